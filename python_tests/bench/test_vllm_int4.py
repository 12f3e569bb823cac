"""Dense int4 peers of `bench layers8`: what is handed to vLLM's ops means the levels and scales
that results are checked against (ops that read vLLM's layouts on the CPU stand in), what they
refuse is left out and said, and what tables make of their times."""

import subprocess
import sys
import types

import pytest
import torch

from bench import bench_layers8, layers8, record, results8, table, vllm_int4
from bench.layers import WrongResult
from bench.shapes import Shape
from python_tests.bench.test_bench_layers8 import entry

KIND = "uint4b8"
SHAPE = Shape("", "", 64, 256)


def levels_of(words, in_features):
    """[in_features, out_features] of GPTQ's words [in_features / 8, out_features]."""
    rows = torch.arange(in_features, device=words.device)
    return ((words.long()[rows // 8] >> (4 * (rows % 8))[:, None]) & 15) - 8


def repack(words, perm, size_k, size_n, num_bits, is_a_8bit=False):
    assert num_bits == 4 and perm.numel() == 0 and perm.dtype == torch.int32
    assert words.is_contiguous() and words.shape == (size_k // 8, size_n)
    return levels_of(words, size_k).reshape(size_k // 16, -1)


def marlin_gemm(
    a, c, weight, bias, scales, a_scales, global_scale, zeros, g_idx, perm, locks, kind, **sizes
):
    n, k = sizes["size_n"], sizes["size_k"]
    assert kind == KIND and not locks.any() and zeros.numel() == g_idx.numel() == perm.numel() == 0
    assert (c, bias, a_scales, global_scale) == (None,) * 4
    assert sizes["size_m"] == len(a) and scales.shape == (k // 128, n)
    assert sizes["use_fp32_reduce"]
    true = torch.empty_like(scales)
    order = [64 * b + i + 8 * j for b in range(n // 64) for i in range(8) for j in range(8)]
    true[:, order] = scales
    return product(a, weight.reshape(k, n), true)


def prepack(words, a_type, kind, scales_type):
    assert kind == KIND and a_type == scales_type and words.stride() == (1, words.shape[0])
    return levels_of(words, words.shape[0] * 8)


def machete_mm(a, weight, b_type, b_group_scales, b_group_size):
    assert b_type == KIND and b_group_size == 128 and b_group_scales.is_contiguous()
    return product(a, weight, b_group_scales)


def product(a, levels, scales):
    return (a.float() @ (levels * scales.float().repeat_interleave(128, 0))).to(a.dtype)


@pytest.fixture
def ops(monkeypatch):
    """vLLM with ops of the CPU that read its layouts; benches do not measure the bandwidth."""
    monkeypatch.setattr(bench_layers8, "bandwidths", lambda run: None)
    package, custom, types_ = map(
        types.ModuleType, ("vllm", "vllm._custom_ops", "vllm.scalar_type")
    )
    package.__version__ = "0.24.0"
    package._custom_ops = custom
    types_.scalar_types = types.SimpleNamespace(uint4b8=KIND)
    custom.gptq_marlin_repack, custom.marlin_gemm = repack, marlin_gemm
    custom.machete_prepack_B, custom.machete_mm = prepack, machete_mm
    for module in (package, custom, types_):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in vllm_int4.SETTINGS:
        monkeypatch.setenv(name, "set")
    return custom


def layer(names=vllm_int4.NAMES, dtype=torch.bfloat16, shape=SHAPE):
    return layers8.Layer8(shape, "int4", dtype, torch.device("cpu"), names)


# ---- layouts -------------------------------------------------------------------------------------


def test_words_hold_eight_successive_in_features_lowest_nibble_first():
    levels = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7] + [0] * 8, [7] * 16], dtype=torch.int32)
    words = vllm_int4.gptq_words(levels)
    assert words.dtype == torch.int32 and words.is_contiguous()
    stored = [[0xFEA98710, 0x88888888], [0xFFFFFFFF] * 2]
    assert (words.long() & 0xFFFFFFFF).tolist() == stored
    some = torch.randint(-8, 8, (24, 64), dtype=torch.int32)
    assert torch.equal(levels_of(vllm_int4.gptq_words(some).t(), 64).t(), some)


def test_marlin_transposes_the_scales_of_64_out_features():
    scales = torch.arange(2 * 128).reshape(2, 128).t()  # [out_features, groups]
    order = [i + 8 * j for i in range(8) for j in range(8)]
    order += [64 + n for n in order]
    got = vllm_int4.marlin_scales(scales)
    assert got.is_contiguous() and torch.equal(got, scales.t()[:, order])
    for bad in (scales[:96], scales[:, :1]):
        with pytest.raises(ValueError, match="expected scales"):
            vllm_int4.marlin_scales(bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_are_symmetric_and_within_half_a_step(dtype):
    weight = torch.randn(5, 384).to(dtype)
    weight[2, 128:256] = 0
    levels, scales = vllm_int4.quantise(weight)
    assert levels.dtype == torch.int32 and scales.dtype == dtype and scales.shape == (5, 3)
    assert int(levels.min()) == -7 and int(levels.max()) == 7
    assert scales[2, 1] == 1 and not levels[2, 128:256].any()
    step = scales.float().repeat_interleave(128, 1)
    assert bool(((levels * step - weight.float()).abs() <= 0.53 * step).all())
    with pytest.raises(ValueError, match="in groups of 128, got 192"):
        vllm_int4.quantise(torch.ones(2, 192))


def test_layouts_are_those_of_vllm():
    pytest.importorskip("vllm", exc_type=ImportError)
    utils = "vllm.model_executor.layers.quantization.utils"
    marlin = pytest.importorskip(f"{utils}.marlin_utils", exc_type=ImportError)
    quant = pytest.importorskip(f"{utils}.quant_utils", exc_type=ImportError)
    levels, scales = vllm_int4.quantise(torch.randn(192, 384))
    words = quant.gptq_pack((levels + 8).t().contiguous(), 4, 384, 192)
    assert torch.equal(vllm_int4.gptq_words(levels).t(), words)
    theirs = marlin.marlin_permute_scales(scales.t().contiguous(), 384, 192, 128)
    assert torch.equal(vllm_int4.marlin_scales(scales), theirs)


# ---- the providers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", vllm_int4.NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ops_get_the_weight_that_results_are_checked_against(name, dtype, ops):
    made = layer(dtype=dtype)
    for tokens in (1, 70):
        x = made.inputs(tokens)
        assert made.check(name, x) == "bounded"
        (call,) = made.calls(name, x)
        assert call().shape == (tokens, 64) and call().dtype == dtype
    provider = made.providers[name]
    assert provider.config(x) == "vLLM 0.24.0" and not made.refused
    one = vllm_int4.make(name, provider.weight.to(dtype))
    copy = one.clone()
    assert copy.packed.data_ptr() != one.packed.data_ptr() and torch.equal(copy(x), one(x))
    assert one.nbytes == one.packed.nbytes + one.scales.nbytes == provider.bytes


@pytest.mark.parametrize("name", vllm_int4.NAMES)
@pytest.mark.parametrize("what", ["nibbles", "levels", "scales"])
def test_a_wrong_layout_is_seen(name, what, ops, monkeypatch):
    words = vllm_int4.gptq_words
    if what == "nibbles":
        monkeypatch.setattr(vllm_int4, "gptq_words", lambda q: words(q.flip(1)))
    elif what == "levels":
        monkeypatch.setattr(vllm_int4, "gptq_words", lambda q: words((q + 1).clamp(max=7)))
    elif name == "marlin":
        monkeypatch.setattr(vllm_int4, "marlin_scales", lambda s: s.t().contiguous())
    else:
        true = ops.machete_mm

        def wrong(a, weight, b_type, b_group_scales, b_group_size):
            return true(a, weight, b_type, b_group_scales.flip(0), b_group_size)

        monkeypatch.setattr(ops, "machete_mm", wrong)
    made = layer((name,))
    with pytest.raises(WrongResult, match=f"{name} is wrong in"):
        made.check(name, made.inputs(16))


def refuse(*arguments, **options):
    raise RuntimeError("no tile\nfor this shape")


def test_what_is_refused_is_left_out_and_said(ops, tmp_path, capsys, monkeypatch):
    names = ("w4a16", "marlin", "machete")
    monkeypatch.setattr(bench_layers8, "_providers", lambda *arguments: names)
    out = tmp_path / "r.jsonl"
    options = ["--device", "cpu", "--seconds", "0.01", "--tokens", "2", "--dtype", "int4"]
    options += ["--shapes", "64x256", "--out", str(out)]

    def timed():
        assert bench_layers8.main(out, options) == 0
        text = capsys.readouterr().out
        assert "FAILED" not in text
        found = {e["backend"] for e in record.read(out) if e["op"] == "linear8"}
        out.unlink()
        return found, text

    found, text = timed()
    assert found == set(names) and "x dense int4 in the geometric mean of 1 cells" in text
    monkeypatch.setattr(ops, "marlin_gemm", refuse)
    found, text = timed()
    assert found == {"w4a16", "machete"}
    assert "left out: 64x256 2 tokens int4, marlin: RuntimeError: no tile\n" in text
    monkeypatch.setattr(ops, "machete_prepack_B", refuse)
    found, text = timed()
    assert found == {"w4a16"}
    assert "64x256, vLLM's Machete is left out: RuntimeError: no tile\n" in text


def test_a_wrong_result_is_a_failure(ops, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_layers8, "_providers", lambda *arguments: ("w4a16", "machete"))
    monkeypatch.setattr(ops, "machete_mm", lambda a, *rest, **more: a[:, :64] * 0)
    out = tmp_path / "r.jsonl"
    options = ["--device", "cpu", "--seconds", "0.01", "--tokens", "2", "--dtype", "int4"]
    assert bench_layers8.main(out, [*options, "--shapes", "64x256", "--out", str(out)]) == 1
    assert "FAILED 64x256 2 tokens int4, machete: bench: machete is wrong" in (
        capsys.readouterr().out
    )


def test_a_lost_context_ends_the_run(ops, tmp_path, monkeypatch):
    def lost(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench_layers8, "_providers", lambda *arguments: ("w4a16", "marlin"))
    monkeypatch.setattr(ops, "marlin_gemm", lost)
    options = ["--device", "cpu", "--tokens", "2", "--dtype", "int4", "--shapes", "64x256"]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench_layers8.main(tmp_path / "r", [*options, "--out", str(tmp_path / "r")])


def test_shapes_outside_of_the_layouts_are_refused(ops):
    made = layer(shape=Shape("", "", 72, 256))
    assert "expected scales" in made.refused["marlin"]
    assert not made.takes("marlin", 1) and made.takes("machete", 1)


def test_a_vllm_without_the_ops_is_said(ops, monkeypatch):
    monkeypatch.delattr(ops, "gptq_marlin_repack")
    with pytest.raises(vllm_int4.Refused, match="AttributeError: .*gptq_marlin_repack"):
        vllm_int4.make("marlin", torch.randn(64, 256).half())
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(vllm_int4.Refused, match="Error: .*vllm"):
        vllm_int4.make("machete", torch.randn(64, 256).half())


# ---- a child process -----------------------------------------------------------------------------


def test_no_child_without_vllm(monkeypatch):
    monkeypatch.setattr(vllm_int4.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", refuse)
    reason = "vLLM is not installed"
    assert vllm_int4.probe(vllm_int4.NAMES, "float16") == {"marlin": reason, "machete": reason}


def test_each_kernel_has_its_own_child(monkeypatch):
    def run(command, **options):
        assert command[1:3] == ["-m", "bench.vllm_int4"] and command[4] == "float16"
        if command[3] == "slow":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        code = {"marlin": 0, "machete": -11}.get(command[3], 1)
        text = "Traceback\nbench.Refused: RuntimeError: why\n" if code == 1 else ""
        return subprocess.CompletedProcess(command, code, "", text)

    monkeypatch.setattr(vllm_int4.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", run)
    assert vllm_int4.probe(("marlin", "machete", "other", "slow"), "float16", 7) == {
        "marlin": "",
        "machete": "exit code -11",
        "other": "bench.Refused: RuntimeError: why",
        "slow": "no answer within 7 s",
    }


def test_what_fails_in_the_child_is_recorded_and_not_compared(monkeypatch):
    said, added = [], []
    run = types.SimpleNamespace(device=torch.device("cuda"), left=50.0, say=said.append)
    run.add = lambda **entry: added.append(entry)
    asked = []

    def probe(names, dtype, timeout):
        asked.append((tuple(names), dtype, timeout))
        return {name: "exit code -11" * (name == "machete") for name in names}

    monkeypatch.setattr(vllm_int4, "probe", probe)
    names = bench_layers8._providers(run, ("int4", "float16"), None)
    assert names == ("w4a16", "cuda", "dense", "marlin")
    assert asked == [(("marlin", "machete"), "float16", 25.0)]
    (entry,) = added
    assert entry["backend"] == "machete" and entry["metrics"] == {"outcome": "exit code -11"}
    assert said[-1] == "vLLM's Machete is not compared in int4: exit code -11"
    assert bench_layers8._providers(run, ("int4", "float16"), "w4a16,dense") == ("w4a16", "dense")
    assert len(asked) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_child_says_that_there_is_no_gpu(capsys):
    assert vllm_int4.main(["marlin", "float16", "64", "256", "1"]) == 3
    assert "Error: no CUDA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_vllm_computes_on_the_gpu(dtype):
    if vllm_int4.importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    found = vllm_int4.probe(vllm_int4.NAMES, dtype)
    if torch.cuda.get_device_capability() != (9, 0):
        found.pop("machete")
    assert set(found.values()) == {""}


# ---- tables --------------------------------------------------------------------------------------


def test_the_faster_dense_int4_kernel_is_the_peer():
    times = {("w4a16", 16): 10.0, ("marlin", 16): 15.0, ("machete", 16): 14.0, ("dense", 16): 40.0}
    times |= {("w4a16", 64): 10.0, ("marlin", 64): 9.0}
    records = [entry(name, us, tokens, "int4") for (name, tokens), us in times.items()]
    cells = results8.cells(records)
    assert [results8.ratio(c, "W4A16", "dense int4") for c in cells] == [1.4, 0.9]
    ((_, ours, peer, value),) = results8.losses(cells)
    assert (ours, peer, value) == ("W4A16", "dense int4", 0.9)
    lines = results8.summary(records)
    assert "int4 W4A16, tokens 1-16: 1.400 x dense int4 in the geometric mean of 1" in (
        " ".join(lines)
    )
    text = table.render(records)
    assert "| 64x32 | 64 | int4 | W4A16 | dense int4 | 0.900 |" in text
    assert "W4A16, int4: time of dense int4 / cuBLAS 16-bit over ours" in text
    assert "| 64x32 | 1.40 / 4.00 (10.0) | 0.90 / - (10.0) |" in text
