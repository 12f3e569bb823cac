"""The benchmark of recovery, whole, on a tiny GGUF on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("gguf", reason="needs gguf")
pytest.importorskip("transformers", reason="needs transformers")
from bench import bench_finetune, recovery_table
from python_tests.clock import patiently
from python_tests.integrations import gguf_cases as cases
from sparsekern.oneshot.presets import PRESETS

WORDS = "the and then an hand 12 than these 34 a band stand other that is all there is to say "


@pytest.fixture
def options(tmp_path):
    model = tmp_path / "tiny.gguf"
    cases.write_gguf(model, cases.gguf_tensors(cases.tiny_llama()), cases.metadata())
    train, other, test = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "test.txt"
    train.write_text("\n".join(WORDS[i:] for i in range(60)))
    other.write_text("\n".join(WORDS[::-1][i:] for i in range(60)))
    test.write_text("\n".join(WORDS[::2] for _ in range(12)))
    found = ["--gguf", model, "--train", f"{train},{other}", "--held-out", other, "--tail", 400]
    found += ["--test", test, "--samples", 4, "--window", 32, "--batch", 4]
    found += ["--teacher-rows", 8, "--teacher-tokens", 256, "--eval-window", 64]
    return [*found, "--device", "cpu", "--out", tmp_path / "records.jsonl"]


def measure(options, *more):
    code = bench_finetune.main(options[-1], [str(option) for option in (*options, *more)])
    file = options[-1]
    lines = file.read_text().splitlines() if file.exists() else []
    return code, [json.loads(line) for line in lines]


def test_a_record_for_each_start(options, tmp_path):
    more = ["--start", "magnitude,sparsegpt", "--steps", 3, "--baseline", "--lr", "1e-3,6e-4"]
    more += ["--weight-decay", 0.1]
    more += ["--work", tmp_path / "work", "--save", tmp_path / "saved", "--cache", tmp_path / "c"]
    code, records = measure(options, *more)
    assert code == 0 and [r["backend"] for r in records] == ["magnitude", "sparsegpt"]
    assert [r["settings"]["lr"] for r in records] == [1e-3, 6e-4]
    for record in records:
        assert record["settings"]["weight_decay"] == 0.1
        assert record["check"].startswith("0 violations, 14 layers")
        metrics, details = record["metrics"], record["details"]
        for name in ("test.txt", "b.txt tail"):
            assert metrics[f"perplexity {name}"] > 1 and metrics[f"start {name}"] > 1
            assert details["overlap"][name]["found"] == 0
        assert record["settings"]["sampled_tokens"] >= 32
        assert metrics["dense_training_tokens_per_s"] > 0 and metrics["tokens"] == 3 * 4 * 32
        assert (tmp_path / "saved" / record["backend"] / "config.json").exists()
    ((case, (header, lines)),) = recovery_table.rows(records).items()
    assert case.startswith("tiny.gguf") and len(header) == 6
    assert [line[0].split(" (")[0] for line in lines] == [
        "dense", "magnitude", "SparseGPT", "ASP", "SparseGPT, then training",
    ]  # fmt: skip
    assert lines[3][-1] == "0.0 M" and lines[4][1] == "KL, weight decay 0.1"
    assert lines[4][2] == f"{metrics['perplexity test.txt']:.2f}"
    # A second call reads text and weights, and starts where the first one did.
    _, again = measure(options, *more[:2], "--steps", 1, "--cache", tmp_path / "c")
    for old, new in zip(records, again[2:], strict=True):
        assert new["settings"]["training_tokens"] == old["settings"]["training_tokens"]
        assert new["metrics"]["start test.txt"] == old["metrics"]["start test.txt"]


def test_best_and_minutes_that_a_limit_shortens(options, monkeypatch):
    rounds = tuple(replace(step, epochs=1) for step in PRESETS["best"].rounds)
    monkeypatch.setitem(PRESETS, "best", replace(PRESETS["best"], rounds=rounds))
    monkeypatch.setattr(bench_finetune.Recovery, "limit", lambda self, share: 3.0)
    code, records = measure(options, "--start", "best", "--minutes", 30)
    assert code == 0 and [r["backend"] for r in records] == ["best"]
    assert records[0]["metrics"]["minutes"] < 0.5
    assert records[0]["settings"]["minutes"] < 0.5


def test_resume_after_the_limit(options, tmp_path, monkeypatch):
    limits = iter([0.2, None])
    monkeypatch.setattr(bench_finetune.Recovery, "limit", lambda self, share: next(limits))
    more = ["--start", "magnitude", "--steps", 60, "--resume", tmp_path / "r", "--cache"]
    assert measure(options, *more, tmp_path / "c") == (0, [])
    assert (tmp_path / "r" / "0-magnitude" / "checkpoint.pt").exists()
    code, (record,) = measure(options, *more, tmp_path / "c")
    assert code == 0 and record["metrics"]["steps"] == 60
    assert len(measure(options, *more, tmp_path / "c")[1]) == 1  # finished: nothing to do


def test_two_processes_make_one_record(options, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += [
        "bench",
        "finetune",
        *map(str, options),
        "--starts",
        "magnitude",
        "--minutes",
        "0.05",
    ]
    command += ["--limit-seconds", "800", "--cache", str(tmp_path / "c")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = [json.loads(line) for line in options[-1].read_text().splitlines()]
    assert record["metrics"]["processes"] == 2 and record["check"].startswith("0 violations")
    assert done.stdout.count("recorded") == 1


def test_unknown_starts_and_counts_are_refused(options):
    for bad in (["--start", "nearest"], ["--start", "magnitude,best", "--minutes", "1,2,3"]):
        with pytest.raises(SystemExit):
            measure(options, *bad)


def child(options, *more):
    """The benchmark as a process of its own, its lines as they come."""
    command = [sys.executable, "-m", "bench", "finetune", *map(str, [*options, *more])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def written(options):
    return [json.loads(line) for line in options[-1].read_text().splitlines()]


def test_a_limit_that_training_is_cut_for(options, tmp_path):
    """Hours are asked for; training has what is left, and the record is there in time."""

    def attempt(limit):
        options[-1].unlink(missing_ok=True)
        begin, more = time.monotonic(), ["--start", "magnitude", "--minutes", 60]
        with child(options, *more, "--limit-seconds", limit) as process:
            try:
                out, _ = process.communicate(timeout=2 * limit)
            finally:
                process.kill()
        assert process.returncode == 0 and time.monotonic() - begin < 1.1 * limit, out
        (record,) = written(options)
        assert record["op"] == "finetune" and record["metrics"]["minutes"] * 60 < 0.9 * limit
        return record, out

    record, out = patiently(attempt, 30, 100, 400)
    phases = record["details"]["phases"]
    assert {"load", "dense evaluation", "sample", "magnitude: prune", "magnitude: train"} < {
        *phases
    }
    windows = record["details"]["windows"]
    # As many of the last as there was time for, one of each text at least.
    assert all(1 <= windows["last"][name] <= count for name, count in windows["all"].items())
    assert max(windows["start"].values()) <= 24
    assert all(f"phase {name}: " in out for name in phases)


def test_sigterm_in_training_ends_with_a_record(options):
    with child(options, "--start", "magnitude", "--minutes", 60) as process:
        for line in process.stdout:
            if "  step " in line:
                process.send_signal(signal.SIGTERM)
                break
        out, _ = process.communicate(timeout=900)
    stopped, record = written(options)
    assert stopped["op"] == "finetune_stopped" and stopped["details"]["why"] == "SIGTERM"
    assert stopped["details"]["phase"] == "magnitude: train" and stopped["metrics"]["steps"] >= 1
    assert record["op"] == "finetune" and record["metrics"]["perplexity test.txt"] > 1, out
    assert "ended by on_step" in record["details"]["notes"][-1]


@pytest.mark.parametrize("phase", ["dense", "prune", "evaluate", "compress"])
def test_the_limit_in_every_phase_leaves_a_record(options, tmp_path, phase):
    """A phase that never ends, and then the limit: the process does, with what is known."""
    script = tmp_path / "child.py"
    script.write_text(STUCK)
    command = [
        sys.executable,
        script,
        phase,
        "1000",
        *options,
        "--start",
        "magnitude",
        "--steps",
        2,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment,
                          timeout=900)  # fmt: skip
    assert done.returncode == 3, done.stderr[-2000:]
    assert "the limit is reached in phase" in done.stdout
    if phase == "dense":  # nothing is known yet
        assert not options[-1].exists()
        return
    (record,) = written(options)
    assert record["op"] == "finetune_stopped" and record["metrics"]["dense test.txt"] > 1
    assert ("start test.txt" in record["metrics"]) == (phase in ("evaluate", "compress"))
    assert record["metrics"]["steps"] == (2 if phase in ("evaluate", "compress") else 0)


# A call of the phase sleeps where no Python exception could reach it, until the watch ends it.
STUCK = """
import sys, time
from bench import bench_finetune as b, options
phase, limit = sys.argv[1], sys.argv[2]
real, calls = b.Recovery.evaluate, []
def stuck(*a, **k):
    calls[-1].watch.limit = 0.0
    time.sleep(10_000)
def evaluate(self, *a, **k):
    calls.append(self)
    if (phase, len(calls)) in (("dense", 1), ("evaluate", 3)):
        stuck()
    return real(self, *a, **k)
b.Recovery.evaluate = evaluate
if phase == "prune":
    b.Recovery.prune = stuck
if phase == "compress":
    b.sparsekern.finetune.masked.Masked.compress = stuck
out = sys.argv[sys.argv.index("--out") + 1]
sys.exit(b.main(out, [*sys.argv[3:], "--limit-seconds", limit]))
"""


def test_a_last_evaluation_that_is_out_of_time_takes_the_first_windows(options, monkeypatch):
    monkeypatch.setattr(bench_finetune, "AFTERWARDS", 1e6)
    monkeypatch.setattr(bench_finetune.Recovery, "limit", lambda self, share: 1.0)
    code, (record,) = measure(
        options, "--start", "magnitude", "--minutes", 1, "--limit-seconds", 500
    )
    windows = record["details"]["windows"]
    assert code == 0 and set(windows["last"].values()) == {1} != set(windows["all"].values())
    assert record["case"].endswith(", the first 1 windows")
    assert record["metrics"]["dense test.txt"] > 1 < record["metrics"]["perplexity test.txt"]
