"""2:4 layers under torch.func, forward-mode AD, torch.fx, ONNX export and autocast: as nn.Linear,
or refused in words that name the way out."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import sparsekern as sk
from python_tests.linear_cases import random_input, random_weight


@pytest.fixture
def pair():
    """(weight, the same dense, x [3, 32])."""
    torch.manual_seed(0)
    w24 = sk.compress(random_weight(16, 32, torch.float32))
    return w24, w24.to_dense(), torch.randn(3, 32)


BIAS = torch.linspace(-1, 1, 16)
TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).pow(2).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(3, 16))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).pow(2).sum())(x[0]),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "vmap along the last": lambda f, x: torch.func.vmap(f, in_dims=1)(x.t().contiguous()),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).exp().sum()))(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.func.vmap(f)(x).pow(2).sum())(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x.cos()),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "functionalize of grad": lambda f, x: torch.func.functionalize(
        torch.func.grad(lambda x: f(x).exp().sum())
    )(x),
    "vmap of functionalize": lambda f, x: torch.func.vmap(torch.func.functionalize(f))(x),
}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_as_the_dense_layer(name, activation, pair):
    w24, dense, x = pair
    act = getattr(nn.functional, activation) if activation else lambda y: y
    ours = TRANSFORMS[name](lambda x: sk.linear(x, w24, BIAS, activation), x)
    theirs = TRANSFORMS[name](lambda x: act(nn.functional.linear(x, dense, BIAS)), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["rowmajor", "tile64"])
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "vmap of grad", "jacfwd"])
def test_within_torch_compile(name, layout, pair):
    """A custom op has neither tangents nor batches: the compiled graph has products of torch."""
    w24, dense, x = pair
    if layout == "tile64":  # which float32 weights cannot have
        w24 = sk.quantize(w24, "int8")
        w24, dense = w24.to_layout(layout), w24.to_dense()
    torch._dynamo.reset()

    def ours(x):
        return TRANSFORMS[name](lambda x: sk.linear(x, w24, BIAS, "silu"), x)

    def theirs(x):
        silu = nn.functional.silu
        return TRANSFORMS[name](lambda x: silu(nn.functional.linear(x, dense, BIAS)), x)

    found = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_within_torch_export(transform, pair):
    if transform == "jvp" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("torch 2.11's export of a jvp fails for nn.Linear, too")
    w24, dense, x = pair

    class Transformed(nn.Module):
        def forward(self, x):
            return TRANSFORMS[transform](lambda x: sk.linear(x, w24, BIAS), x)

    found = torch.export.export(Transformed(), (x,), strict=False).module()(x)
    expected = TRANSFORMS[transform](lambda x: nn.functional.linear(x, dense, BIAS), x)
    torch.testing.assert_close(found, expected)


def test_one_compiled_layer_with_and_without_a_tangent(pair):
    w24, dense, x = pair
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x):
        def layer(x):
            return sk.linear(x, w24)

        return layer(x), torch.func.jvp(layer, (x,), (x.cos(),))[1]

    y, tangent = both(x)
    torch.testing.assert_close(y, x @ dense.t())
    torch.testing.assert_close(tangent, x.cos() @ dense.t())


@pytest.mark.parametrize("activation", [None, "silu"])
def test_batches_of_gradients_of_torch_autograd(activation, pair):
    """is_grads_batched, vectorize=True and gradcheck use another vmap than torch.func's."""
    w24, dense, x = pair
    act = getattr(nn.functional, activation) if activation else lambda y: y

    def jacobians(f):
        x_ = x.clone().requires_grad_()
        vectors = torch.eye(48).view(48, 3, 16)
        (rows,) = torch.autograd.grad(f(x_), x_, vectors, is_grads_batched=True)
        hessian = torch.autograd.functional.hessian(
            lambda x: f(x).pow(2).sum(), x[0], vectorize=True
        )
        return rows, hessian

    ours = jacobians(lambda x: sk.linear(x, w24, None, activation))
    theirs = jacobians(lambda x: act(x @ dense.t()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_tangent_of_the_gradient_alone(pair):
    w24, dense, x = pair
    x.requires_grad_()
    y, v = sk.linear(x, w24), torch.ones(3, 16)
    with forward_ad.dual_level():
        (grad,) = torch.autograd.grad(y, x, forward_ad.make_dual(v, v.cos()))
        tangent = forward_ad.unpack_dual(grad).tangent
    torch.testing.assert_close(tangent, v.cos() @ dense)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "dual"])
def test_quantized_rows_are_refused_under_transforms(transform, pair):
    """Rounding has no slope, and a tangent of zeros would pass for one."""
    w24, _, x = pair
    quantized = sk.quantize(w24, "int8")
    rows, scales = sk.quantize_rows(x, "int8")
    with pytest.raises(
        NotImplementedError,
        match="linear_quantized: .*outside of torch.func.*Call sparsekern.linear",
    ):
        torch.func.vmap(lambda q, scale: sk.linear_quantized(q, scale, quantized))(rows, scales)

    def within(function):
        if transform == "vmap":
            return torch.func.vmap(function)(x)
        if transform == "jvp":
            return torch.func.jvp(function, (x,), (x,))
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(x, x))

    weight = torch.ones(x.shape[-1])
    for function in (
        lambda x: sk.quantize_rows(x, "fp8")[1],
        lambda x: sk.silu_mul_quantize(x, x, "int8")[1],
        lambda x: sk.rms_norm_quantize(x, weight, "int8")[1],
    ):
        with pytest.raises(NotImplementedError, match="quantize: .*outside of|rows: .*outside of"):
            within(function)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "hessian"])
def test_gated_linear(name, pair):
    w24, dense, x = pair
    other = sk.compress(dense * 0.5)
    ours = TRANSFORMS[name](lambda x: sk.gated_linear(x, w24, other), x)
    theirs = TRANSFORMS[name](
        lambda x: nn.functional.silu(x @ dense.t()) * (x @ (dense * 0.5).t()), x
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_call_like_one_before_keeps_its_tangent(pair):
    """The quick way of inference knows no tangents: it is not taken."""
    w24, dense, x = pair
    with torch.no_grad():
        sk.linear(x, w24)
        with forward_ad.dual_level():
            y = sk.linear(forward_ad.make_dual(x, x.cos()), w24)
            tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, x.cos() @ dense.t())


def model():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    sk.prune_model(layers, "magnitude", progress=False)
    return layers.eval()


def test_gradients_for_the_biases_by_functional_call(pair):
    layers, x = model(), pair[2]
    parameters = dict(layers.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layers, parameters, (x,)).pow(2).sum()

    found = torch.func.grad(loss)(parameters)
    layers(x).pow(2).sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, parameters[name].grad)


def test_functional_call_takes_buffers_and_names_them_for_a_state_dict(pair):
    layers, x = model(), pair[2]
    given = dict(layers.named_parameters()) | dict(layers.named_buffers())
    assert torch.equal(torch.func.functional_call(layers, given, (x,)), layers(x))
    with pytest.raises(AttributeError, match=r"got compressed alone. .*named_buffers\(\)\)"):
        torch.func.functional_call(layers, layers.state_dict(), (x,))


def test_fx_sees_one_call_of_a_module(pair):
    layers, x = model(), pair[2]
    traced = torch.fx.symbolic_trace(layers)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 3
    assert torch.equal(traced(x), layers(x))
    with pytest.raises(TypeError, match="SparseLinear: expected a model to trace"):
        torch.fx.symbolic_trace(layers[0])


def test_fx_of_the_function_says_what_to_do(pair):
    w24 = pair[0]

    class Calls(nn.Module):
        def forward(self, x):
            return sk.linear(x, w24)

    with pytest.raises(TypeError, match="sparsekern.linear: .*whose layers are SparseLinear"):
        torch.fx.symbolic_trace(Calls())


@pytest.mark.parametrize("bias", [True, False])
def test_onnx_export_names_decompress_model(bias, pair, tmp_path):
    layers = model()
    if not bias:
        for layer in (layers[0], layers[2]):
            layer.bias = None
    with pytest.raises(NotImplementedError, match="a dense model for ONNX.*decompress_model"):
        torch.onnx.export(layers, (pair[2],), str(tmp_path / "x.onnx"), dynamo=False)


def test_onnx_export_after_decompressing(pair, tmp_path):
    pytest.importorskip("onnx")
    layers = sk.decompress_model(copy.deepcopy(model()))
    torch.onnx.export(layers, (pair[2],), str(tmp_path / "x.onnx"), dynamo=False)
    assert (tmp_path / "x.onnx").stat().st_size > 4 * 32 * 48


def test_onnx_export_by_dynamo(pair, tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match="decompress_model"):
        torch.onnx.export(model(), (pair[2],), str(tmp_path / "x.onnx"), dynamo=True)
    layers = sk.decompress_model(copy.deepcopy(model()))
    torch.onnx.export(layers, (pair[2],), str(tmp_path / "y.onnx"), dynamo=True)


def test_a_jit_trace_computes_on_what_it_is_given(pair):
    x = pair[2]
    layers = model()
    for layer in (layers[0], layers[2]):
        layer.bias = None
    with torch.no_grad():
        layers(x)
        traced = torch.jit.trace(layers, x)
        assert torch.equal(traced(2 * x), layers(2 * x))


# ---- autocast ------------------------------------------------------------------------------------

KINDS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("weight", KINDS)
def test_autocast_gives_the_dtype_that_a_dense_layer_has(weight, given, autocast, device):
    dense = nn.Linear(32, 16)
    dense.weight.data = random_weight(16, 32, torch.float32, integers=True)
    dense = dense.to(device, weight)
    layer = sk.SparseLinear.from_linear(dense)
    x = random_input((3, 32), given, integers=True).to(device)
    with torch.autocast(device.type, dtype=autocast):
        expected = dense(x)
        wanted = x.clone().requires_grad_()
        got = [layer(x), sk.linear(x, layer.weight, layer.bias), layer(wanted)]
        with torch.no_grad():
            got += [layer(x), layer(x)]
        gated = sk.gated_linear(x, layer.weight, layer.weight)
    for y in got:
        assert y.dtype == expected.dtype == autocast
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-1)
    assert gated.dtype == autocast
    got[2].float().sum().backward()
    assert wanted.grad is not None and wanted.grad.dtype == given


def test_autocast_compiles_where_the_weight_has_the_other_16_bits():
    """The spec of the cast weight is made, or found, while the graph is traced."""
    half = sk.compress(random_weight(12, 28, torch.float16))
    quantized, x = sk.quantize(half, "fp8"), torch.randn(3, 28)

    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sk.linear(x, half), sk.gated_linear(x, half, half), sk.linear(x, quantized)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), call(x), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.bfloat16
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(x)[0], call(x)[0])


def test_autocast_that_is_off_changes_nothing(pair):
    w24, _, x = pair
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sk.linear(x, w24).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert sk.linear(x, w24).dtype == torch.float32
    assert sk.linear(x, w24).dtype == torch.float32


def test_autocast_within_compile(pair):
    layers, x = model(), pair[2]
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, layers(x))


def test_vmap_after_a_plain_call_of_its_shape(pair):
    w24, dense, x = pair
    sk.linear(x, w24)  # whose launch is remembered
    batch = torch.stack([x, 2 * x])
    got = torch.func.vmap(lambda part: sk.linear(part, w24))(batch)
    torch.testing.assert_close(got, batch @ dense.t())


def test_weights_that_vmap_stacks_are_refused():
    """torch.func.stack_module_state of an ensemble."""
    layers = [sk.SparseLinear(32, 16) for _ in range(2)]
    state = torch.func.stack_module_state(layers)
    call = lambda s, x: torch.func.functional_call(layers[0], s, (x,))  # noqa: E731
    with pytest.raises(NotImplementedError, match="one weight for all of torch.func.vmap"):
        torch.func.vmap(call)(state, torch.randn(2, 3, 32))


def test_jit_script_says_what_to_do(pair):
    model = nn.Sequential(sk.SparseLinear.from_sparse24(pair[0]), nn.ReLU())
    with pytest.raises(NotImplementedError, match=r"torch.export.*decompress_model"):
        torch.jit.script(model)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "made, text",
    [
        (lambda x: x.to_sparse(), "sparse_coo. Call x.to_dense"),
        (lambda x: x.to_sparse_csr(), "sparse_csr. Call x.to_dense"),
        (lambda x: torch.nested.nested_tensor([x]), "nested tensor .* Pass its values"),
        (lambda x: torch.nested.nested_tensor([x], layout=torch.jagged), "Pass its values"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_x_that_is_not_dense(made, text, gradients, pair):
    w24, _, x = pair
    with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match=text):
        sk.linear(made(x), w24)
