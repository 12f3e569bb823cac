"""gated_linear: both halves of a gated MLP, silu(x · Gᵀ) · (x · Uᵀ), in one op.

gate and up are two thirds of a decoder's weight bytes and read the same x. At up to 32 tokens, with
both weights in layout "tile64" on a Hopper GPU, one launch streams the two; otherwise the op is
composed of two sparse linear layers and a product.
"""

import torch
from torch import Tensor

from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.errors import message
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.ops import linear_op as ops

_OP = "sparsekern.gated_linear"


def gated_linear(x, gate24, up24):
    """Gated linear layer: y = silu(x · Gᵀ) · (x · Uᵀ), with G and U 2:4-sparse along in_features.

    Specification: reference.gated_linear (float64). Sums in float32.

    Args:
        x: [..., in_features] float32 | float16 | bfloat16, any strides. Zero tokens allowed.
        gate24, up24: Sparse24 [out_features, in_features], dtype and device of x. Their layouts may
            differ, but only two in "tile64" are fused.
    Returns:
        [..., out_features], dtype of x, contiguous. No aliasing with inputs.
    Raises:
        ValueError: shapes or devices. TypeError: dtypes, or a weight is no Sparse24.
        NotImplementedError: no backend can run this problem.
    Notes:
        Fused, it is rounded once; composed, both halves are rounded to x.dtype before the product.
        Gradients flow to x. Under autocast, x is cast to the weights' dtype.
    """
    ops.check_types(_OP, x, gate24)
    ops.check_types(_OP, x, up24)
    if x.dtype != gate24.values.dtype and ops.autocast(x):
        x = x.to(gate24.dtype)
    _check(x, gate24.values, gate24.shape, up24.values, up24.shape)
    if x.requires_grad and torch.is_grad_enabled():
        return ops.linear(x, gate24, None, "silu") * ops.linear(x, up24)
    if ops.needs_custom_op(x, None):
        return torch.ops.sparsekern.gated_linear(
            x,
            gate24.values,
            gate24.metadata,
            up24.values,
            up24.metadata,
            *gate24.shape,
            gate24.layout,
            up24.layout,
        )
    return _compute(x, gate24, up24)


def _check(x, gate_values, gate_shape, up_values, up_shape):
    if tuple(gate_shape) != tuple(up_shape):
        expected = f"gate24 and up24 of one shape ({list(gate_shape)})"
        remedy = "Pass the two weights of one MLP."
        raise ValueError(message(_OP, expected, list(up_shape), remedy))
    ops.check_linear(_OP, x, gate_values, gate_shape, None, None)
    ops.check_linear(_OP, x, up_values, up_shape, None, None)


def _compute(x, gate24, up24):
    if cuda_backend.gated_supported(x, gate24, up24):
        return cuda_backend.gated_linear(x, gate24, up24)
    folded = ops.fold(x)
    gate, _ = ops.select_backend(folded, gate24)
    up, _ = ops.select_backend(folded, up24)
    y = gate.linear(folded, gate24, None, "silu").mul_(up.linear(folded, up24, None, None))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], gate24.shape[0])


@torch.library.custom_op("sparsekern::gated_linear", mutates_args=())
def _gated_linear_op(
    x: Tensor,
    gate_values: Tensor,
    gate_metadata: Tensor,
    up_values: Tensor,
    up_metadata: Tensor,
    out_features: int,
    in_features: int,
    gate_layout: str,
    up_layout: str,
) -> Tensor:
    shape = (out_features, in_features)
    gate24 = Sparse24(gate_values, gate_metadata, shape, gate_layout)
    with cuda_backend.nothing_kept():
        return _compute(x, gate24, Sparse24(up_values, up_metadata, shape, up_layout))


@_gated_linear_op.register_fake
def _(
    x,
    gate_values,
    gate_metadata,
    up_values,
    up_metadata,
    out_features,
    in_features,
    gate_layout,
    up_layout,
):
    shape = (out_features, in_features)
    _check(x, gate_values, shape, up_values, shape)
    return x.new_empty((*x.shape[:-1], out_features))
