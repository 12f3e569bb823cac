"""The measuring tools: quantiles, stopping, interleaving, records, and the README's tables.

A fake clock and fake samplers stand in for the GPU, so the rules are tested exactly; the timers
themselves run in the tests marked `gpu`.
"""

import json
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

from bench import headline, record, shapes, table, timing  # noqa: E402

ENV = {
    "schema": 1,
    "time": "2026-01-01T00:00:00Z",
    "git": "a" * 40,
    "dirty": False,
    "gpu": "GPU X",
    "torch": "2.9",
}


@pytest.mark.parametrize(
    "samples, q, wanted",
    [
        ([3.0], 0.2, 3.0),
        ([1, 2, 3], 0.5, 2),
        ([3, 1, 2, 4], 0.5, 2.5),
        ([1, 2, 3, 4, 5, 6], 0.2, 2),
        ([5, 1], 0.0, 1),
        ([5, 1], 1.0, 5),
    ],
)
def test_quantile(samples, q, wanted):
    assert timing.quantile(samples, q) == pytest.approx(wanted)


def test_quantile_agrees_with_numpy():
    import numpy

    samples = [random.random() for _ in range(37)]
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert timing.quantile(samples, q) == pytest.approx(numpy.quantile(samples, q))


def test_quantile_of_nothing():
    with pytest.raises(ValueError, match="expected at least one sample"):
        timing.quantile([], 0.5)


def test_rotations_exceed_three_times_the_cache():
    assert timing.rotations(10, l2_bytes=100) == 30
    assert timing.rotations(7, l2_bytes=100) * 7 >= 300 > (timing.rotations(7, 100) - 1) * 7
    assert timing.rotations(10**9, l2_bytes=100) == 2
    with pytest.raises(ValueError, match="bytes_per_set > 0, got 0"):
        timing.rotations(0, l2_bytes=100)


def test_sampling_stops_when_every_provider_is_precise():
    stop = timing.StopRule(min_rounds=5, budget_s=1e9)
    noisy = iter([1.0, 3.0] * 5000)
    quiet = {"a": lambda: 2.0, "b": lambda: 1.0}
    samples, converged = timing.sample_rounds(quiet, stop)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 5, "b": 5}
    assert converged == {"a": True, "b": True}
    samples, converged = timing.sample_rounds({**quiet, "noisy": lambda: next(noisy)}, stop)
    # standard deviation 1, mean 2: 1 % of the mean needs 1 / sqrt(n) <= 0.02, that is 2500 rounds
    assert all(len(taken) == stop.max_rounds for taken in samples.values())
    assert converged == {"a": True, "b": True, "noisy": False}


def test_sampling_stops_when_the_time_is_up():
    now = iter(range(1000))
    samples, converged = timing.sample_rounds(
        {"a": iter(range(1, 1000)).__next__}, timing.StopRule(budget_s=7), clock=lambda: next(now)
    )
    assert len(samples["a"]) == 7 and converged == {"a": False}


def test_sampling_goes_on_for_the_least_time():
    now = iter(range(1000))
    stop = timing.StopRule(min_rounds=2, min_s=9, budget_s=50)
    samples, converged = timing.sample_rounds({"a": lambda: 1.0}, stop, clock=lambda: next(now))
    assert len(samples["a"]) == 9 and converged == {"a": True}


def test_wall_timer_calls_in_turn_and_needs_no_gpu():
    called = []
    calls = [lambda i=i: called.append(i) for i in range(3)]
    rule = timing.StopRule(min_rounds=4, max_rounds=4)
    times = timing.compare({"a": calls}, timer="wall", stop=rule)
    assert called == [0, 1, 2, 0, 1, 2, 0] and len(times["a"].samples) == 4
    assert 0 < times["a"].median < 1e5


def test_every_round_samples_every_provider_in_a_new_order():
    taken = []
    samplers = {name: lambda name=name: taken.append(name) or 1.0 for name in "abc"}
    timing.sample_rounds(samplers, timing.StopRule(min_rounds=40, max_rounds=40), seed=1)
    rounds = ["".join(taken[i : i + 3]) for i in range(0, len(taken), 3)]
    assert len(rounds) == 40 and all(sorted(r) == list("abc") for r in rounds)
    assert len(set(rounds)) == 6
    again, taken[:] = list(taken), []
    timing.sample_rounds(samplers, timing.StopRule(min_rounds=40, max_rounds=40), seed=1)
    assert taken == again


def test_timing_row():
    row = timing.Timing("graph", (1.0, 2.0, 3.0), True).row()
    assert row == {
        "timer": "graph",
        "iters": 3,
        "us": {"p20": 1.4, "p50": 2.0, "p80": 2.6},
        "converged": True,
    }


def test_compare_refuses():
    with pytest.raises(ValueError, match=r"\['events', 'graph', 'wall'\], got 'stopwatch'"):
        timing.compare({"a": [lambda: None]}, timer="stopwatch")
    with pytest.raises(ValueError, match="at least one sampler"):
        timing.sample_rounds({})
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="expected a CUDA GPU, got none"):
            timing.compare({"a": [lambda: None]})


def test_the_stop_rule_is_that_of_the_statistics_module():
    samples = timing.Samples()
    for value in (random.gauss(100.0, 3.0) for _ in range(500)):
        samples.add(value)
        if len(samples.values) > 1:
            error = statistics.stdev(samples.values) / len(samples.values) ** 0.5
            relative = error / statistics.fmean(samples.values)
            for bound, wanted in ((relative * 1.0001, True), (relative * 0.9999, False)):
                rule = timing.StopRule(standard_error=bound, min_rounds=2)
                assert rule.precise(samples) is wanted


@pytest.mark.gpu
@pytest.mark.parametrize("timer", ["graph", "events"])
def test_timers_see_twice_the_work(timer):
    sets = [torch.randn(4096, 4096, device="cuda") for _ in range(timing.rotations(2**26))]
    times = timing.compare(
        {
            "once": [lambda s=s: s.mul_(1.0) for s in sets],
            "twice": [lambda s=s: s.mul_(1.0).mul_(1.0) for s in sets],
        },
        timer=timer,
        stop=timing.StopRule(budget_s=2.0),
    )
    # At least the traffic at 8 TB/s; at most that at 0.1 TB/s. The second pass may hit the cache.
    assert 2**27 / 8e6 < times["once"].median < 2**27 / 1e5
    assert 1.2 < times["twice"].median / times["once"].median < 2.5


def measurement(backend="cuda", **fields):
    base = {
        "op": "layer",
        "backend": backend,
        "check": "exact",
        "us": {"p50": 10.0},
        "out_features": 64,
        "in_features": 32,
        "tokens": 1,
        "dtype": "bfloat16",
        "campaign": "c1",
    }
    return {**base, **fields}


def test_append_and_read(tmp_path):
    path = tmp_path / "records" / "a.jsonl"
    first = record.append(path, measurement(), ENV)
    second = record.append(path, measurement("dense"), {**ENV, "time": "2025-01-01T00:00:00Z"})
    assert record.read(path) == [second, first]
    assert len({first["id"], second["id"]}) == 2
    assert path.read_text().count("\n") == 2


def test_append_by_many_writers_keeps_lines_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    with ThreadPoolExecutor(8) as pool:
        for i in range(200):
            pool.submit(record.append, path, measurement(note="x" * 5000, i=i), ENV)
    assert sorted(entry["i"] for entry in record.read(path)) == list(range(200))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(check=""), "field 'check', got ''"),
        (dict(op=None), "field 'op', got None"),
        (dict(us={"p50": float("nan")}), "not JSON compliant"),
        (dict(metrics={"a": 1}), "either 'us'"),
    ],
)
def test_append_refuses(tmp_path, fields, message):
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match=message):
        record.append(path, measurement(**fields), ENV)
    assert not path.exists()


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"\xff", b'{"schema": 2}', b'{"schema": 1, "id": "x"}']
)
def test_read_names_the_bad_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    record.append(path, measurement(), ENV)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not a record"):
        record.read(path)


def test_a_field_that_a_record_lacks_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    record.append(path, measurement(), ENV)
    entry = measurement(op="linear8")
    del entry["out_features"]
    entry = record.append(path, entry, ENV)
    with pytest.raises(KeyError, match=r"a\.jsonl, line 2: expected a field 'out_features'"):
        table.render(record.read(path))
    del entry["us"]
    path.write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match="line 1: .*fields missing: either us or metrics"):
        record.read(path)


def test_environment_of_this_process(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_GIT_SHA", "abc123")
    env = record.environment()
    assert env["git"] == "abc123" and env["dirty"] is False
    assert env["torch"] == torch.__version__ and env["schema"] == record.SCHEMA
    assert (env["gpu"] is None) == (not torch.cuda.is_available())
    json.dumps(env, allow_nan=False)
    monkeypatch.setenv("SPARSEKERN_GIT_SHA", "abc123-dirty")
    assert record.git_state() == {"git": "abc123", "dirty": True}


def test_git_state_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("SPARSEKERN_GIT_SHA", raising=False)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.git_state() == {"git": None, "dirty": True}

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    (tmp_path / "bench" / "records").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("a")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    clean = record.git_state()
    assert len(clean["git"]) == 40 and clean["dirty"] is False
    (tmp_path / "bench" / "records" / "x.jsonl").write_text("{}")
    assert record.git_state() == clean
    (tmp_path / "a.txt").write_text("b")
    assert record.git_state() == {**clean, "dirty": True}


def test_gpu_state_reads_nvidia_smi(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "580.1, 1980, 1980, 2619, 700.00, 95.5, [N/A]"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = type("Properties", (), {"uuid": "00"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert record.gpu_state() == {
        "driver": "580.1",
        "clock_sm_mhz": 1980.0,
        "clock_sm_max_mhz": 1980.0,
        "clock_mem_mhz": 2619.0,
        "power_limit_w": 700.0,
        "power_draw_w": 95.5,
        "temperature_c": None,
    }
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert record.gpu_state() == {}


def records_of(*measurements, **env):
    return [{"id": str(i), **ENV, **env, **m} for i, m in enumerate(measurements)]


def test_timing_table():
    text = table.render(
        records_of(
            measurement("dense", us={"p50": 20.0}),
            measurement("cuda", us={"p50": 12.5}),
            measurement("dense", us={"p50": 9.0}, tokens=16),
            measurement("triton", us={"p50": 18.0}, tokens=16),
        )
    )
    assert text.splitlines() == [
        f"**layer**, GPU X, torch 2.9, git {'a' * 10}",
        "",
        "| out x in | tokens | dtype | dense us | cuda us | triton us | campaign |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 64 x 32 | 1 | bfloat16 | 20 | 12.5 (1.60x) |  | c1 |",
        "| 64 x 32 | 16 | bfloat16 | 9 |  | 18 (0.50x) | c1 |",
    ]


def test_the_newest_campaign_replaces_the_whole_row():
    old = [measurement("dense", us={"p50": 20.0}), measurement("cuda", us={"p50": 10.0})]
    new = [measurement("cuda", us={"p50": 8.0}, campaign="c2")]
    row = table.render(records_of(*old, *new)).splitlines()[-1]
    assert row == "| 64 x 32 | 1 | bfloat16 | 8 | c2 |"


def test_metrics_table():
    def result(backend, **metrics):
        return {
            "op": "prune_model",
            "backend": backend,
            "check": "loaded",
            "case": "model A",
            "metrics": metrics,
            "campaign": "c1",
        }

    text = table.render(
        records_of(
            result("wanda", perplexity=212.6),
            result("sparsegpt", perplexity=94.56, seconds=1234.5),
            gpu=None,
        )
    )
    assert text.splitlines()[0].startswith("**Pruning**, CPU")
    assert text.splitlines()[2:] == [
        "| case | backend | perplexity | seconds | campaign |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| model A | sparsegpt | 94.56 | 1234 | c1 |",
        "| model A | wanda | 212.6 |  | c1 |",
    ]


def test_dirty_records_do_not_enter():
    assert table.render(records_of(measurement(), dirty=True)) == table.NOTHING
    assert table.render([]) == table.NOTHING


def test_check_notices_a_number_typed_by_hand(tmp_path, capsys):
    readme, target = tmp_path / "README.md", tmp_path / "RESULTS.md"
    readme.write_text(f"# a\n{headline.BEGIN}\nold\n{headline.END}\nz\n")
    records = records_of(measurement())
    assert table.main(["--check"], readme, target, records) == 1
    assert "differs" in capsys.readouterr().out
    assert table.main([], readme, target, records) == 0
    assert readme.read_text() == f"# a\n{headline.BEGIN}\n\n{headline.END}\nz\n"
    assert table.main(["--check"], readme, target, records) == 0
    assert "| 10 |" in target.read_text()
    target.write_text(target.read_text().replace("| 10 |", "| 9 |"))
    assert table.main(["--check"], readme, target, records) == 1


@pytest.mark.parametrize("text", ["", "a", "ba", "abb", "aab"])
def test_markers_must_be_there_once(text):
    with pytest.raises(ValueError, match="expected one"):
        table.replace(text, "x", "a", "b")


def test_readme_shows_what_the_records_say():
    assert table.main(["--check"]) == 0


def test_bench_without_gpu_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "bench"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0 and "no CUDA GPU" in done.stdout
    for wanted in ("1,x", "0", "²"):
        with pytest.raises(ValueError, match="numbers of tokens such as 1,16,64"):
            shapes.token_counts(wanted, "decode")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no benchmark nothing" in done.stdout
