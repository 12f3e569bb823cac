"""The file of sparsekern tune: whose cells they are, and how they become those of another file."""

import json

import pytest
import torch

from sparsekern.backends.cuda import configs
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.cli import main as cli
from sparsekern.profiling import layer_bench, provenance, tune_table

GPU, SHAPE = "Test GPU, 132 multiprocessors", (64, 128)
KNOWN = {"decode a", "decode b"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes runs that write to tmp_path/NAME, one second after the other."""
    monkeypatch.setenv("SPARSEKERN_GIT_SHA", "abc")
    monkeypatch.setattr(provenance, "gpu_state", lambda index: {"driver": "580.1"})
    seconds = iter(range(10, 60))

    def stamp(form, when):
        return f"2026-11-29T00:00:{next(seconds)}Z"

    monkeypatch.setattr(tune_table.time, "strftime", stamp)
    return lambda name, *shard: tune_table.Run(tmp_path / name, GPU, 0, *shard)


def entries(path):
    return json.loads(path.read_text())["entries"]


def test_a_cell_knows_its_run(run, tmp_path):
    first = run("t.json", (1, 2))
    first.store("bfloat16", SHAPE, {1: ("decode a", 2.0), 1024: ("decode b", 9.0)}, {1: 2.5})
    path = tmp_path / "t.json"
    name, about = tune_table.run_of(path, GPU, "bfloat16", SHAPE, 1024)
    assert name == "2026-11-29T00:00:10Z, shard 1/2"
    assert (about["git"], about["dirty"], about["driver"]) == ("abc", False, "580.1")
    second = run("t.json")
    second.store("bfloat16", SHAPE, {1024: ("decode a", 8.0)}, {}, {"clock_sm_mhz": 1500.0})
    second.store("float16", (8, 8), {1: ("decode a", 1.0)}, {})
    assert tune_table.run_of(path, GPU, "bfloat16", SHAPE, 1024)[0] == second.name
    assert tune_table.run_of(path, GPU, "bfloat16", SHAPE, 1) == (
        first.name,
        {**about, "cells": {"bfloat16": {"64x128": "1"}}},
    )
    assert tune_table.run_of(path, GPU, "float16", (8, 8), 1)[1]["clock_sm_mhz"] == 1500.0
    assert tune_table.run_of(path, GPU, "bfloat16", SHAPE, 2) is None
    run("t.json").store("bfloat16", SHAPE, {1: ("decode a", 2.0)}, {})
    assert len(entries(path)[tune_table.runs_key(GPU)]) == 2, "the first one has no cell left"


def test_runs_are_no_cells(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "user"))
    run("t.json").store("bfloat16", SHAPE, {64: ("decode a", 2.0)}, {64: 1.5})
    tuning.forget()
    tuned = tuning.lookup(GPU, "bfloat16", *SHAPE, 64, KNOWN)
    assert tuned == ("decode a", 2.0, 64, "shipped", "bfloat16")
    assert tuning.dense_us(tuned, GPU, *SHAPE) == 1.5
    assert tuning.summary(GPU).startswith("shipped: 1 shapes, dense is faster in 1 of 1 cells")
    tuning.forget()


def test_a_merge_keeps_what_was_not_measured(run, tmp_path, capsys):
    target = tmp_path / "shipped.json"
    old = {1: ("decode a", 2.0), 64: ("decode b", 5.0)}
    tuning.store(target, GPU, "bfloat16", SHAPE, old, {1: 3.0, 64: 6.0})
    tuning.store(target, "Other GPU", "bfloat16", SHAPE, old)
    run("a.json", (1, 2)).store("bfloat16", SHAPE, {64: ("decode a", 4.0)}, {64: 4.5})
    run("b.json", (2, 2)).store("int8", (8, 16), {1: ("decode b", 1.0)}, {})
    sources = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert cli.main(["tune", "--merge", *sources, "--out", str(target)]) == 0
    found = entries(target)
    assert found[GPU]["bfloat16"] == {"64x128": {"1": ["decode a", 2.0], "64": ["decode a", 4.0]}}
    assert found[GPU]["bfloat16, dense"] == {"64x128": {"1": ["dense", 3.0], "64": ["dense", 4.5]}}
    assert found[GPU]["int8"] == {"8x16": {"1": ["decode b", 1.0]}}
    assert found["Other GPU"]["bfloat16"] == {"64x128": {"1": ["decode a", 2.0], "64": [*old[64]]}}
    name, about = tune_table.run_of(target, GPU, "bfloat16", SHAPE, 64)
    assert name.endswith("shard 1/2") and about["git"] == "abc"
    assert tune_table.run_of(target, GPU, "bfloat16", SHAPE, 1) is None
    assert "a.json: 1 cells of Test GPU, 132 multiprocessors into" in capsys.readouterr().out
    before = target.read_text()
    assert tune_table.merge(sources, target, say=len) == 2 and target.read_text() == before


def test_a_merged_table_tells_what_dense_takes(run, tmp_path, monkeypatch):
    """explain, doctor and keep_dense read the file that a merge has made."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "shipped")
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(configs, "runnable", lambda index, types: dict.fromkeys(KNOWN, ("", 0)))
    monkeypatch.setattr(tuning, "gpu_name", lambda index: GPU)
    monkeypatch.setattr(cuda_backend, "packs", lambda device, dtype: True)
    target = tuning.TABLES / "gpu.json"
    tuning.store(target, GPU, "bfloat16", SHAPE, {64: ("decode b", 3.0), 4096: ("decode b", 90.0)})
    where = dict(dtype=torch.bfloat16, device="cuda:0")
    assert layer_bench.tuned_times(*SHAPE, 4096, **where) is None, "an old cell, without dense"
    run("a.json").store("bfloat16", SHAPE, {4096: ("decode a", 80.0)}, {4096: 75.0})
    tune_table.merge([tmp_path / "a.json"], target, say=len)
    told = configs.choose(4096, *SHAPE, "bfloat16", 0)
    assert (told.variant, told.us, told.dense_us) == ("decode a", 80.0, 75.0)
    assert told.why.endswith("shipped tuned table; dense is faster: 75 us, measured beside 80")
    assert layer_bench.tuned_times(*SHAPE, 4096, **where) == (75.0, 80.0)
    assert layer_bench.tuned_times(*SHAPE, 64, **where) is None
    assert "shipped: 1 shapes, dense is faster in 1 of 1 cells" in tuning.summary(GPU)
    tuning.forget()


def test_what_is_no_table_is_not_merged(tmp_path, capsys):
    target, bad = tmp_path / "t.json", tmp_path / "bad.json"
    bad.write_text(json.dumps({"version": 1, "entries": {GPU: {"bfloat16": {"64": {}}}}}))
    for name in ("missing.json", "bad.json"):
        arguments = ["tune", "--merge", str(tmp_path / name), "--out", str(target)]
        assert cli.main(arguments) == 2
        assert "expected a table that sparsekern tune wrote" in capsys.readouterr().err
    assert not target.exists()
