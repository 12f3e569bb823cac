"""Find a mask and its weights together: alternate between the best dense weights near a sparse
point and the best sparse point near them.

SparseGPT chooses each group's mask once, from the left to the right, before it knows what becomes
of the columns to the right. Here every group is chosen again in every round, against weights that
all other groups have adjusted to. The two sides are pulled together by a penalty that grows:
while it is small masks move, in the end they stand still and the weights are the least-squares
fit under them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from sparsekern.backends import triton
from sparsekern.errors import check, message
from sparsekern.prune.hessian import Hessian, as_matrix
from sparsekern.prune.masks import check_no_nan, select
from sparsekern.prune.methods import (
    Details,
    Method,
    Option,
    Pruned,
    PruneError,
    is_count,
    is_number,
)
from sparsekern.prune.pattern import TWO_OF_FOUR, Pattern
from sparsekern.prune.products import Factor, large_inverse
from sparsekern.prune.refine import fit_kept
from sparsekern.prune.sparsegpt import damping_steps
from sparsekern.prune.team import Team, gathered, own_rows, rows_at_a_time
from sparsekern.utils.exact import exact_float32

_OP = "sparsekern.prune.admm"
ROUNDS = 48
FIRST, LAST = 0.1, 3.0  # the penalty, where the Hessian has a diagonal of ones
EACH = 3  # rounds with one penalty, and one factorisation


def admm(
    w: Tensor,
    hessian: Hessian | Tensor,
    *,
    pattern: tuple[int, int] | str = (2, 4),
    rounds: int = ROUNDS,
    damp: float = 0.01,
) -> tuple[Tensor, Tensor, Details]:
    """Prune w to a pattern, minimising ‖(W − D)X‖² + λ‖W − D‖² over all D of the pattern.

    With columns scaled so that H has a diagonal of ones, A = H + damp·I, and a penalty ρ that grows
    from 0.1 to 3, each round does

        Y ← (W A + ρD − V)(A + ρI)⁻¹       the best dense weights near D
        D ← Y + V/ρ, the n largest squares of each m columns (in pairs: the largest sums of two)
        V ← V + ρ(Y − D)

    Rows do not depend on each other. One matmul [out, in] x [in, in] a round, and one inverse of
    [in, in] in three rounds, in which a wide layer with few rows has most of its work; three
    float32 matrices of w's size are held. Large ones are multiplied and inverted on the tensor
    cores of a GPU (prune/products.py).

    Args:
        w: [out_features, in_features] floating point; never modified.
        hessian: Hessian of the layer's inputs or its matrix [in_features, in_features], on the same
            device; never modified.
        pattern: (n, m), "n:m" or "4:8 in pairs".
        rounds: more of them change less and less; what is left is for `refine`.
        damp: λ of a column as a multiple of its own H_jj; grows as in `sparsegpt` where A is not
            positive definite.
    Returns:
        (w', mask, Details): w' of w's dtype, zero where the bool mask is False; new.
    Raises:
        ValueError: shapes, devices, pattern, rounds or damp that do not fit; NaN in w.
        PruneError (a RuntimeError): no damping makes A positive definite, or w' is not finite.
    Source: Meng et al. 2024, "ALPS" (arXiv:2406.07831): the splitting, the scaling and a growing
    penalty; here it grows on a fixed schedule, so that rows do not depend on each other.
    """
    return _solve(w, hessian, pattern, rounds, damp, None)


def _solve(
    w: Tensor,
    hessian: Hessian | Tensor,
    pattern: tuple[int, int] | str,
    rounds: int,
    damp: float,
    team: Team | None,
) -> tuple[Tensor, Tensor, Details]:
    """`admm`. Of a team each member has all of w and the Hessian, and some of the rows and of the
    inverses; all return all."""
    check(w.dim() == 2, _OP, "w of shape [out_features, in_features]", f"shape {list(w.shape)}")
    kind = Pattern.of(pattern, _OP)
    kind.check_columns(_OP, w.shape[1])
    check(is_count(rounds, 1), _OP, "rounds, an int >= 1", repr(rounds))
    check(math.isfinite(damp) and damp >= 0, _OP, "a finite damp >= 0", repr(damp))
    check_no_nan(_OP, "w", w)
    h = as_matrix(_OP, hessian, w)
    with exact_float32(w.device):
        scale = h.diagonal().sqrt()
        dead = scale == 0
        scale = scale.masked_fill(dead, 1.0)
        a = h / scale[:, None] / scale
        a.diagonal().fill_(1.0)
        used, first = _damped(a, damp)
        mine = own_rows(w, team)
        target = (w[mine].detach().float() * scale).masked_fill_(dead, 0)
        some = rows_at_a_time(w.shape[1])
        parts = [slice(i, i + some) for i in range(0, len(target), some)]
        pulled = torch.empty_like(target)
        factor = Factor(a)
        for part in parts:
            pulled[part] = factor.times(target[part])
        del factor
        sparse, dual = target, torch.zeros_like(target)  # D and V
        keep = torch.empty(target.shape, dtype=torch.bool, device=w.device)
        steps = -(-rounds // EACH)
        penalties = [FIRST * (LAST / FIRST) ** (i / max(1, steps - 1)) for i in range(steps)]
        inverses = _inverses(a, penalties, [first], team)
        del first
        for step, penalty in enumerate(penalties):
            solver = Factor(next(inverses))
            for _ in range(min(EACH, rounds - EACH * step)):
                for part in parts:
                    d, v = sparse[part], dual[part]
                    y = solver.times(torch.add(pulled[part], d, alpha=penalty).sub_(v))
                    torch.add(y, v, alpha=1 / penalty, out=d)
                    keep[part] = _largest(d, kind)
                    d.mul_(keep[part])
                    v.add_(y.sub_(d), alpha=penalty)
        pruned, keep = gathered(team, sparse.div_(scale).to(w.dtype), keep)
    expected = f"updated weights that are finite in {w.dtype}"
    remedy = "Raise damp, or prune in float32."
    check(bool(pruned.isfinite().all()), _OP, expected, "NaN or Inf", remedy, exc=PruneError)
    count = int(dead.sum())
    return pruned, keep, Details(used, (f"{count} inputs always zero",) if count else ())


def _inverses(
    a: Tensor, penalties: list[float], known: list[Tensor | None], team: Team | None
) -> Iterator[Tensor]:
    """(a + penalty·I)⁻¹ for each penalty in turn. The members of a team make some each, at the same
    time. known: [the first, or None]; it is taken out."""
    if known[0] is None:
        known[0] = _inverse(a, penalties[0])
    yield cast(Tensor, known.pop())
    world = 1 if team is None else team.world
    for i in range(1, len(penalties), world):
        some = penalties[i : i + world]
        if team is None:
            yield _inverse(a, some[0])
            continue
        own = _inverse(a, some[team.rank]) if team.rank < len(some) else None
        coming = team.in_turn(own, len(some))
        del own
        yield from coming


def _largest(d: Tensor, kind: Pattern) -> Tensor:
    """The mask of the largest squares; by one kernel, of the same mask, where there is one."""
    squares = d.square()
    if kind == TWO_OF_FOUR and squares.is_cuda and triton.available():
        from sparsekern.backends.triton import compress

        return compress.mask24(squares)[0]
    return select(squares, kind)


def _damped(a: Tensor, damp: float) -> tuple[float, Tensor | None]:
    """Add to the diagonal of a what makes the factorisation with the smallest penalty succeed; and
    the inverse with that penalty, where it is known then."""
    for step in damping_steps(damp):
        tried = a.clone()
        tried.diagonal().add_(step + FIRST)
        found = large_inverse(tried)
        if found is not None or int(torch.linalg.cholesky_ex(tried)[1]) == 0:
            a.diagonal().add_(step)
            return step, found
    expected = "a Hessian that is positive definite after damping"
    raise PruneError(message(_OP, expected, f"damp up to {step:g}", "Add calibration inputs."))


def _inverse(a: Tensor, penalty: float) -> Tensor:
    shifted = a.clone()
    shifted.diagonal().add_(penalty)
    found = large_inverse(shifted)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted)) if found is None else found


def _method(
    weight: Tensor,
    hessian: Hessian,
    *,
    pattern: tuple[int, int],
    mask: Tensor | None = None,
    damp: float = 0.01,
    rounds: int = ROUNDS,
    team: Team | None = None,
) -> Pruned:
    if mask is not None:  # nothing to search: the fit under it
        start = weight.masked_fill(~mask, 0)
        fitted = fit_kept(weight, start, mask, hessian, damp=damp, team=team)
        return fitted, mask.clone(), Details(damp)
    return _solve(weight, hessian, pattern, rounds, damp, team)


def _work(rows: int, width: int, *, rounds: int = ROUNDS) -> float:
    """Multiplications: an inverse takes 2.3 of the width to the third."""
    return float(width) ** 2 * (2.3 * width * -(-rounds // EACH) + rows * (1 + rounds))


METHOD = Method(
    "admm",
    "mask and weights in turn, towards each other; slower than sparsegpt",
    _method,
    needs="hessian",
    options=(
        Option(
            "damp",
            0.01,
            "added to the Hessian's diagonal, as a share of each entry",
            "a finite number >= 0",
            lambda value: is_number(value, 0),
        ),
        Option(
            "rounds",
            ROUNDS,
            "of choosing masks and solving for the weights",
            "an int >= 1",
            lambda value: is_count(value, 1),
        ),
    ),
    updates=True,
    stacked=True,
    refine=16,
    match_dense=0.25,
    together=True,
    work=_work,
)
