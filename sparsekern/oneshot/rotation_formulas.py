"""What the search of a rotation is made of, for stacks of matrices and with hand-written gradients:
what of each input the others do not tell, what 2:4 drops, Cayley's form.

Inverses are taken by halves, in matmuls: with m = [[a, b], [bᵀ, c]] and s = c − bᵀ a⁻¹ b,

    m⁻¹ = [[a⁻¹ + t yᵀ, −t], [−tᵀ, s⁻¹]],   y = a⁻¹ b,   t = y s⁻¹

No pivot is needed: H + diag H, scaled to a unit diagonal, has no eigenvalue below 1/2 and none
above n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAF = 64  # rows of the matrices that the inverse by halves leaves to a library


def inverse(m: Tensor) -> Tensor:
    """m⁻¹ of [..., n, n], symmetric and positive definite, of a moderate condition."""
    n = m.shape[-1]
    if n <= LEAF:
        leaf: Tensor = torch.linalg.inv_ex(m).inverse
        return leaf
    half = n // 2
    b = m[..., :half, half:]
    a = inverse(m[..., :half, :half])
    y = a @ b
    s = inverse(m[..., half:, half:] - b.mT @ y)
    t = y @ s
    result = torch.empty_like(m)
    torch.add(a, t @ y.mT, out=result[..., :half, :half])
    torch.neg(t, out=result[..., :half, half:])
    torch.neg(t.mT, out=result[..., half:, :half])
    result[..., half:, half:] = s
    return result


class _Told(torch.autograd.Function):
    """e_j = 1 / 2[m⁻¹]_jj of m = h + diag(own). With k = m⁻¹: ∂e_j/∂m = 2 e_j² k_:j k_j:."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, own: Tensor) -> Tensor:
        m = h + torch.diag_embed(own)
        scale = m.diagonal(dim1=-2, dim2=-1).rsqrt()
        k = inverse(m * scale[..., None] * scale[..., None, :])
        k = k * scale[..., None] * scale[..., None, :]
        energy: Tensor = 0.5 / k.diagonal(dim1=-2, dim2=-1)
        ctx.save_for_backward(k, energy)
        return energy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        k, energy = ctx.saved_tensors
        by_m = (k * (2 * grads[0] * energy.square())[..., None, :]) @ k
        return by_m, by_m.diagonal(dim1=-2, dim2=-1)


def untold(h: Tensor) -> Tensor:
    """1 / 2[(H + diag H)⁻¹]_jj of Gram matrices [..., in, in]: what of each input a random half of
    the others does not tell; H_jj without correlation, 0 of an input that is always zero. What is
    added is at least the rounding of H, beside which H of few tokens or of rotated inputs is
    singular."""
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    rounding = torch.finfo(h.dtype)
    mean = diagonal.mean(-1, keepdim=True).detach().clamp_min(rounding.tiny)
    own = torch.maximum(diagonal + dead * mean, 8 * h.shape[-1] * rounding.eps * mean)
    energy: Tensor = _Told.apply(h, own)  # type: ignore[no-untyped-call]
    return energy * ~dead


class Turned(torch.autograd.Function):
    """Qᵀ H Q of symmetric H [B, n, n]: three products forward and backward, not five."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, q: Tensor) -> Tensor:
        half = (h.reshape(-1, len(q)) @ q).view_as(h).mT.reshape(-1, len(q))  # (H Q)ᵀ, one by one
        ctx.save_for_backward(half)
        return (half @ q).view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (half,) = ctx.saved_tensors
        return None, half.t() @ (grads[0] + grads[0].mT).view_as(half)


class _Lost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, energy: Tensor, stack: int) -> Tensor:
        importance = w.square().mul_(energy)
        groups = importance.unflatten(-1, (-1, 4))
        a, b, c, d = groups.unbind(-1)
        low, other = torch.minimum(a, b), torch.minimum(c, d)
        high = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
        # The smallest, and the smallest of the rest: much faster than topk of four.
        second = torch.minimum(torch.maximum(low, other), high)
        total = (torch.minimum(low, other) + second).sum((1 - stack, 2))
        if any(ctx.needs_input_grad):
            dropped = w * (groups <= second[..., None]).view_as(w)
            ctx.save_for_backward(dropped, energy)
            ctx.stack = stack
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dropped, energy = ctx.saved_tensors
        grad = grads[0].unsqueeze(1 - ctx.stack).unsqueeze(2)
        by_w = dropped * (2 * grad * energy) if ctx.needs_input_grad[0] else None
        by_energy = None
        if ctx.needs_input_grad[1]:
            by_energy = dropped.square().sum(1 - ctx.stack, keepdim=True) * grad
        return by_w, by_energy, None


def lost(w: Tensor, energy: Tensor, stack: int = 0) -> Tensor:
    """Σ w_ij² energy_j of what 2:4 drops when it keeps the two largest of each group: of each of B
    matrices, w [B, out, in] and energy [B, 1, in], or with stack=1 [out, B, in] and [1, B, in]."""
    total: Tensor = _Lost.apply(w, energy, stack)  # type: ignore[no-untyped-call]
    return total


def cayley(a: Tensor) -> Tensor:
    """(I − A)(I + A)⁻¹ = 2 (I + A)⁻¹ − I with A = a − aᵀ: orthogonal, the identity for a = 0.
    Batched."""
    eye = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype).expand_as(a)
    q: Tensor = 2 * torch.linalg.inv_ex(eye + (a - a.mT)).inverse - eye
    return q
