"""sparsekern.linear and explain: numbers, shapes, errors, choice of backend."""

import copy
import pickle

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
from sparsekern.backends import registry
from sparsekern.backends.cpu import CpuBackend
from sparsekern.backends.protocol import Explained, folded, problem_of
from sparsekern.errors import FormatError
from sparsekern.formats.layouts import WeightSpec
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
    monkeypatch.setattr(ops.cpu, "_CHUNK_BYTES", 3 * 40 * 4)
    w, x = random_weight(10, 40, torch.float32, integers=True), torch.eye(40)
    w24 = compress(w)
    assert [stop - start for start, stop, _ in ops.cpu.dense_chunks(w24)] == [3, 3, 3, 1]
    assert torch.equal(linear(x, w24), w.t())
    assert torch.equal(ops.cpu.input_grad(torch.eye(10), w24), w)


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


def test_the_bits_do_not_depend_on_torchs_precision_of_matmuls():
    """Medium is bfloat16 on CPUs that have it, and another order of sums on others."""
    w24, x = compress(random_weight(64, 512, torch.float32)), random_input((16, 512), torch.float32)

    def both():
        inputs = x.clone().requires_grad_()
        y = linear(inputs, w24)
        return y.detach(), *torch.autograd.grad(y.square().sum(), inputs)

    wanted = both()
    torch.set_float32_matmul_precision("medium")
    try:
        found = both()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, found, wanted))


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
    "float64": (
        dict(x=torch.ones(2, 16).double()),
        TypeError,
        r"x\.dtype == weight\.dtype .*float32.*got torch\.float64",
    ),
    "an activation that is a list": (
        dict(activation=["relu"]),
        ValueError,
        r"activation in None, 'relu', 'gelu', 'silu', got \['relu'\]",
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
        r"bias\.dtype == weight\.dtype .*got torch\.float16",
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
        "backend in 'cuda', 'cuda-mma', 'cuda-precise', 'cuda-a16', 'triton', 'cpu', "
        "'cusparselt', got 'tpu'",
    ),
    "triton on cpu": (
        dict(backend="triton"),
        NotImplementedError,
        r"backend 'triton' can run, got .*(on a GPU, got cpu|no CUDA device|triton)",
    ),
    "cusparselt without its layout": (
        dict(backend="cusparselt"),
        NotImplementedError,
        r"needs layout 'cusparselt', got 'rowmajor'; make one with SparseLinear\(layout=",
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
    assert forced.backend == "triton" and forced.config.startswith("few_rows2_unroll2")
    assert explain(x, w24).backend in ("cuda", "triton")
    with pytest.raises(NotImplementedError, match="needs x on the CPU, got cuda"):
        linear(x, w24, backend="cpu")


class Seven:
    """A backend for few tokens, whose results are all 7."""

    name = "seven"

    def supports(self, problem):
        return None if problem.tokens <= 2 else f"{problem.tokens} tokens are too many"

    def bind(self, problem):
        return folded(lambda x, w24, bias: x.new_full((x.shape[0], w24.shape[0]), 7.0))

    def explain(self, problem):
        return Explained("constant", "few tokens", 7.0)


@pytest.fixture
def seven():
    registry.register_backend(Seven(), device="cpu", before="cpu")
    yield
    registry.unregister_backend("seven")


def test_the_order_decides_among_backends(seven):
    """A refusal goes on to the next and shows in the reason."""
    w24 = compress(random_weight(8, 16, torch.float32))
    assert torch.equal(linear(torch.ones(2, 16), w24), torch.full((2, 8), 7.0))
    assert torch.equal(linear(torch.ones(1, 2, 16), w24), torch.full((1, 2, 8), 7.0))
    told = explain(torch.ones(2, 16), w24)
    assert (told.backend, told.reason, told.expected_us) == ("seven", "few tokens", 7.0)
    assert explain(torch.ones(3, 16), w24).backend == "cpu"
    assert "not seven: 3 tokens are too many" in explain(torch.ones(3, 16), w24).reason
    with pytest.raises(NotImplementedError, match="3 tokens are too many"):
        linear(torch.ones(3, 16), w24, backend="seven")
    # No pair of gated halves is offered to a backend that has no `gated`.
    assert registry.find(problem_of(torch.ones(2, 16), w24.spec, gated=w24.spec))[0] is None


def test_a_backend_that_comes_or_goes_changes_calls_like_one_before():
    w24, x = compress(random_weight(8, 16, torch.float32)), torch.ones(2, 16)
    with torch.no_grad():
        before = linear(x, w24)
        registry.register_backend(Seven(), device="cpu", before="cpu")
        assert linear(x, w24).eq(7).all()
        registry.unregister_backend("seven")
        assert torch.equal(linear(x, w24), before)


class Named(Seven):
    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize("result", [7.0, torch.zeros(1), torch.zeros(3, 8).half(), "turned"])
def test_what_a_backend_returns_is_checked(result):
    class Wrong(Named):
        def supports(self, problem):
            return None

        def bind(self, problem):
            turned = torch.zeros(8, 3).t()
            return lambda x, w24, bias: turned if isinstance(result, str) else result

    x, w24 = torch.ones(3, 16), compress(random_weight(8, 16, torch.float32))
    registry.register_backend(Wrong("wrong"))
    try:
        for _ in range(2):  # a wrong launch is not kept
            with pytest.raises(TypeError, match=r"a contiguous y \[3, 8\] of torch.float32 from"):
                linear(x, w24, backend="wrong")
    finally:
        registry.unregister_backend("wrong")


def test_what_cannot_be_registered(seven):
    for backend, options, error, text in (
        (Seven(), {}, ValueError, "a new name, got 'seven'"),
        (object(), {}, TypeError, "supports, bind and explain, got object"),
        (registry._BACKENDS["triton"], dict(device="cpu"), ValueError, "a new name, got 'triton'"),
        (Seven, {}, TypeError, "an object with name, supports, bind and explain, got type"),
        (Named(8), {}, TypeError, "text as the backend's name, got 8"),
        (Named("eight"), dict(device="gpu"), ValueError, "device: a type such as .*got 'gpu'"),
        (Named("eight"), dict(device="cuda:0"), ValueError, "device: a type such as"),
        (Named("eight"), dict(before="cpu"), ValueError, "Say on which type: device='cpu'"),
    ):
        with pytest.raises(error, match=text):
            registry.register_backend(backend, **options)
    registry.unregister_backend("seven")
    with pytest.raises(ValueError, match=r"before among \['cpu'\] \(device 'cpu'\), got 'tpu'"):
        registry.register_backend(Seven(), device="cpu", before="tpu")
    registry.register_backend(Seven(), device="cpu", before="cpu")


def test_a_call_like_one_before_is_bound_once(monkeypatch):
    bound = []
    bind = CpuBackend.bind
    monkeypatch.setattr(CpuBackend, "bind", lambda *a: bound.append(1) or bind(*a))
    w24, other = (compress(random_weight(8, 16, torch.float32, seed=seed)) for seed in (1, 2))
    x, bias = torch.ones(5, 7, 16), torch.ones(8)
    ops._calls.clear()
    with torch.no_grad():
        first = linear(x, w24, bias)
        assert torch.equal(linear(x, w24, bias), first) and len(bound) == 1
        linear(torch.zeros_like(x), other, torch.zeros(8))
        assert len(bound) == 1, "another weight of the same spec, another bias"
        for arguments in (
            (x, w24),
            (x[:, :6], w24, bias),
            (x.transpose(0, 1), w24, bias),
            (x, w24, bias, "relu"),
            (x.half(), w24.to(F16)),
        ):
            linear(*arguments)
        assert len(bound) == 6
        with pytest.raises(ValueError, match="bias of shape"):
            linear(x, w24, torch.ones(7))
        assert linear(x.to("meta"), w24.to("meta"), bias.to("meta")).is_meta
    assert linear(x, w24, bias).equal(first) and len(bound) == 6, "with gradients that nobody wants"


def test_no_backend_for_a_device_says_so(monkeypatch):
    monkeypatch.setitem(registry._PREFERENCE, "cpu", [])
    ops._calls.clear()
    w24 = compress(random_weight(8, 16, torch.float32))
    with pytest.raises(NotImplementedError, match="a backend for this problem, got device cpu"):
        linear(torch.ones(1, 16), w24)


def test_specs():
    """Equal specs are one object; their text says all."""
    w24 = compress(random_weight(8, 16, torch.float32))
    spec = w24.spec
    assert spec is compress(torch.zeros(8, 16)).spec and spec is WeightSpec.parse(spec.text)
    assert spec is not w24.to(F16).spec and spec.with_(dtype=F16) is w24.to(F16).spec
    assert copy.deepcopy(spec) is spec and pickle.loads(pickle.dumps(spec)) is spec
    for text in ("", "8x16", spec.text + " ", spec.text.replace("float32", "float31"), 7):
        with pytest.raises((FormatError, TypeError), match="sparsekern"):
            WeightSpec.parse(text)
    for wrong, error, text in (
        (dict(dtype=torch.int8), TypeError, "a dtype in float32, .*got torch.int8"),
        (dict(dtype="float16"), TypeError, ".*got 'float16'. Leave it None"),
        (dict(storage="float16", dtype=torch.float32), TypeError, "dtype float16 or None"),
        (dict(scale="column"), ValueError, r"scale in \('row', 'group'\) or None"),
        (dict(storage="int4", group="64"), TypeError, "group: a whole number, got '64'"),
    ):
        with pytest.raises(error, match=f"WeightSpec: expected {text}"):
            WeightSpec.of((8, 16), **{"storage": "fp8", **wrong})
    with pytest.raises(TypeError, match="got torch.float64"):
        spec.with_(dtype=torch.float64)
    tensors = list(w24.tensors.values())
    with pytest.raises(ValueError, match="the tensors values, metadata, got 1 tensors"):
        torch.ops.sparsekern.linear(torch.ones(1, 16), tensors[:1], spec.text, None, None, None)
