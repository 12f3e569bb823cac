"""Linear layers of quantised weights on the CPU: sparsekern.linear, autograd, compile, modules."""

import copy
import io
import pickle

import pytest
import torch

import sparsekern as sk
from python_tests.linear_cases import random_input, random_weight
from sparsekern import reference
from sparsekern.errors import FormatError

BF16 = torch.bfloat16
KINDS = ["fp8", "int8", "int4"]
DTYPES = [torch.float32, torch.float16, BF16]


def quantized(name, dtype=torch.float32, shape=(24, 200), group=None):
    return sk.quantize(sk.compress(random_weight(*shape, dtype)), name, group=group)


def exact(w24):
    """The float64 weight that the levels and scales stand for, by reference.py."""
    groups = w24.spec.group
    scale = w24.tensors["weight_scale"]
    levels = w24.to(torch.float32).to_dense().double()
    levels = (levels / reference.column_scales(scale, w24.shape[1], groups)).float()
    if w24.spec.element.bits != 8 or w24.values.dtype == torch.int8:
        levels = levels.round()
    return reference.dequantize(levels, scale, groups)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_linear_is_the_reference(name, dtype, activation):
    w24, x = quantized(name, dtype), random_input((2, 3, 200), dtype)
    bias = random_input((24,), dtype)
    y = sk.linear(x, w24, bias, activation)
    expected = reference.linear(x, exact(w24), bias, activation)
    bound = x.double().abs() @ exact(w24).abs().T + bias.double().abs()
    unit = torch.finfo(dtype).eps
    assert y.dtype == dtype and y.shape == (2, 3, 24)
    assert bool(((y.double() - expected).abs() <= 1e-5 * bound + unit * expected.abs()).all())
    assert sk.explain(x, w24).backend == "cpu"


@pytest.mark.parametrize("name", KINDS)
def test_small_integers_are_exact(name):
    w = (random_weight(24, 200, torch.float32) * 3).round().clamp(-7, 7)
    w24 = sk.quantize(sk.compress(w), name, scale=torch.full((24, 1 if name != "int4" else 2), 0.5))
    w24 = w24 if name != "int4" else sk.quantize(sk.compress(w), name, scale=torch.ones(24, 2))
    assert torch.equal(w24.to_dense(), w)
    x = torch.randint(-8, 9, (5, 200)).float()
    assert torch.equal(sk.linear(x, w24).double(), reference.linear(x, w))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_and_compile(name):
    w24 = quantized(name)
    x = random_input((3, 200), torch.float32).requires_grad_()
    sk.linear(x, w24).sum().backward()
    expected = exact(w24).sum(0).expand(3, 200)
    assert torch.allclose(x.grad.double(), expected, atol=1e-4)
    compiled = torch.compile(lambda v: sk.linear(v, w24), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x.detach()), sk.linear(x.detach(), w24))
    torch.library.opcheck(
        torch.ops.sparsekern.linear.default,
        (x.detach(), list(w24.tensors.values()), w24.spec.text, None, None, None),
        # test_schema multiplies every tensor, which torch cannot with fp8 on the CPU.
        test_utils=("test_schema", "test_faketensor")[name == "fp8" :],
    )


def test_gated_pairs_of_quantised_weights():
    gate, up = quantized("int8"), quantized("int4")
    x = random_input((3, 200), torch.float32)
    expected = reference.gated_linear(x, exact(gate), exact(up))
    assert torch.allclose(sk.gated_linear(x, gate, up).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_modules(name):
    w24 = quantized(name, BF16)
    module = sk.SparseLinear.from_sparse24(w24, torch.randn(24).to(BF16))
    x = random_input((3, 200), BF16)
    assert torch.equal(module(x), sk.linear(x, w24, module.bias))
    text = repr(module)
    assert f"stored as {w24.spec.storage}" in text and "dtype=torch.bfloat16" in text
    assert ("group=128" in text) == (name == "int4")
    state = module.state_dict()
    names = {"compressed", "bitmask", "shape", "weight_scale", "storage", "bias"}
    assert set(state) == names and state["weight_scale"].dtype == torch.float32
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = sk.SparseLinear(200, 24, dtype=BF16)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.weight.spec is w24.spec and torch.equal(other(x), module(x))
    empty = sk.SparseLinear(200, 24, dtype=BF16, device="meta")
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), module(x))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x)) and twin.weight.spec is w24.spec
    scale = module.weight_scale.clone()
    module.half()
    assert module.weight.dtype == torch.float16 and torch.equal(module.weight_scale, scale)
    assert module.weight.spec.storage == w24.spec.storage
    assert torch.equal(module.weight.rowmajor().values.view(torch.uint8),
                       w24.values.view(torch.uint8))  # fmt: skip
    assert module(x.half()).dtype == torch.float16
    linear = torch.nn.Linear(200, 24)
    linear.weight.data = random_weight(24, 200, torch.float32)
    made = sk.SparseLinear.from_linear(linear, dtype=name)
    assert made.weight.spec is sk.compress(linear.weight, quantize=name).spec


DAMAGE = {
    "a scale of zero": (lambda state: state["weight_scale"].__setitem__((3, 0), 0), "0.0 at row 3"),
    "a scale that is NaN": (
        lambda state: state["weight_scale"].fill_(float("nan")),
        "weight_scale finite and above 0, got nan at row 0",
    ),
    "no scale": (lambda state: state.pop("weight_scale"), "weight_scale"),
    "scales of another shape": (
        lambda state: state.update(weight_scale=torch.ones(24, 2)),
        r"weight_scale float32 of shape \[24, 1\]",
    ),
    "fp8 that is NaN": (
        lambda state: state["compressed"].view(torch.uint8).fill_(0x7F),
        "finite values, got nan",
    ),
    "three bits": (lambda state: state["bitmask"].fill_(0x77), "2 bits set"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_states(kind):
    change, text = DAMAGE[kind]
    module = sk.SparseLinear.from_sparse24(quantized("fp8"))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    change(state)
    other = sk.SparseLinear.from_sparse24(quantized("fp8"))
    with pytest.raises(FormatError, match=text):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("storage", torch.tensor([105.5, 110.0])),
        ("storage", torch.tensor([105, 300])),
        ("storage", torch.zeros(3, 3, dtype=torch.uint8)),
        ("storage", torch.zeros(10**4, dtype=torch.uint8)),
        ("storage", torch.zeros(6, dtype=torch.uint8, device="meta")),
        ("storage", "int8 0"),
        ("weight_scale", None),
        ("weight_scale", "x"),
    ],
)
def test_what_is_no_tensor_of_a_state(key, value):
    module = sk.SparseLinear.from_sparse24(quantized("int8"))
    state = {**module.state_dict(), key: value}
    with pytest.raises(FormatError, match=f"sparsekern.SparseLinear.*expected '{key}'"):
        module.load_state_dict(state)
