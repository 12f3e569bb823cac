"""linear_quantized: y = act(x8 · Wᵀ) with x and W in 8 bits, a scale per token and per channel.

For whoever quantises activations himself (ops/quantize_rows.py, an engine); `sparsekern.linear`
does it by itself where that is faster. The op is sparsekern::linear_quantized; like
ops/linear_op.py this file calls a backend's launch directly in eager mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import memory, registry
from sparsekern.backends.protocol import Problem, problem_of
from sparsekern.errors import check, message
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.ops import linear_op as ops
from sparsekern.ops import transforms
from sparsekern.utils.arguments import check_strided

_OP = "sparsekern.linear_quantized"
_calls: ops.Calls = {}
_op_calls: ops.Calls = {}  # those within the registered op
registry.watch(_calls.clear)
registry.watch(_op_calls.clear)


def linear_quantized(
    x: Tensor,
    x_scale: Tensor,
    w24: Sparse24,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y = activation(x · levels(W)ᵀ · weight_scale · x_scale + bias), W 2:4-sparse and quantised.

    Specification: backends/cpu.py:quantized_linear. The product of levels is summed exactly for
    int8 (int32) and in float32 for e4m3 (CPU: exactly); then come the channel's scale, the token's,
    the bias and the activation in float32, and one rounding to w24.dtype.

    Args:
        x: [..., in_features] float8_e4m3fn | int8, the storage type of w24, any strides.
        x_scale: float32 [...] or [..., 1], a scale for each token, as from `quantize_rows`.
        w24: Sparse24 of storage "float8_e4m3fn" or "int8" (sparsekern.quantize), device of x.
        bias: [out_features], dtype w24.dtype, device of x, or None.
        activation: None | "relu" | "gelu" (exact, with erf) | "silu".
        backend: None chooses; a name forces it. See `explain_quantized`.
    Returns:
        [..., out_features], dtype w24.dtype, contiguous. No aliasing with inputs.
    Raises:
        ValueError: shapes, devices, unknown activation or backend, a gradient is wanted.
        TypeError: dtypes, or w24 is no quantised Sparse24.   NotImplementedError: no backend, or
        not the one asked for, can run this problem; a transform of torch.func around the call.
    Notes:
        A scale that is NaN makes the token's y NaN. Scales are not looked at otherwise.
        int8 without gelu and silu: the bits of the CPU on CUDA; Triton, where it splits
        in_features, may round otherwise, because it scales the parts. A row-major weight on a
        GPU whose kernels read another layout is packed once, as `linear` does.
    """
    ops.check_types(_OP, x, w24)
    _check(x, x_scale, w24.spec, w24.values, bias, activation)
    registry.check_name(_OP, backend)
    transforms.refuse(_OP, "Call sparsekern.linear, with x of the weight's dtype.")
    if ops.needs_custom_op(x, bias):
        wanted = torch.is_grad_enabled() and bias is not None and bias.requires_grad
        remedy = "Call it under torch.no_grad(), or pass bias.detach()."
        check(not wanted, _OP, "arguments without gradients", "bias.requires_grad", remedy)
        if backend is None and ops._is_eager(x):
            w24 = ops.in_best_layout(w24)
        seen: Tensor = torch.ops.sparsekern.linear_quantized(
            x, x_scale, list(w24.tensors.values()), w24.spec.text, bias, activation, backend
        )
        return seen
    if backend is None:
        w24 = ops.in_best_layout(w24)
    return _compute(x, x_scale, w24, bias, activation, backend, _calls)


def explain_quantized(x: Tensor, w24: Sparse24, *, backend: str | None = None) -> ops.Explanation:
    """Which backend and config `linear_quantized(x, scale, w24)` uses, and why; computes nothing.

    Args, Raises: as `linear_quantized`.
    """
    ops.check_types(_OP, x, w24)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    _check(x, scale, w24.spec, w24.values, None, None)
    spec, packed = w24.spec, ""
    best = registry.best_layout(spec, w24.device) if backend is None else spec.layout
    if best != spec.layout and w24.keeps_twin and not w24.values.is_inference():
        spec, packed = spec.with_(layout=best), "; packed once from 'rowmajor' and remembered"
    problem = problem_of(x, spec)
    chosen = registry.choose(problem, backend, _OP)
    config, why, us = chosen.explain(problem)
    return ops.Explanation(chosen.name, config, spec.layout, why + packed, us)


def _check(
    x: Tensor,
    x_scale: object,
    spec: WeightSpec,
    values: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> None:
    """Every relation between the arguments; shared by the eager path and the fake kernel."""
    kind, in_features = spec.element, spec.shape[1]
    rows = kind.scaled and kind.bits == 8
    expected = "a weight of storage 'float8_e4m3fn' or 'int8'"
    remedy = "Call sparsekern.quantize(weight, 'fp8' or 'int8')."
    check(rows, _OP, expected, repr(spec.storage), remedy, TypeError)
    expected = f"x.dtype == the weight's storage type ({kind.storage})"
    remedy = "Call sparsekern.quantize_rows(x, ...), or sparsekern.linear for a plain x."
    check(x.dtype is kind.storage, _OP, expected, x.dtype, remedy, TypeError)
    check_strided(_OP, "x", x)
    if not x.shape or x.shape[-1] != in_features:
        expected = f"x.shape[-1] == weight.in_features ({in_features})"
        raise ValueError(message(_OP, expected, f"x of shape {list(x.shape)}"))
    if not isinstance(x_scale, Tensor):
        raise TypeError(message(_OP, "x_scale of type Tensor", type(x_scale).__name__))
    check(x_scale.dtype is torch.float32, _OP, "x_scale float32", x_scale.dtype, "", TypeError)
    check_strided(_OP, "x_scale", x_scale)
    sizes = list(x.shape[:-1])
    if list(x_scale.shape) not in (sizes, [*sizes, 1]):  # else torch.compile traces no text
        expected = f"x_scale of shape x.shape[:-1] ({sizes})"
        raise ValueError(message(_OP, expected, str(list(x_scale.shape))))
    for name, tensor in (("x", x), ("x_scale", x_scale)):
        place = tensor.device
        check(
            place == values.device, _OP, f"{name} on the weight's device ({values.device})", place
        )
    ops.check_epilogue(_OP, spec, bias, x.device, activation)


def _compute(
    x: Tensor,
    x_scale: Tensor,
    w24: Sparse24,
    bias: Tensor | None,
    activation: str | None,
    backend: str | None,
    calls: ops.Calls,
) -> Tensor:
    """Find or bind the launch and call it, for checked arguments."""
    bias = None if bias is None else bias.contiguous()
    x_scale = x_scale.reshape(-1)  # new and contiguous, unless it is so already
    x_scale = x_scale if x_scale.is_contiguous() else x_scale.contiguous()
    problem: Problem = problem_of(x, w24.spec, activation, bias is not None)
    key = (*problem[:4], problem.device, problem.quantized, activation, bias is not None, backend)
    launch = calls.get(key)
    if launch is None:
        launch = registry.choose(problem, backend, _OP).bind(problem._replace(aligned=True))
        if len(calls) >= ops._KNOWN_CALLS:
            calls.clear()
        calls[key] = launch
    y = launch(x, w24, bias, x_scale)
    if y is not None:
        return y
    bind = registry.choose(problem, backend, _OP).bind
    return ops.launch_anew(bind, problem, x, w24, bias, x_scale)


@torch.library.custom_op("sparsekern::linear_quantized", mutates_args=())
def _linear_quantized_op(
    x: Tensor,
    x_scale: Tensor,
    tensors: list[Tensor],
    spec: str,
    bias: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> Tensor:
    w24 = ops.weight_of(tensors, spec)
    _check(x, x_scale, w24.spec, w24.values, bias, activation)
    with memory.nothing_kept():
        return _compute(x, x_scale, w24, bias, activation, backend, _op_calls)


@_linear_quantized_op.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    tensors: list[Tensor],
    spec: str,
    bias: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> Tensor:
    parsed = WeightSpec.parse(spec)
    _check(x, x_scale, parsed, tensors[0], bias, activation)
    return x.new_empty((*x.shape[:-1], parsed.shape[0]), dtype=parsed.dtype)
