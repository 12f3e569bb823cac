"""Aim a layer at what the dense model computes: the weight that best maps the pruned model's inputs
to the dense model's outputs.

Pruned block by block, a layer sees inputs that the blocks before it have already changed. The best
weight for those inputs is no longer W; it can make up for part of the change. SparseGPT then prunes
that weight. The whole correction also fits the noise of a finite calibration text, so only a share
of it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from sparsekern.errors import check, message
from sparsekern.prune.hessian import Hessian, as_matrix
from sparsekern.prune.methods import PruneError
from sparsekern.prune.products import Factor, is_large, large_inverse
from sparsekern.prune.sparsegpt import damping_steps
from sparsekern.prune.team import Team, gathered, own_rows, rows_at_a_time
from sparsekern.utils.arguments import checked
from sparsekern.utils.exact import exact_float32

_OP = "sparsekern.prune.retarget"


@checked("sparsekern.prune.retarget")
def retarget(w: Tensor, hessian: Hessian, *, share: float = 0.25, damp: float = 0.01) -> Tensor:
    """W + share · W G (H + λI)⁻¹, with H = 2/n Σ xᵀx and G = 2/n Σ (x_dense − x)ᵀ x.

    With share = 1 this minimises ‖x W'ᵀ − x_dense Wᵀ‖² + λ‖W' − W‖² over all W'.

    Args:
        w: [out_features, in_features] floating point, on the Hessian's device; never modified.
        hessian: whose inputs were added together with the dense model's (Hessian.add(x, dense)).
        share: of the correction, from 0 to 1.
        damp: λ as a multiple of mean(diag H); grows as in `sparsegpt` when H + λI is not positive
            definite.
    Returns:
        [out_features, in_features] of w's dtype, new.
    Raises:
        ValueError: share or damp that do not fit; a Hessian without dense inputs.
        PruneError (a RuntimeError): no damping makes H + λI positive definite.
    Source: the normal equations; that calibration against the dense model helps layer-wise
    compression: Li et al. 2025, "GPTAQ" (arXiv:2504.02692).
    """
    return retargeted(w, hessian, share=share, damp=damp)


def retargeted(
    w: Tensor, hessian: Hessian, *, share: float, damp: float, team: Team | None = None
) -> Tensor:
    """`retarget`. Of a team each member has all of w and the Hessian, and works on some of the
    rows; all return all."""
    check(0 <= share <= 1, _OP, "share from 0 to 1", repr(share))
    check(math.isfinite(damp) and damp >= 0, _OP, "a finite damp >= 0", repr(damp))
    h = as_matrix(_OP, hessian, w)
    drift = hessian.drift
    check(
        drift is not None,
        _OP,
        "a Hessian with dense inputs",
        "one without",
        "Call hessian.add(x, dense) for every input.",
    )
    with exact_float32(w.device):
        scale = h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        h = h / scale
        target = w[own_rows(w, team)].detach().float()
        parts = target.split(rows_at_a_time(w.shape[1])) if len(target) else ()
        factor = Factor(cast(Tensor, drift) / scale)
        corrections = [factor.times(part) for part in parts]
        del factor
        solve = _large_solver(h, damp) or _solver(h, damp)
        del h
        result = torch.empty_like(target, dtype=w.dtype)
        for part, found in zip(parts, result.split(rows_at_a_time(w.shape[1]))):
            found.copy_(part + share * solve(corrections.pop(0)))
        return gathered(team, result)[0]


def _solver(h: Tensor, damp: float) -> Callable[[Tensor], Tensor]:
    """right -> right (h + damp·I)⁻¹, by a factorisation, where damp may have to grow."""
    for step in damping_steps(damp):
        damped = h.clone()
        damped.diagonal().add_(step)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return lambda right: torch.cholesky_solve(right.t(), lower).t()
    expected = "a Hessian that is positive definite after damping"
    raise PruneError(message(_OP, expected, f"damp up to {step:g}", "Add calibration inputs."))


def _large_solver(h: Tensor, damp: float) -> Callable[[Tensor], Tensor] | None:
    """The same for a large h on a GPU, by an inverse with a diagonal of ones and one correction of
    what is left; None where there is none that is good enough."""
    if not is_large(h):
        return None
    damped = h.clone()
    damped.diagonal().add_(damp)
    root = damped.diagonal().clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    damped.div_(root[:, None]).div_(root)
    found = large_inverse(damped)
    if found is None:
        return None
    inverse = Factor(found)
    del found
    matrix = Factor(damped)
    del damped

    def solve(right: Tensor) -> Tensor:
        right = right / root
        solved = inverse.times(right)
        solved += inverse.times(right - matrix.times(solved))
        return solved.div_(root)

    return solve
