"""Cells that no table has: random shapes and numbers of tokens, for bench_random.py.

The shapes are those of cells.random_shapes, shuffled: spread evenly over the logarithms, every
second one with both sizes a multiple of 64. Each has one number of tokens in each of CLASSES, even
over the logarithms, too. They come in two halves. The first has every shape once, with two of its
four numbers, one of few tokens and one of many; which two is drawn. So a run that is cut short has
measured a fair sample: shapes by chance, and about as many cells of each class.

In every n-th cell of a class all variants are timed, for the regret of the cost model's pick.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from sparsekern.backends.cuda import tuned_tables
from sparsekern.utils import json_store

from .cells import MOST, random_shapes
from .shapes import Shape

SEED, SHAPES_WANTED, EVERY = 19, 120, 8
CLASSES = ((1, 16), (17, 64), (65, 512), (513, 8192))  # first and last number of tokens


class Point(NamedTuple):
    """One number of tokens of a shape; swept: all variants are timed, too."""

    tokens: int
    swept: bool


def tabled() -> set[tuple[int, int]]:
    """(out_features, in_features) of everything in a shipped table or the user's."""
    found = set()
    for path in (*sorted(tuned_tables.TABLES.glob("*.json")), tuned_tables.user_path()):
        for gpu, table in json_store.load(path, tuned_tables.VERSION).items():
            if gpu.endswith(", runs"):
                continue
            for sizes in table.values():
                found |= {tuple(map(int, size.split("x"))) for size in sizes}
    return found


def shapes(
    count: int = SHAPES_WANTED, seed: int = SEED, most: tuple[int, int] = MOST
) -> list[tuple[int, int]]:
    """So many random shapes that no table has."""
    known, more = tabled(), count
    while True:
        found = [shape for shape in random_shapes(more, seed, most) if shape not in known]
        if len(found) >= count:
            return found[:count]
        more += count - len(found)


def jobs(
    count: int = SHAPES_WANTED,
    seed: int = SEED,
    every: int = EVERY,
    shard: tuple[int, int] = (1, 1),
    most: tuple[int, int] = MOST,
) -> list[tuple[Shape, list[Point]]]:
    """Shapes with their numbers of tokens, in the order to measure.

    Args:
        count: of shapes.      every: of the cells of a class one in so many is swept; 0: none.
        shard: (number, of how many): every so-manieth job, from this one on.
        most: out_features and in_features of a shape.
    """
    draw = random.Random(seed)
    halves: tuple[list, list] = ([], [])
    seen = [0] * len(CLASSES)
    for place, size in enumerate(shapes(count, seed, most)):
        shape = Shape("", f"random {place}", *size)
        drawn = [_tokens(draw, *limits) for limits in CLASSES]
        few, many = draw.randrange(2), 2 + draw.randrange(2)
        for half, wanted in zip(halves, ((few, many), (1 - few, 5 - many))):
            half.append((shape, [(kind, drawn[kind]) for kind in wanted]))
    for half in halves:
        draw.shuffle(half)
    found = []
    for shape, numbers in (*halves[0], *halves[1]):
        points = []
        for kind, tokens in numbers:
            points.append(Point(tokens, bool(every) and seen[kind] % every == 0))
            seen[kind] += 1
        found.append((shape, points))
    return found[shard[0] - 1 :: shard[1]]


def _tokens(draw: random.Random, first: int, last: int) -> int:
    return int(first * ((last + 1) / first) ** draw.random())
