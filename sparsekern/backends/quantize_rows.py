"""Activations to 8 bits with one scale per token: on whatever is the fastest for a tensor.

    CUDA with the native module, float16 and bfloat16    csrc/activations/quantize_rows.cuh
    anything else                                        here, in torch: the specification

The rule, y being what is quantised, [tokens, features]:

    absmax = max |y| of a token;   scale = absmax / limit, at least 2^-126, and 1 where absmax is 0
    q = y * (1 / scale), rounded to the nearest level, ties to even, and saturated to ±limit

with limit 448 (float8_e4m3fn) or 127 (int8), all in float32, each operation rounded. A token with
NaN or Inf has the scale NaN and q = 0: whatever is computed from it is NaN, for this token alone.
Both implementations give the same bits for the same y. A norm's sum of squares is added in another
order on the GPU (that depends on `features` alone), and silu uses the GPU's fast exponential, so y
itself may there differ in its last bit.

All functions take rows [tokens, features] with unit stride along features, and are not recorded by
autograd. Arguments are not checked here; ops/quantize_rows.py does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekern import _native
from sparsekern.formats import dtypes

_SMALLEST = torch.finfo(torch.float32).tiny
_CAPABILITY = (8, 0)  # of the native kernels


def quantize(y: Tensor, storage: str, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """(q [tokens, features], scale float32 [tokens]) of y.

    Args:
        storage: "float8_e4m3fn" or "int8".
        multiple: q has a row stride that is a multiple of this many elements; the gaps are not
            written.
    """
    if native(y):
        q, scale = _outputs(y, storage, multiple)
        _launch(y, storage, q, scale)
        return q, scale
    q, scale = quantize_torch(y, storage)
    if q.shape[1] % multiple:
        wide, _ = _outputs(y, storage, multiple)
        wide.view(torch.uint8).copy_(q.view(torch.uint8))
        q = wide
    return q, scale


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, storage: str, residual: Tensor | None, with_y: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q, scale, y) of y = h · weight / sqrt(mean(h²) + eps), rounded once to the dtype of x.

    h is x, or x + residual, rounded to the dtype and written into residual, which has unit stride
    along features too. y is None unless it is asked for.
    """
    if native(x):
        q, scale = _outputs(x, storage, 1)
        y = torch.empty_like(q, dtype=x.dtype) if with_y else None
        _launch(x, storage, q, scale, y=y, norm_weight=weight, eps=eps, residual=residual)
        return q, scale, y
    if residual is not None:
        x = residual.copy_(x.float() + residual.float())
    h = x.float()
    mean = h.double().square().mean(1, keepdim=True).float()
    inverse = torch.ones_like(mean) / (mean + eps).sqrt()
    y = (h * weight.float() * inverse).to(x.dtype)
    q, scale = quantize_torch(y, storage)
    return q, scale, y if with_y else None


def silu_mul(
    gate: Tensor, up: Tensor, storage: str, with_y: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q, scale, y) of y = silu(gate) · up, rounded once to the dtype of gate."""
    if native(gate):
        q, scale = _outputs(gate, storage, 1)
        y = torch.empty_like(q, dtype=gate.dtype) if with_y else None
        _launch(gate, storage, q, scale, y=y, up=up)
        return q, scale, y
    y = (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)
    q, scale = quantize_torch(y, storage)
    return q, scale, y if with_y else None


def quantize_torch(y: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """The rule in torch, for any floating-point y."""
    kind, limit = dtypes.element(storage), dtypes.scaled_codec(storage).top
    numbers = y.float()
    most = numbers.abs().amax(1) if y.shape[1] else numbers.new_zeros(y.shape[0])
    # Quotients of tensors: torch on a GPU multiplies with the inverse of a plain number.
    scale = (most / torch.full_like(most, limit)).clamp(min=_SMALLEST)
    scale = scale.masked_fill(most == 0, 1.0)
    finite = most.isfinite()
    scale = scale.masked_fill(~finite, torch.nan)
    levels = numbers * (torch.ones_like(scale) / scale)[:, None]
    levels = levels.masked_fill(~finite[:, None], 0.0).clamp(-limit, limit)
    if not kind.storage.is_floating_point:
        levels = levels.round()
    return levels.to(kind.storage), scale


def native(x: Tensor) -> bool:
    """True when the native kernels take rows like x."""
    return (
        x.is_cuda
        and x.dtype in dtypes.NATIVE
        and _native.available()
        and torch.cuda.get_device_capability(x.device) >= _CAPABILITY
    )


def _outputs(x: Tensor, storage: str, multiple: int) -> tuple[Tensor, Tensor]:
    tokens, features = x.shape
    stride = -(-features // multiple) * multiple
    sizes, dtype = (tokens, stride), dtypes.element(storage).storage
    q = torch.empty(sizes, dtype=dtype, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    return (q if stride == features else q[:, :features]), scale


def _launch(
    x: Tensor,
    storage: str,
    q: Tensor,
    scale: Tensor,
    *,
    y: Tensor | None = None,
    up: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> None:
    module: Any = _native.module()
    with torch.cuda.device(x.device):
        module.quantize_rows(
            x=x.data_ptr(),
            x_stride=x.stride(0),
            tokens=x.shape[0],
            features=x.shape[1],
            dtype=dtypes.NATIVE[x.dtype],
            up=0 if up is None else up.data_ptr(),
            up_stride=0 if up is None else up.stride(0),
            norm_weight=0 if norm_weight is None else norm_weight.data_ptr(),
            eps=eps,
            residual=0 if residual is None else residual.data_ptr(),
            residual_stride=0 if residual is None else residual.stride(0),
            y=0 if y is None else y.data_ptr(),
            y_stride=0 if y is None else y.stride(0),
            storage=dtypes.element(storage).native_code,
            q=q.data_ptr(),
            q_stride=q.stride(0),
            scale=scale.data_ptr(),
            stream=torch.cuda.current_stream(x.device).cuda_stream,
        )
