"""`sparsekern bench kernels`: rows, checks, a kernel from a file, JSON lines, plots."""

import json
import sys
from dataclasses import asdict

import pytest
import torch

from sparsekern.cli.main import main
from sparsekern.profiling import kernel_bench, kernel_plot

RIGHT = """
import torch
from sparsekern import decompress

NAME = "by hand"

def build(w24, tokens):
    dense = decompress(w24)
    return lambda x: torch.nn.functional.linear(x, dense)
"""
WRONG = "def linear(x, w24):\n    y = x.new_empty(x.shape[0], w24.shape[0]).zero_()\n    return y\n"
RAISES = "def linear(x, w24):\n    raise RuntimeError('no such tile')\n"
ONE_OFF = """
from sparsekern import decompress

def linear(x, w24):
    y = x @ decompress(w24).t()
    y[-1, -1] += 1
    return y
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    rule = kernel_bench.timer.StopRule(min_rounds=1, max_rounds=2, budget_s=0.1)
    monkeypatch.setitem(kernel_bench.RULES, "cpu", rule)
    monkeypatch.setitem(kernel_bench.CEILING_BYTES, "cpu", 2**16)
    monkeypatch.setitem(kernel_bench.CEILING_SIZE, "cpu", 32)


def file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_the_command(tmp_path, capsys):
    right, wrong = file(tmp_path, "right.py", RIGHT), file(tmp_path, "wrong.py", WRONG)
    command = ["bench", "kernels", "--device", "cpu", "--shapes", "64x32,32x64", "--tokens", "1,8"]
    options = ["--out", str(tmp_path / "rows.jsonl"), "--plot", str(tmp_path / "k.png")]
    code = main([*command, "--kernel", str(right), "--kernel", str(wrong), *options])
    output = capsys.readouterr().out
    assert code == 1  # a kernel failed
    assert output.count("FAILED on whole numbers: wrong in") == 4
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 4 and {row["kernel"] for row in rows} == {
        "dense",
        "sparsekern",
        "by hand",
        "wrong",
    }
    for row in rows:
        assert row["schema"] == kernel_bench.SCHEMA and row["device"] == "cpu"
        if row["kernel"] == "wrong":
            assert not row["us"] and row["roof"] is None and row["speedup"] is None
        else:
            assert row["us"]["p20"] <= row["us"]["p50"] <= row["us"]["p80"]
            assert row["roof"] > 0 and row["check"] and row["speedup"] or row["kernel"] == "dense"
    for kind in ("roofline", "speedup"):
        assert (tmp_path / f"k-{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--kernel", str(right)]) == 0


@pytest.mark.parametrize(
    "text, status",
    [(ONE_OFF, "wrong in 1 of 192 elements, first at token 2, out_feature 63"),
     (RAISES, "RuntimeError: no such tile"),
     ("def linear(x, w24):\n    return x\n", r"expected y (3, 64)"),
     ("def linear(x, w24):\n    return None\n", "got NoneType")],
)  # fmt: skip
def test_a_kernel_that_is_wrong_is_not_timed(tmp_path, text, status):
    kernel = kernel_bench.load_kernel(file(tmp_path, "mine.py", text))
    problem = kernel_bench.Problem((64, 32), torch.float32, torch.device("cpu"))
    limits = kernel_bench.Ceilings(1.0, 1.0, 1.0)
    rows = {row.kernel: row for row in kernel_bench.cell(problem, 3, limits, [kernel])}
    assert rows["mine"].status.startswith("FAILED") and status in rows["mine"].status
    assert not rows["mine"].us and rows["sparsekern"].us and rows["dense"].us
    assert status in rows["mine"].text()


def test_files_that_are_no_kernels(tmp_path):
    with pytest.raises(ValueError, match=r"linear\(x, w24\) or build"):
        kernel_bench.load_kernel(file(tmp_path, "a.py", "x = 1\n"))
    with pytest.raises(ValueError, match="LAYOUT"):
        kernel_bench.load_kernel(file(tmp_path, "b.py", RIGHT + "LAYOUT = 'csr'\n"))
    with pytest.raises(FileNotFoundError):
        kernel_bench.load_kernel(tmp_path / "absent.py")


def test_bad_arguments(capsys):
    assert main(["bench", "--shape", "64x32", "--device", "cpu", "--out", "x"]) == 2
    assert "expected the word 'kernels' with --out" in capsys.readouterr().err
    options = dict(dtype=torch.float32, device="cpu", say=lambda text: None)
    with pytest.raises(ValueError, match="multiple of 4"):
        kernel_bench.bench_kernels([(64, 30)], [1], **options)
    same = kernel_bench.UserKernel("dense", "rowmajor", lambda w24, tokens: lambda x: x)
    with pytest.raises(ValueError, match="different names, got 'dense'"):
        kernel_bench.bench_kernels([(64, 32)], [1], kernels=[same], **options)


def test_share_of_the_roof():
    limits = kernel_bench.Ceilings(read_tb_s=2.0, copy_tb_s=2.0, dense_tflops=500.0)
    assert limits.share(1.0, 2 * 10**6, 1, True) == (1.0, "memory")
    assert limits.share(2.0, 1, 10**9, True) == (0.5, "compute")
    assert limits.share(4.0, 1, 10**9, False) == (0.5, "compute")


def test_what_the_child_says(monkeypatch):
    answer = kernel_bench.cusparselt_row((64, 32), 8, "float16", "cpu")
    assert answer == {"status": "absent: no CUDA GPU"}
    monkeypatch.setattr(kernel_bench.sys, "executable", "false")
    assert "ended with 1" in kernel_bench.cusparselt_row((64, 32), 8, "float16", "cpu")["status"]


def test_a_plot_needs_a_time(tmp_path):
    row = kernel_bench.Row(64, 32, 1, "float32", "cpu", "mine", "", "FAILED: wrong")
    assert asdict(row)["us"] == {}
    with pytest.raises(ValueError, match="a row with a time"):
        kernel_plot.plot([row], kernel_bench.Ceilings(1.0, 1.0, 1.0), tmp_path / "k.svg")


def test_a_plot_that_cannot_be_is_refused_before_anything_is_measured(capsys, monkeypatch):
    def measure(*_, **__):
        raise AssertionError

    monkeypatch.setattr(kernel_bench, "bench_kernels", measure)
    words = ["bench", "kernels", "--shapes", "64x32", "--device", "cpu", "--plot"]
    for name in ("k", "k.words"):
        assert main([*words, name]) == 2
        assert f"--plot NAME.svg or NAME.png, got {name}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*words, "k.svg"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    kernel = kernel_bench.load_kernel(file(tmp_path, "right.py", RIGHT))
    rows, _ = kernel_bench.bench_kernels(
        [(1024, 1024)], [16], dtype=torch.bfloat16, device="cuda", kernels=[kernel]
    )
    found = {row.kernel: row for row in rows}
    assert set(found) == {"dense", "sparsekern", "triton", "cusparselt", "by hand"}
    for name in ("dense", "sparsekern", "by hand"):
        assert found[name].status == "ok" and found[name].timer == "graph", found[name]
    assert found["sparsekern"].variant and 0 < found["sparsekern"].roof < 1.5
