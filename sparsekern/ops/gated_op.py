"""gated_linear: both halves of a gated MLP, silu(x · Gᵀ) · (x · Uᵀ), in one op.

gate and up are two thirds of a decoder's weight bytes and read the same x. At up to 32 tokens, with
both weights in layout "tile64" on a Hopper GPU, one launch streams the two; otherwise the op is
composed of two sparse linear layers and a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import memory, registry
from sparsekern.backends.protocol import problem_of
from sparsekern.errors import message
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.ops import linear_op as ops
from sparsekern.ops import transforms

_OP = "sparsekern.gated_linear"


def gated_linear(x: Tensor, gate24: Sparse24, up24: Sparse24) -> Tensor:
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
        Gradients flow to x. Under autocast the result has its dtype: see sparsekern.linear.
    """
    ops.check_types(_OP, x, gate24)
    ops.check_types(_OP, x, up24)
    rounded = ops.autocast(x)
    if rounded is not None:
        x, (gate24, up24) = ops.under_autocast(rounded, x, gate24, up24)
        with torch.autocast(x.device.type, enabled=False):
            return gated_linear(x, gate24, up24).to(rounded)
    _check(x, gate24.spec, gate24.values, up24.spec, up24.values)
    if transforms.active() or (x.requires_grad and torch.is_grad_enabled()):
        return ops.linear(x, gate24, None, "silu") * ops.linear(x, up24)
    if ops.needs_custom_op(x, None):
        if not torch.compiler.is_compiling() and ops._jit_trace() is not None:
            ops.refuse_onnx(_OP)
        gate, up = list(gate24.tensors.values()), list(up24.tensors.values())
        y: Tensor = torch.ops.sparsekern.gated_linear(x, gate, gate24.spec.text, up, up24.spec.text)
        return y
    return _compute(x, ops.in_best_layout(gate24), ops.in_best_layout(up24), ops._calls)


def _check(
    x: Tensor, gate: WeightSpec, gate_values: Tensor, up: WeightSpec, up_values: Tensor
) -> None:
    if gate.shape != up.shape:
        expected = f"gate24 and up24 of one shape ({list(gate.shape)})"
        remedy = "Pass the two weights of one MLP."
        raise ValueError(message(_OP, expected, str(list(up.shape)), remedy))
    ops.check_linear(_OP, x, gate, gate_values, None, None)
    ops.check_linear(_OP, x, up, up_values, None, None)


def _compute(x: Tensor, gate24: Sparse24, up24: Sparse24, calls: ops.Calls) -> Tensor:
    pair = problem_of(x, gate24.spec, gated=up24.spec)
    fused, _ = registry.find(pair)
    if fused is not None:
        return ops.launch_anew(fused.bind, pair, x, gate24, up24)
    gate = ops._compute(x, gate24, None, "silu", None, calls)
    return gate.mul_(ops._compute(x, up24, None, None, None, calls))


@torch.library.custom_op("sparsekern::gated_linear", mutates_args=())
def _gated_linear_op(
    x: Tensor, gate: list[Tensor], gate_spec: str, up: list[Tensor], up_spec: str
) -> Tensor:
    with memory.nothing_kept():
        pair = ops.weight_of(gate, gate_spec), ops.weight_of(up, up_spec)
        return _compute(x, *pair, ops._op_calls)


@_gated_linear_op.register_fake
def _(x: Tensor, gate: list[Tensor], gate_spec: str, up: list[Tensor], up_spec: str) -> Tensor:
    ops.refuse_onnx(_OP)
    spec = WeightSpec.parse(gate_spec)
    _check(x, spec, gate[0], WeightSpec.parse(up_spec), up[0])
    return x.new_empty((*x.shape[:-1], spec.shape[0]))
