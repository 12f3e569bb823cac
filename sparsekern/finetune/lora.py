"""Low-rank adapters on a 2:4 weight: the masked product, and the merge that keeps the mask.

    plain     y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ          cheap; a merge loses what B·A has outside the mask
    masked    y = x·(W + s·(B·A)∘M)ᵀ          a merge loses nothing but rounding

The masked product is formed for some rows at a time, in forward and again in backward; kept between
them are x, A and B. A merge changes the stored values alone: metadata and bytes stay.

Source: Muñoz et al. 2024, "SQFT" (arXiv:2410.03750), SparsePEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import check
from sparsekern.formats import codec
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.ops.linear_op import autocast

OP = "sparsekern.finetune.lora"
ROWS = 1024  # of the product at a time


@dataclass(frozen=True)
class Merge:
    """A merged weight and what the mask took from the product.

    weight: the new Sparse24, row-major, metadata as before.
    loss: ‖(1 − M)∘ΔW‖² / ‖ΔW‖², the share of the adapter that is lost; 0 for ΔW = 0.
    """

    weight: Sparse24
    loss: float


def check_mergeable(op: str, w24: Sparse24) -> None:
    """TypeError for a weight whose numbers are levels and scales: a sum would need new ones."""
    remedy = "Keep the adapter unmerged, or set layer.weight = sparsekern.dequantize(layer.weight)."
    expected = "a weight of plain numbers"
    check(w24.spec.element.plain, op, expected, w24.spec.storage, remedy, TypeError)


@torch.no_grad()
def merge(w24: Sparse24, a: Tensor, b: Tensor, scale: float = 1.0) -> Merge:
    """W + (s·B·A)∘M in the form of W: values at the slots that it stores.

    Args:
        w24: Sparse24 [out, in], any layout.      a: [r, in].      b: [out, r].      scale: s.
    Returns:
        Merge. Products are summed in float32, added to W in float32 and rounded once.
    Raises:
        ValueError: shapes that do not fit; a result that is not finite.
        TypeError: a quantised weight.
    """
    op = f"{OP}.merge"
    check_mergeable(op, w24)
    _check_shapes(op, w24.shape, a, b)
    old = w24.rowmajor()
    values = torch.empty_like(old.values)
    right = a.float()
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    kept = torch.zeros_like(total)
    groups = w24.in_features // 4
    for begin in range(0, w24.out_features, ROWS):
        rows = slice(begin, begin + ROWS)
        delta = (b[rows].float() @ right) * scale
        columns = _columns(old.metadata[rows], groups)
        here = delta.gather(1, columns)
        values[rows] = (old.values[rows].float() + here).to(values.dtype)
        total += delta.double().square().sum()
        kept += here.double().square().sum()
    finite = bool(values.isfinite().all())
    check(finite, op, "finite merged weights", "NaN or Inf", "The adapter is broken.")
    values.masked_fill_(values == 0, 0)  # -0.0 is stored as +0.0
    loss = float(((total - kept) / total).clamp(min=0)) if float(total) > 0 else 0.0
    return Merge(Sparse24(values, old.metadata, w24.shape), loss)


def masked_product(x: Tensor, a: Tensor, b: Tensor, bitmask: Tensor, scale: float = 1.0) -> Tensor:
    """s · x · ((B·A)∘M)ᵀ without the [out, in] product in memory.

    Args:
        x: [..., in].      a: [r, in].      b: [out, r], dtypes of x (autocast casts them).
        bitmask: uint8 [out, ceil(in / 8)] as Sparse24.bitmask() gives it.
        scale: s.
    Returns:
        [..., out], dtype of x. Gradients flow to x, a and b.
    """
    _check_shapes(f"{OP}.masked_product", torch.Size((bitmask.shape[0], x.shape[-1])), a, b)
    dtype = autocast(x)
    if dtype is not None:
        x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
    folded = x.reshape(-1, x.shape[-1])
    y: Tensor = _MaskedProduct.apply(folded, a, b, bitmask, scale)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], b.shape[0])


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, bitmask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b, bitmask)
        ctx.scale = scale
        y = x.new_empty(x.shape[0], b.shape[0])
        for begin in range(0, b.shape[0], ROWS):
            rows = slice(begin, begin + ROWS)
            y[:, rows] = x @ _delta(a, b[rows], bitmask[rows], scale).t()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With Δ = s·(B·A)∘M: dx = g·Δ; G = s·(gᵀ·x)∘M; dB = G·Aᵀ; dA = Bᵀ·G."""
        x, a, b, bitmask = ctx.saved_tensors
        grad, scale = grads[0], ctx.scale
        grad_x = torch.zeros_like(x, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_a = torch.zeros_like(a, dtype=torch.float32)
        grad_b = torch.empty_like(b)
        for begin in range(0, b.shape[0], ROWS):
            rows = slice(begin, begin + ROWS)
            g = grad[:, rows]
            if grad_x is not None:
                grad_x += g @ _delta(a, b[rows], bitmask[rows], scale)
            product = (g.t() @ x) * scale
            product.masked_fill_(~_unpack(bitmask[rows], x.shape[1]), 0)
            grad_b[rows] = product @ a.t()
            grad_a += b[rows].t() @ product
        return (
            None if grad_x is None else grad_x.to(x.dtype),
            grad_a.to(a.dtype),
            grad_b,
            None,
            None,
        )


def _delta(a: Tensor, b: Tensor, bitmask: Tensor, scale: float) -> Tensor:
    return ((b @ a) * scale).masked_fill_(~_unpack(bitmask, a.shape[1]), 0)


def _unpack(bitmask: Tensor, in_features: int) -> Tensor:
    """uint8 [rows, ceil(in / 8)] -> bool [rows, in]."""
    bits = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return ((bitmask.unsqueeze(2) >> bits) & 1).bool().flatten(1)[:, :in_features]


def _columns(metadata: Tensor, groups: int) -> Tensor:
    """The column of each stored value, int64 [rows, in / 2]."""
    nibbles = codec.unpack_nibbles(metadata, groups).long()
    pairs = torch.stack((nibbles & 3, nibbles >> 2), dim=2)
    first = 4 * torch.arange(groups, device=metadata.device).view(1, groups, 1)
    return (pairs + first).flatten(1)


def _check_shapes(op: str, shape: torch.Size, a: Tensor, b: Tensor) -> None:
    out_features, in_features = shape
    fits = a.dim() == 2 and a.shape[1] == in_features
    check(fits, op, f"a [r, {in_features}]", list(a.shape))
    wanted = [out_features, a.shape[0]]
    check(list(b.shape) == wanted, op, f"b {wanted}", list(b.shape))
