"""sparsekern.linear under autograd, torch.compile, fake tensors, autocast and CUDA graphs."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from python_tests.linear_cases import (
    ACTIVATIONS,
    assert_within,
    error_bound,
    random_input,
    random_weight,
)
from sparsekern import reference
from sparsekern.backends import cpu, memory
from sparsekern.formats.sparse24 import compress
from sparsekern.ops import gated_op as gated
from sparsekern.ops import linear_op as ops
from sparsekern.ops.linear_op import linear


def op_arguments(x, w24, bias, activation, backend=None):
    return (x, list(w24.tensors.values()), w24.spec.text, bias, activation, backend)


# ---- gradients -----------------------------------------------------------------------------------


def dense_linear(x, w, bias, activation):
    return reference.ACTIVATIONS[activation](torch.nn.functional.linear(x, w, bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_match_dense_float64(activation, with_bias, device):
    w = random_weight(12, 40, torch.float32)
    inputs = [random_input((2, 3, 40), torch.float32)]
    if with_bias:
        inputs.append(random_input((12,), torch.float32, seed=2))
    direction = random_input((2, 3, 12), torch.float32, seed=3)

    ours = [t.to(device).requires_grad_() for t in inputs]
    bias = ours[1] if with_bias else None
    y = linear(ours[0], compress(w.to(device)), bias, activation)
    grads = torch.autograd.grad(y, ours, direction.to(device))

    exact = [t.double().requires_grad_() for t in inputs]
    bias = exact[1] if with_bias else None
    y64 = dense_linear(exact[0], w.double(), bias, activation)
    expected = torch.autograd.grad(y64, exact, direction.double())
    assert len(grads) == len(expected) == 1 + with_bias
    for ours_grad, grad64 in zip(grads, expected):
        assert ours_grad.dtype == torch.float32
        torch.testing.assert_close(ours_grad.double().cpu(), grad64, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_second_derivative_matches_dense_float64(activation, device):
    w = random_weight(6, 16, torch.float32)

    def second(x, y):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    x = random_input((3, 16), torch.float32).to(device).requires_grad_()
    ours = second(x, linear(x, compress(w.to(device)), None, activation))
    x64 = x.detach().cpu().double().requires_grad_()
    expected = second(x64, dense_linear(x64, w.double(), None, activation))
    torch.testing.assert_close(ours.double().cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_16_bit(dtype, device):
    """Integers and relu, whose slope is exact: the gradients are exact but for one rounding."""
    w = random_weight(12, 40, dtype, integers=True)
    x = random_input((7, 40), dtype, integers=True).to(device).requires_grad_()
    bias = random_input((12,), dtype, seed=2, integers=True).to(device).requires_grad_()
    direction = random_input((7, 12), dtype, seed=3, integers=True)
    y = linear(x, compress(w.to(device)), bias, "relu")
    grads = torch.autograd.grad(y, (x, bias), direction.to(device))
    z = reference.linear(x.detach().cpu(), w, bias.detach().cpu())
    dz = direction.double() * (z > 0)
    assert torch.equal(grads[0].cpu(), (dz @ w.double()).to(dtype))
    assert torch.equal(grads[1].cpu(), dz.sum(0).to(dtype))


def test_gradient_of_the_bias_alone_and_of_a_vector(device):
    w24 = compress(random_weight(6, 16, torch.float32).to(device))
    bias = torch.zeros(6, device=device, requires_grad=True)
    x = torch.ones(16, device=device)
    linear(x, w24, bias).sum().backward()
    assert torch.equal(bias.grad, torch.ones(6, device=device))
    assert x.grad is None and w24.values.grad is None


def test_gradients_of_zero_tokens(device):
    w24 = compress(random_weight(6, 16, torch.float32).to(device))
    x = torch.zeros(0, 16, device=device, requires_grad=True)
    bias = torch.zeros(6, device=device, requires_grad=True)
    linear(x, w24, bias, "gelu").sum().backward()
    assert x.grad.shape == (0, 16)
    assert torch.equal(bias.grad, torch.zeros(6, device=device))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activation_slopes_against_differences(activation):
    z = torch.linspace(-6, 6, 101, dtype=torch.float64) + 0.013  # no point at relu's corner
    function, step = reference.ACTIVATIONS[activation], 1e-6
    slope = (function(z + step) - function(z - step)) / (2 * step)
    torch.testing.assert_close(ops._activation_slope(z, activation), slope, rtol=0, atol=1e-8)
    assert math.isclose(ops._activation_slope(torch.zeros(1), "relu").item(), 0.0)


# ---- registration --------------------------------------------------------------------------------


class SeenOps(TorchDispatchMode):
    """Records the sparsekern ops that pass through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparsekern":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def op_calls(monkeypatch):
    """A list that grows with every call of torch.ops.sparsekern.linear."""
    calls, op = [], torch.ops.sparsekern.linear

    def counted(*arguments):
        calls.append(arguments)
        return op(*arguments)

    monkeypatch.setattr(torch.ops.sparsekern, "linear", counted)
    return calls


def test_a_dispatch_mode_sees_every_call():
    w24, x = compress(random_weight(6, 16, torch.float32)), torch.ones(2, 16)
    for _ in range(2):  # the second time the launch is known
        with SeenOps() as seen, torch.no_grad():
            y = linear(x, w24)
        assert seen.names == ["sparsekern::linear"] and torch.equal(y, linear(x, w24))


def test_eager_path_bypasses_the_op_unless_a_gradient_is_wanted(op_calls):
    w24 = compress(random_weight(6, 16, torch.float32))
    bias = torch.zeros(6, requires_grad=True)
    x = torch.ones(2, 16)
    with torch.no_grad():
        direct = linear(x, w24, bias)
    assert not op_calls
    through_op = linear(x, w24, bias)
    assert len(op_calls) == 1
    assert torch.equal(direct, through_op)
    assert through_op.requires_grad and not direct.requires_grad


class Subclass(torch.Tensor):
    pass


def test_which_calls_are_seen_by_torch(monkeypatch, op_calls):
    """Tracing, subclasses and wanted gradients go through the op, everything else around it."""
    w24 = compress(random_weight(8, 16, torch.float32))
    x, trained = torch.ones(2, 16), torch.zeros(8, requires_grad=True)

    def seen(*arguments):
        before = len(op_calls)
        linear(*arguments)
        return len(op_calls) > before

    for _ in range(2):  # the second time the launch is known
        assert not seen(x, w24)
        assert seen(x, w24, trained) and seen(x.clone().requires_grad_(), w24)
        assert seen(x.as_subclass(Subclass), w24)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert not seen(x, w24, trained)
        with monkeypatch.context() as compiling:
            compiling.setattr(ops, "_is_compiling", lambda: True)
            compiling.setattr(ops, "_is_traced", lambda: True)
            assert seen(x, w24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_opcheck(dtype, activation, device):
    w24 = compress(random_weight(6, 16, dtype).to(device))
    x = random_input((2, 3, 16), dtype).to(device)
    bias = random_input((6,), dtype).to(device)
    # The gradients that AOTAutograd computes round where eager does, but not always in one order.
    tolerance = {} if dtype == torch.float32 else dict(atol=2e-2, rtol=2e-2)
    for wanted in (False, True):
        x, bias = x.detach().requires_grad_(wanted), bias.detach().requires_grad_(wanted)
        torch.library.opcheck(
            torch.ops.sparsekern.linear.default, op_arguments(x, w24, bias, activation), **tolerance
        )
        grad = random_input((2, 3, 6), dtype).to(device).requires_grad_(wanted)
        arguments = (grad, list(w24.tensors.values()), w24.spec.text)
        torch.library.opcheck(
            torch.ops.sparsekern.linear_input_grad.default, arguments, **tolerance
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, device):
    w24 = compress(random_weight(8, 16, torch.float32).to(device))

    def block(x, bias):
        return linear(torch.tanh(x), w24, bias, "gelu").sum(-1)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (3, 5):
        results = []
        for function in (block, compiled):
            x = random_input((2, tokens, 16), torch.float32).to(device).requires_grad_()
            bias = torch.ones(8, device=device, requires_grad=True)
            y = function(x, bias)
            results.append((y, *torch.autograd.grad(y.sum(), (x, bias))))
        for eager, traced in zip(*results):
            torch.testing.assert_close(traced, eager)


def test_within_the_registered_ops_no_memory_is_kept(monkeypatch):
    seen = []

    def spied(*arguments, compute=cpu.linear):
        seen.append(memory.depth)
        return compute(*arguments)

    monkeypatch.setattr(cpu, "linear", spied)
    x, w24 = random_input((3, 16), torch.float32), compress(random_weight(8, 16, torch.float32))
    torch.ops.sparsekern.linear(*op_arguments(x, w24, None, None))
    weight = list(w24.tensors.values()), w24.spec.text
    torch.ops.sparsekern.gated_linear(x, *weight, *weight)
    linear(x, w24)
    gated.gated_linear(x, w24, w24)
    assert seen == [1, 1, 1, 0, 0, 0] and memory.depth == 0


def test_compile_without_gradients_uses_one_op():
    w24 = compress(random_weight(8, 16, torch.float32))
    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    x = random_input((3, 16), torch.float32)
    with torch.no_grad():
        expected = linear(x, w24, None, "relu")
        function = torch.compile(
            lambda x: linear(x, w24, None, "relu"), backend=record, fullgraph=True
        )
        assert torch.equal(function(x), expected)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1 and sum("sparsekern" in target for target in targets) == 1


def test_fake_kernel_refuses_what_the_eager_path_refuses():
    w24 = compress(torch.zeros(4, 16))
    meta = w24.to("meta")
    narrow, half = torch.ones(2, 12, device="meta"), torch.ones(2, 16, device="meta").half()
    for bad in (narrow, half):
        with pytest.raises((ValueError, TypeError), match="sparsekern.linear: expected"):
            torch.ops.sparsekern.linear(*op_arguments(bad, meta, None, None))


def test_meta_tensors():
    w24 = compress(random_weight(8, 16, torch.bfloat16)).to("meta")
    y = linear(torch.empty(2, 3, 16, dtype=torch.bfloat16, device="meta"), w24)
    assert y.is_meta and y.shape == (2, 3, 8) and y.dtype == torch.bfloat16


def test_autocast_follows_the_weight(device):
    w = random_weight(8, 16, torch.bfloat16, integers=True)
    x = random_input((3, 16), torch.float32, integers=True)
    bias = torch.ones(8)
    with torch.autocast(device_type=device.type, dtype=torch.bfloat16):
        y = linear(x.to(device), compress(w.to(device)), bias.to(device))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.cpu(), reference.linear(x, w, bias).to(torch.bfloat16))


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_data():
    w24 = compress(random_weight(96, 256, torch.bfloat16).cuda())
    x = torch.zeros(4, 256, dtype=torch.bfloat16, device="cuda")
    linear(x, w24, None, "silu")  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, w24, None, "silu")
    for seed in (1, 2):
        x.copy_(random_input((4, 256), torch.bfloat16, seed=seed))
        graph.replay()
        assert torch.equal(y, linear(x, w24, None, "silu"))
        assert y.abs().sum() > 0


@pytest.mark.gpu
def test_inductor_on_gpu():
    """Compiled the weight is read row-major, otherwise in the layout that the GPU reads best."""
    w, x = random_weight(96, 256, torch.bfloat16), random_input((4, 256), torch.bfloat16)
    w24 = compress(w.cuda())
    compiled = torch.compile(lambda x: linear(x, w24, None, "silu"), fullgraph=True)
    y64 = reference.linear(x.double(), w.double(), None, "silu")
    bound = error_bound(x, w, None, y64, torch.bfloat16)
    for function in (compiled, lambda x: linear(x, w24, None, "silu")):
        assert_within(function(x.cuda()), y64, bound)


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    w24 = compress(random_weight(96, 256, torch.float32).cuda())
    x = random_input((64, 256), torch.float32).cuda()
    expected = linear(x, w24)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x * 2
        y = linear(late, w24)
    stream.synchronize()
    assert torch.equal(y, expected * 2)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_result_can_be_changed_in_place(shape, activation, device):
    """nn.ReLU(inplace=True), += and the like, as after nn.Linear."""
    w24 = compress(random_weight(8, 16, torch.float32).to(device))
    bias = torch.ones(8, device=device, requires_grad=True)
    x = torch.randn(shape, device=device, requires_grad=True)
    torch.nn.functional.relu_(linear(x, w24, bias, activation)).sum().backward()
    got, x.grad = x.grad, None
    dense_linear(x, w24.to_dense(), bias, activation).relu().sum().backward()
    torch.testing.assert_close(got, x.grad)
