"""Benches of quantised layers and activations: dry runs on the CPU, what they refuse, and what
their tables say of made-up records."""

import pytest
import torch

from bench import bench_activations, bench_layers8, layers8, record, results8, table
from bench.layers import WrongResult
from bench.shapes import Shape
from sparsekern.backends import quantize_rows as rows

COMMON = ["--device", "cpu", "--seconds", "0.01"]


def entry(backend, us, tokens=16, dtype="float8_e4m3fn", campaign="c1", **fields):
    stated = dict(id=f"{backend}{us}", schema=1, time="2026-01-01T00:00:00Z", git="a" * 40)
    stated |= dict(dirty=False, gpu="GPU X", torch="2.11", op="linear8", check="bounded")
    case = dict(out_features=64, in_features=32, tokens=tokens, dtype=dtype, case="bfloat16")
    timed = dict(backend=backend, us={"p50": us}, timer="graph", campaign=campaign)
    return stated | case | timed | fields


# ---- layers8 -------------------------------------------------------------------------------------


def test_dry_run_checks_times_and_goes_on(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    options = [
        *COMMON,
        "--shapes",
        "64x128",
        "--tokens",
        "1,70",
        "--campaign",
        "c",
        "--out",
        str(out),
    ]
    assert bench_layers8.main(out, [*options, "--dtype", "fp8,int8,int4"]) == 0
    found = [e for e in record.read(out) if e["op"] == "linear8"]
    got = {(e["dtype"], e["tokens"], e["backend"]): e["check"] for e in found}
    assert got["float8_e4m3fn", 1, "w8a16"] == got["int8", 70, "w8a8"] == "exact+bounded"
    assert got["int8", 70, "w8a8+quantize"] == got["int4", 70, "w4a16"] == "exact+bounded"
    assert got["int8", 1, "dense"] == "bounded" and got["int8", 70, "w8a16"] == "exact+bounded"
    assert all(e["config"] and e["bytes"] > 0 for e in found if e["backend"] != "dense")
    capsys.readouterr()
    assert bench_layers8.main(out, [*options, "--dtype", "int8"]) == 0
    assert len([e for e in record.read(out) if e["op"] == "linear8"]) == len(found)
    with pytest.raises(SystemExit, match="--dtype of fp8, int8, int4, got 'fp4'"):
        bench_layers8.main(out, [*options, "--dtype", "fp4"])


@pytest.mark.parametrize("where", ["product", "scale"])
def test_a_wrong_result_is_reported_and_not_recorded(where, tmp_path, capsys, monkeypatch):
    true = layers8.linear_quantized

    def wrong(x, x_scale, w24, *more, **options):
        if where == "scale":
            return true(x, torch.ones_like(x_scale), w24, *more, **options)
        y = true(x, x_scale, w24, *more, **options)
        y[-1, -1] += 1 + y.abs().max()
        return y

    monkeypatch.setattr(layers8, "linear_quantized", wrong)
    out = tmp_path / "r.jsonl"
    options = [*COMMON, "--shapes", "64x128", "--tokens", "4", "--dtype", "int8", "--out", str(out)]
    assert bench_layers8.main(out, options) == 1
    assert "w8a8 is wrong in" in capsys.readouterr().out
    kept = {e["backend"] for e in record.read(out) if e["op"] == "linear8"}
    assert kept == {"w8a16", "dense"}


def test_the_ends_of_many_tokens_are_checked(monkeypatch):
    monkeypatch.setattr(layers8, "CHECKED", 8)
    shape = Shape("", "", 64, 128)
    names = ("w8a8", "dense")
    layer = layers8.Layer8(shape, "int8", torch.bfloat16, torch.device("cpu"), names)
    x, true = layer.inputs(20), layers8.linear_quantized
    assert layer.check("w8a8", x) == "exact+bounded"
    for token, seen in ((3, True), (10, False), (19, True)):

        def wrong(*arguments, token=token, **options):
            y = true(*arguments, **options)
            y[token, 5] = 1e4
            return y

        monkeypatch.setattr(layers8, "linear_quantized", wrong)
        if seen:
            with pytest.raises(WrongResult, match="w8a8 is wrong in 1 of"):
                layer.check("w8a8", x)
        else:
            assert layer.check("w8a8", x) == "exact+bounded"


def test_16_bits_of_x_are_asked_for_and_what_is_widened_in_memory_is_rounded(monkeypatch):
    cpu = torch.device("cpu")
    for storage, name, backend in (("int8", "w8a16", "cuda-a16"), ("int4", "w4a16", None)):
        layer = layers8.Layer8(Shape("", "", 64, 128), storage, torch.bfloat16, cpu, (name,))
        x = layer.inputs(70)
        assert layer.check(name, x) == "exact+bounded"
        monkeypatch.setattr(layer.providers[name], "config", lambda x: "cuda (widen + prefill")
        with pytest.raises(WrongResult, match=f"{name} is wrong in"):
            layer.check(name, x)  # the CPU does not round the numbers
        layer.device = torch.device("cuda")
        assert layer._backend_a16(name) == backend


def test_unknown_provider():
    shape = Shape("", "", 8, 16)
    with pytest.raises(ValueError, match="expected a provider in .*got 'w1a1'"):
        layers8.Layer8(shape, "int8", torch.bfloat16, torch.device("cpu"), ("w1a1",))


# ---- tables --------------------------------------------------------------------------------------


def test_ratios_take_the_faster_dense_peer_and_the_newest_campaign():
    records = [
        entry("w8a8", 99.0, campaign="c0"),
        entry("w8a8", 10.0),
        entry("w8a8+quantize", 12.5),
        entry("w8a16", 8.0),
        entry("scaled_mm", 20.0),
        entry("scaled_mm fast", 15.0),
        entry("cusparselt", 9.0),
        entry("dense", 30.0),
    ]
    (cell,) = results8.cells(records)
    assert results8.ratio(cell, "W8A8", "dense 8-bit") == 1.5
    assert results8.ratio(cell, "W8A8 with quantisation", "cuBLAS 16-bit") == 2.4
    assert results8.ratio(cell, "W8A16", "2:4 16-bit") is None
    ((_, ours, peer, value),) = results8.losses([cell])
    assert (ours, peer, value) == ("W8A8", "cuSPARSELt", 0.9)
    assert results8.compared([cell]) == 6
    lines = results8.summary(records)
    assert "float8_e4m3fn W8A8, tokens 1-16: 1.500 x dense 8-bit in the geometric mean of 1" in (
        " ".join(lines)
    )
    assert "slower than a peer in 1 of 6 comparisons" in lines


def test_results_begin_with_the_losses():
    records = [entry("w8a8", 10.0), entry("cusparselt", 9.0), entry("dense", 30.0)]
    records += [entry("w8a8", 20.0, tokens=64), entry("dense", 30.0, tokens=64)]
    text = table.render(records)
    head, _, rest = text.partition("**Linear layers with quantised 2:4 weights**")
    assert "**Where we lose**, GPU X" in head
    assert "Quantised layers: in 1 of 3 comparisons" in head
    assert "| 64x32 | 16 | float8_e4m3fn | W8A8 | cuSPARSELt | 0.900 |" in head
    assert "W8A8, float8_e4m3fn: time of cuSPARSELt / cuBLAS 16-bit over ours" in rest
    assert "| 64x32 | 0.90 / 3.00 (10.0) | - / 1.50 (20.0) |" in rest
    assert results8.losses_table([]) is None
    nothing = table.render([entry("w8a8", 10.0), entry("dense", 30.0)])
    assert "Quantised layers: in 0 of 1 comparisons." in nothing


# ---- activations ---------------------------------------------------------------------------------


def test_dry_run_of_activations(tmp_path):
    out = tmp_path / "r.jsonl"
    options = [*COMMON, "--tokens", "1,3", "--features", "64,100", "--out", str(out)]
    assert bench_activations.main(out, options) == 0
    found = record.read(out)
    assert len(found) == 4 * 2 * 2 * 2
    norms = [e for e in found if e["case"].startswith("norm")]
    assert len(norms) == 16 and all("of_rms_norm" in e["metrics"] for e in norms)
    assert all(e["metrics"]["us"] > 0 and e["check"] == "exact+bounded" for e in found)
    assert "Quantising activations" in table.render([{**e, "dirty": False} for e in found])


@pytest.mark.parametrize("source", bench_activations.SOURCES)
@pytest.mark.parametrize("what", ["q", "scale", "y"])
def test_activations_that_are_wrong_are_not_timed(source, what, tmp_path, capsys, monkeypatch):
    if what == "y" and source == "plain":
        pytest.skip("y is x")
    true = bench_activations._ours

    def ours(*arguments):
        call = true(*arguments)

        def wrong(with_y):
            q, scale, y = call(with_y)
            if what == "y":
                y = y * 1.05
                q, scale = rows.quantize_torch(y, "int8")
            changed = {"q": q, "scale": scale, "y": y}[what]
            if what != "y":
                changed[0] = changed[0] + 1
            return q, scale, y

        return wrong

    monkeypatch.setattr(bench_activations, "_ours", ours)
    out = tmp_path / "r.jsonl"
    options = [*COMMON, "--tokens", "2", "--features", "64", "--storage", "int8", "--out", str(out)]
    assert bench_activations.main(out, [*options, "--sources", source]) == 1
    assert "FAILED" in capsys.readouterr().out and not out.exists()
