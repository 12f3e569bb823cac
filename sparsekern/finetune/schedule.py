"""How masks move while a model is trained: not at all, by magnitude, with SR-STE, or by gradients.

A schedule is asked once per optimizer step, with `step` counted from 1. Weights here are
[rows, in_features], groups are m consecutive columns, and a mask is True where a weight is kept.

    Frozen      the masks stay
    SRSTE       dropped weights train on, out of sight of the forward: g + λ·(1 − M)·w
    Magnitude   the same without decay: λ = 0
    RigL        dropped weights are zero; where the gradient wants one back, it replaces the smaller
                of the kept ones of its group

Source: Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from
scratch" (arXiv:2102.04010) for SR-STE; Evci et al. 2020, "Rigging the lottery" (arXiv:1911.11134)
for RigL, here within the groups of 2:4; SparseForge (arXiv:2605.06402) freezes masks early.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import check
from sparsekern.prune.masks import nm_mask
from sparsekern.prune.pattern import Pattern
from sparsekern.utils.arguments import check_fields, checked, shown

OP = "sparsekern.finetune.schedule"


@dataclass(frozen=True)
class Schedule:
    """Base of the schedules.

    Args:
        every: masks are chosen again after each `every`-th step.
        freeze_at: the last step that may move a mask; None: they move to the end.
    """

    every: int = 1
    freeze_at: int | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.every, int) and self.every >= 1
        check(whole, OP, "every >= 1, a number of steps", repr(self.every))
        last = self.freeze_at
        good = last is None or (isinstance(last, int) and last >= 0)
        check(good, OP, "freeze_at >= 0, a step, or None", repr(last))
        reached = not last or last >= self.every
        remedy = f"Pass every={last} or less."
        check(reached, OP, f"freeze_at >= every ({self.every})", last, remedy)

    def live(self, step: int) -> bool:
        """Whether masks can still move at this step or a later one."""
        return self.freeze_at is None or step <= self.freeze_at

    def moves(self, step: int) -> bool:
        """Whether masks are chosen again after this step."""
        return self.live(step) and step % self.every == 0

    def trains_dropped(self, step: int) -> bool:
        """Whether this step updates the weights outside the mask, too (straight-through)."""
        return False

    def reads_gradients(self, step: int) -> bool:
        """Whether the choice after this step needs the gradient of the dropped weights."""
        return False

    def decay(self, step: int) -> float:
        """λ: what is added to the gradient of a dropped weight, as a share of the weight."""
        return 0.0

    def reselect(
        self, weight: Tensor, mask: Tensor, gradient: Tensor | None, step: int, n: int, m: int
    ) -> Tensor:
        """The mask after this step, bool like `mask`, n kept of every m.

        Args:
            weight: [rows, in_features] after the step; with trains_dropped the dense one.
            mask: bool of the same shape, True = kept.
            gradient: |∂loss/∂weight| of all weights, where reads_gradients asked for it.
            step: from 1.      n, m: the pattern. Where pairs of columns are kept together, every
                argument is per pair: the norms of its weights and of their gradients, and n and m
                count pairs.
        """
        return mask

    def describe(self) -> dict[str, Any]:
        """Name and arguments as JSON-able values; `make` is the inverse."""
        return {"name": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Frozen(Schedule):
    """The masks stay as they are; every and freeze_at are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        moving = ("a schedule that moves masks", lambda given: False)
        check_fields(OP, self, {"every": moving, "freeze_at": moving})

    def live(self, step: int) -> bool:
        return False


@dataclass(frozen=True)
class SRSTE(Schedule):
    """Straight-through training of all weights, dropped ones decayed, the n largest |w| kept.

        g ← ∂loss/∂w at (M·w) + λ(t)·(1 − M)·w,      M ← the n largest |w| of each group

    Args:
        weight_decay: λ. 2e-4 is the paper's choice.
        ramp: steps over which λ rises linearly from 0 (AST, arXiv:2407.20584, ramps it).
        every, freeze_at: see Schedule.
    """

    weight_decay: float = 2e-4
    ramp: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.weight_decay >= 0, OP, "weight_decay >= 0", self.weight_decay)
        check(self.ramp >= 0, OP, "ramp >= 0, a number of steps", self.ramp)
        check_fields(OP, self, {"ramp": ("weight_decay > 0", lambda given: given["weight_decay"])})

    def trains_dropped(self, step: int) -> bool:
        return self.live(step)

    def decay(self, step: int) -> float:
        if not self.live(step):
            return 0.0
        return self.weight_decay * min(1.0, step / self.ramp if self.ramp else 1.0)

    def reselect(
        self, weight: Tensor, mask: Tensor, gradient: Tensor | None, step: int, n: int, m: int
    ) -> Tensor:
        return nm_mask(weight.abs(), n, m)


@dataclass(frozen=True)
class Magnitude(SRSTE):
    """Gradual magnitude: SRSTE without decay, chosen again every `every` steps."""

    every: int = 100
    weight_decay: float = 0.0


@dataclass(frozen=True)
class RigL(Schedule):
    """Drop by magnitude, grow by gradient, one pair per group.

    In a share of the groups, f(t) = fraction/2 · (1 + cos(π·t/freeze_at)), those whose smallest
    kept |w| is smallest, this weight gives its place to the dropped weight of largest |gradient|,
    which starts from zero with zero moments. Groups whose dropped weights have no gradient stay.

    Args:
        every: 100 as in the paper.
        freeze_at: needed, because the share falls towards it.
        fraction: at the start; 0.3 is the paper's.
    """

    every: int = 100
    freeze_at: int | None = 1000
    fraction: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.freeze_at is not None, OP, "freeze_at, a step, with RigL", None)
        check(0 < self.fraction <= 1, OP, "0 < fraction <= 1", self.fraction)

    def reads_gradients(self, step: int) -> bool:
        return self.moves(step)

    def share(self, step: int) -> float:
        """f(t): the share of groups that may change at this step."""
        end = max(1, self.freeze_at or 1)
        return self.fraction / 2 * (1 + math.cos(math.pi * min(1.0, step / end)))

    def reselect(
        self, weight: Tensor, mask: Tensor, gradient: Tensor | None, step: int, n: int, m: int
    ) -> Tensor:
        assert gradient is not None
        kept = mask.reshape(-1, m)
        infinity = float("inf")
        size = weight.reshape(-1, m).abs().float()
        weakest, drop = size.masked_fill(~kept, infinity).min(dim=1)
        wanted, grow = gradient.reshape(-1, m).float().masked_fill(kept, -1.0).max(dim=1)
        count = int(self.share(step) * kept.shape[0])
        candidates = (wanted > 0) & (weakest < infinity)
        order = weakest.masked_fill(~candidates, infinity).sort(stable=True).indices[:count]
        rows = order[candidates[order]]
        moved = kept.clone()
        moved[rows, drop[rows]] = False
        moved[rows, grow[rows]] = True
        return moved.view_as(mask)


KINDS: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (Frozen, SRSTE, Magnitude, RigL)
}


def make(described: dict[str, Any]) -> Schedule:
    """The schedule that `describe` was called on.

    Raises:
        ValueError: a name that is not in KINDS, or arguments that do not fit.
    """
    arguments = dict(described)
    name = arguments.pop("name", None)
    check(name in KINDS, OP, f"a schedule in {sorted(KINDS)}", repr(name))
    return KINDS[str(name)](**arguments)


def grouped(weight: Tensor, transposed: bool) -> Tensor:
    """The weight as [..., rows, in_features], a view: Conv1D stores [in_features, out_features],
    and some models their experts so."""
    return weight.mT if transposed else weight


@checked("sparsekern.finetune.zeros_mask", n=(0, 2**20), m=(1, 2**20))
def zeros_mask(weight: Tensor, n: int = 2, m: int = 4, unit: int = 1) -> Tensor:
    """The mask that a pruned weight implies: its non-zeros, filled up to n per group.

    Args:
        weight: [rows, in_features] with at most n non-zeros in each group of m columns.
        n, m, unit: the pattern; with unit=2 pairs count whole.
    Returns:
        bool, exactly n per group. Of a group's zeros the higher columns are added first.
    Raises:
        ValueError: a group with more than n non-zeros.
    """
    op = "sparsekern.finetune.zeros_mask"
    pattern = Pattern(n, m, unit, op=op)
    columns = weight.shape[-1] if weight.dim() == 2 else 0
    fits = columns % m == 0 and weight.dim() == 2 and not weight.is_meta
    check(fits, op, f"weight [rows, a multiple of {m}] with data", shown(weight))
    nonzero = weight.detach() != 0
    counts = pattern.counts(nonzero)
    most = int(counts.max()) if counts.numel() else 0
    check(
        most <= n,
        op,
        f"at most {n} non-zeros in each group of {m}{', pairs counted whole' if unit > 1 else ''}",
        f"{most} ({int((counts > n).sum())} of {counts.numel()} groups have more than {n})",
        "Prune the weight first, or pass its mask.",
    )
    return nm_mask(nonzero.to(torch.float32), n, m, unit)
