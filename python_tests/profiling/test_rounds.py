"""Measuring in turns: who wins under noise, drift and throttling, who leaves, and when it ends."""

import itertools
import random
from dataclasses import replace

import pytest

from sparsekern.profiling import rounds, timer
from sparsekern.profiling.rounds import contest, interval

RULE = timer.StopRule(0.002, min_rounds=6, max_rounds=60, budget_s=1.0)


class Machine:
    """A clock that moves only while a fake candidate runs: {name: us}, times `slower(seconds)`.

    noise: share of a time by which it is off, drawn anew for each sample. limits: {name: how much
    slower it gets} after the candidates have run for `limit_s` on end.
    """

    def __init__(self, noise=0.0, slower=lambda now: 1.0, limits=None, limit_s=0.0, seed=0, **us):
        self.us, self.noise, self.slower, self.now = us, noise, slower, 0.0
        self.limits, self.limit_s = limits or {}, limit_s
        self.random, self.order = random.Random(seed), []

    def clock(self):
        return self.now

    def sampler(self, name):
        def sample():
            us = self.us[name]
            if isinstance(us, Exception):
                raise us
            us *= self.slower(self.now) * (1 + self.noise * self.random.uniform(-1, 1))
            us *= self.limits.get(name, 1.0) if self.now >= self.limit_s else 1.0
            self.now += us * 1e-6
            self.order.append(name)
            return us

        return sample

    def contest(self, rule=RULE, **options):
        samplers = {name: self.sampler(name) for name in self.us}
        return contest(samplers, rule, clock=self.clock, **options)


# ---- the interval --------------------------------------------------------------------------------


def test_an_interval_is_of_the_order_statistics():
    assert interval([3.0, 1.0, 2.0]) == (0.0, 2.0, float("inf")), "three tell nothing"
    assert interval([6, 5, 4, 3, 2, 1]) == (1, 3.5, 6), "six: 1 in 64 that all are on one side"
    assert interval(range(1, 12)) == (1, 6, 11), "eleven: (1 + 11) / 2048 > (6 / 11)^2 / 64"
    assert interval(range(1, 13)) == (2, 6.5, 11), "twelve: (1 + 12) / 4096 < (6 / 12)^2 / 64"


def test_an_interval_holds_the_median_as_often_as_it_says():
    draw, outside = random.Random(7), 0
    for _ in range(2000):
        low, _, high = interval([draw.expovariate(1.0) for _ in range(12)])
        outside += not low <= 0.6931471805599453 <= high
    assert 0 < outside / 2000 <= 2 * rounds.RISK / 4


def test_of_many_the_rank_is_that_of_the_normal_distribution():
    exact = rounds._outer(200)
    assert abs(rounds._outer(201) - exact) <= 1
    assert 0 < 1000 - rounds._outer(2001) < 6 * 2001**0.5 / 2


# ---- who wins ------------------------------------------------------------------------------------


def test_the_fastest_wins_in_the_fewest_rounds():
    machine = Machine(a=4.0, b=3.0, c=3.9)
    standing = machine.contest()
    assert standing.best == "b" and standing.decided
    assert standing.us == pytest.approx({"a": 4.0, "b": 3.0, "c": 3.9})
    assert len(standing.values["b"]) == 6 and machine.order.count("c") == rounds.EARLY_ROUNDS


def test_among_equals_the_first_one_stays():
    """Sixty looks at two that are as fast: what is known beyond the noise is seldom wrong."""
    best = [Machine(noise=0.03, seed=seed, a=5.0, b=5.0).contest().best for seed in range(100)]
    assert 0 < best.count("b") < 6


@pytest.mark.parametrize("seed", range(4))
def test_one_percent_is_found_under_three_percent_of_noise(seed):
    us = dict(a=5.0, b=4.95, c=5.05)
    standing = Machine(noise=0.03, seed=seed, **us).contest(replace(RULE, max_rounds=400))
    assert standing.best == "b"


def test_a_gain_that_is_not_worth_it_changes_nothing():
    standing = Machine(a=5.0, b=4.995, c=6.0).contest(replace(RULE, standard_error=0.02))
    assert standing.best == "b", "beyond the noise is beyond the noise"
    standing = Machine(noise=0.004, a=5.0, b=5.0).contest(replace(RULE, standard_error=0.02))
    assert standing.decided and len(standing.values["a"]) == 6


def test_drift_moves_all_alike():
    """The clock falls by 25 % while the candidates are measured: medians of times alone would be
    those of different clocks, ratios within a round are not."""
    machine = Machine(slower=lambda now: 1 + 1e3 * now, a=5.0, b=4.9, c=5.1)
    standing = machine.contest(replace(RULE, min_rounds=24))
    assert standing.best == "b" and machine.now > 2.5e-4
    assert standing.ratio("a", "b").middle == pytest.approx(5.0 / 4.9, rel=0.01)


def test_a_step_of_the_clock_in_the_middle_changes_nothing():
    machine = Machine(slower=lambda now: 1.4 if now > 4e-5 else 1.0, a=5.0, b=4.8)
    standing = machine.contest()
    assert standing.best == "b" and standing.ratio("a", "b").middle == pytest.approx(5 / 4.8)


def test_the_power_limit_shows_after_it_has_settled():
    """a is faster until the GPU has run for 0.2 s; then it is the slower one."""
    us, limits = dict(a=3000.0, b=3500.0), {"a": 1.5}
    machine = Machine(limits=limits, limit_s=0.2, **us)
    assert machine.contest(replace(RULE, budget_s=0.05)).best == "a"
    machine = Machine(limits=limits, limit_s=0.2, **us)
    standing = machine.contest(replace(RULE, settle_s=0.25))
    assert standing.best == "b" and standing.us["a"] == pytest.approx(4500.0)


def test_the_later_half_of_a_turn_counts():
    """Each turn begins at the clock that the one before has left: fast, then as it is."""
    began, last = {}, [None]

    def warm(name, now):
        if last[0] != name:
            last[0], began[name] = name, now
        return 0.5 if now - began[name] < 0.02 else 1.0

    machine = Machine(a=1000.0, b=990.0)
    plain = machine.sampler

    def sampler(name):
        sample = plain(name)
        return lambda: sample() * warm(name, machine.now)

    samplers = {name: sampler(name) for name in machine.us}
    rule = replace(RULE, turn_s=0.06, budget_s=10.0)
    standing = contest(samplers, rule, clock=machine.clock)
    assert standing.best == "b" and standing.us == pytest.approx({"a": 1000.0, "b": 990.0})


# ---- who leaves, and when it ends ----------------------------------------------------------------


def test_the_order_is_balanced():
    machine = Machine(a=5.0, b=5.0, c=5.0)
    machine.contest(replace(RULE, min_rounds=12, max_rounds=12))
    taken = ["".join(machine.order[i : i + 3]) for i in range(0, 36, 3)]
    assert taken[:6] == ["abc", "cba", "bca", "acb", "cab", "bac"] and taken[6:] == taken[:6]
    machine = Machine(a=5.0, b=5.0)
    machine.contest(replace(RULE, min_rounds=8, max_rounds=8))
    firsts = machine.order[::2]
    assert firsts.count("a") == firsts.count("b") == 4


def test_far_ones_leave_early_and_slower_ones_when_it_is_known():
    machine = Machine(noise=0.02, seed=1, a=5.0, far=5.5, near=5.1, equal=5.0)
    standing = machine.contest()
    counts = {name: len(values) for name, values in standing.values.items()}
    assert counts["far"] == rounds.EARLY_ROUNDS < counts["near"] < counts["equal"]
    assert counts["equal"] == counts["a"] == 60 and not standing.decided


def test_a_peer_runs_to_the_end_and_never_wins():
    standing = Machine(a=5.0, b=4.0, dense=3.0).contest(peers=("dense",))
    assert standing.best == "b" and standing.decided
    assert standing.us == pytest.approx({"a": 5.0, "b": 4.0, "dense": 3.0})
    standing = Machine(a=5.0, dense=9.0).contest(peers=("dense",))
    assert standing.best == "a" and len(standing.values["dense"]) == 6


def test_one_that_fails_is_out():
    broken = RuntimeError("no such tile")
    standing = Machine(a=5.0, b=broken, c=4.0).contest()
    assert standing.best == "c" and standing.failed == {"b": "RuntimeError: no such tile"}
    assert set(standing.us) == {"a", "c"}
    standing = Machine(a=broken, b=5.0, c=4.0, dense=1.0).contest(peers=("dense",))
    assert standing.best == "c", "the first one failed"
    assert Machine(a=broken, b=broken).contest(replace(RULE, settle_s=0.1)) is None


def test_one_that_fails_later_is_out_from_there():
    machine = Machine(a=4.04, b=4.0, c=4.02)
    plain, left = machine.sampler, itertools.count()

    def sampler(name):
        sample = plain(name)
        return lambda: sample() if name != "b" or next(left) < 8 else 0.0

    samplers = {name: sampler(name) for name in machine.us}
    standing = contest(samplers, replace(RULE, min_rounds=10), clock=machine.clock)
    assert standing.best == "c" and set(standing.us) == {"a", "c"}
    assert standing.failed == {"b": "ValueError: expected a time, got 0.0 us"}


def test_who_left_is_there_when_the_winner_fails():
    machine = Machine(a=5.0, b=4.0, c=4.5)
    plain, left = machine.sampler, itertools.count()

    def sampler(name):
        sample = plain(name)
        return lambda: sample() if name != "b" or next(left) < 4 else float("nan")

    standing = contest({n: sampler(n) for n in machine.us}, RULE, clock=machine.clock)
    assert standing.best == "c" and len(standing.values["a"]) == rounds.EARLY_ROUNDS
    assert not standing.decided


def test_it_ends_when_the_time_is_up():
    machine = Machine(noise=0.05, a=9000.0, b=9000.0)
    standing = machine.contest(replace(RULE, budget_s=0.2))
    assert not standing.decided and 0.2 <= machine.now < 0.3
    machine = Machine(a=5.0, b=9.0)
    machine.contest(replace(RULE, min_s=1e-3, max_rounds=10**6))
    assert machine.now >= 1e-3, "decided long before, but asked to go on"


def test_what_is_sustained_is_measured_for_longer():
    assert rounds.rule(1, 4096, 4096) is rounds.SHORT
    assert rounds.rule(1024, 8192, 8192) is rounds.SUSTAINED
    assert rounds.SUSTAINED.settle_s > 0 and rounds.SUSTAINED.turn_s > 0


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="at least one sampler"):
        contest({})
