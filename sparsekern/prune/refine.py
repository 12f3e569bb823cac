"""Refine the kept weights of any mask: the least-squares fit that SparseGPT's single sweep stops
short of.

The sweep spreads the error of a pruned weight over the columns to its right alone, each time as if
they were all kept. Once the mask is known the best weights under it are those of a linear system
per row, with the rows of H that the mask keeps. Conjugate gradients solve the systems of all rows
together, because every row multiplies by the same H: one matmul [out, in] x [in, in] a step, and
no step can raise the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.errors import check
from sparsekern.prune.hessian import Hessian, as_matrix
from sparsekern.prune.masks import check_no_nan
from sparsekern.prune.products import Factor
from sparsekern.prune.team import Team, gathered, own_rows, rows_at_a_time
from sparsekern.utils.arguments import checked
from sparsekern.utils.exact import exact_float32

_OP = "sparsekern.prune.refine"


@checked("sparsekern.prune.refine", steps=(0, 10**6), damp=(0, 10**6))
def refine(
    w: Tensor,
    pruned: Tensor,
    mask: Tensor,
    hessian: Hessian | Tensor,
    *,
    steps: int = 32,
    damp: float = 0.01,
) -> Tensor:
    """Lower ‖(W − W')X‖² + λ‖W − W'‖² over the weights that the mask keeps, from W' = pruned.

    Conjugate gradients with the diagonal of A = H + λI as preconditioner: with the residual
    R = mask ⊙ ((W − W')A), every row r takes the step W'_r += α_r·P_r, α_r = ⟨R_r, Z_r⟩ /
    ⟨P_r, P_r A⟩, Z = R / diag(A). A row whose residual is zero, or rounding, stays as it is.

    Args:
        w: [out_features, in_features] floating point, the weights before pruning.
        pruned: same shape and device: where to start, zero where mask is False.
        mask: bool, same shape and device, True = kept.
        hessian: Hessian of the layer's inputs, or its matrix, on the same device.
        steps: matmuls to spend; 0 returns a copy of pruned.
        damp: λ as a multiple of mean(diag H), as in `sparsegpt`.
    Returns:
        [out_features, in_features] of pruned's dtype, zero where mask is False; new. Inputs that
        were zero in all of the calibration keep the weights that they have in `pruned`.
    Raises:
        ValueError: shapes, devices, steps or damp that do not fit; NaN in a weight.
        TypeError: a mask that is not bool.
    Source: Hestenes and Stiefel 1952; that 2:4 pruning gains from solving for the kept weights:
    Meng et al. 2024, "ALPS" (arXiv:2406.07831).
    """
    return fit_kept(w, pruned, mask, hessian, steps=steps, damp=damp)


def fit_kept(
    w: Tensor,
    pruned: Tensor,
    mask: Tensor,
    hessian: Hessian | Tensor,
    *,
    steps: int = 32,
    damp: float = 0.01,
    team: Team | None = None,
) -> Tensor:
    """`refine`. Of a team each member has all of it, and solves some of the rows; all return
    all."""
    shape = tuple(w.shape)
    check(w.dim() == 2, _OP, "w of shape [out_features, in_features]", f"shape {list(shape)}")
    for name, tensor in (("pruned", pruned), ("mask", mask)):
        check(
            tuple(tensor.shape) == shape,
            _OP,
            f"{name} of w's shape {list(shape)}",
            f"{list(tensor.shape)}",
        )
        check(tensor.device == w.device, _OP, f"{name} on {w.device} like w", f"{tensor.device}")
    check(mask.dtype == torch.bool, _OP, "a bool mask", str(mask.dtype), exc=TypeError)
    check(isinstance(steps, int) and steps >= 0, _OP, "steps >= 0", repr(steps))
    check(damp >= 0, _OP, "damp >= 0", repr(damp))
    check_no_nan(_OP, "w", w)
    check_no_nan(_OP, "pruned", pruned)
    h = as_matrix(_OP, hessian, w)
    with exact_float32(w.device):
        # The fit does not depend on the scale of H: bring it to where float32 is at home.
        h = h / h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        free = mask & (h.diagonal() > 0)
        a = h.clone()
        a.diagonal().add_(damp)
        diagonal, factor = a.diagonal().clone(), Factor(a)
        del a
        mine = own_rows(w, team)
        result = torch.empty_like(pruned[mine])
        rows = rows_at_a_time(shape[1])
        for i in range(mine.start, mine.stop, rows):
            part = slice(i, min(i + rows, mine.stop))
            x = pruned[part].detach().float() * mask[part]
            x = _solve(w[part].detach().float(), x, free[part], factor, diagonal, steps)
            result[i - mine.start : part.stop - mine.start] = x
        return gathered(team, result)[0]


def _solve(w: Tensor, x: Tensor, free: Tensor, a: Factor, diagonal: Tensor, steps: int) -> Tensor:
    """x, moved in place towards the minimum of tr((w − x) a (w − x)ᵀ) over the free weights."""
    inverse_diagonal = diagonal.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
    r = a.times(w - x).mul_(free)
    z = r * inverse_diagonal
    p, rz = z.clone(), (r * z).sum(dim=1)
    arrived = rz * (64 * torch.finfo(torch.float32).eps) ** 2
    for _ in range(steps):
        q = a.times(p).mul_(free)
        # What is left of a residual that has arrived is rounding, whose steps would lead away.
        alpha = _ratio(rz, (p * q).sum(dim=1)).masked_fill_(rz <= arrived, 0)
        x.addcmul_(alpha[:, None], p)
        r.addcmul_(alpha[:, None], q, value=-1)
        torch.mul(r, inverse_diagonal, out=z)
        previous, rz = rz, (r * z).sum(dim=1)
        p.mul_(_ratio(rz, previous)[:, None]).add_(z)
    return x


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is not positive: a row that has arrived, or left float32's range."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))
