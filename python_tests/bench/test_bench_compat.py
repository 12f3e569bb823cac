"""`bench compat` and `bench hosttime`: both bindings, the verdict, and children of two checkouts.
Fake modules compute in Python what the kernels would."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as entry
from bench import bench_compat, bench_hosttime, record

FIELDS = dict(rows=64, split=2)


class ByPosition:
    """A module as before: decode(...) takes 16 integers; prefill one more."""

    def __init__(self):
        self.calls = []

    def decode_configs(self):
        return [dict(index=1, rows=32, split=1), dict(index=2, **FIELDS)]

    def decode(self, *arguments):
        assert len(arguments) == 16
        self.calls.append(arguments)

    def prefill(self, *arguments):
        assert len(arguments) == 17
        self.calls.append(arguments)


class ByName:
    """A module as now: kernels(), and Linear with keywords."""

    def __init__(self):
        self.calls = calls = []

        class Linear:
            def __init__(self, **fixed):
                self.fixed = fixed

            def __call__(self, **named):
                calls.append({**self.fixed, **named})

        self.Linear = Linear

    def kernels(self):
        return {"decode": [dict(index=0, **FIELDS), dict(index=1, rows=16, split=8)]}


def operands():
    x, y = torch.zeros(3, 32).bfloat16(), torch.zeros(3, 64).bfloat16()
    w24 = SimpleNamespace(
        shape=(64, 32), values=torch.zeros(64, 16).bfloat16(), metadata=torch.zeros(64)
    )
    return x, w24, y, torch.zeros(8, dtype=torch.uint8)


def test_both_bindings_get_the_same_problem():
    x, w24, y, space = operands()
    old, new = ByPosition(), ByName()
    bench_compat.launcher(old, "decode", 2, x, w24, y, space)()
    bench_compat.launcher(new, "decode", 0, x, w24, y, space)()
    (given,), (named,) = old.calls, new.calls
    assert given[:6] == (*(named[k] for k in ("x", "values", "metadata")), 0, 0, named["y"])
    sizes = ("tokens", "out_features", "in_features", "x_stride", "y_stride")
    assert given[6:11] == tuple(named[k] for k in sizes) == (3, 64, 32, 32, 64)
    assert given[11:] == (0, 1, 0, 2, 0) and named["dtype"] == "bfloat16"
    assert (named["kernel"], named["config"], named["stream"]) == ("decode", 0, 0)
    assert "workspace" not in named
    bench_compat.launcher(old, "prefill", 5, x, w24, y, space)()
    bench_compat.launcher(new, "prefill", 5, x, w24, y, space)()
    assert old.calls[-1][14:] == (5, space.data_ptr(), 0)
    assert new.calls[-1]["workspace"] == space.data_ptr()


def test_configs_are_matched_by_their_fields():
    old = bench_compat.configs(ByPosition(), "decode")
    new = bench_compat.configs(ByName(), "decode")
    (common,) = old.keys() & new.keys()
    assert dict(common) == FIELDS and (old[common], new[common]) == (2, 0)


def test_there_are_enough_cells():
    assert set(bench_compat.CELLS) == {"decode", "split", "prefill", "mma"}
    cells = [(kernel, cell) for kernel, of in bench_compat.CELLS.items() for cell in of]
    assert len(set(cells)) == len(cells) >= 24
    assert all(tokens <= 64 for _, _, tokens in bench_compat.CELLS["decode"])


def test_summary_and_verdict():
    ratios = [
        bench_compat.Ratio("decode", "a", 10.0, 10.0),
        bench_compat.Ratio("mma", "b", 10.0, 10.404),
    ]
    metrics = bench_compat.summary(ratios)
    assert metrics["geometric_mean"] == pytest.approx(1.02, abs=1e-5)
    assert metrics["worst_case"] == "b" and metrics["cells"] == 2
    text = bench_compat.verdict(metrics)
    assert "+2.00% (BEYOND 1%)" in text and "worst +4.04% (BEYOND 3%): b" in text
    assert "BEYOND" not in bench_compat.verdict({**metrics, "geometric_mean": 1, "worst": 1.02})


@pytest.mark.parametrize("wrong", [0, 3])
def test_a_different_output_is_not_timed(tmp_path, wrong):
    fields = tuple(FIELDS.items())
    timed = []

    class Cell:
        def fastest(self):
            return fields, {"old": 2, "new": 0}

        def different(self, indices):
            return wrong

        def times(self, indices, quick):
            timed.append(indices)
            return {name: SimpleNamespace(median=us) for name, us in (("old", 4.0), ("new", 5.0))}

    options = bench_compat.parser("compat", "", 1.0)
    run = bench_compat.Run(tmp_path / "r.jsonl", options.parse_args(["--device", "cpu"]))
    found = bench_compat.measure(run, Cell(), "decode", (64, 32, 3))
    if wrong:
        assert found.startswith("DIFFERENT: decode 64x32, 3 tokens") and "3 elements" in found
        assert not timed and not run.records
    else:
        assert found.ratio == 1.25 and record.read(run.path)[0]["metrics"]["ratio"] == 1.25


def test_load_module_finds_a_module_of_the_same_name():
    """A second module of the name _C beside the first; any extension module stands in."""
    from sparsekern import _native

    if not _native.available():
        pytest.skip(_native.reason())
    again = bench_compat.load_module(_native.module().__file__, "another")
    assert again.__name__ == "another._C" and again.build_info() == _native.module().build_info()
    with pytest.raises(FileNotFoundError, match="no file at"):
        bench_compat.load_module("/nowhere/_C.so")
    with pytest.raises(ImportError):
        bench_compat.load_module(ctypes.__file__)


def test_all_benchmarks_leave_out_those_that_need_another_build():
    assert {"compat", "hosttime"} <= set(entry.names())


def test_hosttime_takes_turns_and_records_medians(tmp_path, monkeypatch):
    order, old = [], tmp_path / "old"
    (old / "sparsekern").mkdir(parents=True)
    (old / "sparsekern" / "__init__.py").touch()
    us = {True: iter([10.0, 30.0, 20.0]), False: iter([12.0, 24.0, 8.0])}

    def child(checkout, device, size, batches, tokens):
        order.append(checkout == old)
        return {"SparseLinear, 1 tokens": next(us[checkout == old])}

    monkeypatch.setattr(bench_hosttime, "child", child)
    path = tmp_path / "h.jsonl"
    arguments = ["--old", str(old), "--rounds", "3", "--device", "cpu"]
    assert bench_hosttime.main(path, arguments) == 0
    assert order == [True, False, False, True, True, False]
    (entry,) = record.read(path)
    assert entry["op"] == "hosttime" and entry["backend"] == "SparseLinear"
    assert entry["metrics"] == {"old_us": 20.0, "new_us": 12.0, "ratio": 0.6, "children": 3}
    with pytest.raises(FileNotFoundError):
        bench_hosttime.main(path, ["--old", str(tmp_path / "none"), "--device", "cpu"])


def test_a_child_measures_the_checkout_it_was_given(tmp_path):
    us = bench_hosttime.child(record.ROOT, "cpu", 32, 2, "1")
    assert set(us) == {"sparsekern.linear, 1 tokens", "SparseLinear, 1 tokens"}
    assert all(value > 0 for value in us.values())
    with pytest.raises(RuntimeError, match="failed|gave the package"):
        bench_hosttime.child(tmp_path, "cpu", 32, 2, "one")


@pytest.mark.gpu
def test_compat_of_a_module_with_itself(tmp_path):
    from sparsekern import _native

    arguments = ["--old", _native.module().__file__, "--quick", "--kernels", "decode,mma"]
    path = tmp_path / "c.jsonl"
    assert bench_compat.main(path, arguments) == 0
    ops = [entry["op"] for entry in record.read(path)]
    assert ops.count("compat") == 7 and ops.count("compat_summary") == 1
