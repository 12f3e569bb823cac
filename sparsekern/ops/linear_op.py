"""The sparse linear op: checks, shape folding, choice of backend, registration, autograd.

One call goes nn/sparse_linear.py -> ops/linear_op.py -> backend. This file owns what is common to every backend; a
backend sees a checked, two-dimensional x and returns [tokens, out_features] (cuda and cusparselt:
any number of dimensions, which saves two views). Backends:

    cuda        sparsekern/backends/cuda/linear.py, with the native module (sparsekern/_native.py)
    cuda-mma    the same with one kernel for every GPU, which is never preferred on Hopper
    triton      sparsekern/backends/triton/linear.py
    cpu         sparsekern/backends/cpu.py
    cusparselt  sparsekern/backends/cusparselt/linear.py, for weights that were packed for it

The weight's layout, the device and the shapes choose the backend; nothing global does. In eager
mode, when no gradient is wanted, the backend is called directly, because the custom-op boundary
costs more than a small kernel, and a weight in "tile64" or "cusparselt" goes straight to its own
backend; otherwise (autograd, torch.compile, fake and meta tensors) the call goes through
torch.ops.sparsekern.linear.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern import _native
from sparsekern.backends import cpu as cpu_backend
from sparsekern.backends import triton as triton_kernels
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.backends.cusparselt import linear as cusparselt_backend
from sparsekern.errors import message
from sparsekern.formats.sparse24 import Sparse24, decompress

_OP = "sparsekern.linear"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the likeliest first, for the search
_TILE64 = cuda_backend.LAYOUT
_ACTIVATIONS = (None, "relu", "gelu", "silu")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_is_traced = torch.compiler.is_dynamo_compiling  # quicker; other tracers bring tensors of their own
_is_grad_enabled = torch.is_grad_enabled


# ---- the table of backends -----------------------------------------------------------------------


class Backend(NamedTuple):
    """supported(x, w24) -> (bool, reason), linear(x, w24, bias, activation) -> y and
    config(x, w24) -> name, for checked arguments and x [tokens, in_features].

    origin(x, w24) -> (why this config, its expected time in us or None), where there is a choice.
    """

    name: str
    supported: Callable
    linear: Callable
    config: Callable
    origin: Callable | None = None


def _load_cpu():
    return Backend("cpu", cpu_backend.supported, cpu_backend.linear, cpu_backend.config)


def _load_triton():
    if not triton_kernels.available():
        return triton_kernels.reason()
    kernels = importlib.import_module("sparsekern.backends.triton.linear")

    def supported(x, w24):
        if x.device.type != "cuda":
            return False, f"backend 'triton' needs x on a GPU, got {x.device}"
        if w24.layout != "rowmajor":
            return False, f"backend 'triton' needs layout 'rowmajor', got {w24.layout!r}"
        return True, "x is on a GPU and the layout is 'rowmajor'"

    def linear(x, w24, bias, activation):
        bias = None if bias is None else bias.contiguous()
        return kernels.linear(x, w24.values, w24.metadata, w24.shape[1], bias, activation)

    def config(x, w24):
        return str(kernels.pick_config(x.shape[0], w24.shape[0], w24.shape[1], x.dtype))

    return Backend("triton", supported, linear, config)


def _load_cuda():
    if not _native.available():
        return _native.reason()
    return Backend(
        "cuda",
        cuda_backend.supported,
        cuda_backend.linear,
        cuda_backend.config,
        cuda_backend.origin,
    )


def _load_cusparselt():
    module = cusparselt_backend
    return Backend("cusparselt", module.supported, module.linear, module.config)


def _load_cuda_mma():
    if not _native.available():
        return _native.reason()
    run = cuda_backend.mma_linear
    return Backend("cuda-mma", cuda_backend.supported, run, cuda_backend.mma_config)


# A loader returns a Backend, or the reason why there is none. To add one: a loader and a name.
_LOADERS = {
    "cuda": _load_cuda,
    "cuda-mma": _load_cuda_mma,
    "triton": _load_triton,
    "cpu": _load_cpu,
    "cusparselt": _load_cusparselt,
}
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton", "cusparselt")}
# {layout: (backend, its module)} of the layouts that one backend alone computes with.
_OWNERS = {
    cuda_backend.LAYOUT: ("cuda", cuda_backend),
    cusparselt_backend.LAYOUT: ("cusparselt", cusparselt_backend),
}
_NO_OWNER = (None, None)


@functools.cache
def _load(name):
    return _LOADERS[name]()


def _try(name, x, w24):
    """(Backend, reason it was taken), or (None, reason it cannot run)."""
    loaded = _load(name)
    if isinstance(loaded, str):
        return None, loaded
    ok, reason = loaded.supported(x, w24)
    return (loaded if ok else None), reason


def select_backend(x, w24, backend=None):
    """The backend that computes linear(x, w24), and why.

    Args:
        x: [tokens, in_features].
        w24: Sparse24 [out_features, in_features].
        backend: None for the best one of x's device, or a name that must be used.
    Returns:
        (Backend, reason).
    Raises:
        ValueError: unknown name. NotImplementedError: the one asked for, or every one, cannot run.
    """
    if backend is not None:
        if backend not in _LOADERS:
            names = ", ".join(map(repr, _LOADERS))
            raise ValueError(message(_OP, f"backend in {names}", repr(backend), "Leave it None."))
        chosen, reason = _try(backend, x, w24)
        if chosen is None:
            expected = f"a problem that backend {backend!r} can run"
            raise NotImplementedError(message(_OP, expected, reason, "Leave backend=None."))
        return chosen, f"requested; {reason}"
    refusals = []
    owner, _ = _OWNERS.get(w24.layout, _NO_OWNER)
    # As _compute: the layout's own backend comes first.
    names = sorted(_PREFERENCE.get(x.device.type, ()), key=lambda name: name != owner)
    for name in names:
        chosen, reason = _try(name, x, w24)
        if chosen is not None:
            return chosen, "; ".join([reason, *refusals]) if refusals else reason
        refusals.append(f"not {name}: {reason}")
    got = "; ".join(refusals) or f"device {x.device}"
    remedy = "Move x and the weight to the CPU, or use weight.rowmajor()."
    raise NotImplementedError(message(_OP, "a backend for this problem", got, remedy))


# ---- checks --------------------------------------------------------------------------------------


def check_linear(op, x, values, shape, bias, activation):
    """Every relation between the arguments; shared by the eager path and the fake kernel.

    Runs in every call, so each property of a tensor is asked for once.
    """
    out_features, in_features = shape
    x_shape, dtype, device = x.shape, x.dtype, x.device
    weight_dtype = values.dtype
    if not x_shape or x_shape[-1] != in_features:
        expected = f"x.shape[-1] == weight.in_features ({in_features})"
        remedy = "Pad x, or pass the weight compressed for it."
        raise ValueError(message(op, expected, f"x of shape {list(x_shape)}", remedy))
    if weight_dtype not in _DTYPES:
        expected = "weight.dtype in float32, float16, bfloat16"
        raise TypeError(message(op, expected, weight_dtype, "Call weight.to(torch.bfloat16)."))
    if dtype is not weight_dtype:
        expected = f"x.dtype == weight.dtype ({weight_dtype})"
        raise TypeError(message(op, expected, dtype, "Call x.to(weight.dtype)."))
    if device != values.device:
        expected = f"x on the weight's device ({values.device})"
        raise ValueError(message(op, expected, device, "Call x.to(weight.device)."))
    if values.requires_grad:
        got = "weight.values.requires_grad == True"
        raise ValueError(message(op, "a frozen weight", got, "Call weight.detach()."))
    if bias is not None:
        if bias.shape != (out_features,):
            expected = f"bias of shape [out_features] ([{out_features}])"
            raise ValueError(message(op, expected, list(bias.shape), "Reshape the bias."))
        if bias.dtype != dtype:
            expected = f"bias.dtype == x.dtype ({dtype})"
            raise TypeError(message(op, expected, bias.dtype, "Call bias.to(x.dtype)."))
        if bias.device != device:
            expected = f"bias on x's device ({device})"
            raise ValueError(message(op, expected, bias.device, "Call bias.to(x.device)."))
    if activation not in _ACTIVATIONS:
        expected = "activation in None, 'relu', 'gelu', 'silu'"
        raise ValueError(message(op, expected, repr(activation), "Apply others to the result."))


def check_types(op, x, w24):
    if not isinstance(w24, Sparse24):
        got = type(w24).__name__
        remedy = "Call sparsekern.compress(w)."
        raise TypeError(message(op, "weight of type Sparse24", got, remedy))
    if not isinstance(x, Tensor):
        got = type(x).__name__
        raise TypeError(message(op, "x of type Tensor", got, "Call torch.as_tensor(x)."))


# ---- the op --------------------------------------------------------------------------------------


def fold(x):
    """[..., features] -> [tokens, features]; a view where the strides allow one."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _compute(x, w24, bias, activation, backend):
    owner, module = _OWNERS.get(w24.layout, _NO_OWNER)
    if owner and backend in (None, owner) and not module.why_not(x, w24):  # without a detour
        return module.linear(x, w24, bias, activation)
    folded = fold(x)
    chosen, _ = select_backend(folded, w24, backend)
    y = chosen.linear(folded, w24, bias, activation)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], w24.shape[0])


@torch.library.custom_op("sparsekern::linear", mutates_args=())
def _linear_op(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    out_features: int,
    in_features: int,
    bias: Tensor | None,
    activation: str | None,
    layout: str,
    backend: str | None,
) -> Tensor:
    w24 = Sparse24(values, metadata, (out_features, in_features), layout)
    with cuda_backend.nothing_kept():
        return _compute(x, w24, bias, activation, backend)


@_linear_op.register_fake
def _(x, values, metadata, out_features, in_features, bias, activation, layout, backend):
    check_linear(_OP, x, values, (out_features, in_features), bias, activation)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("sparsekern::linear_input_grad", mutates_args=())
def _input_grad_op(
    grad: Tensor,
    values: Tensor,
    metadata: Tensor,
    out_features: int,
    in_features: int,
    layout: str,
) -> Tensor:
    """grad [..., out_features] · W -> [..., in_features]: the gradient of linear for x."""
    w24 = Sparse24(values, metadata, (out_features, in_features), layout)
    folded = fold(grad)
    if grad.device.type == "cpu":
        result = cpu_backend.input_grad(folded, w24)
    else:
        result = folded @ decompress(w24.rowmajor())
    return result.view(*grad.shape[:-1], in_features)


@_input_grad_op.register_fake
def _(grad, values, metadata, out_features, in_features, layout):
    return grad.new_empty((*grad.shape[:-1], in_features))


def _activation_slope(z, activation):
    """d activation(z) / dz, elementwise; relu has slope 0 at 0, as in torch."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _save_for_backward(ctx, inputs, output):
    x, values, metadata, out_features, in_features, bias, activation, layout, backend = inputs
    # The pre-activation is computed again from x and bias: no second output, no memory held for it.
    again = (x, bias) if activation else (None, None)
    ctx.save_for_backward(values, metadata, *again)
    ctx.sizes, ctx.activation, ctx.layout, ctx.backend = (
        (out_features, in_features),
        activation,
        layout,
        backend,
    )


def _backward(ctx, grad):
    """With z = x·Wᵀ + b: dz = grad · activation'(z); dx = dz · W; db = sum of dz over tokens."""
    values, metadata, x, bias = ctx.saved_tensors
    dz = grad.float()
    if ctx.activation:
        z = torch.ops.sparsekern.linear(
            x, values, metadata, *ctx.sizes, bias, None, ctx.layout, ctx.backend
        )
        dz = dz * _activation_slope(z.float(), ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.sparsekern.linear_input_grad(
            dz.to(grad.dtype), values, metadata, *ctx.sizes, ctx.layout
        )
    if ctx.needs_input_grad[5]:
        grad_bias = dz.sum_to_size((ctx.sizes[0],)).to(grad.dtype)
    return grad_x, None, None, None, None, grad_bias, None, None, None


def _save_for_double_backward(ctx, inputs, output):
    _, values, metadata, out_features, in_features, layout = inputs
    ctx.save_for_backward(values, metadata)
    ctx.sizes, ctx.layout = (out_features, in_features), layout


def _double_backward(ctx, grad):
    values, metadata = ctx.saved_tensors
    grad_grad = torch.ops.sparsekern.linear(
        grad, values, metadata, *ctx.sizes, None, None, ctx.layout, None
    )
    return grad_grad, None, None, None, None, None


_linear_op.register_autograd(_backward, setup_context=_save_for_backward)
_input_grad_op.register_autograd(_double_backward, setup_context=_save_for_double_backward)


def autocast(x):
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def needs_custom_op(x, bias):
    """True where the call must be seen: gradients, tracing, tensors without data."""
    if _is_compiling() or type(x) not in _PLAIN_TYPES or x.is_meta:
        return True
    if not _is_grad_enabled():  # first, because then no tensor is asked
        return False
    return x.requires_grad or (bias is not None and bias.requires_grad)


def linear(x, w24, bias=None, activation=None, *, backend=None):
    """Sparse linear layer: y = activation(x · Wᵀ + bias), with W 2:4-sparse along in_features.

    Specification: reference.linear (float64). Accumulates in float32, adds the bias and applies the
    activation in float32, then rounds once to x.dtype.

    Args:
        x: [..., in_features] float32 | float16 | bfloat16, any strides. Zero tokens allowed.
        w24: Sparse24 of shape [out_features, in_features], dtype and device of x.
        bias: [out_features], dtype and device of x, or None.
        activation: None | "relu" | "gelu" (exact, with erf) | "silu".
        backend: None chooses; "cpu", "triton", "cuda", "cuda-mma" or "cusparselt" forces one. See
            `explain`.
    Returns:
        [..., out_features], dtype of x, contiguous. No aliasing with inputs.
    Raises:
        ValueError: shape, device, unknown activation or backend.
        TypeError: dtypes, or w24 is no Sparse24.
        NotImplementedError: no backend, or not the one asked for, can run this problem.
    Notes:
        A weight in layout "tile64" must be complete in memory, not only queued: see pack.pack.
        Gradients flow to x and bias, twice if wanted; the weight is frozen. The pre-activation is
        computed again in backward. Under autocast, x and bias are cast to the weight's dtype.
        float32 never runs in TF32. On the CPU 16-bit inputs are multiplied in float32 (exact
        products, and no need for fast 16-bit matmuls; see backends/cpu.py).
        Bitwise reproducible for a fixed config; the config depends on the number of tokens.
        Whether an infinite or NaN x reaches a row that has pruned its column (0 · Inf) is left to
        the backend.
    """
    if type(x) is not Tensor or type(w24) is not Sparse24:
        check_types(_OP, x, w24)
    values, layout = w24.values, w24.layout
    # Inference with a plain tensor and a packed weight is what has to be quick on the host. Here a
    # call like one before ends as below, with fewer questions.
    owner, module = _OWNERS.get(layout, _NO_OWNER)
    if (
        module is not None
        and (backend is None or backend == owner)
        and (activation is None or activation in _ACTIVATIONS)
        and type(x) is Tensor
        and not _is_traced()
        and not _is_grad_enabled()
    ):
        y = module.linear_again(x, w24, bias, activation)
        if y is not None:
            return y
    if x.dtype is not values.dtype and autocast(x):
        x = x.to(w24.dtype)
        bias = None if bias is None else bias.to(w24.dtype)
    check_linear(_OP, x, values, w24.shape, bias, activation)
    # Likewise: why_not refuses what is on no GPU, tensors without data, too.
    if (
        layout == _TILE64
        and backend is None
        and type(x) is Tensor
        and not _is_compiling()
        and not _is_grad_enabled()
        and not cuda_backend.why_not(x, w24)
    ):
        return cuda_backend.linear(x, w24, bias, activation)
    if needs_custom_op(x, bias):
        return torch.ops.sparsekern.linear(
            x, values, w24.metadata, *w24.shape, bias, activation, layout, backend
        )
    return _compute(x, w24, bias, activation, backend)


# ---- explain -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What `linear` does with a problem: the backend, its config, the weight's layout, and why.

    expected_us: the time on the GPU that a tuned table has for just this problem, else None.
    """

    backend: str
    config: str
    layout: str
    reason: str
    expected_us: float | None = None

    def __str__(self):
        text = f"{self.backend} ({self.config}, layout {self.layout}): {self.reason}"
        return text if self.expected_us is None else f"{text}; expected {self.expected_us:g} us"


def explain(x, w24, *, backend=None):
    """Which backend and config `linear(x, w24, backend=backend)` uses, and why; computes nothing.

    Args, Raises: as `linear`.
    Returns:
        Explanation(backend, config, layout, reason, expected_us): strings, and a time or None.
    """
    check_types(_OP, x, w24)
    check_linear(_OP, x, w24.values, w24.shape, None, None)
    folded = fold(x)
    chosen, reason = select_backend(folded, w24, backend)
    why, us = chosen.origin(folded, w24) if chosen.origin else ("", None)
    reason = f"{reason}; {why}" if why else reason
    return Explanation(chosen.name, str(chosen.config(folded, w24)), w24.layout, reason, us)
