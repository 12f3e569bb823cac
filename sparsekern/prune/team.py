"""Several processes that solve one layer together, with the numbers of one process, bit for bit.

Rows are worked on some at a time, also by one process alone, and a member of a team takes some of
these parts whole: the products are those of one process. What depends on the Hessian alone, such as
an inverse, is made by one member and given to the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

ROWS = 2048  # that are worked on at a time, of those that
ELEMENTS = 2**26  # numbers allow


class Team(Protocol):
    """One member's view. All call the same things in the same order.

    Attributes:
        rank, world: of the member, and how many there are.
    """

    rank: int
    world: int

    def share(self, value: Any, source: int) -> Any:
        """What member `source` calls it with, tensors included."""

    def in_turn(self, value: Any, count: int) -> Iterator[Any]:
        """What the first `count` members call it with, one after the other."""


def rows_at_a_time(width: int) -> int:
    """Rows of a weight with so many columns that are worked on together."""
    return max(1, min(ROWS, ELEMENTS // max(1, width)))


def own_rows(w: Tensor, team: Team | None) -> slice:
    """The rows of a weight that this member solves; all without a team."""
    rows, width = w.shape
    if team is None:
        return slice(0, rows)
    step = rows_at_a_time(width)
    parts = -(-rows // step)
    first, end = (parts * (team.rank + i) // team.world * step for i in (0, 1))
    return slice(min(first, rows), min(end, rows))


def gathered(team: Team | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All rows of tensors [own rows, ...] of which each member has its own."""
    if team is None:
        return tensors
    given = list(team.in_turn(tensors, team.world))
    return tuple(torch.cat(some) for some in zip(*given, strict=True))
