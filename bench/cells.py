"""Measured cells, as bench/fit.py reads them: what `sparsekern tune --log` wrote, and the shapes to
tune for it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda.cost_model import Work
from sparsekern.backends.cuda.narrow_model import NarrowTile
from sparsekern.backends.cuda.variant import (
    PLAIN,
    Bits,
    MmaTile,
    RowBlocks,
    SplitTile,
    Tile,
    Variant,
    variant_name,
)
from sparsekern.profiling.tune import KINDS, SHAPES

CONFIGS = Path(__file__).resolve().parent.parent / "csrc" / "linear/configs.h"
# Classes of cells whose gaps are told apart: name, shapes or None for all, fewest tokens.
LARGE = (
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (14336, 4096), (1024, 4096)),
    *((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (28672, 8192), (1024, 8192)),
)
CLASSES = (
    ("all cells", None, 1),
    ("Llama-3 8B and 70B from 96 tokens", LARGE, 96),
)
MOST, LEAST = (60_000, 30_000), 64  # of `random_shapes`: out_features and in_features, and both


@dataclass(frozen=True)
class Cell:
    """One shape, number of tokens and bits of its types, with the measured us of each variant."""

    shape: tuple[int, int]
    tokens: int
    times: dict[Variant, float]
    bits: Bits = PLAIN

    @property
    def best(self) -> float:
        return min(self.times.values())

    def offers(self, variant: Variant) -> bool:
        """True when the variant was sampled here and may be chosen."""
        size = self.tokens, *self.shape, self.bits
        return variant in self.times and heuristics.considered(variant, *size)

    def work(self, variant: Variant, multiprocessors: int) -> Work:
        return heuristics.work(variant, self.tokens, *self.shape, multiprocessors, self.bits)


@dataclass(frozen=True)
class Gap:
    """What a table picks in a cell, and how much slower that is than the fastest: 0.05 for 5 %."""

    cell: Cell
    picked: Variant
    share: float

    def __str__(self) -> str:
        out_features, in_features = self.cell.shape
        best = min(self.cell.times, key=self.cell.times.get)
        names = f"{variant_name(self.picked)} instead of {variant_name(best)}"
        where = f"{out_features}x{in_features}, {self.cell.tokens} tokens"
        return f"{self.share:6.1%}  {where}: {names}, {self.cell.best:.1f} us"


def variants() -> dict[str, Variant]:
    """{name: variant} of everything in csrc/linear/configs.h."""
    text, found = CONFIGS.read_text(), []

    def entries(name):
        part = text.partition(f"#define {name}(X)")[2].partition("\n\n")[0]
        for numbers in re.findall(r"X\(([\d, ]+)\)", part):
            yield [int(number) for number in numbers.split(",")][1:]

    for panels, *rest in entries("SK_DECODE_CONFIGS"):
        found.append(RowBlocks(heuristics.PANEL * panels, *rest))
    for panels, *rest, streamed, promoted in entries("SK_PREFILL_CONFIGS"):
        rows = 2 * heuristics.PANEL * panels
        found.append(Tile(rows, *rest, bool(streamed), bool(promoted)))
    found += [MmaTile(*numbers) for numbers in entries("SK_MMA_CONFIGS")]
    for panels, *rest, across in entries("SK_SPLIT_CONFIGS"):
        found.append(SplitTile(2 * heuristics.PANEL * panels, *rest, bool(across)))
    found += [NarrowTile(4 * heuristics.PANEL, *rest) for rest in entries("SK_NARROW_CONFIGS")]
    return {variant_name(variant): variant for variant in found}


def read(paths: Iterable[str | Path]) -> list[Cell]:
    """The cells of these files; of one that was measured twice the later. Without the tiles of the
    narrow kernel, which has a model of its own (narrow_model.py).

    Raises:
        ValueError: a line is no cell, or none is there.
    """
    named = {name: v for name, v in variants().items() if not isinstance(v, NarrowTile)}
    cells = {}
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
                bits = KINDS[row["dtype"]].bits if row.get("dtype") in KINDS else PLAIN
                cells[key] = Cell(key[2], key[3], times, bits)
    if not cells:
        raise ValueError("no cell with a time of a variant in csrc/linear/configs.h")
    return list(cells.values())


def belongs(cell, shapes, fewest):
    return cell.tokens >= fewest and (shapes is None or cell.shape in shapes)


def random_shapes(count: int, seed: int, most: tuple[int, int] = MOST) -> list[tuple[int, int]]:
    """(out_features, in_features), spread evenly over the logarithms; every second one with both a
    multiple of 64, the others with in_features a multiple of 4. None is one of tune.SHAPES."""
    draw, found = random.Random(seed), dict[tuple[int, int], None]()
    while len(found) < count:
        sizes = (LEAST * (end / LEAST) ** draw.random() for end in most)
        out_features, in_features = map(round, sizes)
        out_step, in_step = (64, 64) if len(found) % 2 == 0 else (1, 4)
        shape = (out_features // out_step * out_step, in_features // in_step * in_step)
        if shape not in SHAPES:
            found[shape] = None
    return list(found)
