"""The quality benchmark, whole, on a tiny GGUF on the CPU."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gguf", reason="needs gguf")
pytest.importorskip("transformers", reason="needs transformers")
from bench import bench_quality
from python_tests.clock import patiently
from python_tests.integrations import gguf_cases as cases
from python_tests.oneshot.driver_models import build, tokens

WORDS = "the and then an hand 12 than these 34 a band stand other that is all there is to say "


def options(tmp_path, *more):
    model = tmp_path / "tiny.gguf"
    cases.write_gguf(model, cases.gguf_tensors(cases.tiny_llama()), cases.metadata())
    train, test = tmp_path / "a.txt", tmp_path / "test.txt"
    train.write_text("\n".join(WORDS[i:] for i in range(60)))
    test.write_text("\n".join(WORDS[::2] for _ in range(12)))
    given = ["--gguf", model, "--calibration", train, "--test", test, "--window", 32]
    given += ["--samples", 6, "--batch-size", 2, "--device", "cpu", "--out", tmp_path / "r.jsonl"]
    return [str(option) for option in [*given, *more]]


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]


def test_a_row_per_run_and_seed(tmp_path, monkeypatch, capsys):
    short = {**bench_quality.PARTS, "span": {"reconstruct": {"span": None, "epochs": 2}}}
    monkeypatch.setattr(bench_quality, "PARTS", short)
    arguments = options(tmp_path, "--runs", "fast,span", "--seeds", 2)
    assert bench_quality.main(tmp_path / "r.jsonl", arguments) == 0
    rows = records(tmp_path)
    names = [(row["backend"], row["seed"]) for row in rows]
    assert names == [("fast", 0), ("span", 0), ("fast", 1), ("span", 1)]
    assert len({row["case"] for row in rows}) == 4
    assert rows[1]["details"]["fits"][0]["epochs"] == 2
    assert all(row["metrics"]["perplexity"] > 1 for row in rows)
    assert "over 2 seeds" in capsys.readouterr().out


def test_methods_and_permutations_are_rows(tmp_path):
    arguments = options(tmp_path, "--runs", "admm,permute,permute+admm")
    assert bench_quality.main(tmp_path / "r.jsonl", arguments) == 0
    rows = records(tmp_path)
    assert [row["details"]["method"] for row in rows] == ["admm", "sparsegpt", "admm"]
    assert len({row["metrics"]["perplexity"] for row in rows}) == 3
    assert all(row["check"].startswith("14 layers have two of four") for row in rows)


@pytest.mark.parametrize("family, rotates", [("llama", True), ("gemma3", False)])
def test_a_time_for_a_rotation_is_none_for_a_model_that_has_none(family, rotates):
    """With a time it is asked for by hand, and refused; the preset by itself leaves it out."""
    table = bench_quality.Table.__new__(bench_quality.Table)
    table.model, table.run = build(family), SimpleNamespace(say=lambda text: None)
    table.train, table.window = tokens(4)[0].repeat(4), 20
    table.end, table.evaluation = time.perf_counter() + 60, 1.0
    limited = table.limited({"preset": "best"})
    assert ("rotate" in limited) == rotates and limited["reconstruct"][0].seconds > 1


def test_a_row_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    """explore: one pruned start; a wrong row is a line of the table and exit code 1."""
    rows = {
        "span": (0, "start", bench_quality._with(bench_quality.SPAN, epochs=1)),
        "wrong": (0, "prune", {"reconstruct": {"span": 0}}),
        "again": (0, "prune", {"reconstruct": {"span": 1, "epochs": 1}}),
    }
    monkeypatch.setattr(bench_quality, "EXPLORE", rows)
    arguments = options(tmp_path, "--explore")
    assert bench_quality.main(tmp_path / "r.jsonl", arguments) == 1
    assert [row["backend"] for row in records(tmp_path)] == ["reconstruct", "span", "again"]
    out = capsys.readouterr().out
    assert "FAILED wrong, seed 0: ValueError" in out and "wrong" in out.splitlines()[-3]


def test_the_matrix(tmp_path):
    """Each calibration on each held-out tail, and the blend."""
    other = tmp_path / "b.txt"
    other.write_text("\n".join(WORDS[::-1][i:] for i in range(60)))
    arguments = options(tmp_path, "--matrix", f"{tmp_path / 'a.txt'},{other}", "--tail", 400)
    assert bench_quality.main(tmp_path / "r.jsonl", arguments) == 0
    rows = records(tmp_path)
    assert [row["backend"] for row in rows] == ["a.txt", "b.txt", "blend"]
    for row in rows:
        assert {"perplexity a.txt", "perplexity b.txt", "perplexity test.txt"} < set(row["metrics"])
        assert 0 <= row["details"]["distance"]["a.txt"] <= 1
    assert rows[0]["details"]["distance"]["a.txt"] < rows[0]["details"]["distance"]["b.txt"] + 0.1


def test_every_row_of_explore_is_valid():
    from sparsekern.oneshot.rounds import as_rounds

    for name, (seconds, kind, what) in bench_quality.EXPLORE.items():
        assert kind in ("start", "prune") and 0 < seconds < 120, name
        rounds = what if kind == "start" else what.get("reconstruct")
        assert as_rounds(rounds) or "rotate" in what, name


def test_parts_of_a_run():
    best = bench_quality.options_of("best+permute+admm")
    assert best == {"preset": "best", "permute": True, "method": "admm"}
    assert bench_quality.options_of("rotate+span") == {
        "rotate": True,
        "reconstruct": bench_quality.SPAN,
    }


def test_skip_rules_are_drawn_or_taken_as_they_are():
    model = cases.tiny_llama()
    assert bench_quality.skip_rules(model, "rule-of-thumb") == "rule-of-thumb"
    drawn = bench_quality.skip_rules(model, "random:0.3:5")
    assert drawn == bench_quality.skip_rules(model, "random:0.3:5")
    assert drawn != bench_quality.skip_rules(model, "random:0.3:6") and drawn[0] == "lm_head"
    sizes = {
        n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    share = sum(sizes[name] for name in drawn[1:]) / (sum(sizes.values()) - sizes["lm_head"])
    assert 0.2 < share <= 0.3


def test_compile_is_for_rounds_after_the_walk(tmp_path, monkeypatch):
    seen = []
    real = bench_quality.sparsekern.prune_model

    def prune(model, method, ids, **options):
        seen.append([(r.span, r.compile, r.seed) for r in options.pop("reconstruct")])
        return real(model, method, ids, **options, reconstruct=())

    monkeypatch.setattr(bench_quality.sparsekern, "prune_model", prune)
    arguments = options(tmp_path, "--runs", "default+compile,span+compile", "--seeds", 2)
    assert bench_quality.main(tmp_path / "r.jsonl", arguments) == 0
    assert seen == [[row] for seed in (0, 1) for row in ((1, False, seed), (None, True, seed))]


def test_unknown_runs_and_starts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected --start without rotation, got 'rotate"):
        bench_quality.main(tmp_path / "r.jsonl", ["--gguf", "n.gguf", "--start", "rotate+admm"])
    with pytest.raises(ValueError, match="expected runs in .*'fastest'"):
        bench_quality.main(tmp_path / "r.jsonl", ["--gguf", "none.gguf", "--runs", "fastest"])


def test_a_row_ends_in_its_time_with_what_it_has(tmp_path, monkeypatch, capsys):
    """Rounds and a rotation that would never end: the row is recorded, and says so."""
    from sparsekern import Reconstruction
    from sparsekern.oneshot import presets

    rounds = (
        Reconstruction(span=1, epochs=10**6),
        Reconstruction(span=None, epochs=10**6, between=1.0, recut=True, batch=2),
    )
    long = presets.Preset("", rotate=True, rounds=rounds, samples=6, side_by_side=True)
    monkeypatch.setitem(presets.PRESETS, "best", long)

    def attempt(seconds):
        (tmp_path / "r.jsonl").unlink(missing_ok=True)
        arguments = options(tmp_path, "--runs", "best,fast", "--row-seconds", seconds)
        assert bench_quality.main(tmp_path / "r.jsonl", arguments) == 0
        row, fast = records(tmp_path)
        assert (row["backend"], fast["backend"]) == ("best", "fast")
        assert all(fit["stopped"] for fit in row["details"]["fits"])
        assert row["metrics"]["seconds"] < seconds

    patiently(attempt, 15, 60, 240)
    out = capsys.readouterr().out
    assert "phase best: prune_model: " in out and "out of time" in out and "rotated in" in out


def test_a_row_that_hangs_is_a_record(tmp_path):
    """No exception reaches it: the process ends after the budget."""
    script = tmp_path / "child.py"
    script.write_text(
        "import sys, time\nfrom bench import bench_quality as b\nb.LATE = 1.0\n"
        "def hang(*a, **k):\n    b.signal.setitimer(b.signal.ITIMER_REAL, 0)\n    time.sleep(1e4)\n"
        "b.sparsekern.prune_model = hang\nb.main(sys.argv[1], sys.argv[2:])\n"
    )
    arguments = options(tmp_path, "--runs", "best", "--budget", 30)
    command = [sys.executable, str(script), str(tmp_path / "r.jsonl"), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 3, done.stderr[-2000:]
    (row,) = records(tmp_path)
    assert row["op"] == "quality_stopped" and row["details"]["phase"] == "best: prune_model"
