"""One cell of sparsekern tune: which variant wins, which are refused, and who runs how often."""

from dataclasses import replace

import pytest

from python_tests.profiling.fakes import Clock, Fakes
from sparsekern.profiling import rounds, tune_cell
from sparsekern.profiling.timer import StopRule


def run(fakes, clock=None, **options):
    clock = clock or fakes.clock or (lambda: 0.0)
    return tune_cell.tune_cell(
        8, fakes.names, fakes.sampler, fakes.wrong, clock, dense=fakes.dense, **options
    )


def test_the_fastest_wins_and_the_gap_of_the_heuristics_is_told():
    cell = run(Fakes(h=4.0, a=5.0, b=3.2))
    assert (cell.best, cell.us, cell.heuristic) == ("b", 3.2, "h")
    assert cell.heuristic_us == pytest.approx(4.0) and cell.gap == pytest.approx(0.25)
    assert str(cell) == "8 tokens: b 3.20 us; heuristics: h, 25.0% slower"


def test_the_choice_of_the_heuristics_may_be_the_best():
    cell = run(Fakes(h=3.0, a=5.0))
    assert cell.best == cell.heuristic == "h" and cell.gap == 0
    assert str(cell) == "8 tokens: h 3.00 us; heuristics: the same"


def test_a_wrong_result_is_refused_and_reported():
    fakes = Fakes(h=4.0, a=3.0, b=3.5, c=9.0, wrong=["a"])
    cell = run(fakes)
    assert cell.best == "b" and cell.refused == {"a": "3 of 9 elements are wrong"}
    assert fakes.checked == ["a", "b", "h"], "nothing may win unchecked, c cannot"
    assert str(cell).endswith("REFUSED a: 3 of 9 elements are wrong")


def test_the_choice_of_the_heuristics_may_be_wrong():
    cell = run(Fakes(h=3.0, a=3.5, wrong=["h"]))
    assert (cell.best, cell.heuristic, cell.heuristic_us) == ("a", "h", 3.0)
    assert set(cell.refused) == {"h"} and cell.gap < 0


def test_nothing_wins_when_everything_is_wrong_or_fails():
    assert run(Fakes(h=4.0, a=3.0, wrong=["h", "a"])) is None
    assert run(Fakes(h=RuntimeError("no tile"), a=RuntimeError("no tile"), dense=1.0)) is None
    assert run(Fakes(h=[4.0, RuntimeError("gone")], dense=1.0)) is None


def test_one_that_fails_is_refused():
    gone = RuntimeError("gone")
    cell = run(Fakes(h=4.0, a=gone, b=[3.0, 3.0, gone], c=3.5))
    assert cell.best == "c"
    assert cell.refused == dict.fromkeys("ab", "RuntimeError: gone")

    fakes = Fakes(h=4.0, a=3.0)
    plain = fakes.sampler

    def sampler(name):
        if name == "a":
            raise MemoryError("no room for the graph")
        return plain(name)

    fakes.sampler = sampler
    cell = run(fakes)
    assert cell.best == "h" and cell.refused == {"a": "MemoryError: no room for the graph"}


def test_slow_variants_are_sampled_twice():
    fakes = Fakes(h=4.0, a=3.0, b=3.8, c=3.95)
    run(fakes)
    assert fakes.samples["c"] == 2, "1.3 x the best is 3.9"
    assert fakes.samples["h"] == 2 + rounds.EARLY_ROUNDS, "the choice of the heuristics takes part"
    assert fakes.samples["b"] == 2 + rounds.EARLY_ROUNDS
    assert fakes.samples["a"] == 2 + rounds.SHORT.min_rounds


def test_one_long_sample_takes_nobody_out():
    """As where something else kept the CPU busy."""
    cell = run(Fakes(h=4.0, a=[6.0, 3.0], b=[3.5, 9.0, 3.5], c=[8.0, 7.0]))
    assert cell.best == "a" and cell.times["c"] == 7.0
    assert cell.times["b"] == pytest.approx(3.5)


def test_only_a_few_are_sampled_to_the_end():
    us = {f"v{i}": 10.0 + 0.1 * i for i in range(12)}
    fakes = Fakes(h=100.0, **us)
    run(fakes)
    often = [name for name, count in fakes.samples.items() if count > 2]
    assert often == ["h", *list(us)[: tune_cell.FINALISTS]]


def test_the_ratios_decide_not_a_lucky_sample():
    cell = run(Fakes(h=[3.0], a=[3.1, 1.0, 3.5]))
    assert cell.best == "h"


def test_among_equals_the_choice_of_the_heuristics_stays():
    cell = run(Fakes(a=[5.0, 5.1, 4.9, 5.0], h=[5.0, 4.9, 5.1, 5.0]))
    assert cell.best == "a"


def test_the_last_rounds_are_those_of_the_rule():
    clock = Clock()
    fakes = Fakes(clock, h=[7000.0, 7000.0, 7090.0] * 20, a=[7000.0, 7090.0, 7000.0] * 20)
    run(fakes, rule=StopRule(0.002, min_rounds=6, max_rounds=60, budget_s=0.1))
    assert fakes.samples == {"h": 2 + 8, "a": 2 + 8}, "0.1 s are over after 8 rounds of 14.1 ms"


def test_a_variant_that_is_fast_until_the_power_limit_shows_does_not_win():
    us = {"h": 4000.0, "a": [3000.0] * 60 + [5000.0]}
    rule = replace(rounds.SUSTAINED, settle_s=0.2, turn_s=0.06)
    cell = run(Fakes(Clock(), **us), rule=rule)
    assert cell.best == "h" and cell.heuristic_us == 4000.0
    assert run(Fakes(Clock(), **us), rule=rounds.SHORT).best == "a", "without load it would"


def test_the_first_samples_follow_load_where_the_rule_says_so():
    """What the limit does to the clock it has done before anybody is compared."""
    us = dict(h=[2000.0] * 20 + [4400.0], a=4500.0, b=[3000.0] * 10 + [6000.0])
    fakes = Fakes(Clock(), **us)
    cell = run(fakes, rule=replace(rounds.SUSTAINED, turn_s=0.0))
    assert cell.best == "h" and set(cell.times) == {"h", "a", "b"}
    assert cell.times["b"] == 6000.0 and cell.times["a"] == pytest.approx(4500.0)
    assert fakes.samples["h"] > 20 + rounds.SUSTAINED.min_rounds


def test_screening_stops_when_its_time_is_used_up():
    clock, fakes = Clock(), Fakes(h=4.0, a=4.0, b=4.0, c=1.0)
    plain = fakes.sampler

    def sampler(name):
        clock.now += 0.15  # to capture its graph
        return plain(name)

    fakes.sampler = sampler
    cell = run(fakes, clock)
    assert fakes.samples["c"] == 0 and fakes.samples["b"] > 0 and cell.best != "c"


# ---- dense ---------------------------------------------------------------------------------------


def test_dense_is_measured_beside_and_never_chosen():
    cell = run(Fakes(h=4.0, a=3.2, dense=3.0))
    assert cell.best == "a" and cell.dense_us == pytest.approx(3.0)
    assert set(cell.times) == {"h", "a"}
    assert str(cell) == "8 tokens: a 3.20 us; heuristics: h, 25.0% slower; 0.94 x dense"
    assert str(run(Fakes(h=2.0, dense=3.0))).endswith("heuristics: the same; 1.50 x dense")


def test_a_dense_product_that_fails_is_told():
    cell = run(Fakes(h=4.0, a=3.2, dense=RuntimeError("no memory")))
    assert cell.best == "a" and cell.dense_us is None
    assert cell.refused == {"dense": "RuntimeError: no memory"}
