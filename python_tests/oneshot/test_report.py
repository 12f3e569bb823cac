"""PruneReport: content, table, JSON, atomic save, plot."""

import json
import math
import os
import sys
from html import escape

import pytest

from python_tests.oneshot.driver_models import build, plain, tokens
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.oneshot.report import LayerReport, PruneReport
from sparsekern.utils import files
from sparsekern.utils.files import write_atomic


@pytest.fixture(scope="module")
def report():
    return prune_model(build("llama"), "sparsegpt", tokens(), device="cpu", progress=False)


def test_content(report):
    assert (report.model, report.method, report.device) == ("LlamaForCausalLM", "sparsegpt", "cpu")
    assert report.options["pattern"] == [2, 4] and report.options["skip"] == ["lm_head"]
    assert report.calibration["samples"] == 6 and report.calibration["tokens"] == 120
    assert len(report.layers) == 15 and len(report.pruned) == 14 and len(report.skipped) == 1
    row = report["model.layers.1.mlp.down_proj"]
    assert (row.shape, row.dtype, row.block, row.method) == ((32, 64), "float32", 1, "sparsegpt")
    assert row.damp == 0.01 and 0 < row.relative_error < 1 and row.seconds > 0
    assert (row.bytes_dense, row.bytes_sparse) == (32 * 64 * 4, 32 * 32 * 4 + 32 * 8)
    head = report["lm_head"]
    assert (
        head.skipped
        and head.reason == "skip rule 'lm_head'"
        and head.bytes_sparse == head.bytes_dense
    )
    assert report.seconds >= sum(report.phases.values()) > 0
    phases = {"load", "capture", "hessian", "prune", "forward", "store", "other"}
    assert set(report.phases) == phases and report.phases["other"] >= 0
    with pytest.raises(KeyError, match="nothing"):
        report["nothing"]
    assert "lm_head" in report and "nothing" not in report and list(report) == report.layers


def test_relative_error_is_that_of_the_outputs():
    """‖(W − W')X‖² / ‖WX‖² recomputed in float64 from the layer's own inputs."""
    import torch

    x = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0))
    model, dense = plain(), plain()
    row = prune_model(model, "sparsegpt", x, device="cpu", progress=False)["up"]
    w, new = dense.up.weight.detach().double(), model.up.weight.to_dense().double()
    inputs = x.reshape(-1, 16).double()
    expected = ((w - new) @ inputs.T).square().sum() / (w @ inputs.T).square().sum()
    assert row.relative_error == pytest.approx(float(expected), rel=1e-4)


def test_table(report):
    lines = report.table().splitlines()
    assert lines[0].split() == [
        "layer",
        "shape",
        "method",
        "rel.",
        "error",
        "damp",
        "seconds",
        "note",
    ]
    assert len(lines) == 2 + 15 + 2
    row = next(line for line in lines if line.startswith("model.layers.0.self_attn.k_proj"))
    assert row.split()[1:3] == ["16x32", "sparsegpt"] and row.split()[4] == "0.01"
    assert lines[16].startswith("lm_head") and lines[16].endswith("skipped: skip rule 'lm_head'")
    assert lines[-1] == str(report) == report.summary()
    assert (
        "14 layers pruned (sparsegpt), 1 left dense" in lines[-1]
        and "72 KiB -> 38.25 KiB" in lines[-1]
    )


def test_notes_reach_the_table():
    import torch

    x = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0))
    x[..., 3] = 0
    report = prune_model(plain(), "sparsegpt", x, device="cpu", progress=False)
    assert report["up"].note == "1 inputs always zero"
    assert "1 inputs always zero" in report.table()


def test_json_round_trip(report):
    text = report.to_json()
    data = json.loads(text)
    assert data["schema"] == 1 and len(data["layers"]) == 15
    assert PruneReport.from_json(text) == report
    with pytest.raises(ValueError, match="schema 1, got 2"):
        PruneReport.from_json(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match="schema 1, got None"):
        PruneReport.from_json("[]")
    with pytest.raises(ValueError, match="the fields of a report, got KeyError: 'layers'. Pass"):
        PruneReport.from_json(text.replace('"layers"', '"rows"'))


def test_json_has_no_infinities():
    layers = [
        LayerReport("a", (4, 4), "float32", relative_error=math.inf),
        LayerReport("b", (4, 4), "float32"),
    ]
    text = PruneReport("M", "wanda", layers=layers, options={"x": [math.nan]}).to_json()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert data["layers"][0]["relative_error"] is None and data["options"]["x"] == [None]


def test_save_is_atomic(report, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    report.save(path)
    assert PruneReport.from_json(path.read_text()) == report
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "disk full"))
    )
    with pytest.raises(OSError, match=r"report\.json to be written, got disk full. Make"):
        write_atomic(path, b"half")
    assert os.listdir(tmp_path) == ["report.json"]
    assert PruneReport.from_json(path.read_text()) == report


def test_plot(report, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    report.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    without = prune_model(build("llama"), "magnitude", device="cpu", progress=False)
    with pytest.raises(ValueError, match="relative errors, got none"):
        without.plot(tmp_path / "nothing.png")


def test_plot_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot(tmp_path / "errors.png")


def test_html(report):
    page = report._repr_html_()
    assert page.count("<tr>") == 1 + len(report.layers) and escape(report.summary()) in page
    row = LayerReport("<b>", (4, 4), "float32", skipped=True, reason="a & b")
    page = PruneReport("<i>", "wanda", layers=[row])._repr_html_()
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;" in page and "a &amp; b" in page


def test_dataframe(report, monkeypatch):
    """With a stand-in, because pandas is no requirement."""

    class Pandas:
        DataFrame = staticmethod(list)

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    rows = report.to_dataframe()
    assert [row["name"] for row in rows] == [layer.name for layer in report.layers]
    assert {"shape", "is_24", "reason", "relative_error"} <= rows[0].keys()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        report.to_dataframe()


def test_parameters_of_the_model(report):
    assert report.parameters["dense"] - report.parameters["stored"] == sum(
        layer.elements // 2 for layer in report.pruned
    )
    assert PruneReport.from_json(report.to_json()).parameters == report.parameters
