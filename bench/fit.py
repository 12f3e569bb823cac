"""Fits the table of heuristics.py to measured cells: `python -m bench.fit CELLS.jsonl`.

CELLS.jsonl is what `sparsekern tune --log CELLS.jsonl` appends: a line per cell with the times of
all variants that were sampled. Printed are the table TIMES, to paste into sparsekern/heuristics.py,
and how much slower than the fastest variant its picks are in these cells. With --check nothing is
fitted: the gaps are those of the table that heuristics.py has.

The model is heuristics.work (counts) and heuristics.us (their time), and nothing is modelled here.
Each variant is fitted alone: least squares of log(predicted / measured) over its eight
coefficients, which are positive, by damped Gauss-Newton steps on their logarithms. A time counts
the less the slower it is than the fastest in its cell (NEAR), because far from the best no pick
will fall, and an error far beyond TRUST counts little more than one of TRUST (log(1 + (e/TRUST)^2)
in place of e^2), because most times are one sample. Variants that no cell needs are left out in
the end (`needed`).

These gaps are of the data that was fitted. --cross tells those of data that was not: each shape's
picks by a table fitted to the other shapes.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from sparsekern import heuristics
from sparsekern.heuristics import MmaTile, RowBlocks, SplitTile, Tile, Times, Variant, Work

CONFIGS = Path(__file__).resolve().parent.parent / "csrc" / "configs.h"
NEAR = 0.15  # 15 % slower than the fastest: half the weight
TRUST = 0.05  # error from which on a sample is distrusted
MATTERS, FEW_CELLS = 0.03, 3  # kept: within 3 % of the fastest in at least three cells
DREAD, MISSED = 10, 1e-4  # see `needed`
START = Times(0.3, 0.1, 0.1, 2.8, 2.0, 3.0, 2.0, 2.0)
LOWEST, HIGHEST = 1e-3, 1e3  # of a coefficient
STEPS, EASE = 60, 1e-4  # most steps of a fit; step of a numeric derivative
# Classes of cells whose gaps are told apart: name, shapes or None for all, fewest tokens.
LARGE = (
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (14336, 4096), (1024, 4096)),
    *((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (28672, 8192), (1024, 8192)),
)
CLASSES = (
    ("all cells", None, 1),
    ("Llama-3 8B and 70B from 96 tokens", LARGE, 96),
)


@dataclass(frozen=True)
class Cell:
    """One shape and number of tokens, with the measured us of each variant."""

    shape: tuple[int, int]
    tokens: int
    times: dict[Variant, float]

    @property
    def best(self) -> float:
        return min(self.times.values())

    def offers(self, variant: Variant) -> bool:
        """True when the variant was sampled here and may be chosen."""
        return variant in self.times and heuristics.considered(variant, self.tokens, *self.shape)

    def work(self, variant: Variant, multiprocessors: int) -> Work:
        return heuristics.work(variant, self.tokens, *self.shape, multiprocessors)


@dataclass(frozen=True)
class Gap:
    """What a table picks in a cell, and how much slower that is than the fastest: 0.05 for 5 %."""

    cell: Cell
    picked: Variant
    share: float

    def __str__(self) -> str:
        out_features, in_features = self.cell.shape
        best = min(self.cell.times, key=self.cell.times.get)
        names = f"{heuristics.name(self.picked)} instead of {heuristics.name(best)}"
        where = f"{out_features}x{in_features}, {self.cell.tokens} tokens"
        return f"{self.share:6.1%}  {where}: {names}, {self.cell.best:.1f} us"


def variants() -> dict[str, Variant]:
    """{name: variant} of everything in csrc/configs.h."""
    text, found = CONFIGS.read_text(), []

    def entries(name):
        part = text.partition(f"#define {name}(X)")[2].partition("\n\n")[0]
        for numbers in re.findall(r"X\(([\d, ]+)\)", part):
            yield [int(number) for number in numbers.split(",")][1:]

    for panels, split in entries("SK_DECODE_CONFIGS"):
        found.append(RowBlocks(heuristics.PANEL * panels, split))
    for panels, *rest, streamed in entries("SK_PREFILL_CONFIGS"):
        found.append(Tile(2 * heuristics.PANEL * panels, *rest, bool(streamed)))
    found += [MmaTile(*numbers) for numbers in entries("SK_MMA_CONFIGS")]
    for panels, *rest in entries("SK_SPLIT_CONFIGS"):
        found.append(SplitTile(2 * heuristics.PANEL * panels, *rest))
    return {heuristics.name(variant): variant for variant in found}


def read(paths: Iterable[str | Path]) -> list[Cell]:
    """The cells of these files; of one that was measured twice the later.

    Raises:
        ValueError: a line is no cell, or none is there.
    """
    named, cells = variants(), {}
    for path in paths:
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                key = row.get("gpu"), row.get("dtype"), tuple(row["shape"]), row["tokens"]
                wrong = row.get("refused", {})
                times = {
                    named[name]: float(us)
                    for name, us in row["times"].items()
                    if name in named and name not in wrong
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                text = f"{path}:{number}: not a cell of `sparsekern tune --log`"
                raise ValueError(text) from error
            if times:
                cells[key] = Cell(key[2], key[3], times)
    if not cells:
        raise ValueError("no cell with a time of a variant in csrc/configs.h")
    return list(cells.values())


# ---- the fit -------------------------------------------------------------------------------------


def that_matter(cells: Sequence[Cell]) -> list[Variant]:
    """The variants that are close to the fastest often enough to be chosen (MATTERS, FEW_CELLS)."""
    close = [
        variant
        for cell in cells
        for variant, us in cell.times.items()
        if us <= (1 + MATTERS) * cell.best and cell.offers(variant)
    ]
    return [variant for variant in variants().values() if close.count(variant) >= FEW_CELLS]


def fit_variant(of: Work, us: numpy.ndarray, weights: numpy.ndarray) -> Times:
    """The coefficients of one variant.

    Args:
        of: its counts, arrays of one entry per cell. us, weights: of the cells.
    """
    measured = numpy.log(us)

    def errors(logs):
        return numpy.log(heuristics.us(Times(*numpy.exp(logs)), of)) - measured

    def cost(error):
        return numpy.sum(weights * numpy.log1p((error / TRUST) ** 2))

    used = numpy.array([True, *(numpy.any(count) for count in (of.extras, of.totals)), True,
                        *(numpy.any(count) for count in of[4:]), True])  # fmt: skip
    logs = numpy.log(START)
    logs[~used] = numpy.log(LOWEST)
    error, damping = errors(logs), 1e-2
    for _ in range(STEPS):
        slopes = numpy.zeros((len(us), len(logs)))
        for i in numpy.flatnonzero(used):
            moved = logs.copy()
            moved[i] += EASE
            slopes[:, i] = (errors(moved) - error) / EASE
        now = weights / (1 + (error / TRUST) ** 2)
        normal, down = slopes.T @ (slopes * now[:, None]), -slopes.T @ (now * error)
        for _ in range(8):
            eased = normal + damping * numpy.diag(numpy.diag(normal) + 1e-6)
            step = numpy.clip(numpy.linalg.solve(eased, down), -1, 1)
            moved = numpy.clip(logs + step, numpy.log(LOWEST), numpy.log(HIGHEST))
            trial = errors(moved)
            if cost(trial) < cost(error):
                logs, error, damping = moved, trial, max(damping / 3, 1e-6)
                break
            damping *= 4
        else:
            break
    return Times(*(0.0 if value <= 1.01 * LOWEST else value for value in numpy.exp(logs).tolist()))


def fit_all(cells: Sequence[Cell], multiprocessors: int) -> dict[Variant, Times]:
    """Coefficients of each variant that matters, from the cells in which it was sampled."""
    table = {}
    for variant in that_matter(cells):
        of = [cell for cell in cells if cell.offers(variant)]
        if len(of) < len(Times._fields):
            continue
        counts = [cell.work(variant, multiprocessors) for cell in of]
        us = numpy.array([cell.times[variant] for cell in of])
        slower = us / numpy.array([cell.best for cell in of]) - 1
        weights = 1 / (1 + (slower / NEAR) ** 2)
        table[variant] = rounded(fit_variant(Work(*numpy.array(counts, float).T), us, weights))
    return table


def fit_table(cells: Sequence[Cell], multiprocessors: int) -> dict[Variant, Times]:
    """The table TIMES for these cells: `fit_all`, then `needed`."""
    table = fit_all(cells, multiprocessors)
    return needed(table, cells, multiprocessors)


def needed(
    table: dict[Variant, Times], cells: Sequence[Cell], multiprocessors: int
) -> dict[Variant, Times]:
    """The table without the variants that are not missed, one after the other.

    That is measured by the mean over all cells of gap + DREAD * gap^2, in which a gap of 10 %
    counts twice, and a variant that saves less than MISSED of it is left out. So is one that the
    model picks wrongly so often that it costs more than it saves.
    """
    names = list(table)
    taken = numpy.full((len(cells), len(names)), numpy.inf)
    predicted = taken.copy()
    for i, cell in enumerate(cells):
        for j, variant in enumerate(names):
            if cell.offers(variant):
                taken[i, j] = cell.times[variant] / cell.best - 1
                of = cell.work(variant, multiprocessors)
                predicted[i, j] = heuristics.us(table[variant], of)

    def cost(kept):
        picked = numpy.array(kept)[numpy.argmin(predicted[:, kept], axis=1)]
        gap = taken[numpy.arange(len(cells)), picked]
        return numpy.mean(gap + DREAD * gap**2)

    kept = list(range(len(names)))
    now = cost(kept)
    while len(kept) > 1:
        least, out = min((cost([k for k in kept if k != out]), out) for out in kept)
        if not least < now + MISSED:
            break
        kept.remove(out)
        now = least
    return {names[k]: table[names[k]] for k in kept}


def rounded(times: Times) -> Times:
    """Three digits: what is printed is what was checked."""
    return Times(*(float(f"{value:.3g}") for value in times))


# ---- the gaps ------------------------------------------------------------------------------------


def gaps(
    cells: Iterable[Cell], table: dict[Variant, Times], multiprocessors: int
) -> list[Gap]:
    """What the table picks in each cell, among the variants that were sampled there."""
    found = []
    for cell in cells:
        predicted = {
            variant: heuristics.us(times, cell.work(variant, multiprocessors))
            for variant, times in table.items()
            if cell.offers(variant)
        }
        if predicted:
            picked = min(predicted, key=predicted.get)
            found.append(Gap(cell, picked, cell.times[picked] / cell.best - 1))
    return found


def cross(cells: Sequence[Cell], multiprocessors: int) -> list[Gap]:
    """The gaps of each shape by a table fitted to the other shapes."""
    found = []
    for shape in sorted({cell.shape for cell in cells}):
        others = [cell for cell in cells if cell.shape != shape]
        table = fit_table(others, multiprocessors)
        own = [cell for cell in cells if cell.shape == shape]
        found += gaps(own, table, multiprocessors)
    return found


def summary(found: Sequence[Gap], worst: int = 10) -> str:
    """Mean and worst of each class, then the worst cells."""
    lines = []
    for text, shapes, fewest in CLASSES:
        shares = [
            gap.share
            for gap in found
            if gap.cell.tokens >= fewest and (shapes is None or gap.cell.shape in shapes)
        ]
        if shares:
            mean = statistics.fmean(shares)
            lines.append(f"{text}, {len(shares)}: mean {mean:.2%}, worst {max(shares):.1%}")
    lines += [str(gap) for gap in sorted(found, key=lambda gap: -gap.share)[:worst]]
    return "\n".join(lines)


def source(table: dict[Variant, Times]) -> str:
    """The table as it stands in heuristics.py."""
    lines = ["TIMES: dict[Variant, Times] = {"]
    lines += [f"    {_call(variant)}: {_call(times)}," for variant, times in table.items()]
    return "\n".join([*lines, "}"])


def _call(values: Variant | Times) -> str:
    shown = list(values)
    if isinstance(values, Tile) and not values.streamed:
        shown.pop()  # the default
    text = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in shown)
    return f"{type(values).__name__}({text})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fit", description=__doc__.split("\n")[0])
    parser.add_argument("cells", nargs="+", metavar="CELLS.jsonl", help="of sparsekern tune --log")
    parser.add_argument("--multiprocessors", type=int, default=132, help="of the GPU (default 132)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fit nothing: gaps of heuristics.py")
    what.add_argument("--cross", action="store_true", help="also gaps of shapes left out of a fit")
    args = parser.parse_args(arguments)
    cells = read(args.cells)
    table = heuristics.TIMES
    if not args.check:
        table = fit_table(cells, args.multiprocessors)
        print(source(table), end="\n\n")
    print(summary(gaps(cells, table, args.multiprocessors)))
    if args.cross:
        print("\nShapes left out of the fit:")
        print(summary(cross(cells, args.multiprocessors)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
