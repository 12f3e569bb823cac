"""bench random: which cells, in which order; the verdict on made-up records; a dry run on the CPU,
and on a GPU the real thing."""

import json
import math
from collections import Counter

import pytest
import torch

from bench import bench_random, fit, results, table, unseen, verdict
from sparsekern.backends.cuda import tuned_tables
from sparsekern.profiling import tune

ENV = {
    "schema": 1,
    "time": "2026-01-01T00:00:00Z",
    "git": "a" * 40,
    "dirty": False,
    "gpu": "GPU X",
    "torch": "2.9",
    "check": "exact",
}


def kind(tokens):
    return next(i for i, (first, last) in enumerate(unseen.CLASSES) if first <= tokens <= last)


# ---- the cells -----------------------------------------------------------------------------------


def test_every_shape_has_a_number_of_tokens_of_each_class():
    jobs = unseen.jobs()
    cells = [(shape[2:], point.tokens) for shape, points in jobs for point in points]
    assert len(cells) == 480 and len({size for size, _ in cells}) == 120
    by_shape = {}
    for size, tokens in cells:
        by_shape.setdefault(size, []).append(kind(tokens))
    assert all(sorted(kinds) == [0, 1, 2, 3] for kinds in by_shape.values())
    assert not {*by_shape} & (unseen.tabled() | {*tune.SHAPES})
    assert all(64 <= out <= 60000 and 64 <= into <= 30000 for out, into in by_shape)
    assert sum(into % 64 != 0 for _, into in by_shape) > 40, "not only multiples of 64"
    assert jobs == unseen.jobs() != unseen.jobs(seed=20)


def test_shapes_may_be_held_small():
    sizes = [shape[2:] for shape, _ in unseen.jobs(60, seed=1, most=(2048, 512))]
    assert max(out for out, _ in sizes) in range(1024, 2049)
    assert max(into for _, into in sizes) in range(256, 513)


def test_the_first_half_has_every_shape_once_and_all_classes_alike():
    first = unseen.jobs()[:120]
    assert len({shape for shape, _ in first}) == 120
    counts = Counter(kind(point.tokens) for _, points in first for point in points)
    assert min(counts.values()) > 45
    assert all(kind(few.tokens) < 2 <= kind(many.tokens) for _, (few, many) in first)


def test_one_cell_in_eight_of_each_class_is_swept():
    points = [point for _, points in unseen.jobs() for point in points]
    assert Counter(kind(p.tokens) for p in points if p.swept) == dict.fromkeys(range(4), 15)
    assert not any(p.swept for _, points in unseen.jobs(every=0) for p in points)


def test_shards_share_the_cells():
    whole, parts = unseen.jobs(), [unseen.jobs(shard=(i, 2)) for i in (1, 2)]
    assert sorted([*parts[0], *parts[1]]) == sorted(whole)
    for part in parts:
        odd = sum(shape.in_features % 64 != 0 for shape, _ in part)
        assert 0.35 < odd / len(part) < 0.65, "both have shapes of both sorts"


def test_shapes_of_a_table_are_left_out(tmp_path, monkeypatch):
    first = unseen.shapes(3)
    monkeypatch.setattr(tuned_tables, "TABLES", tmp_path)
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "user"))
    tuned_tables.store(tmp_path / "t.json", "G", "int8", first[0], {1: ("decode a", 1.0)})
    tuned_tables.store(tuned_tables.user_path(), "G", "int8", first[2], {1: ("decode a", 1.0)})
    assert unseen.shapes(3)[0] == first[1] and not {first[0], first[2]} & {*unseen.shapes(3)}


# ---- the verdict ---------------------------------------------------------------------------------


def cell(shape, tokens, ratio, campaign="c", **more):
    """Records of one cell: ours in 10 us, dense in `ratio` times that."""
    out_features, in_features = map(int, shape.split("x"))
    case = dict(out_features=out_features, in_features=in_features, tokens=tokens)
    common = {**ENV, **case, "dtype": "bfloat16", "op": verdict.OP, "campaign": campaign, **more}
    return [
        {**common, "id": f"{shape}{tokens}{name}", "backend": name, "us": {"p50": us}, "config": c}
        for name, us, c in (("cuda", 10.0, "mma 64x8"), ("dense", 10.0 * ratio, ""))
    ]


def pick(shape, tokens, regret, campaign="c"):
    entry = cell(shape, tokens, 1.0, campaign)[0]
    del entry["us"]
    return {**entry, "op": verdict.PICK, "metrics": {"regret": regret}}


def test_a_verdict_that_is_met():
    records = [r for i in range(1, 300) for r in cell(f"{64 * i}x2048", 1 + i % 8192, 1.5)]
    records += cell("64x64", 1, 0.5)
    records += [pick("64x2048", n, 0.02) for n in (1, 2)] + [pick("64x2048", 4, 0.08)]
    found = verdict.judge(records)
    assert len(found.cells) == 300 and [c.shape for c, _ in found.lost] == ["64x64"]
    assert found.far == [], "8 KiB of weights"
    assert [p.met for p in found.promises()] == [True] * 5
    assert found.promises()[0].found == "300, 300 cells"
    assert "1 of 300 (0.3%)" in found.promises()[1].found
    assert "0; and 1 with small weights" in found.promises()[2].found
    assert [p.found for p in found.promises()[3:]] == ["4.0% in 3 cells", "8.0% in 3 cells"]


def test_a_verdict_that_is_not():
    records = [
        *cell("512x256", 1, 0.89),  # 256 KiB
        *cell("512x252", 1, 0.89),
        *cell("1152x6912", 100, 0.78),
        *cell("8192x640", 600, 0.979),
        *cell("8192x640", 17, 0.98),
        *cell("8192x640", 2, 2.0),
        pick("512x256", 1, 0.2),
        pick("512x256", 2, 0.0),
    ]
    found = verdict.judge(records)
    assert [ratio for _, ratio in found.lost] == pytest.approx([0.78, 0.89, 0.89, 0.979])
    assert [c.shape for c, _ in found.far] == ["1152x6912", "512x256"]
    assert [p.met for p in found.promises()] == [False] * 5
    means = [results.geometric_mean(c.ratios) for c in found.classes]
    assert means == pytest.approx([(0.89 * 0.89 * 2.0) ** (1 / 3), 0.98, 0.78, 0.979])
    lines = found.lines()
    assert lines[0] == "4 of 6 cells below 0.98 x cuBLAS"
    assert lines[1] == "  0.780 x cuBLAS: 1152x6912, 100 tokens, bfloat16, mma 64x8"
    assert sum(line.startswith("NOT MET") for line in lines) == 5


def test_exactly_one_percent_is_too_many():
    records = [r for i in range(1, 100) for r in cell(f"{64 * i}x2048", 16, 1.5)]
    records += cell("64x4096", 16, 0.97)
    found = verdict.judge(records)
    assert [p.met for p in found.promises()] == [False, False, True, None], "nor 100 shapes enough"


def test_the_newest_campaign_counts_whole():
    old = [r for n in range(1, 9) for r in cell("640x2048", n, 0.5, "old")]
    found = verdict.judge([*old, pick("8x8", 1, 0.9, "old"), *cell("640x2048", 1, 1.2, "new")])
    assert found.campaign == "new" and len(found.cells) == 1 and found.regrets == []
    whole = [r for n in range(1, 121) for r in cell(f"{8 * n}x2048", 1, 1.0, "whole")]
    assert verdict.judge([*old, *whole, *old]).campaign == "whole", "a sample decides nothing"
    assert verdict.judge([]) is None
    alone = cell("640x2048", 1, 1.0)[:1]
    assert verdict.judge(alone) is None, "without dense there is no ratio"


def test_the_section_has_losses_first_and_says_when_there_is_nothing():
    records = [*cell("1152x6912", 100, 0.78), *cell("64x64", 1, 0.9), *cell("640x2048", 9, 2.0)]
    text = verdict.section([*records, pick("64x64", 1, 0.01)])
    title = "**Linear layers of random shapes**, GPU X, git aaaaaaaaaa: 3 cells of 3 shapes"
    assert text.startswith(title)
    assert text.index("| 1152x6912 | 100 | 15552 | mma 64x8 | 0.780 |") < text.index("geometric")
    assert text.index("| 1152x6912") < text.index("| 64x64 | 1 | 8 | mma 64x8 | 0.900 |")
    assert f"| 1 to 16 | 2 | {math.sqrt(0.9 * 2.0):.2f} | 0.90 | 1 | 1 |" in text
    assert text.count("NOT MET") == 3 and text.count("| met |") == 2
    dirty = [{**r, "dirty": True} for r in records]
    assert verdict.NOTHING in verdict.section(dirty) and verdict.NOTHING in verdict.section([])
    assert "random" not in table.render(records), "they are in no other table"


def test_layers_of_llama_against_cusparselt():
    def timed(shape, tokens, ratio):
        return [
            {**r, "op": "linear", "backend": r["backend"].replace("dense", "cusparselt")}
            for r in cell(shape, tokens, ratio)
        ]

    records = [
        *timed("4096x4096", 1024, 1.2),
        *timed("8192x28672", 8192, 0.96),
        *timed("8192x8192", 512, 0.98),
        *timed("640x2048", 1024, 0.5),  # no layer of those models
        *timed("4096x4096", 16, 0.5),  # nothing is promised there
    ]
    many, few = verdict.against_cusparselt(results.cells(records))
    mean = math.sqrt(1.2 * 0.96)
    assert many.found == f"{mean:.3f} in 2 cells, worst 0.960 (8192x28672, 8192), 1 below 0.97"
    assert (many.met, few.met) == (False, True) and few.text.startswith("65 to 512 tokens")
    assert "| GPU X | 65 to 512 tokens: no cell below 0.97 |" in verdict.section(records)
    assert verdict.against_cusparselt([]) == []


# ---- the runs ------------------------------------------------------------------------------------


def test_a_cell_at_the_power_limit_settles_first():
    case = dict(tokens=8192, out_features=8192, in_features=8192)
    rule = bench_random.stop_rule(case, 0.1)
    assert (rule.settle_s, rule.min_s) == (bench_random.SETTLE_S, bench_random.SUSTAINED_S)
    rule = bench_random.stop_rule({**case, "tokens": 1}, 0.1)
    assert (rule.settle_s, rule.min_s, rule.budget_s) == (0.0, 0.1, 0.1)


DRY = "--device cpu --providers cpu,dense --most 4e5 --seconds 0.001 --shapes 30 --campaign c"


def test_dry_run(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    assert bench_random.main(path, DRY.split()) == 0
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found and {e["op"] for e in found} == {verdict.OP}
    assert [e["backend"] for e in found] == ["cpu", "dense"] * (len(found) // 2)
    assert {e["check"] for e in found if e["backend"] == "cpu"} == {"exact+bounded"}
    assert all(e["tokens"] * e["out_features"] * e["in_features"] <= 4e5 for e in found)
    out = capsys.readouterr().out
    assert f"of {len(found) // 2} cells below 0.98 x cuBLAS" in out and "open: the pick's" in out
    assert bench_random.main(path, DRY.split()) == 0
    assert len(path.read_text().splitlines()) == len(found), "of this campaign nothing is left"


def test_a_wrong_result_fails_the_run(tmp_path, capsys, monkeypatch):
    from bench import layers

    monkeypatch.setattr(layers.ops, "linear", lambda x, w24, **_: x.new_zeros(len(x), w24.shape[0]))
    assert bench_random.main(tmp_path / "r.jsonl", DRY.split()) == 1
    out = capsys.readouterr().out
    assert "FAILED " in out and "cpu is wrong in" in out and "nothing was measured" in out


def test_nothing_begins_when_the_time_is_up(tmp_path, capsys):
    assert bench_random.main(tmp_path / "r.jsonl", [*DRY.split(), "--budget", "0"]) == 0
    assert "cells were not reached in the budget" in capsys.readouterr().out


class FakeLayer:
    """Stands for tune.Layer: two variants, of which the heuristics take the slower one."""

    def __init__(self, out_features, in_features, dtype, device):
        assert dtype == torch.bfloat16

    def warm_up(self):
        pass

    def names(self, tokens):
        return ["split 128x64, 2 parts", "split 128x64, 3 parts"]

    def cell(self, tokens):
        from python_tests.profiling.fakes import Fakes

        slow, fast = self.names(tokens)
        return Fakes(dense=9.0, **{slow: 5.0, fast: 4.0})


def test_a_swept_cell_is_a_record_and_a_line_for_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "Layer", FakeLayer)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuned_tables, "gpu_name", lambda index: "G")
    run = bench_random.Run(
        tmp_path / "r.jsonl", bench_random.make_parser().parse_args(["--device", "cpu"])
    )
    case, log = dict(out_features=640, in_features=2048, tokens=100, dtype="bfloat16"), []
    bench_random._sweep(run, case, tmp_path / "log.jsonl", log)
    (entry,) = run.records
    assert log == [] and entry["op"] == verdict.PICK and entry["config"] == "split 128x64, 2 parts"
    assert entry["metrics"] == {
        "regret": 0.25,
        "us": 5.0,
        "best_us": 4.0,
        "best": "split 128x64, 3 parts",
        "variants": 2,
    }
    (read,) = fit.read([tmp_path / "log.jsonl"])
    assert (read.shape, read.tokens, read.best) == ((640, 2048), 100, 4.0)
    assert fit.main([str(tmp_path / "log.jsonl"), "--check"]) == 0


@pytest.mark.gpu
def test_random_shapes_on_a_gpu(tmp_path, capsys):
    from sparsekern.backends.cuda import linear as cuda_backend

    if reason := cuda_backend.hopper_refusal(torch.cuda.current_device()):
        pytest.skip(reason)
    path, log = tmp_path / "r.jsonl", tmp_path / "log.jsonl"
    arguments = "--shapes 4 --every 2 --most 2e9 --seconds 0.02 --budget 1e9"
    assert bench_random.main(path, [*arguments.split(), "--log", str(log)]) == 0
    found = [json.loads(line) for line in path.read_text().splitlines()]
    picks = [e for e in found if e["op"] == verdict.PICK]
    assert {e["backend"] for e in found if e["op"] == verdict.OP} == {"cuda", "dense"}
    assert picks and len(log.read_text().splitlines()) == len(picks)
    assert all(e["metrics"]["regret"] >= 0 and e["metrics"]["variants"] > 1 for e in picks)
    assert all(not e["config"].startswith("cuda") for e in picks)
    assert "geometric mean" in capsys.readouterr().out
