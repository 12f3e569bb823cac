"""Fits the cost model's table to measured cells: `python -m bench.fit CELLS.jsonl`.

CELLS.jsonl is what `sparsekern tune --log CELLS.jsonl` appends: a line per cell with the times of
all variants that were sampled. Printed are the table TIMES, to paste into
sparsekern/backends/cuda/coefficients.py, and how much slower than the fastest variant its picks are
in these cells. With --check nothing is fitted: the gaps are those of the table that
backends/cuda/coefficients.py has.

The model is heuristics.work (counts) and heuristics.us (their time), and nothing is modelled here.
The table is made in two steps:

1. Each variant is fitted alone (`fit_variant`): least squares of log(predicted / measured) over its
   eight coefficients, which are positive, by damped Gauss-Newton steps on their logarithms. They
   begin at the present ones, of this variant or of the most similar that has some (`start_of`), and
   are held there (HELD): what the cells say nothing of stays. A time counts the less the slower it
   is than the fastest in its cell (NEAR), because far from the best no pick will fall, and an error
   far beyond TRUST counts little more than one of TRUST (log(1 + (e/TRUST)^2) in place of e^2),
   because most times are the shorter of two samples.
2. A variant that is seldom close to the fastest has no coefficients (`that_matter`): few cells hold
   them badly, and it gains little.

With few cells, or when one kernel has changed, --move split takes the present table and moves the
coefficients of that kernel. Its variants that had none get some where they are close to the fastest
in three cells (NEW_CELLS); those of another kernel, or whose coefficients were estimates, are named
by --new. New ones are held little. --trust 0.15: where the formula misses more than samples
scatter, as of random shapes, so that what is missed is not distrusted as a bad sample.

To leave out more variants, those that picks do not miss, and then to move the coefficients so that
picks in the fitted cells cost less, was tried and made the picks for shapes that were left out
worse in one comparison: 5.5 % in place of 3.6 % slower than the fastest, in 183 cells of an H200.

Cells of 8-bit weights make TIMES_8: row blocks in these steps, from the cells with x of 16 bits,
and tiles and split tiles from those of TIMES (`scaled`). Cells of int4 weights make TIMES_4.

These gaps are of the data that was fitted. Those of data that was not: --cross tells each shape's
picks by a table fitted to the other shapes, --test FILE those in the cells of other files. Shapes
to tune for both, seeded and in no table, are what `python -m bench.fit --shapes COUNT --seed N`
prints:

    sparsekern tune --shapes $(python -m bench.fit --shapes 60 --seed 1) --log fitted.jsonl
    sparsekern tune --shapes $(python -m bench.fit --shapes 60 --seed 2) --log tested.jsonl
    python -m bench.fit fitted.jsonl --test tested.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import partial

import numpy

from sparsekern.backends.cuda import coefficients
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda.coefficients import Times
from sparsekern.backends.cuda.cost_model import Work
from sparsekern.backends.cuda.variant import SplitTile, Tile, Variant, variant_name

from .cells import CLASSES, SHAPES, Cell, Gap, belongs, random_shapes, read, variants

__all__ = ["CLASSES", "SHAPES", "Cell", "Gap", "main", "random_shapes", "read", "variants"]

NEAR, NEAR_8 = 2.0, 0.15  # three times as slow as the fastest: half the weight; in `scaled`
TRUST = 0.05  # error from which on a sample is distrusted
MATTERS, FEW_CELLS = 0.03, 4  # kept: within 3 % of the fastest in at least four cells
NEW_CELLS = 3  # the same, for a variant that gets coefficients in `moved`
OFTEN = 0.05  # see `scaled`
# A coefficient that is e times its start costs as much as HELD cells with an error of 1.3 TRUST, of
# a variant that had none HELD_NEW; a start is at least LEAST.
HELD, HELD_NEW, LEAST = 8.0, 2.0, Times(0.15, 0.05, 0.01, 1.0, 0.1, 0.1, 0.1, 0.1)
LOWEST, HIGHEST = 1e-3, 1e3  # of a coefficient
FASTEST = 4.8  # highest rate: what the data sheet of the H200 says of its memory, in TB/s
STEPS, EASE = 60, 1e-4  # most steps of a fit; step of a numeric derivative


# ---- the fit -------------------------------------------------------------------------------------


def that_matter(cells: Sequence[Cell]) -> list[Variant]:
    """The variants that are close to the fastest often enough to be chosen (MATTERS, FEW_CELLS)."""
    close = _close(cells)
    return [variant for variant in variants().values() if close[variant] >= FEW_CELLS]


def _close(cells):
    """{variant: in how many of the cells it is close to the fastest}."""
    return Counter(
        variant
        for cell in cells
        for variant, us in cell.times.items()
        if us <= (1 + MATTERS) * cell.best and cell.offers(variant)
    )


def start_of(variant: Variant, table: dict[Variant, Times]) -> Times:
    """Its coefficients in the table, or those of the variant of its kind that is most similar."""

    def apart(other):
        return sum(abs(numpy.log((1 + a) / (1 + b))) for a, b in zip(variant, other, strict=True))

    return table[min((v for v in table if isinstance(v, type(variant))), key=apart)]


def fit_variant(
    start: Times,
    of: Work,
    us: numpy.ndarray,
    weights: numpy.ndarray,
    held: float = 0.0,
    trust: float = TRUST,
) -> Times:
    """The coefficients of one variant.

    Args:
        of: its counts, arrays of one entry per cell. us, weights: of the cells.
        held: how much to its start: HELD.      trust: TRUST.
    """
    start = Times(*numpy.maximum(start, LEAST))
    logs = _fit_from(start, of, us, weights, held=held, trust=trust)
    return Times(*(0.0 if value <= 1.01 * LOWEST else value for value in numpy.exp(logs).tolist()))


def _fit_from(start, of, us, weights, unit=1.0, held=0.0, trust=TRUST):
    """Logarithms of the coefficients of the local optimum that is reached from here; unit: what
    coefficients are multiples of; held: see HELD."""
    measured = numpy.log(us)

    def errors(logs):
        times = Times(*(numpy.exp(logs)[:, None] * unit))
        return numpy.log(heuristics.us(times, of)) - measured

    def cost(error, logs):
        moved = held * numpy.sum((logs - begin) ** 2)
        return numpy.sum(weights * numpy.log1p((error / trust) ** 2)) + moved

    used = numpy.array(
        [
            True,
            *(numpy.any(count) for count in (of.extras, of.totals)),
            True,
            *(numpy.any(count) for count in of[4:7]),
            True,
        ]
    )
    highest = numpy.log(Times(*[HIGHEST] * len(start))._replace(rate=FASTEST))
    logs = numpy.log(start)
    logs[~used] = numpy.log(LOWEST)
    begin = logs
    error, damping = errors(logs), 1e-2
    for _ in range(STEPS):
        slopes = numpy.zeros((len(us), len(logs)))
        for i in numpy.flatnonzero(used):
            moved = logs.copy()
            moved[i] += EASE
            slopes[:, i] = (errors(moved) - error) / EASE
        now = weights / (trust**2 + error**2)
        normal = slopes.T @ (slopes * now[:, None]) + held * numpy.eye(len(logs))
        down = -slopes.T @ (now * error) - held * (logs - begin)
        for _ in range(8):
            eased = normal + damping * numpy.diag(numpy.diag(normal) + 1e-6)
            step = numpy.clip(numpy.linalg.solve(eased, down), -1, 1)
            moved = numpy.clip(logs + step, numpy.log(LOWEST), highest)
            trial = errors(moved)
            if cost(trial, moved) < cost(error, logs):
                logs, error, damping = moved, trial, max(damping / 3, 1e-6)
                break
            damping *= 4
        else:
            break
    return logs


def fit_all(cells: Sequence[Cell], multiprocessors: int) -> dict[Variant, Times]:
    """Coefficients of each variant that matters, from the cells in which it was sampled."""
    present = coefficients.table(cells[0].bits)
    return _fitted(cells, multiprocessors, that_matter(cells), set(present))


def moved(
    cells: Sequence[Cell],
    multiprocessors: int,
    kernels: Collection[str],
    new: Collection[str],
    trust: float = TRUST,
) -> dict[Variant, Times]:
    """The present table, with the coefficients of these kernels and of the variants with the `new`
    names moved to these cells, or made."""
    present, close = coefficients.table(cells[0].bits), _close(cells)
    of = [
        variant
        for name, variant in variants().items()
        if name in new
        or name.split()[0] in kernels
        and (variant in present or close[variant] >= NEW_CELLS)
    ]
    known = {variant for variant in present if variant_name(variant) not in new}
    return present | _fitted(cells, multiprocessors, of, known, trust)


def _fitted(cells, multiprocessors, wanted, known, trust=TRUST):
    """Of the wanted variants those that were sampled in as many cells as there are coefficients.
    known: those that are held at the present ones by HELD."""
    table, present = {}, coefficients.table(cells[0].bits)
    for variant in wanted:
        of = [cell for cell in cells if cell.offers(variant)]
        if len(of) < len(Times._fields):
            continue
        counts = [cell.work(variant, multiprocessors) for cell in of]
        us = numpy.array([cell.times[variant] for cell in of])
        slower = us / numpy.array([cell.best for cell in of]) - 1
        weights = 1 / (1 + (slower / NEAR) ** 2)
        start, held = start_of(variant, present), HELD if variant in known else HELD_NEW
        of_cells = Work(*numpy.array(counts, float).T)
        table[variant] = rounded(fit_variant(start, of_cells, us, weights, held, trust))
    return table


def fit_table(cells: Sequence[Cell], multiprocessors: int) -> dict[Variant, Times]:
    """The table for these cells: `fit_all`; for 8-bit x `scaled`."""
    of_8 = [cell for cell in cells if cell.bits.x == 8]
    if of_8:
        others = [cell for cell in cells if cell.bits.x != 8]
        more = scaled(of_8, multiprocessors)
        return (fit_table(others, multiprocessors) if others else {}) | more
    return fit_all(cells, multiprocessors)


def scaled(cells: Sequence[Cell], multiprocessors: int) -> dict[Variant, Times]:
    """Tiles and split tiles of TIMES with their coefficients scaled to these cells, all tiles by
    one set of eight factors and all split tiles by another; and those of their own (`fit_all`) of
    what else is close to the fastest in OFTEN of the cells.

    For 8-bit x, whose cells are few: with coefficients of their own the variants of the shipped
    cells are picked better, and those of shapes that were left out worse.
    """
    table = {}
    for kind in (Tile, SplitTile):
        of = {v: times for v, times in coefficients.TIMES.items() if isinstance(v, kind)}
        of = {v: times for v, times in of.items() if any(cell.offers(v) for cell in cells)}
        pairs = [(v, cell) for cell in cells for v in of if cell.offers(v)]
        if not pairs:
            continue
        counts = numpy.array([cell.work(v, multiprocessors) for v, cell in pairs], float)
        us = numpy.array([cell.times[v] for v, cell in pairs])
        slower = us / numpy.array([cell.best for _, cell in pairs]) - 1
        weights, unit = 1 / (1 + (slower / NEAR_8) ** 2), numpy.array([of[v] for v, _ in pairs]).T
        factors = numpy.exp(_fit_from(Times(*[1.0] * 8), Work(*counts.T), us, weights, unit))
        factors[factors <= 1.01 * LOWEST] = 0.0
        table |= {v: rounded(Times(*(times * factors))) for v, times in of.items()}
    own = {v for v, count in _close(cells).items() if count >= OFTEN * len(cells)} - {*table}
    return table | {v: of for v, of in fit_all(cells, multiprocessors).items() if v in own}


def rounded(times: Times) -> Times:
    """Three digits: what is printed is what was checked."""
    return Times(*(float(f"{value:.3g}") for value in times))


# ---- the gaps ------------------------------------------------------------------------------------


def gaps(cells: Iterable[Cell], table: dict[Variant, Times], multiprocessors: int) -> list[Gap]:
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


def cross(cells: Sequence[Cell], multiprocessors: int, fit=fit_table) -> list[Gap]:
    """The gaps of each shape by a table fitted to the other shapes."""
    found = []
    for shape in sorted({cell.shape for cell in cells}):
        others = [cell for cell in cells if cell.shape != shape]
        table = fit(others, multiprocessors)
        own = [cell for cell in cells if cell.shape == shape]
        found += gaps(own, table, multiprocessors)
    return found


def summary(found: Sequence[Gap], worst: int = 10) -> str:
    """Mean and worst of each class, then the worst cells."""
    lines = []
    for text, shapes, fewest in CLASSES:
        shares = [gap.share for gap in found if belongs(gap.cell, shapes, fewest)]
        if shares:
            mean = statistics.fmean(shares)
            lines.append(f"{text}, {len(shares)}: mean {mean:.2%}, worst {max(shares):.1%}")
    lines += [str(gap) for gap in sorted(found, key=lambda gap: -gap.share)[:worst]]
    return "\n".join(lines)


def source(table: dict[Variant, Times], name: str = "TIMES") -> str:
    """The table as it stands in backends/cuda/coefficients.py."""
    lines = [f"{name}: dict[Variant, Times] = {{"]
    lines += [f"    {_call(variant)}: {_call(times)}," for variant, times in table.items()]
    return "\n".join([*lines, "}"])


def _call(values: Variant | Times) -> str:
    shown, defaults = list(values), [*values._field_defaults.values()]
    while defaults and shown[-1] == defaults.pop():
        shown.pop()
    text = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in shown)
    return f"{type(values).__name__}({text})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fit", description=__doc__.split("\n")[0])
    parser.add_argument("cells", nargs="*", metavar="CELLS.jsonl", help="of sparsekern tune --log")
    parser.add_argument("--multiprocessors", type=int, default=132, help="of the GPU (default 132)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--check", action="store_true", help="fit nothing: gaps of backends/cuda/coefficients.py"
    )
    what.add_argument("--cross", action="store_true", help="also gaps of shapes left out of a fit")
    parser.add_argument("--move", metavar="KERNEL,...", help="keep the rest of the table")
    parser.add_argument(
        "--new", action="append", default=[], metavar="VARIANT", help="also moved: was an estimate"
    )
    parser.add_argument("--trust", type=float, default=TRUST, help="of --move (default 0.05)")
    parser.add_argument(
        "--test", action="append", default=[], metavar="FILE", help="also gaps in cells not fitted"
    )
    parser.add_argument("--shapes", type=int, metavar="COUNT", help="print so many random shapes")
    parser.add_argument("--seed", type=int, default=0, help="of --shapes (default 0)")
    args = parser.parse_args(arguments)
    if args.shapes is not None:
        print(",".join(f"{out}x{into}" for out, into in random_shapes(args.shapes, args.seed)))
        return 0
    cells = read(args.cells)
    tables = {id(table): table for table in (coefficients.table(cell.bits) for cell in cells)}
    if len(tables) > 1:
        raise ValueError("expected cells of one table, got weights of 8 or 4 bits and of others")
    (table,) = tables.values()
    name = next(
        name for name in ("TIMES", "TIMES_8", "TIMES_4") if getattr(coefficients, name) is table
    )
    fit = fit_table
    if args.move:
        fit = partial(moved, kernels=args.move.split(","), new=args.new, trust=args.trust)
    if not args.check:
        table = fit(cells, args.multiprocessors)
        print(source(table, name), end="\n\n")
    print(summary(gaps(cells, table, args.multiprocessors)))
    if args.test:
        print("\nCells that were not fitted:")
        print(summary(gaps(read(args.test), table, args.multiprocessors)))
    if args.cross:
        print("\nShapes left out of the fit:")
        print(summary(cross(cells, args.multiprocessors, fit)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
