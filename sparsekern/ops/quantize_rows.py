"""Activations to 8 bits, one scale per token: quantize_rows, rms_norm_quantize, silu_mul_quantize.

The two fused ones are what a decoder layer does just before a linear layer; each reads its rows
once. The rule and what happens to zeros, NaN and Inf is in backends/quantize_rows.py.

    q, scale = quantize_rows(x, "fp8")          x ≈ q * scale[..., None]
    y = linear_quantized(q, scale, w24q)        ops/quantized_linear.py

In eager mode the kernels are called directly; torch.compile and fake tensors see the ops
sparsekern::quantize_rows, ::rms_norm_quantize and ::silu_mul_quantize. None has a gradient.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from sparsekern.backends import quantize_rows as rows
from sparsekern.errors import check, message
from sparsekern.formats import dtypes
from sparsekern.ops import transforms
from sparsekern.ops.linear_op import needs_custom_op
from sparsekern.utils.arguments import check_strided

_OP = "sparsekern.quantize_rows"
_NORM = "sparsekern.rms_norm_quantize"
_SILU = "sparsekern.silu_mul_quantize"
# What users call the types, and the types themselves.
STORAGES = ("fp8", "int8", "float8_e4m3fn")


def quantize_rows(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """q = round(x / scale), scale = max |x| / limit of each token; limit 448 (fp8) or 127 (int8).

    Specification: backends/quantize_rows.py:quantize_torch, whose bits every backend gives.

    Args:
        x: [..., features] float32 | float16 | bfloat16, any strides. Zero tokens allowed.
        dtype: "fp8" (float8_e4m3fn) or "int8".
    Returns:
        (q [..., features] float8_e4m3fn | int8, contiguous; scale float32 [...]). A token of zeros
        has the scale 1; one with NaN or Inf has the scale NaN and q = 0.
    Raises:
        TypeError: x is no tensor, or not of these dtypes.   ValueError: an unknown dtype; x has no
        dimension; gradients are wanted for x.   NotImplementedError: a sparse or nested x; a
        transform of torch.func, or forward-mode AD, around the call. So the two below.
    """
    storage = checked_storage(_OP, dtype)
    _check_rows(_OP, x)
    if needs_custom_op(x, None):
        _no_gradient(_OP, x)
        found: tuple[Tensor, Tensor] = torch.ops.sparsekern.quantize_rows(x, storage)
        return found
    return _quantize_rows(x, storage)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    dtype: str,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    with_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`quantize_rows` of y = RMSNorm(x + residual) · weight, without y in memory.

    y = h · weight / sqrt(mean(h²) + eps) in float32, rounded once to the dtype of x; then its q.

    Args:
        x: [..., features] float32 | float16 | bfloat16, any strides.
        weight: [features], dtype and device of x.
        dtype: "fp8" or "int8".   eps: >= 0, finite.
        residual: shape, dtype and device of x, or None; it becomes h = x + residual, rounded, in
            place; no two of its elements share memory.
        with_y: also return y.
    Returns:
        (q, scale, y or None), as `quantize_rows` of y.
    Raises:
        TypeError: dtypes.   ValueError: shapes, devices, eps, an unknown dtype; gradients are
        wanted for an argument.
    """
    storage = checked_storage(_NORM, dtype)
    _check_flag(_NORM, with_y)
    _check_norm(x, weight, eps, residual)
    eps = float(eps)
    if needs_custom_op(x, weight) or (residual is not None and needs_custom_op(residual, None)):
        _no_gradient(_NORM, x, weight, residual)
        q, scale, y = torch.ops.sparsekern.rms_norm_quantize(
            x, weight, eps, storage, residual, with_y
        )
    else:
        q, scale, y = _rms_norm_quantize(x, weight, eps, storage, residual, with_y)
    return q, scale, y if with_y else None


def silu_mul_quantize(
    gate: Tensor, up: Tensor | None, dtype: str, *, with_y: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`quantize_rows` of y = silu(gate) · up, without y in memory.

    In float32, rounded once to the dtype of gate, then quantised.

    Args:
        gate: [..., features] float32 | float16 | bfloat16, any strides; without up both halves,
            [..., 2 · features], gate first.
        up: shape, dtype and device of gate, or None.
        dtype: "fp8" or "int8".   with_y: also return y.
    Returns:
        (q [..., features], scale [...], y or None), as `quantize_rows` of y.
    Raises:
        TypeError: dtypes.   ValueError: shapes, devices, an unknown dtype; gradients are wanted for
        an argument.
    """
    storage = checked_storage(_SILU, dtype)
    _check_flag(_SILU, with_y)
    _check_gated(gate, up)
    if needs_custom_op(gate, up):
        _no_gradient(_SILU, gate, up)
        q, scale, y = torch.ops.sparsekern.silu_mul_quantize(gate, up, storage, with_y)
    else:
        q, scale, y = _silu_mul_quantize(gate, up, storage, with_y)
    return q, scale, y if with_y else None


# ---- checks --------------------------------------------------------------------------------------


def checked_storage(op: str, dtype: object) -> str:
    """The element type that a user calls "fp8" or "int8".

    Raises:
        ValueError: another one.
    """
    check(dtype in STORAGES, op, "dtype 'fp8' or 'int8'", repr(dtype))
    return dtypes.element(str(dtype)).name


def _check_flag(op: str, with_y: object) -> None:
    if with_y is not True and with_y is not False:
        raise TypeError(message(op, "with_y True or False", type(with_y).__name__))


def _check_rows(op: str, x: object, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(message(op, f"{name} of type Tensor", type(x).__name__))
    if x.dtype not in dtypes.PLAIN:
        known = f"{name} of dtype {dtypes.names(' | ')}"
        raise TypeError(message(op, known, str(x.dtype), "Convert it."))
    check_strided(op, name, x)
    if not x.dim():
        raise ValueError(message(op, f"{name} [..., features]", "a tensor without dimensions"))
    transforms.refuse(op, "Call it on all rows: they are independent, and have no slope.")


def _check_like(op: str, name: str, tensor: object, of: str, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(message(op, f"{name} of type Tensor", type(tensor).__name__))
    if tensor.shape != x.shape:  # else torch.compile traces no text of sizes
        expected = f"{name}.shape == {of}.shape ({list(x.shape)})"
        raise ValueError(message(op, expected, str(list(tensor.shape))))
    _check_kind(op, name, tensor, of, x)


def _check_kind(op: str, name: str, tensor: Tensor, of: str, x: Tensor) -> None:
    check_strided(op, name, tensor)
    same = tensor.dtype == x.dtype
    check(same, op, f"{name}.dtype == {of}.dtype ({x.dtype})", tensor.dtype, "", TypeError)
    place = tensor.device
    check(place == x.device, op, f"{name} on the device of {of} ({x.device})", place)


def _check_norm(x: Tensor, weight: object, eps: object, residual: Tensor | None) -> None:
    _check_rows(_NORM, x)
    if not isinstance(weight, Tensor):
        raise TypeError(message(_NORM, "weight of type Tensor", type(weight).__name__))
    if weight.shape != x.shape[-1:]:
        expected = f"weight of shape [features] ([{x.shape[-1]}])"
        raise ValueError(message(_NORM, expected, str(list(weight.shape))))
    _check_kind(_NORM, "weight", weight, "x", x)
    if not (isinstance(eps, (int, float)) and 0 <= eps <= sys.float_info.max):
        raise ValueError(message(_NORM, "eps finite and >= 0", repr(eps)))
    if residual is not None:
        _check_like(_NORM, "residual", residual, "x", x)


def _check_gated(gate: Tensor, up: Tensor | None) -> None:
    _check_rows(_SILU, gate, "gate")
    if up is None:
        if gate.shape[-1] % 2:
            expected = "gate [..., 2 * features] where up is None"
            raise ValueError(message(_SILU, expected, str(list(gate.shape)), "Pass up."))
    else:
        _check_like(_SILU, "up", up, "gate", gate)


def _no_gradient(op: str, *tensors: Tensor | None) -> None:
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    remedy = "Call it under torch.no_grad(); rounding has no gradient."
    check(not wanted, op, "arguments without gradients", "one that requires a gradient", remedy)


# ---- computing -----------------------------------------------------------------------------------


def folded(x: Tensor) -> Tensor:
    """x as rows [tokens, features] with unit stride along features; a view where there is one."""
    if x.dim() != 2:
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _quantize_rows(x: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    q, scale = rows.quantize(folded(x.detach()), storage)
    return (q, scale) if x.dim() == 2 else (q.view(x.shape), scale.view(x.shape[:-1]))


def _rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, storage: str, residual: Tensor | None, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if residual is not None and not residual.is_contiguous():
        remedy = "Pass residual.clone(): it is changed in place."
        overlaps = _overlaps(residual)
        check(not overlaps, _NORM, "residual with memory for each element", "shared", remedy)
    target = None if residual is None else folded(residual.detach())
    q, scale, y = rows.rms_norm(
        folded(x.detach()), weight.detach().contiguous(), eps, storage, target, with_y
    )
    if residual is not None and target is not None and target.data_ptr() != residual.data_ptr():
        residual.detach().copy_(target.view(residual.shape))  # it could not be folded in place
    y = x.new_empty(0) if y is None else y.view(x.shape)
    return q.view(x.shape), scale.view(x.shape[:-1]), y


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory: a stride is shorter than what the smaller ones span."""
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride < span:
            return True
        span += (size - 1) * stride
    return False


def _silu_mul_quantize(
    gate: Tensor, up: Tensor | None, storage: str, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if up is None:
        both = folded(gate.detach())
        first, second = both.chunk(2, 1)
        shape = (*gate.shape[:-1], gate.shape[-1] // 2)
    else:
        first, second, shape = folded(gate.detach()), folded(up.detach()), tuple(gate.shape)
    q, scale, y = rows.silu_mul(first, second, storage, with_y)
    y = gate.new_empty(0) if y is None else y.view(shape)
    return q.view(shape), scale.view(shape[:-1]), y


# ---- the ops -------------------------------------------------------------------------------------


def _fakes(
    x: Tensor, shape: tuple[int, ...], storage: str, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q = x.new_empty(shape, dtype=dtypes.element(storage).storage)
    scale = x.new_empty(shape[:-1], dtype=torch.float32)
    return q, scale, x.new_empty(shape if with_y else (0,))


@torch.library.custom_op("sparsekern::quantize_rows", mutates_args=())
def _quantize_rows_op(x: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    _check_rows(_OP, x)
    return _quantize_rows(x, checked_storage(_OP, storage))


@_quantize_rows_op.register_fake
def _(x: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    _check_rows(_OP, x)
    return _fakes(x, tuple(x.shape), checked_storage(_OP, storage), False)[:2]


@torch.library.custom_op("sparsekern::rms_norm_quantize", mutates_args=("residual",))
def _rms_norm_quantize_op(
    x: Tensor, weight: Tensor, eps: float, storage: str, residual: Tensor | None, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm(x, weight, eps, residual)
    return _rms_norm_quantize(x, weight, eps, checked_storage(_NORM, storage), residual, with_y)


@_rms_norm_quantize_op.register_fake
def _(
    x: Tensor, weight: Tensor, eps: float, storage: str, residual: Tensor | None, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm(x, weight, eps, residual)
    return _fakes(x, tuple(x.shape), checked_storage(_NORM, storage), with_y)


@torch.library.custom_op("sparsekern::silu_mul_quantize", mutates_args=())
def _silu_mul_quantize_op(
    gate: Tensor, up: Tensor | None, storage: str, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_gated(gate, up)
    return _silu_mul_quantize(gate, up, checked_storage(_SILU, storage), with_y)


@_silu_mul_quantize_op.register_fake
def _(gate: Tensor, up: Tensor | None, storage: str, with_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_gated(gate, up)
    last = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    shape = (*gate.shape[:-1], last)
    return _fakes(gate, shape, checked_storage(_SILU, storage), with_y)
