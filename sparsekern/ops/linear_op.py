"""The sparse linear op: checks, the call cache, registration with torch, autograd.

One call goes nn/sparse_linear.py -> ops/linear_op.py -> the launch of a backend. This file owns
what is common to every backend: the checks, what a call is keyed by, and the choice, which is that
of backends/registry.py. A backend is asked once per kind of call; its launch is kept in `_calls`,
and a later call like it is one look-up away from the kernel.

In eager mode, when no gradient is wanted, the launch is called directly, because the custom-op
boundary costs more than a small kernel; otherwise (autograd, torch.compile, fake and meta tensors)
the call goes through torch.ops.sparsekern.linear.

A row-major weight where the kernels read another layout is packed once and remembered: see
`Sparse24.twin` and `linear`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad

from sparsekern.backends import compress as fastest
from sparsekern.backends import cpu, memory, registry
from sparsekern.backends.protocol import Launch, Problem, problem_of
from sparsekern.errors import message
from sparsekern.formats import dtypes, sparse24
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.formats.weight_like import products
from sparsekern.ops import transforms
from sparsekern.utils.arguments import check_strided, shown

_OP = "sparsekern.linear"
_ACTIVATIONS = (None, "relu", "gelu", "silu")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_is_traced = torch.compiler.is_dynamo_compiling  # quicker; other tracers bring tensors of their own
_is_grad_enabled = torch.is_grad_enabled
_jit_trace = torch._C._get_tracing_state
_has_autocast = torch.amp.is_autocast_available
_any_autocast = torch._C._is_any_autocast_enabled
_any_transform = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack  # FlopCounterMode and its kind are to see it
# Device types that have an autocast; asked here because torch.compile of torch 2.11 cannot.
_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "mtia", "xla", "xpu") if _has_autocast(kind)
)

# {what decides: launch}. What decides: shape and strides of x (None: contiguous), its dtype and
# GPU, the weight's spec, the activation, whether there is a bias, the backend that is asked for.
Calls = dict[tuple[object, ...], Launch]
_calls: Calls = {}
_op_calls: Calls = {}  # those within the registered ops
_KNOWN_CALLS = 4096  # when there are so many, they are forgotten
registry.watch(_calls.clear)
registry.watch(_op_calls.clear)


def _functional_linear(input: Tensor, weight: Sparse24, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear of a 2:4 weight."""
    return linear(input, weight, bias)


products[torch.nn.functional.linear] = _functional_linear


# ---- checks --------------------------------------------------------------------------------------


def check_linear(
    op: str,
    x: Tensor,
    spec: WeightSpec,
    values: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> None:
    """Every relation between the arguments; shared by the eager path and the fake kernel."""
    in_features = spec.shape[1]
    check_strided(op, "x", x)
    x_shape, dtype, device = x.shape, x.dtype, x.device
    if not x_shape or x_shape[-1] != in_features:
        expected = f"x.shape[-1] == weight.in_features ({in_features})"
        remedy = "Pad x, or pass the weight compressed for it."
        raise ValueError(message(op, expected, f"x of shape {list(x_shape)}", remedy))
    if dtype is not spec.dtype:
        expected = f"x.dtype == weight.dtype ({spec.dtype})"
        raise TypeError(message(op, expected, str(dtype), "Call x.to(weight.dtype)."))
    if device != values.device:
        expected = f"x on the weight's device ({values.device})"
        raise ValueError(message(op, expected, str(device), "Call x.to(weight.device)."))
    if values.requires_grad:
        got = "weight.values.requires_grad == True"
        raise ValueError(message(op, "a frozen weight", got, "Call weight.detach()."))
    check_epilogue(op, spec, bias, device, activation)


def check_epilogue(
    op: str, spec: WeightSpec, bias: Tensor | None, device: torch.device, activation: str | None
) -> None:
    """Bias and activation against the weight's spec and the device of x."""
    if bias is not None:
        check_bias_type(op, bias)
        if bias.shape != spec.shape[:1]:
            expected = f"bias of shape [out_features] ([{spec.shape[0]}])"
            raise ValueError(message(op, expected, str(list(bias.shape)), "Reshape the bias."))
        if bias.dtype != spec.dtype:
            expected = f"bias.dtype == weight.dtype ({spec.dtype})"
            raise TypeError(message(op, expected, str(bias.dtype), "Call bias.to(weight.dtype)."))
        if bias.device != device:
            expected = f"bias on x's device ({device})"
            raise ValueError(message(op, expected, str(bias.device), "Call bias.to(x.device)."))
    if activation not in _ACTIVATIONS:
        expected = "activation in None, 'relu', 'gelu', 'silu'"
        raise ValueError(message(op, expected, repr(activation), "Apply others to the result."))


def check_types(op: str, x: object, w24: object) -> None:
    """TypeError unless x is a tensor and w24 a Sparse24."""
    if not isinstance(w24, Sparse24):
        sparse24.check_is_sparse24(op, w24)
    if not isinstance(x, Tensor):
        got, remedy = type(x).__name__, "Call torch.as_tensor(x)."
        if got == "Proxy":  # of torch.fx: a graph cannot hold a Sparse24
            remedy = "Trace a model whose layers are SparseLinear modules, or torch.fx.wrap a call."
        raise TypeError(message(op, "x of type Tensor", got, remedy))


def check_bias_type(op: str, bias: object) -> None:
    """TypeError for a bias that is neither a tensor nor None, NotImplementedError for one that is
    not dense."""
    if bias is not None and not isinstance(bias, Tensor):
        expected = "bias: a tensor [out_features], or None"
        raise TypeError(message(op, expected, type(bias).__name__, "Call torch.as_tensor(bias)."))
    if bias is not None:
        check_strided(op, "bias", bias)


# ---- computing -----------------------------------------------------------------------------------


def launch_anew(bind: Callable[[Problem], Launch], problem: Problem, *arguments: Any) -> Tensor:
    """Bind a problem as it is and call it, with its GPU as the current one."""
    if problem.device.type == "cuda":
        with torch.cuda.device(problem.device):
            y = bind(problem)(*arguments)
    else:
        y = bind(problem)(*arguments)
    if y is None:
        raise RuntimeError(message(_OP, "a result from a call that was just bound", "None"))
    return y


def _compute(
    x: Tensor,
    w24: Sparse24,
    bias: Tensor | None,
    activation: str | None,
    backend: str | None,
    calls: Calls,
) -> Tensor:
    """Find or bind the launch and call it, for checked arguments."""
    spec, bias = w24.spec, None if bias is None else bias.contiguous()
    problem = problem_of(x, spec, activation, bias is not None)
    shape, strides, dtype, index = problem.x_shape, problem.x_stride, problem.dtype, problem.gpu
    key = shape, strides, dtype, index, spec, activation, bias is not None, backend
    known = calls.get(key)
    launch = known or _bind(problem._replace(aligned=True), backend, calls is _calls)
    y = launch(x, w24, bias)
    if known is None:
        _check_result(y, problem)  # once, for backends from outside
        if len(calls) >= _KNOWN_CALLS:
            calls.clear()
        calls[key] = launch
    if y is not None:
        return y
    return launch_anew(registry.choose(problem, backend).bind, problem, x, w24, bias)


def _check_result(y: object, problem: Problem) -> None:
    """TypeError unless a launch returned what its backend owes for the problem, or None."""
    shape = (*problem.x_shape[:-1], problem.out_features)
    wanted = shape, problem.dtype, problem.device
    if y is not None and (
        not isinstance(y, Tensor) or (y.shape, y.dtype, y.device) != wanted or not y.is_contiguous()
    ):
        expected = f"a contiguous y {list(shape)} of {problem.dtype} from the backend"
        raise TypeError(message(_OP, expected, shown(y), "Mend what its bind returns."))


def _bind(problem: Problem, backend: str | None, twins: bool) -> Launch:
    best = ROWMAJOR
    if twins and backend is None and problem.spec.layout == ROWMAJOR:
        best = registry.best_layout(problem.spec, problem.device)
    if best == ROWMAJOR:
        launch = registry.choose(problem, backend).bind(problem)
    else:
        launch = _bind_rowmajor(problem, best)
    return launch if problem.device.type == "cuda" else _for_device(launch, problem.device)


def _for_device(launch: Launch, device: torch.device) -> Launch:
    """The launch for tensors of this device alone; keys tell GPUs apart, and nothing else."""

    def guarded(x: Tensor, w24: Sparse24, bias: Tensor | None) -> Tensor | None:
        return launch(x, w24, bias) if x.device == device else None

    return guarded


def _bind_rowmajor(problem: Problem, best: str) -> Launch:
    """The launch of row-major weights where kernels read another layout: by way of their twins,
    which stay with them, or, for those that can have none, as they are."""

    @functools.cache
    def bound(layout: str) -> Launch:
        of_layout = problem._replace(spec=problem.spec.with_(layout=layout))
        return registry.choose(of_layout).bind(of_layout)

    in_twin = bound(best)

    def launch(x: Tensor, w24: Sparse24, bias: Tensor | None) -> Tensor | None:
        twin = w24.fresh_twin()
        if twin is None:
            twin = in_best_layout(w24)
            if twin is w24:
                return bound(ROWMAJOR)(x, w24, bias)
        return in_twin(x, twin, bias)

    return launch


def in_best_layout(w24: Sparse24) -> Sparse24:
    """A row-major weight's twin in the layout that kernels read, where it can have one; or w24."""
    layout = _better_layout(w24) if w24.spec.layout == ROWMAJOR else None
    return w24 if layout is None else w24.twin(layout)


def _better_layout(w24: Sparse24) -> str | None:
    """The layout that a row-major weight should have been made in, where it can be packed now."""
    layout = registry.best_layout(w24.spec, w24.device)
    if layout == ROWMAJOR or not w24.keeps_twin:
        return None
    if w24.values.is_inference() or w24.metadata.is_inference():
        warnings.warn(_SLOW_WEIGHT.format(layout=layout), UserWarning, stacklevel=4)
        return None
    if w24.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # packing waits for the GPU, which a capture forbids
    return layout


_SLOW_WEIGHT = (
    "sparsekern.linear: the weight is row-major, for which this GPU has only slow kernels, and was "
    "made in inference mode, so that it cannot be packed once and remembered (its changes cannot "
    "be seen). Use weight.to_layout({layout!r}), or compress without layout='rowmajor'."
)


# ---- the op --------------------------------------------------------------------------------------


def weight_of(tensors: list[Tensor], text: str) -> Sparse24:
    """The weight of an op's arguments: its tensors in the spec's order, and the spec's text."""
    spec = WeightSpec.parse(text)
    if len(tensors) != len(spec.tensors):
        got = f"{len(tensors)} tensors"
        raise ValueError(message(_OP, f"the tensors {', '.join(spec.tensors)}", got))
    return Sparse24.from_tensors(spec, dict(zip(spec.tensors, tensors)))


@torch.library.custom_op("sparsekern::linear", mutates_args=())
def _linear_op(
    x: Tensor,
    tensors: list[Tensor],
    spec: str,
    bias: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> Tensor:
    with memory.nothing_kept():
        y = _compute(x, weight_of(tensors, spec), bias, activation, backend, _op_calls)
    # Autograd forbids in-place changes of a view that a custom op returns; nothing else has y.
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y  # type: ignore[no-any-return]


@_linear_op.register_fake
def _(
    x: Tensor,
    tensors: list[Tensor],
    spec: str,
    bias: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> Tensor:
    refuse_onnx(_OP)
    parsed = WeightSpec.parse(spec)
    check_linear(_OP, x, parsed, tensors[0], bias, activation)
    return x.new_empty((*x.shape[:-1], parsed.shape[0]))


@torch.library.custom_op("sparsekern::linear_input_grad", mutates_args=())
def _input_grad_op(grad: Tensor, tensors: list[Tensor], spec: str) -> Tensor:
    """grad [..., out_features] · W -> [..., in_features]: the gradient of linear for x."""
    w24 = weight_of(tensors, spec)
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad.unsqueeze(0)
    if grad.device.type == "cpu":
        result = cpu.input_grad(rows, w24)
    else:
        result = rows @ fastest.decompress(w24)
    return result.view(*grad.shape[:-1], w24.in_features)


@_input_grad_op.register_fake
def _(grad: Tensor, tensors: list[Tensor], spec: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], WeightSpec.parse(spec).shape[1]))


def _activation_slope(z: Tensor, activation: str) -> Tensor:
    """d activation(z) / dz, elementwise; relu has slope 0 at 0, as in torch."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tensors, ctx.spec, bias, ctx.activation, ctx.backend = inputs
    # The pre-activation is computed again from x and bias: no second output, no memory held for it.
    again = (x, bias) if ctx.activation else (None, None)
    ctx.save_for_backward(*tensors, *again)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """With z = x·Wᵀ + b: dz = grad · activation'(z); dx = dz · W; db = sum of dz over tokens."""
    *tensors, x, bias = ctx.saved_tensors
    dz = grad
    if ctx.activation:
        z = torch.ops.sparsekern.linear(x, tensors, ctx.spec, bias, None, ctx.backend)
        dz = grad.float() * _activation_slope(z.float(), ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        w24 = weight_of(tensors, ctx.spec)
        grad_x = transforms.product(dz.to(grad.dtype), w24, True, ctx.backend)
    if ctx.needs_input_grad[3]:
        out_features = WeightSpec.parse(ctx.spec).shape[0]
        grad_bias = dz.float().sum_to_size((out_features,)).to(grad.dtype)
    return grad_x, [None] * len(tensors), None, grad_bias, None, None


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    w24 = weight_of(tensors, ctx.spec)
    return transforms.product(grad, w24, False, None), [None] * len(tensors), None


_linear_op.register_autograd(_backward, setup_context=_save_for_backward)
_input_grad_op.register_autograd(_double_backward, setup_context=_save_for_double_backward)


# torch.autograd.grad(is_grads_batched=True), jacobian(vectorize=True) and gradcheck hand their
# batches of gradients to the backward by a vmap that is not torch.func's. Its fallback takes no
# list of tensors: both products are then torch's, with a dense copy of the weight.


def _batched_linear(
    x: Tensor,
    tensors: list[Tensor],
    spec: str,
    bias: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> Tensor:
    z = torch.nn.functional.linear(x, weight_of(tensors, spec).to_dense(), bias)
    return z if activation is None else getattr(torch.nn.functional, activation)(z)  # type: ignore[no-any-return]


def _batched_input_grad(grad: Tensor, tensors: list[Tensor], spec: str) -> Tensor:
    return grad @ weight_of(tensors, spec).to_dense()


_batched = torch.library.Library("sparsekern", "IMPL")
_batched.impl("linear", _batched_linear, "Batched")
_batched.impl("linear_input_grad", _batched_input_grad, "Batched")


def autocast(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives linear layers on the device of x; None where it is off."""
    kind = x.device.type
    if kind in _AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def under_autocast(
    dtype: torch.dtype, x: Tensor, *weights: Sparse24
) -> tuple[Tensor, tuple[Sparse24, ...]]:
    """x and the weights in one dtype, for a result that is then rounded to autocast's `dtype`:
    that of the weights, so that nothing but x is cast; where it is another 16-bit one, `dtype`."""
    if weights[0].dtype not in (dtype, torch.float32) and dtype in dtypes.PLAIN:
        weights = tuple(w24.to(dtype=dtype) for w24 in weights)
    if x.dtype is not weights[0].dtype and x.is_floating_point():
        x = x.to(weights[0].dtype)
    return x, weights


def refuse_onnx(op: str) -> None:
    """NotImplementedError within torch.onnx.export, which has no operator for these weights."""
    if torch.onnx.is_in_onnx_export():
        expected, got = "a dense model for ONNX", "one with compressed layers"
        remedy = "Export sparsekern.decompress_model(copy.deepcopy(model))."
        raise NotImplementedError(message(op, expected, got, remedy))


def _wants_gradient(bias: Tensor | None) -> bool:
    return bias is not None and getattr(bias, "requires_grad", False)


def needs_custom_op(x: Tensor, bias: Tensor | None) -> bool:
    """True where the call must be seen: gradients, tracing, modes, tensors without data."""
    if _is_compiling() or type(x) not in _PLAIN_TYPES or x.is_meta or _jit_trace() is not None:
        return True
    if _dispatch_modes():
        return True
    if not _is_grad_enabled():  # first, because then no tensor is asked
        return False
    return x.requires_grad or _wants_gradient(bias)


def linear(
    x: Tensor,
    w24: Sparse24,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Sparse linear layer: y = activation(x · Wᵀ + bias), with W 2:4-sparse along in_features.

    Specification: reference.linear (float64). Accumulates in float32, adds the bias and applies the
    activation in float32, then rounds once to x.dtype.

    Args:
        x: [..., in_features] float32 | float16 | bfloat16, any strides. Zero tokens allowed.
        w24: Sparse24 of shape [out_features, in_features], dtype and device of x.
        bias: [out_features], dtype and device of x, or None.
        activation: None | "relu" | "gelu" (exact, with erf) | "silu".
        backend: None chooses; "cpu", "triton", "cuda", "cuda-mma", "cuda-precise" (e4m3 alone),
            "cuda-a16" (quantised weights alone), "cusparselt" or the name of a registered one
            forces it. See `explain`.
    Returns:
        [..., out_features], dtype of x, contiguous. No aliasing with inputs.
    Raises:
        ValueError: shape, device, unknown activation or backend.
        TypeError: dtypes, or w24 is no Sparse24.
        NotImplementedError: no backend, or not the one asked for, can run this problem; a sparse or
            nested x; weights that torch.func.vmap stacked.
    Notes:
        A weight in layout "tile64" must be complete in memory, not only queued: see tile64.pack.
        A row-major weight on a GPU whose kernels read another layout is packed at the first eager
        call and the packed copy remembered on it (9/16 of the dense bytes beside as much again),
        until its tensors are replaced or changed in place; weight.to_layout("tile64"), or compress
        without layout=, holds one copy. Within torch.compile, in a graph capture before the first
        call, and with backend=, it is used as it is.
        Gradients flow to x and bias, twice if wanted; the weight is frozen. The pre-activation is
        computed again in backward. Under autocast the result has autocast's dtype, as with
        nn.Linear; x and bias are cast to the weight's dtype (a 16-bit weight to autocast's, call by
        call, where that is the other one), and what is accumulated is rounded once more.
        Under torch.func (grad, jvp, vmap, ...) and forward-mode AD the product is rounded before
        bias and activation, which are then added in float32; within torch.compile and torch.export
        it is then computed from a dense copy of the weight.
        int4, and 8-bit weights with backend "cuda-a16", are widened to 16 bits in memory on Hopper
        with more than 64 tokens: 9/8 bytes for every dense number, for the time of the call.
        float32 never runs in TF32. On the CPU 16-bit inputs are multiplied in float32 (exact
        products, and no need for fast 16-bit matmuls; see backends/cpu.py).
        Bitwise reproducible for a fixed config; the config depends on the number of tokens.
        FlopCounterMode counts dense-equivalent work: 2 · tokens · out_features · in_features.
        Whether an infinite or NaN x reaches a row that has pruned its column (0 · Inf) is left to
        the backend.
    """
    if type(x) is not Tensor or type(w24) is not Sparse24:
        check_types(_OP, x, w24)
    spec, tensors = w24.spec, w24.tensors
    values = tensors["values"]
    # Inference with a plain tensor is what has to be quick on the host: a call like one before is
    # one look-up, which stands for the choice of a kernel and for most of check_linear; the rest of
    # it is here.
    if (
        type(x) is Tensor
        and not _is_traced()
        and _forward_ad._current_level < 0
        and not _any_transform()
        and not _dispatch_modes()
        and not _any_autocast()
        and _jit_trace() is None
        and not (_is_grad_enabled() and (x.requires_grad or _wants_gradient(bias)))
    ):
        dtype, index = x.dtype, x.get_device()
        try:
            strides = None if x.is_contiguous() else x.stride()
            launch = _calls.get(
                (x.shape, strides, dtype, index, spec, activation, bias is not None, backend)
            )
        except (TypeError, RuntimeError):  # unhashable, or x has no shape: the checks say it
            launch = None
        if (
            launch is not None
            and values.get_device() == index
            and not values.requires_grad
            and (
                bias is None
                or (
                    bias.dtype is dtype
                    and bias.get_device() == index
                    and bias.is_contiguous()
                    and bias.shape == (spec.shape[0],)
                )
            )
        ):
            y = launch(x, w24, bias)
            if y is not None:
                return y
    rounded = autocast(x)
    if rounded is not None:
        check_bias_type(_OP, bias)
        x, (w24,) = under_autocast(rounded, x, w24)
        bias = None if bias is None else bias.to(w24.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return linear(x, w24, bias, activation, backend=backend).to(rounded)
    check_linear(_OP, x, spec, values, bias, activation)
    registry.check_name(_OP, backend)
    if transforms.active():
        return transforms.linear(x, w24, bias, activation, backend)
    if needs_custom_op(x, bias):
        if not _is_compiling() and _jit_trace() is not None:
            refuse_onnx(_OP)  # what torch.export sees is refused by the op's fake kernel
        if backend is None and spec.layout == ROWMAJOR and _is_eager(x):
            w24 = in_best_layout(w24)
            spec, tensors = w24.spec, w24.tensors
        seen: Tensor = torch.ops.sparsekern.linear(
            x, list(tensors.values()), spec.text, bias, activation, backend
        )
        return seen
    return _compute(x, w24, bias, activation, backend, _calls)


def _is_eager(x: Tensor) -> bool:
    """False while something traces the call, or the tensors have no data."""
    return not _is_compiling() and type(x) in _PLAIN_TYPES and not x.is_meta


# ---- explain -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What `linear` does with a problem: the backend, its config, the layout it reads, and why.

    expected_us: the time on the GPU that a tuned table has for just this problem, else None.
    """

    backend: str
    config: str
    layout: str
    reason: str
    expected_us: float | None = None

    def __str__(self) -> str:
        text = f"{self.backend} ({self.config}, layout {self.layout}): {self.reason}"
        return text if self.expected_us is None else f"{text}; expected {self.expected_us:g} us"


def explain(x: Tensor, w24: Sparse24, *, backend: str | None = None) -> Explanation:
    """Which backend and config `linear(x, w24, backend=backend)` uses, and why; computes nothing.

    Args, Raises: as `linear`.
    Returns:
        Explanation(backend, config, layout, reason, expected_us): strings, and a time or None.
    """
    check_types(_OP, x, w24)
    check_linear(_OP, x, w24.spec, w24.values, None, None)
    spec, packed = w24.spec, ""
    twins = w24.keeps_twin and not w24.values.is_inference()
    if backend is None and spec.layout == ROWMAJOR and twins:
        best = registry.best_layout(spec, w24.device)
        if best != ROWMAJOR:
            spec, packed = spec.with_(layout=best), "packed once from 'rowmajor' and remembered"
    problem = problem_of(x, spec)
    if backend is None:
        chosen, refusals = registry.find(problem)
        chosen = registry.choose(problem) if chosen is None else chosen
    else:
        chosen, refusals = registry.choose(problem, backend), []
    config, why, us = chosen.explain(problem)
    why = why if backend is None else f"requested; {why}"
    reason = "; ".join([why, *([packed] if packed else []), *refusals])
    return Explanation(chosen.name, config, spec.layout, reason, us)
