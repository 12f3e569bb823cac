"""Which weights of a row may stay: n of each m consecutive columns, one by one or in pairs.

2:4 is what the sparse instructions for 16- and 8-bit numbers read. Those of Blackwell for fp4 read
"4:8 in pairs": of every four consecutive pairs of columns two are kept, a pair whole or not at all.
A 4:8-in-pairs mask is in general no 2:4 mask, nor the reverse.

A pair is one unit with one score, and 4:8 in pairs is 2:4 of units: all that is done with a mask is
done on units, here, and the pruners know nothing of pairs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import check

UNITS = {1: "", 2: " in pairs"}
_TEXT = re.compile(r"(\d+):(\d+)([ -]in[ -]pairs|[ -]pairs)?")
_REMEDY = 'Such are (2, 4) and "4:8 in pairs".'


class Pattern(tuple[int, int]):
    """n of each m consecutive columns of a row are kept, in units of `unit` columns.

    It is the tuple (n, m), and equals that where unit is 1; patterns of pairs equal only each
    other. str() gives "2:4" and "4:8 in pairs", and `of` reads both.

    Args:
        n, m: kept columns and group width, 1 <= n < m.
        unit: 1 or 2 columns that are kept or dropped together; n and m are multiples of it.
    Raises:
        ValueError: other numbers.
    """

    unit: int

    def __new__(
        cls, n: int, m: int, unit: int = 1, *, op: str = "sparsekern.prune.Pattern"
    ) -> Pattern:
        integers = all(type(value) is int for value in (n, m))
        right = integers and 1 <= n < m
        expected = "pattern (n, m) of integers with 1 <= n < m"
        check(right, op, expected, f"({n!r}, {m!r})", _REMEDY)
        check(type(unit) is int and unit in UNITS, op, f"unit in {tuple(UNITS)}", repr(unit))
        whole = n % unit == 0 and m % unit == 0
        check(whole, op, f"n and m as multiples of {unit} columns", f"{n}:{m}", _REMEDY)
        made = super().__new__(cls, (n, m))
        made.unit = unit
        return made

    @classmethod
    def of(cls, pattern: Any, op: str = "sparsekern.prune.Pattern.of") -> Pattern:
        """The pattern that a caller means: a Pattern, (n, m), "n:m" or "n:m in pairs".

        Raises:
            ValueError: anything else.
        """
        if isinstance(pattern, Pattern):
            return pattern
        if isinstance(pattern, str) and (found := _TEXT.fullmatch(pattern.strip())):
            return cls(int(found[1]), int(found[2]), 2 if found[3] else 1, op=op)
        pair = isinstance(pattern, (tuple, list)) and len(pattern) == 2
        check(pair, op, 'pattern (n, m), "n:m" or "n:m in pairs"', repr(pattern), _REMEDY)
        return cls(*pattern, op=op)

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.unit == getattr(other, "unit", 1)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return super().__hash__() if self.unit == 1 else hash((*self, self.unit))

    def __getnewargs__(self) -> tuple[int, int, int]:  # type: ignore[override]
        return (*self, self.unit)

    def __str__(self) -> str:
        return f"{self[0]}:{self[1]}{UNITS[self.unit]}"

    def __repr__(self) -> str:
        return f"({self[0]}, {self[1]})" if self.unit == 1 else repr(str(self))

    def described(self) -> list[int] | str:
        """As a value of a report or a state, which `of` reads: [n, m], or text with pairs."""
        return list(self) if self.unit == 1 else str(self)

    def check_columns(self, op: str, in_features: int) -> None:
        """Raise ValueError unless in_features is a multiple of m."""
        check(
            in_features % self[1] == 0,
            op,
            f"in_features % {self[1]} == 0 for pattern {self}",
            f"in_features = {in_features}",
            "Skip this layer, or pad its input dimension.",
        )

    def choices(self) -> Tensor:
        """All ways to keep n of m, bool [number, m], in lexicographic order of the kept units; six
        for 2:4 and for 4:8 in pairs."""
        kept = itertools.combinations(range(self[1] // self.unit), self[0] // self.unit)
        units = torch.tensor(
            [[i in k for i in range(self[1] // self.unit)] for k in kept], device="cpu"
        )
        return units.repeat_interleave(self.unit, dim=1)

    def folded(self, values: Tensor, join: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[..., in_features] -> [..., in_features / unit], one value per unit: the sum (in float64
        or int64, so that it is the same on every device), or join([..., units, unit])."""
        if self.unit == 1:
            return values
        apart = values.unflatten(-1, (-1, self.unit))
        if join is not None:
            return join(apart)
        wide = torch.float64 if values.is_floating_point() else torch.int64
        sums: Tensor = apart.to(wide).sum(-1)
        return sums

    def unfolded(self, units: Tensor) -> Tensor:
        """[..., in_features / unit] -> [..., in_features]: to each column the value of its unit."""
        return units if self.unit == 1 else units.repeat_interleave(self.unit, dim=-1)

    def in_units(self) -> tuple[int, int]:
        """(kept units, units) of a group."""
        return self[0] // self.unit, self[1] // self.unit

    def counts(self, kept: Tensor) -> Tensor:
        """int64 [groups]: how many columns each group keeps, counted in whole units.

        Args:
            kept: a mask, or weights, [..., in_features]; zero or False = dropped. A unit counts
                whole where any of its columns is kept.
        """
        units = self.folded(kept != 0, lambda apart: apart.any(-1))
        counted: Tensor = units.reshape(-1, self.in_units()[1]).sum(1) * self.unit
        return counted

    def broken(self, kept: Tensor) -> Tensor:
        """bool [groups]: the groups of a mask, or of weights, that keep more than n columns."""
        return self.counts(kept) > self[0]

    def most(self, kept: Tensor) -> int:
        """The largest of `counts`; 0 without groups."""
        return int(self.counts(kept).max()) if kept.numel() else 0


TWO_OF_FOUR = Pattern(2, 4)
FOUR_OF_EIGHT_IN_PAIRS = Pattern(4, 8, 2)
