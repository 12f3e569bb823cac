"""N:M masks from scores: of each m consecutive columns of a row, keep the n highest, one by one or
in pairs (pattern.py).

A mask must be the same on every device and in every run, because a checkpoint is compared by its
bytes. Sorting and topk leave the order of equal scores open, so the rank of a column is counted
from pairwise comparisons, where -0.0 equals 0.0 and of equal scores the HIGHER column is kept.

The published SparseGPT and Wanda code leaves ties to topk(largest=False), which is taken to prune
the lower column first on CUDA: inferred from its result, not read off topk. It matters for weights
on a coarse grid. In one layer of SmolLM2's 4-bit-quantised weights 15 % of the groups tie at the
cut; magnitude pruning has perplexity 1913 with this rule (record 82b7d027cd), 3847 with the other,
and the reference run of the published rule had 1918.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.errors import check
from sparsekern.prune.pattern import Pattern
from sparsekern.utils.arguments import check_tensor, checked


def check_no_nan(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError that names the first NaN of `tensor` by row and column."""
    nan = tensor.isnan()
    if not bool(nan.any()):
        return
    *rows, column = nan.nonzero()[0].tolist()
    row = rows[0] if len(rows) == 1 else tuple(rows)
    check(
        False,
        op,
        f"{name} without NaN",
        f"NaN at row {row}, column {column} ({int(nan.sum())} of {nan.numel()} elements)",
        "Find where it comes from: a NaN has no rank.",
    )


def rank_mask(scores: Tensor, n: int) -> Tensor:
    """Keep the n highest of dim 0; no checks, no host synchronisation.

    Column i goes before column j > i when scores[i] > scores[j], so a tie goes to the higher one.

    Args:
        scores: [m, ...] any comparable dtype, without NaN.
        n: how many of the m are kept.
    Returns:
        bool [m, ...], contiguous.
    """
    m = scores.shape[0]
    count_dtype = torch.int8 if m < 128 else torch.int32
    # beaten[j] starts at the number of lower columns; each comparison then corrects both columns.
    beaten = torch.arange(m, dtype=count_dtype, device=scores.device)
    beaten = beaten.view(m, *[1] * (scores.dim() - 1)).expand(scores.shape).contiguous()
    for distance in range(1, m):
        first = (scores[:-distance] > scores[distance:]).view(torch.int8)
        beaten[:-distance].add_(first)
        beaten[distance:].sub_(first)
    return beaten >= m - n


def select(scores: Tensor, pattern: Pattern) -> Tensor:
    """Keep the units of highest score; no checks, no host synchronisation.

    Args:
        scores: [..., in_features] real, without NaN; those of a unit are added.
    Returns:
        bool of its shape, exactly n of each m.
    """
    units = pattern.folded(scores)
    n, m = pattern.in_units()
    groups = units.reshape(*units.shape[:-1], units.shape[-1] // m, m).movedim(-1, 0)
    return pattern.unfolded(rank_mask(groups, n).movedim(0, -1).reshape(units.shape))


@checked("sparsekern.prune.nm_mask", leave=("n", "m"))
def nm_mask(scores: Tensor, n: int = 2, m: int = 4, unit: int = 1) -> Tensor:
    """Keep the n highest scores of each aligned group of m columns; with unit=2 the n / 2 pairs of
    highest sums.

    Args:
        scores: [..., in_features] real, higher = more worth keeping. Infinities are ordered as
            usual. Any strides; never modified.
        n, m: kept columns and group width, 1 <= n < m.
        unit: 1, or 2: columns 2i and 2i + 1 are kept or dropped together; n and m are even.
    Returns:
        bool [..., in_features], True = kept, exactly n in each group. Bit for bit the same on CPU
        and GPU: of equal scores the higher column is kept, -0.0 equals 0.0.
    Raises:
        ValueError: in_features not a multiple of m, a pattern without 1 <= n < m, NaN (the message
            names its row and column).
        TypeError: complex scores.
    """
    op = "sparsekern.prune.nm_mask"
    check_tensor(op, "scores", scores)
    return _nm_mask(op, "scores", scores, Pattern(n, m, unit, op=op))


def magnitude_mask(w: Tensor, n: int = 2, m: int = 4, unit: int = 1) -> Tensor:
    """Keep the n largest |w| of each aligned group of m columns; with unit=2 the pairs of largest
    sums of squares, in float64.

    Args:
        w: [..., in_features] real weight, any dtype; never modified.
        n, m, unit: as in nm_mask.
    Returns:
        bool [..., in_features], True = kept; deterministic as in nm_mask.
    Raises:
        ValueError, TypeError: as nm_mask.
    """
    op = "sparsekern.prune.magnitude_mask"
    check_tensor(op, "w", w)
    check(not w.is_complex(), op, "a real weight", str(w.dtype), exc=TypeError)
    pattern = Pattern(n, m, unit, op=op)
    w = _comparable(w.detach())
    if unit > 1:
        return _nm_mask(op, "w", w.double().square(), pattern)
    if not w.is_floating_point() and w.element_size() > 1:
        # The smallest integer has no abs of its own type; the order of -|w| is the same, reversed.
        return _nm_mask(op, "w", ~torch.where(w > 0, ~w + 1, w), pattern)
    # 8-bit types have no usable abs (int8 wraps at -128, float8 lacks it); float32 holds them.
    return _nm_mask(op, "w", (w.float() if w.element_size() == 1 else w).abs(), pattern)


@checked("sparsekern.prune.wanda_mask", leave=("n", "m"))
def wanda_mask(w: Tensor, act_norm: Tensor, n: int = 2, m: int = 4, unit: int = 1) -> Tensor:
    """Keep the n largest |w_ij| * ‖x_j‖₂ of each aligned group of m columns; with unit=2 the pairs
    of largest sums of squares of these, in float64.

    Args:
        w: [..., in_features] real weight; never modified.
        act_norm: [in_features] norm of each input feature over the calibration set, not negative
            (Hessian.act_norm), same device as w.
        n, m, unit: as in nm_mask.
    Returns:
        bool [..., in_features], True = kept. The score is one float32 product, so CPU and GPU agree
        bit for bit; float64 where an input is float64 or a product leaves float32's range.
    Raises:
        ValueError: act_norm of another length, device or sign; NaN in a score; the rest as nm_mask.
    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models".
    """
    op = "sparsekern.prune.wanda_mask"
    check_tensor(op, "w", w)
    check_tensor(op, "act_norm", act_norm)
    check(not w.is_complex(), op, "a real weight", str(w.dtype), exc=TypeError)
    check(
        w.dim() >= 1 and tuple(act_norm.shape) == (w.shape[-1],),
        op,
        f"act_norm of shape [in_features] for w of shape {list(w.shape)}",
        f"shape {list(act_norm.shape)}",
        "Pass Hessian.act_norm of the same layer.",
    )
    check(
        act_norm.device == w.device,
        op,
        f"act_norm on {w.device} like w",
        f"{act_norm.device}",
        "Move one of them.",
    )
    check(
        not bool((act_norm < 0).any()),
        op,
        "act_norm >= 0",
        "a negative norm",
        "Pass norms, not means.",
    )
    pattern = Pattern(n, m, unit, op=op)
    wide = torch.float64 in (w.dtype, act_norm.dtype)
    scores = w.detach().float().abs() * act_norm.detach().float()
    if unit > 1 or wide or bool(scores.isinf().any()):
        scores = w.detach().double().abs() * act_norm.detach().double()
    return _nm_mask(op, "|w| * act_norm", scores if unit == 1 else scores.square(), pattern)


def _comparable(tensor: Tensor) -> Tensor:
    """The tensor, of a dtype that torch can compare."""
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32) else tensor


def _nm_mask(op: str, name: str, scores: Tensor, pattern: Pattern) -> Tensor:
    check(not scores.is_complex(), op, f"real {name}", str(scores.dtype), exc=TypeError)
    check(scores.dim() >= 1, op, f"{name} of shape [..., in_features]", "a scalar")
    pattern.check_columns(op, scores.shape[-1])
    scores = _comparable(scores.detach())
    if scores.is_floating_point() and scores.element_size() == 1:
        scores = scores.float()
    check_no_nan(op, name, scores)
    if pattern.unit > 1:  # infinities of both signs
        check_no_nan(op, f"sums of pairs of {name}", pattern.folded(scores))
    return select(scores, pattern)
