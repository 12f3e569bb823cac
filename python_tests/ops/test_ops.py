"""sparsekern.linear and explain: numbers, shapes, errors, choice of backend."""

import pytest
import torch

from python_tests.linear_cases import (
    ACTIVATIONS,
    DTYPES,
    PAIRS,
    SHAPES,
    assert_within,
    error_bound,
    random_input,
    random_weight,
)
from sparsekern import reference
from sparsekern.formats.sparse24 import compress
from sparsekern.ops import linear_op as ops
from sparsekern.ops.linear_op import explain, linear

# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_on_small_integers(shape, dtype, device):
    """Every product and partial sum is exact in float32: the result is the float64 one, rounded."""
    tokens, out_features, in_features = shape
    w = random_weight(out_features, in_features, dtype, integers=True)
    x = random_input((tokens, in_features), dtype, integers=True)
    bias = random_input((out_features,), dtype, seed=2, integers=True)
    for activation in (None, "relu"):
        y = linear(x.to(device), compress(w.to(device)), bias.to(device), activation)
        assert torch.equal(y.cpu(), reference.linear(x, w, bias, activation).to(dtype))


def test_every_pattern_alone(device):
    """Row p uses pattern p in every group, so a wrong nibble shows in its own row."""
    w = torch.zeros(6, 64)
    for row, (first, second) in enumerate(PAIRS.tolist()):
        w[row, first::4], w[row, second::4] = 1.0, 2.0
    x = torch.eye(64)
    y = linear(x.to(device), compress(w.to(device)))
    assert torch.equal(y.cpu(), w.t())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_within_bound(dtype, activation, device):
    for tokens, out_features, in_features in SHAPES:
        w = random_weight(out_features, in_features, dtype)
        x = random_input((tokens, in_features), dtype)
        for bias in (None, random_input((out_features,), dtype, seed=2)):
            on_device = None if bias is None else bias.to(device)
            y = linear(x.to(device), compress(w.to(device)), on_device, activation)
            y64 = reference.linear(x, w, bias, activation)
            assert_within(y, y64, error_bound(x, w, bias, y64, dtype))


def test_rows_beyond_one_cpu_chunk(monkeypatch):
    """Chunks of 3 rows of 40 columns; 10 rows leave a last chunk of one."""
    monkeypatch.setattr(ops.cpu_backend, "_CHUNK_BYTES", 3 * 40 * 4)
    w, x = random_weight(10, 40, torch.float32, integers=True), torch.eye(40)
    w24 = compress(w)
    assert [stop - start for start, stop, _ in ops.cpu_backend.dense_chunks(w24)] == [3, 3, 3, 1]
    assert torch.equal(linear(x, w24), w.t())
    assert torch.equal(ops.cpu_backend.input_grad(torch.eye(10), w24), w)


def test_one_rounding(device):
    """1 + 2^-8 is a tie in bfloat16: it rounds to 1 unless the bias is added before rounding."""
    w = torch.tensor([[1.0, 2.0**-8, 0, 0]], dtype=torch.bfloat16, device=device)
    x = torch.ones(1, 4, dtype=torch.bfloat16, device=device)
    bias = torch.tensor([2.0**-10], dtype=torch.bfloat16, device=device)
    assert linear(x, compress(w), None).item() == 1.0
    assert linear(x, compress(w), bias).item() == 1.0 + 2.0**-7


def test_float32_is_not_tf32(device):
    w = torch.tensor([[1.0 + 2.0**-20, 0, 0, 0]] * 16, device=device)
    y = linear(torch.eye(4, device=device), compress(w))
    assert torch.equal(y[0], w[:, 0])


def test_nan_and_inf_stay_in_their_token(device):
    w24 = compress(random_weight(8, 36, torch.float32).to(device))
    x = random_input((3, 36), torch.float32).to(device)
    expected = linear(x, w24)
    x[1] = float("nan")
    y = linear(x, w24, activation="relu")
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]].relu())


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(leading, device):
    w = random_weight(6, 16, torch.float32, integers=True)
    x = random_input((*leading, 16), torch.float32, integers=True)
    for bias in (None, torch.ones(6)):
        on_device = None if bias is None else bias.to(device)
        y = linear(x.to(device), compress(w).to(device), on_device)
        assert y.shape == (*leading, 6) and y.is_contiguous()
        assert torch.equal(y.cpu().double(), reference.linear(x, w, bias))


def test_empty_weight_sides(device):
    x = torch.ones(2, 8, device=device)
    assert linear(x, compress(torch.zeros(0, 8, device=device))).shape == (2, 0)
    bias = torch.arange(3.0, device=device)
    y = linear(x[:, :0], compress(torch.zeros(3, 0, device=device)), bias)
    assert torch.equal(y, bias.expand(2, 3))


def test_strided_inputs(device):
    w = random_weight(6, 16, torch.float32, integers=True)
    w24 = compress(w.to(device))
    base = random_input((16, 10, 2), torch.float32, integers=True).to(device)
    bias = torch.arange(12.0, device=device)[::2]
    transposed, strided = base[:, :, 0].t(), base.transpose(0, 1)[::2, :, 1]
    expanded, reversed_dims = base[:, 0, 0].expand(5, 16), base.permute(1, 2, 0)
    for x in (transposed, strided, expanded, reversed_dims):
        assert not x.is_contiguous()
        y = linear(x, w24, bias)
        assert torch.equal(y.double().cpu(), reference.linear(x.cpu(), w, bias.cpu()))


# ---- errors --------------------------------------------------------------------------------------

F16 = torch.float16


def in_float64(w24):
    """A weight that its own constructor would refuse."""
    w24.values = w24.values.double()
    return w24


ERRORS = {
    "columns": (
        dict(x=torch.ones(2, 12)),
        ValueError,
        r"x\.shape\[-1\] == weight\.in_features \(16\).*\[2, 12\]",
    ),
    "scalar x": (dict(x=torch.tensor(1.0)), ValueError, r"in_features \(16\), got x of shape \[\]"),
    "x dtype": (
        dict(x=torch.ones(2, 16, dtype=F16)),
        TypeError,
        r"x\.dtype == weight\.dtype .*float32.*got torch\.float16",
    ),
    "x type": (dict(x=[1.0]), TypeError, r"x of type Tensor, got list"),
    "weight type": (dict(w24=torch.ones(4, 16)), TypeError, r"type Sparse24, got Tensor.*compress"),
    "weight dtype": (
        dict(w24=in_float64(compress(torch.zeros(4, 16))), x=torch.ones(2, 16).double()),
        TypeError,
        r"weight\.dtype in float32, float16, bfloat16, got torch\.float64",
    ),
    "x device": (
        dict(x=torch.ones(2, 16, device="meta")),
        ValueError,
        r"x on the weight's device \(cpu\), got meta",
    ),
    "bias shape": (
        dict(bias=torch.ones(5)),
        ValueError,
        r"bias of shape \[out_features\] \(\[4\]\), got \[5\]",
    ),
    "bias rank": (dict(bias=torch.ones(1, 4)), ValueError, r"bias of shape .*got \[1, 4\]"),
    "bias dtype": (
        dict(bias=torch.ones(4, dtype=F16)),
        TypeError,
        r"bias\.dtype == x\.dtype .*got torch\.float16",
    ),
    "bias device": (
        dict(bias=torch.ones(4, device="meta")),
        ValueError,
        r"bias on x's device \(cpu\), got meta",
    ),
    "activation": (
        dict(activation="tanh"),
        ValueError,
        r"activation in None, 'relu', 'gelu', 'silu', got 'tanh'",
    ),
    "backend name": (
        dict(backend="tpu"),
        ValueError,
        r"backend in 'cuda', 'cuda-mma', 'triton', 'cpu', 'cusparselt', got 'tpu'",
    ),
    "triton on cpu": (
        dict(backend="triton"),
        NotImplementedError,
        r"backend 'triton' can run, got .*(on a GPU, got cpu|no CUDA device|triton)",
    ),
    "cusparselt without its layout": (
        dict(backend="cusparselt"),
        NotImplementedError,
        r"needs layout 'cusparselt', got 'rowmajor'; make one with SparseLinear\(packed=",
    ),
    "cuda on cpu": (
        dict(backend="cuda"),
        NotImplementedError,
        r"backend 'cuda' can run, got .+ Leave backend=None",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, exception, pattern = ERRORS[name]
    arguments = dict(x=torch.ones(2, 16), w24=compress(torch.zeros(4, 16)), bias=None) | changes
    x, w24 = arguments.pop("x"), arguments.pop("w24")
    with pytest.raises(exception, match=r"^sparsekern\.linear: expected .*" + pattern):
        linear(x, w24, **arguments)


def test_weight_is_frozen():
    w24 = compress(torch.zeros(4, 16))
    w24.values.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen weight.*detach"):
        linear(torch.ones(2, 16), w24)


# ---- backends ------------------------------------------------------------------------------------


def test_explain_on_cpu():
    w24 = compress(random_weight(8, 16, torch.float32))
    chosen = explain(torch.ones(2, 3, 16), w24)
    assert (chosen.backend, chosen.layout) == ("cpu", "rowmajor")
    assert str(chosen) == f"cpu ({chosen.config}, layout rowmajor): {chosen.reason}"
    assert "x is on the CPU" in chosen.reason
    assert explain(torch.ones(1, 16), w24, backend="cpu").reason.startswith("requested")
    with pytest.raises(ValueError, match=r"in_features \(16\)"):
        explain(torch.ones(1, 12), w24)
    with pytest.raises(NotImplementedError, match="backend 'triton' can run"):
        explain(torch.ones(1, 16), w24, backend="triton")


@pytest.mark.gpu
def test_explain_on_gpu_names_what_runs():
    w24 = compress(random_weight(96, 256, torch.bfloat16).cuda())
    x = random_input((4, 256), torch.bfloat16).cuda()
    forced = explain(x, w24, backend="triton")
    assert forced.backend == "triton" and forced.config.startswith("out64_in128_tokens16")
    assert explain(x, w24).backend in ("cuda", "triton")
    with pytest.raises(NotImplementedError, match="needs x on the CPU, got cuda"):
        linear(x, w24, backend="cpu")


def test_a_new_backend_is_a_loader_and_a_name(monkeypatch):
    """The order of preference decides; a refusal goes on to the next and shows in the reason."""

    def load():
        def supported(x, w24):
            few = x.shape[0] <= 2
            return few, "few tokens" if few else f"{x.shape[0]} tokens are too many"

        def compute(x, w24, bias, activation):
            return x.new_full((x.shape[0], w24.shape[0]), 7.0)

        return ops.Backend("seven", supported, compute, lambda x, w24: "constant")

    monkeypatch.setitem(ops._LOADERS, "seven", load)
    monkeypatch.setitem(ops._PREFERENCE, "cpu", ("seven", "cpu"))
    ops._load.cache_clear()
    w24 = compress(random_weight(8, 16, torch.float32))
    assert torch.equal(linear(torch.ones(2, 16), w24), torch.full((2, 8), 7.0))
    assert explain(torch.ones(2, 16), w24).reason == "few tokens"
    assert explain(torch.ones(3, 16), w24).backend == "cpu"
    assert "not seven: 3 tokens are too many" in explain(torch.ones(3, 16), w24).reason
    with pytest.raises(NotImplementedError, match="3 tokens are too many"):
        linear(torch.ones(3, 16), w24, backend="seven")
    ops._load.cache_clear()


def test_no_backend_for_a_device_says_so(monkeypatch):
    monkeypatch.setitem(ops._PREFERENCE, "cpu", ())
    w24 = compress(random_weight(8, 16, torch.float32))
    with pytest.raises(NotImplementedError, match="a backend for this problem, got device cpu"):
        linear(torch.ones(1, 16), w24)
