"""What the benchmarks share: shapes, time budget, results and their tables, checks of outputs, and
every benchmark as a dry run on the CPU. Fake records stand in for an H100."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

from bench import (  # noqa: E402
    __main__ as entry,
)
from bench import (  # noqa: E402
    bench_compress,
    bench_linear,
    bench_overhead,
    cusparselt,
    engines,
    headline,
    layers,
    monitor,
    options,
    record,
    recovery_table,
    results,
    shapes,
    sweep,
    table,
)

ENV = {
    "schema": 1,
    "time": "2026-01-01T00:00:00Z",
    "git": "a" * 40,
    "dirty": False,
    "gpu": "GPU X",
    "torch": "2.9",
}


# ---- shapes and options --------------------------------------------------------------------------


def test_select_shapes():
    assert [str(s) for s in shapes.select("8b", "decode")] == [
        "6144x4096",
        "4096x4096",
        "28672x4096",
        "4096x14336",
    ]
    assert len(shapes.select(None, "decode")) == 13 and len(shapes.select(None, "prefill")) == 8
    assert [s.layer for s in shapes.select("3b", "prefill")] == ["qkv", "o", "gate+up", "down"]
    assert [str(s) for s in shapes.select(None, "decode", True)] == list(shapes.QUICK_SHAPES)
    found = shapes.select("4096x4096,100x64,8b", "prefill")
    assert [str(s) for s in found][:2] == ["4096x4096", "100x64"] and len(found) == 5
    assert found[0].model == "8b" and found[1].model == ""
    with pytest.raises(ValueError, match="8b, 70b, 3b, 1b or OUTxIN, got '7b'"):
        shapes.select("7b", "decode")


def test_token_counts():
    assert shapes.token_counts("1,64", "prefill") == (1, 64)
    assert shapes.token_counts(None, "decode") == shapes.DECODE_TOKENS
    assert shapes.token_counts(None, "prefill")[-1] == 16384
    assert set(shapes.token_counts(None, "prefill", True)) < set(shapes.PREFILL_TOKENS)


def make_run(path, *arguments):
    parser = options.parser("x", "text", budget=50)
    return options.Run(path, parser.parse_args(["--device", "cpu", *arguments]))


def test_a_run_knows_what_its_campaign_has_measured(tmp_path):
    path = tmp_path / "r.jsonl"
    run = make_run(path, "--campaign", "c1")
    case = dict(op="linear", out_features=8, in_features=4, tokens=1, dtype="bfloat16")
    assert not run.has(**case) and 49 < run.left <= 50
    written = run.add(**case, backend="cuda", check="exact", us={"p50": 1.0})
    assert run.has(**case) and not run.has(**{**case, "tokens": 2})
    assert written["campaign"] == "c1" and record.read(path) == [written] == run.records
    assert make_run(path, "--campaign", "c1").has(**case)
    assert not make_run(path, "--campaign", "c2").has(**case)
    assert not make_run(path).has(**case)


def test_out_overrides_the_path_and_a_gpu_must_be_there(tmp_path):
    assert make_run("a", "--out", str(tmp_path / "b")).path == tmp_path / "b"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="expected a CUDA GPU, got none"):
            options.Run("a", options.parser("x", "text", 1).parse_args([]))


def test_watchdog_ends_a_process_that_does_not_return():
    code = (
        "import time; from bench.options import watchdog\n"
        "with watchdog(60): pass\n"
        "with watchdog(0.2): time.sleep(3600)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Timeout" in done.stderr


def test_options_go_to_one_benchmark(capsys):
    assert entry.main(["linear", "compress", "--quick"]) == 2
    assert entry.main(["--quick"]) == 2
    assert "options go to one benchmark" in capsys.readouterr().out
    names = {"compat", "compress", "decode_model", "dense_mma", "hosttime", "linear", "overhead"}
    names |= {"finetune", "generate", "lora", "serve", "prune", "training", "vllm"}
    names |= {"activations", "layers8", "quality", "quantize", "random"}
    assert set(entry.names()) == names


def test_monitor_reads_what_nvidia_smi_prints():
    lines = "1500, 2600, 400.5, 60\\n[N/A], 1, 2, 3\\n1600, 2600, 500.5, 62\\n"
    with monitor.Monitor() as reader:
        reader._start([sys.executable, "-c", f"print('{lines}', end='')"])
        reader._thread.join(10)
        assert reader.medians() == {
            "clock_sm_mhz": 1550,
            "clock_mem_mhz": 2600,
            "power_draw_w": 450.5,
            "temperature_c": 61,
        }
        reader.clear()
        assert reader.medians()["clock_sm_mhz"] == 1600, "the last line"
    assert monitor.Monitor().medians() == {}, "no line, and no nvidia-smi to ask"


def test_a_large_grid_gets_the_seconds_that_are_asked_for():
    default, quick = (bench_linear.stop_rule("prefill", flag) for flag in (False, True))
    asked = bench_linear.stop_rule("prefill", False, 0.05)
    assert asked.min_s == asked.budget_s == 0.05 < quick.min_s < default.min_s


# ---- results and tables --------------------------------------------------------------------------


def timings(shape, tokens, dtype="bfloat16", campaign="c1", **us):
    out_features, _, in_features = shape.partition("x")
    return [
        {
            **ENV,
            "id": f"{shape}{tokens}{dtype}{name}{campaign}",
            "op": "linear",
            "backend": name,
            "check": "exact+bounded",
            "out_features": int(out_features),
            "campaign": campaign,
            "in_features": int(in_features),
            "tokens": tokens,
            "dtype": dtype,
            "us": {"p50": value},
            "bytes": 10**8,
        }
        for name, value in us.items()
    ]


RECORDS = [
    *timings("4096x4096", 1, cuda=10.0, dense=16.0, cusparselt=22.0),
    *timings("4096x4096", 64, cuda=20.0, dense=16.0, cusparselt=22.0, triton=32.0),
    *timings("4096x4096", 1024, cuda=30.0, dense=45.0, cusparselt=29.7),
    *timings("8192x8192", 1024, cuda=100.0, dense=160.0, cusparselt=110.0),
    *timings("8192x8192", 1024, dtype="float16", cuda=100.0, dense=170.0),
]


def test_cells_ratios_and_rates():
    first, second, *_, last = results.cells(RECORDS)
    assert str(first) == "4096x4096, 1 tokens, bfloat16"
    assert first.ratio("dense") == pytest.approx(1.6)
    assert first.ratio("cusparselt") == pytest.approx(2.2)
    assert first.tb_s() == pytest.approx(10.0)
    assert second.ratio("dense", "triton") == pytest.approx(0.5)
    assert last.dtype == "float16" and last.ratio("cusparselt") is None
    assert last.tflops() == pytest.approx(2 * 1024 * 8192 * 8192 / 100e-6 / 1e12)


def test_cells_show_the_newest_campaign_alone():
    newer = timings("4096x4096", 1, campaign="c2", cuda=8.0)
    cell = results.cells([*RECORDS, *newer])[0]
    assert cell.us() == 8.0 and cell.ratio("dense") is None and cell.campaign == "c2"


def test_losses_come_worst_first():
    lost = results.losses(results.cells(RECORDS))
    assert [(c.tokens, peer, round(r, 2)) for c, peer, r in lost] == [
        (64, "dense", 0.80),
        (1024, "cusparselt", 0.99),
    ]


def test_summary_of_a_run():
    lines = results.summary(results.cells(RECORDS), read_tb_s=12.5)
    assert (
        "bfloat16, tokens 1-16: 1.600 x cuBLAS in the geometric mean of 1 cells, worst 1.600 "
        "(4096x4096, 1)"
    ) in lines
    mean = (1.5 * 1.6) ** 0.5
    assert any(line.startswith(f"bfloat16, tokens > 512: {mean:.3f} x cuBLAS") for line in lines)
    assert (
        "most bytes per second: 10.00 TB/s, 80% of the measured read (4096x4096, 1 tokens, "
        "bfloat16)" in lines
    )
    assert lines[-3:] == [
        "slower than a peer in 2 of 9 comparisons",
        "  0.800 x cuBLAS: 4096x4096, 64 tokens, bfloat16",
        "  0.990 x cuSPARSELt: 4096x4096, 1024 tokens, bfloat16",
    ]
    assert results.summary([]) == ["slower than a peer in 0 of 0 comparisons"]


def test_linear_tables_begin_with_what_is_lost():
    text = table.render(RECORDS)
    assert text.splitlines() == [
        "**Where we lose**, GPU X",
        "",
        "Linear layers: in 2 of 9 comparisons, 1 times to cuBLAS and 1 times to cuSPARSELt",
        "",
        "| out x in | tokens | dtype | faster | its time / ours |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 4096x4096 | 64 | bfloat16 | cuBLAS | 0.800 |",
        "| 4096x4096 | 1024 | bfloat16 | cuSPARSELt | 0.990 |",
        "",
        "The Triton kernel is slower than cuBLAS in 1 of 1 comparisons, 0.50 to 0.50.",
        "",
        f"**Linear layers**, GPU X, torch 2.9, git {'a' * 10}",
        "",
        "decode, bfloat16: time of cuBLAS / cuSPARSELt over ours",
        "",
        "| out x in | 1 token | 64 |",
        "| --- | ---: | ---: |",
        "| 4096x4096 | 1.60 / 2.20 | 0.80 / 1.10 |",
        "",
        "Triton kernels, bfloat16: the same for the portable kernels",
        "",
        "| out x in | 64 tokens |",
        "| --- | ---: |",
        "| 4096x4096 | 0.50 / 0.69 |",
        "",
        "prefill, bfloat16: the same, and (dense-equivalent TFLOPS)",
        "",
        "| out x in | 1024 tokens |",
        "| --- | ---: |",
        "| 4096x4096 | 1.50 / 0.99 (1145) |",
        "| 8192x8192 | 1.60 / 1.10 (1374) |",
        "",
        "prefill, float16: the same, and (dense-equivalent TFLOPS)",
        "",
        "| out x in | 1024 tokens |",
        "| --- | ---: |",
        "| 8192x8192 | 1.70 / - (1374) |",
        "",
        'Medians of campaigns c1; "-": not timed.',
    ]


def test_headline_gives_means_and_extremes_of_one_gpu():
    models = [
        {
            **ENV,
            "id": f"m{case}{name}",
            "op": "decode_model",
            "backend": name,
            "campaign": "c1",
            "case": f"8b, 2 layers, batch {case}, context 64",
            "metrics": {"tokens_s": tokens_s, "speedup": tokens_s / 100, "weights_gb": 10.0},
        }
        for case in (8, 1)
        for name, tokens_s in (("dense", 100.0), ("sparse", 140.0), ("s2", 151.0))
    ]
    other = [{**entry, "gpu": "GPU Y", "id": f"y{entry['id']}"} for entry in RECORDS[:2]]
    text = headline.render([*other, *RECORDS, *models])
    assert "one GPU X in bfloat16" in text and "GPU Y" not in text
    assert "| 1 to 1 tokens | 1.60 (1.60 to 1.60) | 2.20 (2.20 to 2.20) |" in text
    assert "| 17 to 64 tokens | 0.80 (0.80 to 0.80) | 1.10 (1.10 to 1.10) |" in text
    mean = (0.99 * 1.1) ** 0.5
    assert f"| 513 to 1024 tokens | 1.55 (1.50 to 1.60) | {mean:.2f} (0.99 to 1.10) |" in text
    assert "(batch 1, context 64): 151 instead of 100 tokens/s, 1.51 times" in text
    assert "cuBLAS is faster in 1 of 4 cells, at worst 0.80" in text
    assert headline.render([{**entry, "dirty": True} for entry in RECORDS]) == ""


def engine(backend, case, tokens_s, campaign, **details):
    return {
        **ENV,
        "id": f"{backend}{case}{campaign}",
        "op": "vllm",
        "backend": backend,
        "campaign": campaign,
        "case": f"8b, 2 layers, {case}",
        "metrics": {"tokens_s": tokens_s},
        "details": {"vllm": "0.24.0", **details},
    }


def test_engines_are_compared_within_one_campaign():
    old = [engine("dense", "batch 1", 50.0, "c1"), engine("sparse", "batch 1", 75.0, "c1")]
    old += [engine("sparse-fp8", "batch 1", 500.0, "c1")]
    new = [
        engine("dense", "batch 1", 100.0, "c2", weights_gb=16.0),
        engine("fp8", "batch 1", 140.0, "c2", weights_gb=10.0),
        engine("sparse-fp8", "batch 1", 126.0, "c2", weights_gb=6.0),
    ]
    first, second = engines.campaigns([*old, *new])
    assert (first.name, second.name) == ("c2", "c1")
    assert [e.name for e in engines.campaigns([*old[::2], *new])] == ["c2"]
    header, rows = first.table()
    assert header == ["engine", "weights, GB", "batch 1"]
    assert rows[2:] == [
        ["2:4 fp8", "6.0", "126 (1.26)"],
        ["2:4 fp8 over dense fp8", "0.60 x", "0.90"],
    ]
    assert first.losses() == [("sparse-fp8", "fp8", "8b, 2 layers, batch 1", 0.9)]
    text = table.render([*old, *new])
    head, _, rest = text.partition("**A real vLLM")
    assert "| 8b, 2 layers, batch 1 | 2:4 fp8 | dense fp8 (vLLM's own) | 0.900 |" in head
    assert rest.count("| 2:4 bfloat16 |") == 1 and "| 75 (1.50) |" in rest
    lines = headline._engines([*old, *new])
    assert "| 2:4 bfloat16 |  | 1.50 x |" in lines and "| 2:4 fp8 | 6.0 GB | 1.26 x |" in lines
    assert lines[-1] == "| **2:4 fp8 over dense fp8** |  | 0.90 x |"
    two = [engine(name, "2 GPUs, batch 1", 200.0, "c3") for name in ("dense", "sparse")]
    assert [e.gpus for e in engines.campaigns([*new, *two])] == [2, 1]
    assert headline._engines([*old, *new, *two]) == lines, "one GPU, whatever is newer"


def test_headline_shows_8_bit_layers_in_two_lines():
    def of(tokens, **us):
        return [
            {**entry, "op": "linear8", "dtype": "float8_e4m3fn"}
            for name, value in us.items()
            for entry in timings("4096x4096", tokens, **{name: value})
        ]

    found = of(64, w8a16=20.0, cuda=12.0, scaled_mm=16.0, dense=30.0)
    found += of(1024, w8a8=10.0, scaled_mm=14.0, dense=25.0)
    assert headline._layers_8_bits(found)[-2:] == [
        "| 1 to 64 tokens, x kept in 16 bits | 0.80 (0.80 to 0.80) | 1.50 (1.50 to 1.50) |",
        "| 65 to 1024 tokens, x of fp8 | 1.40 (1.40 to 1.40) | 2.50 (2.50 to 2.50) |",
    ]
    assert (
        "x kept in 16 bits (backend `cuda-a16`) at 33 to 64 tokens run at 0.60"
        in headline._lost_8_bits(found)
    )
    assert headline._layers_8_bits([]) == [] and headline._lost_8_bits([]) == ""


def test_losses_table_without_losses_and_with_many(monkeypatch):
    assert "Linear layers: in none of 2 comparisons." in table.render(RECORDS[:3])
    monkeypatch.setattr(table, "MAX_LOSSES", 0)
    text = table.render(RECORDS)
    assert "in 2 of 9 comparisons" in text and "1 times to cuSPARSELt, of which the worst 0" in text
    assert "| 0.800 |" in text and "| 0.990 |" not in text


def test_sections_come_in_order_and_sweeps_stay_out():
    def result(op):
        return {
            **ENV,
            "id": op,
            "op": op,
            "backend": "b",
            "check": "exact",
            "case": "c",
            "metrics": {"perplexity": 94.56, "logits": "equal"},
        }

    hidden = {**timings("4096x4096", 1, cuda=1.0)[0], "op": "linear_config"}
    others = [result("zzz"), result("compress"), result("prune_model")]
    text = table.render([*others, hidden, *RECORDS])
    titles = [line.split("**")[1] for line in text.splitlines() if line.startswith("**")]
    assert titles == ["Where we lose", "Linear layers", "Pruning", "Compression", "zzz"]
    assert "| c | b | 94.56 | equal | prune_model |" in text


def test_sweep_judges_the_pick():
    near = sweep.judge("8x8", 128, "b", {"a": 10.0, "b": 10.5})
    far = sweep.judge("8x8", 256, "a", {"a": 12.0, "b": 10.0})
    unknown = sweep.judge("8x8", 512, "c", {"a": 12.0})
    assert near["gap"] == pytest.approx(0.05) and near["best"] == "a"
    lines = sweep.summary([near, far, unknown])
    assert lines[0] == "picked config: 12.50% from the best on average, 20.00% at worst"
    assert lines[1].strip() == "8x8, 256 tokens: b 10.0, a 12.0 us; picked a: +20.0%"
    assert lines[-1] == "best most often: a (2), b (1)"
    assert sweep.summary([unknown]) == ["no cell where the picked config was timed"]


# ---- checks of outputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checks_see_one_wrong_element(dtype):
    layer = layers.Layer(
        shapes.Shape("", "", 96, 512), dtype, torch.device("cpu"), ("cpu", "dense")
    )
    x = layer.inputs(33)
    assert layer.check("cpu", x) == "exact+bounded" and layer.check("dense", x) == "bounded"

    provider = layer.providers["cpu"]
    y = provider.call(x, 0)
    wanted = "cpu is wrong in 1 of 3168 elements; first at token 7, out_feature 95"
    for change in (0.02, float("nan")):
        wrong = y.clone()
        wrong[7, 95] += change * (1 + wrong[7, 95].abs())
        with pytest.raises(layers.WrongResult, match=wanted):
            layers.check_bounded("cpu", wrong, x, provider.weight, layers.OURS_SLACK)
    integers = layer.inputs(33, integers=True)
    exact = torch.nn.functional.linear(integers.float(), layer._integer_weight.float()).to(dtype)
    layers.check_exact("cpu", exact, integers, layer._integer_weight)
    exact[7, 95] = torch.nextafter(exact[7, 95], exact.new_tensor(1e4))
    with pytest.raises(layers.WrongResult, match=wanted):
        layers.check_exact("cpu", exact, integers, layer._integer_weight)


def test_checks_go_through_blocks(monkeypatch):
    monkeypatch.setattr(layers, "REFERENCE_ELEMENTS", 64 * 10)
    x, weight = torch.randn(3, 64), torch.randn(25, 64)
    blocks = [columns for columns, _ in layers.reference_blocks(x, weight)]
    assert [(c.start, c.stop) for c in blocks] == [(0, 10), (10, 20), (20, 30)]
    layers.check_bounded("a", x @ weight.t(), x, weight, 2.0**-20)


def test_unknown_provider():
    with pytest.raises(ValueError, match="expected a provider in .* got 'blas'"):
        layers.Layer(shapes.Shape("", "", 8, 8), torch.float32, torch.device("cpu"), ("blas",))


def test_probe_says_what_the_child_said(monkeypatch):
    assert cusparselt.last_error("Traceback\n  x\nAcceleratorError: illegal instruction\n", 1) == (
        "AcceleratorError: illegal instruction"
    )
    assert cusparselt.last_error("", -6) == "exit code -6"
    if not torch.cuda.is_available():
        assert cusparselt.probe(torch.float16) == "Error: no CUDA GPU that torch can use"
    monkeypatch.setattr(cusparselt.sys, "executable", "/bin/false")
    assert cusparselt.probe(torch.float16) == "exit code 1"


def test_padding_for_the_vendor():
    assert cusparselt.padded(torch.ones(1, 4)).tolist() == [[1] * 4] + [[0] * 4] * 7
    x = torch.ones(16, 4)
    assert cusparselt.padded(x) is x
    assert str(cusparselt.Algorithm(3)) == "alg 3"
    assert str(cusparselt.Algorithm(3, 2, 1)) == "alg 3 split_k 2 mode 1"


# ---- dry runs on the CPU -------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dry_run_of_linear(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    arguments = [
        "--device",
        "cpu",
        "--quick",
        "--kind",
        "decode",
        "--dtype",
        "bfloat16",
        "--shapes",
        "64x128",
        "--tokens",
        "1,9",
        "--providers",
        "cpu,dense,cusparselt",
        "--campaign",
        "c",
    ]
    assert bench_linear.main(path, arguments) == 0
    found = lines_of(path)
    assert [e["op"] for e in found] == ["bandwidth"] + ["linear"] * 4
    assert [(e["tokens"], e["backend"], e["check"]) for e in found[1:]] == [
        (1, "cpu", "exact+bounded"),
        (1, "dense", "bounded"),
        (9, "cpu", "exact+bounded"),
        (9, "dense", "bounded"),
    ]
    assert all(e["us"]["p50"] > 0 and e["timer"] == "wall" for e in found[1:])
    assert found[1]["bytes"] < found[2]["bytes"]
    assert bench_linear.main(path, arguments) == 0  # of this campaign nothing is left to measure
    assert [e["op"] for e in lines_of(path)[5:]] == ["bandwidth"]
    assert "cuSPARSELt is not compared in bfloat16" in capsys.readouterr().out


def test_linear_reports_a_wrong_result_and_goes_on(tmp_path, capsys, monkeypatch):
    def wrong_at_nine(x, w24, **_):
        return x.new_zeros(9, w24.shape[0]) if len(x) == 9 else real(x, w24)

    real = layers.ops.linear
    monkeypatch.setattr(layers.ops, "linear", wrong_at_nine)
    path = tmp_path / "r.jsonl"
    arguments = [
        "--device",
        "cpu",
        "--quick",
        "--kind",
        "decode",
        "--dtype",
        "bfloat16",
        "--shapes",
        "64x128",
        "--tokens",
        "9,1",
        "--providers",
        "cpu,dense",
    ]
    assert bench_linear.main(path, arguments) == 1
    assert [e["tokens"] for e in lines_of(path) if e["op"] == "linear"] == [1, 1]
    assert "FAILED 64x128 9 tokens bfloat16: bench: cpu is wrong in" in capsys.readouterr().out


@pytest.fixture
def stand_ins(monkeypatch):
    """The CPU computes what "cuda" and "cusparselt" would, so that all their plumbing runs."""
    from sparsekern.backends.cuda import linear as cuda_backend

    def unpacked(x, w24, bias, activation):
        assert w24.layout == "tile64"
        return layers.ops.linear(x, w24.rowmajor(), backend="cpu")

    monkeypatch.setattr(layers._native, "available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda_backend, "linear", unpacked)
    monkeypatch.setattr(cuda_backend, "config", lambda x, w24: "decode split 2")
    monkeypatch.setattr(cusparselt, "available", lambda: "")
    monkeypatch.setattr(cusparselt, "compress", lambda pruned: pruned.clone())
    monkeypatch.setattr(cusparselt, "search", lambda *_: cusparselt.Algorithm(5))
    monkeypatch.setattr(cusparselt, "linear", lambda w, x, algorithm: x @ w.t())


LINEAR = ["--device", "cpu", "--quick", "--kind", "decode", "--shapes", "64x128", "--tokens", "3,8"]


def test_linear_with_all_providers(tmp_path, capsys, stand_ins, monkeypatch):
    monkeypatch.setattr(cusparselt, "probe", lambda dtype: "illegal instruction")
    path = tmp_path / "r.jsonl"
    assert bench_linear.main(path, LINEAR) == 0
    found = lines_of(path)
    half = [e["backend"] for e in found if e.get("dtype") == "float16"]
    assert half == ["cuda", "dense"] * 2
    peer = next(e for e in found if e["op"] == "linear_peer")
    assert peer["case"] == "float16" and peer["metrics"] == {"outcome": "illegal instruction"}
    by_name = {e["backend"]: e for e in found if e.get("dtype") == "bfloat16"}
    assert {name: e["config"] for name, e in by_name.items()} == {
        "cuda": "decode split 2",
        "dense": "",
        "cusparselt": "alg 5",
    }
    # x and y of 8 tokens, and a weight of 64 x 128: dense, and 9/16 of it packed
    assert by_name["dense"]["bytes"] == 2 * (8 * 128 + 8 * 64 + 64 * 128)
    assert by_name["cuda"]["bytes"] == 2 * (8 * 128 + 8 * 64) + 64 * 128 * 9 // 8
    out = capsys.readouterr().out
    assert "bfloat16, tokens 1-16:" in out and "x cuSPARSELt in the geometric mean of 2" in out


def test_sweep_times_every_config_and_drops_a_wrong_one(
    tmp_path, capsys, stand_ins, monkeypatch, request
):
    from sparsekern.backends.cuda import linear as cuda_backend

    types = [("bfloat16",) * 3]

    class Native:
        """The functions that the sweep calls; config 3 of decode is wrong."""

        kernels = staticmethod(
            lambda: {
                "decode": [
                    {"index": i, "rows": 256, "split": split, "paired": 0, "types": types}
                    for i, split in ((1, 1), (2, 2), (3, 4))
                ],
                "prefill": [
                    {
                        "index": 0,
                        "rows": 256,
                        "tokens": 192,
                        "cluster_rows": 2,
                        "cluster_tokens": 1,
                        "streamed": False,
                        "promoted": False,
                        "types": types,
                    }
                ],
                "mma": [
                    {
                        "index": 0,
                        "rows": 64,
                        "tokens": 8,
                        "warps_rows": 2,
                        "warps_tokens": 1,
                        "split": 4,
                        "stages": 4,
                        "types": types,
                    }
                ],
                "split": [],
            }
        )
        prefill_workspace_bytes = staticmethod(lambda: 16)

    def launch(space, kind, index, x, w24):
        assert space.numel() == 16
        assert kind in ("mma", "decode" if len(x) <= 64 else "prefill")
        y = layers.ops.linear(x, w24.rowmajor(), backend="cpu")
        return y + 1 if index == 3 else y

    monkeypatch.setattr(layers._native, "module", lambda: Native)
    picks = {3: "decode 256 rows, split 1", 65: "prefill 256x192 cluster 2x1"}
    monkeypatch.setattr(cuda_backend, "config", lambda x, w24: picks[len(x)])
    for cached in (cuda_backend._tiles, cuda_backend._mma_tiles, cuda_backend.variants):
        cached.cache_clear()
        request.addfinalizer(cached.cache_clear)
    monkeypatch.setattr(sweep, "launch", launch)
    path = tmp_path / "r.jsonl"
    arguments = [*LINEAR[:-1], "3,65", "--dtype", "bfloat16", "--sweep"]
    assert bench_linear.main(path, arguments) == 1
    names = [(e["tokens"], e["backend"], e["picked"]) for e in lines_of(path)]
    assert names == [
        (3, "decode 256 rows, split 1", True),
        (3, "decode 256 rows, split 2", False),
        (65, "prefill 256x192 cluster 2x1", True),
    ]
    out = capsys.readouterr().out
    assert "picked config: " in out
    assert "FAILED 64x128 3 tokens decode 256 rows, split 4: bench: " in out
    assert set(sweep.configs(32)) == {n for _, n, _ in names} | {"decode 256 rows, split 4"}
    monkeypatch.setattr(cuda_backend, "mma_config", lambda x, w24: "mma 64x8, 2x1x4 warps")
    assert bench_linear.main(tmp_path / "mma.jsonl", [*arguments, "mma"]) == 0
    names = [(e["tokens"], e["backend"], e["picked"]) for e in lines_of(tmp_path / "mma.jsonl")]
    assert names == [(tokens, "mma 64x8, 2x1x4 warps", True) for tokens in (3, 65)]
    picks[3] = "mma 64x8, 2x1x4 warps"  # by heuristics: beside decode on Hopper, elsewhere alone
    for refusal, decode in (("", 2), ("no Hopper", 0)):
        monkeypatch.setattr(cuda_backend, "hopper_refusal", lambda index, text=refusal: text)
        path = tmp_path / f"picked {decode}.jsonl"
        bench_linear.main(path, [*LINEAR[:-1], "3", "--dtype", "bfloat16", "--sweep"])
        found = [(e["backend"].split()[0], e["picked"]) for e in lines_of(path)]
        assert found == [("decode", False)] * decode + [("mma", True)]


def test_sweep_passes_what_the_module_takes(monkeypatch):
    """The stub file says which parts the fixed part of a launch and its call have."""
    import inspect

    stub = (ROOT / "sparsekern" / "_C.pyi").read_text()
    declared = {}
    exec(stub.replace("from typing import", "TypedDict = object\nfrom typing import"), declared)
    made, called = (
        inspect.signature(getattr(declared["Linear"], name)) for name in ("__init__", "__call__")
    )
    calls = []

    class Native:
        class Linear:
            def __init__(self, **fixed):
                calls.append(made.bind(self, **fixed).arguments)

            def __call__(self, **addresses):
                calls.append(called.bind(self, **addresses).arguments)

    stream = type("Stream", (), {"cuda_stream": 77})
    monkeypatch.setattr(layers._native, "module", lambda: Native)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    weight = layers.prune_compress(torch.randn(64, 128).to(torch.bfloat16))
    x, space = torch.randn(3, 128).to(torch.bfloat16), torch.zeros(16, dtype=torch.uint8)
    for kind in ("decode", "prefill", "mma"):
        y = sweep.launch(space, kind, 5, x, weight)
        fixed, addresses = calls[-2:]
        assert fixed.pop("self") is addresses.pop("self")
        assert fixed == dict(
            kernel=kind,
            config=5,
            tokens=3,
            out_features=64,
            in_features=128,
            x_stride=128,
            y_stride=64,
            dtype="bfloat16",
        )
        assert addresses == dict(
            x=x.data_ptr(),
            values=weight.values.data_ptr(),
            metadata=weight.metadata.data_ptr(),
            y=y.data_ptr(),
            workspace=space.data_ptr(),
            stream=77,
        )


def test_linear_stops_when_the_gpu_context_is_lost(tmp_path, capsys, stand_ins, monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(layers.Layer, "check", lost)
    assert bench_linear.main(tmp_path / "r.jsonl", [*LINEAR, "--dtype", "bfloat16"]) == 1
    out = capsys.readouterr().out
    assert "FAILED 64x128 decode bfloat16 3 tokens: CUDA error: an illegal" in out
    assert "not measured: 64x128 decode bfloat16 8 tokens" in out


def test_linear_begins_nothing_when_the_time_is_up(tmp_path, capsys):
    arguments = [
        "--device",
        "cpu",
        "--quick",
        "--kind",
        "decode",
        "--dtype",
        "bfloat16",
        "--shapes",
        "64x128",
        "--tokens",
        "9",
        "--providers",
        "cpu",
        "--budget",
        "0",
    ]
    assert bench_linear.main(tmp_path / "r.jsonl", arguments) == 0
    out = capsys.readouterr().out
    assert "not measured: 64x128 decode bfloat16 9 tokens" in out


def test_dry_run_of_compress_and_overhead(tmp_path):
    path = tmp_path / "r.jsonl"
    common = ["--device", "cpu", "--quick"]
    assert bench_compress.main(path, [*common, "--shape", "64x64"]) == 0
    compressed = lines_of(path)
    assert [e["case"] for e in compressed] == [
        "prune_compress, 64x64 bfloat16",
        "decompress, 64x64 bfloat16",
    ]
    metrics = compressed[0]["metrics"]
    assert metrics["bytes"] == 64 * 64 * (2 + 1) + 64 * 8
    assert set(metrics) == {"bytes", "us", "tb_s", "copy_tb_s", "fraction"}
    assert bench_overhead.main(path, [*common, "--shape", "32x64x2"]) == 0
    eager = [e for e in lines_of(path)[2:] if e["op"] == "eager_call"]
    calls = {e["backend"]: e["metrics"]["us_p50"] for e in eager}
    assert set(calls) == {"nn.Linear", "SparseLinear", "sparsekern.linear"}
    assert min(calls.values()) > 0
    public = {e["backend"]: e["us"]["p50"] for e in lines_of(path) if e["op"] == "public_call"}
    assert set(public) == {"dense", "SparseLinear", "sk.linear(x, sk.compress(w))"}
    assert min(public.values()) > 0


def test_compress_refuses_what_the_cpu_does_not_compute():
    weight = torch.randn(8, 16).to(torch.bfloat16)
    w24 = layers.prune_compress(weight)
    bench_compress.check_slice(weight, w24)
    w24.values[3, 5] += 1
    with pytest.raises(RuntimeError, match="expected equal values, got different ones"):
        bench_compress.check_slice(weight, w24)


def test_the_table_of_recovery_tells_losses_apart():
    def entry(minutes, perplexity, **settings):
        metrics = {"dense t": 20.0, "start t": 90.0, "perplexity t": perplexity}
        metrics |= {"minutes": minutes, "gpu_seconds": 60.0, "tokens": 1e6}
        details = {"seconds": {"prune": 6.0}}
        known = {"case": "c", "backend": "sparsegpt", "settings": settings}
        return known | {"metrics": metrics, "details": details}

    records = [
        entry(2.0, 31.0, alpha=0.5, block=0.0),
        entry(2.01, 30.5, alpha=0.5, block=0.0),  # the newest of its kind
        entry(2.0, 30.0, alpha=0.0, block=0.25),
        entry(2.0, 29.0, alpha=0.0, block=0.0),
        entry(3.0, 28.0, alpha=1.0, weight_decay=0.1),
    ]
    ((header, lines),) = recovery_table.rows(records).values()
    assert header == ["", "loss", "perplexity, t", "GPU minutes", "tokens trained on"]
    assert [line[1:3] for line in lines] == [
        ["", "20.00"],
        ["", "90.00"],
        ["KL", "29.00"],
        ["KL + 0.25 blocks", "30.00"],
        ["0.5 KL + 0.5 CE", "30.50"],
        ["CE, weight decay 0.1", "28.00"],
    ]
