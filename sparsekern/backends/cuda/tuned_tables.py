"""Tuned tables: which variant of a CUDA kernel was the fastest, as `sparsekern tune` measured it.

Two places are looked at, in this order, and where neither knows the answer cost_model.py decides
(configs.choose):

    yours      tuning.json in $SPARSEKERN_CACHE, or in sparsekern below XDG_CACHE_HOME or ~/.cache
    shipped    every .json file in sparsekern/backends/cuda/tables

Both have the form of utils/json_store.py, one entry per GPU (name and number of multiprocessors):

    {"NVIDIA H100 80GB HBM3, 132 multiprocessors":
      {"bfloat16": {"4096x4096": {"16": ["decode 256 rows, split 4", 3.9], "128": [...]}}}}
        dtype        out x in       tokens  variant                    microseconds

A variant is stored by its meaning, the name that `sparsekern.explain` shows, never by its index. A
name that this build does not have is ignored, and so is a damaged file, with a warning.

Between two tuned numbers of tokens the next higher one decides: with the same variant fewer tokens
never take longer, because tiles are padded, so its measured time is an upper bound. The bound is
worth little far below, and says nothing where other kernels could have taken part, so it decides
only (a) for at least half as many tokens and (b) on its own side of the decode kernel's limit.
Above the highest tuned number that one decides when it is MANY at least: then all multiprocessors
have several tiles, and the best tile hardly changes any more.

What dense takes (cuBLAS, the weight before it was pruned), measured in the same rounds, stands
beside it, as the variant "dense" of a dtype of its own (`dense_key`), because a cell has one:

      {"bfloat16, dense": {"1152x6912": {"128": ["dense", 12.9]}}}

The dtype is that of weight and x; of an 8-bit weight with x of 16 bits it is, say, "int8 weight,
bfloat16" (`configs.Types.key`). float16 and bfloat16 move the same bytes through the same
instructions, so where one of them was not tuned, the cells of the other decide.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Container, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from sparsekern.backends.cuda.cost_model import DECODE_TOKENS
from sparsekern.utils import json_store

TABLES = Path(__file__).parent / "tables"
YOURS, SHIPPED = "yours", "shipped"
DENSE = "dense"
VERSION = 1  # raised when the meaning of an entry changes
MANY = 4096  # tokens
_MOST_US = 1e12  # of a cell: eleven days
_SIBLINGS = {"float16": "bfloat16", "bfloat16": "float16"}


class Tuned(NamedTuple):
    """What a table says about a problem."""

    variant: str  # a key of cuda_backend.variants()
    us: float  # its measured time at `tokens`
    tokens: int  # the tuned number of tokens that decided
    source: str  # YOURS or SHIPPED
    dtype: str  # the one that was measured


def gpu_name(index: int) -> str:
    """What identifies GPU `index` in a table."""
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors"


def user_path() -> Path:
    """The file that holds the user's own tuning; it need not exist."""
    folder = os.environ.get("SPARSEKERN_CACHE")
    return (Path(folder) if folder else json_store.cache_folder()) / "tuning.json"


def deciding_tokens(tuned: Container[int], tokens: int) -> int | None:
    """Which of the tuned numbers of tokens decides for `tokens`; None when none may (see above)."""
    above = min((count for count in tuned if count >= tokens), default=None)
    if above is None:
        return max((count for count in tuned if count >= MANY), default=None)
    if above > 2 * tokens or (above <= DECODE_TOKENS) != (tokens <= DECODE_TOKENS):
        return None
    return above


def _sibling(dtype: str) -> str:
    """The same with the other 16-bit type; itself where there is none."""
    first, comma, last = dtype.rpartition(", ")
    return first + comma + _SIBLINGS.get(last, last)


def lookup(
    gpu: str, dtype: str, out_features: int, in_features: int, tokens: int, known: Container[str]
) -> Tuned | None:
    """The tuned variant for a problem, or None: then heuristics decide.

    Args:
        gpu: from `gpu_name`.      dtype: "bfloat16", "int8", "int8 weight, bfloat16", ...
        known: names of the variants that can run; others are ignored.
    """
    for name in dict.fromkeys((dtype, _sibling(dtype))):
        for source, table in _tables(gpu):
            cells = table.get(name, {}).get((out_features, in_features), {})
            cells = {count: cell for count, cell in cells.items() if cell[0] in known}
            count = deciding_tokens(cells, tokens)
            if count is not None:
                return Tuned(*cells[count], count, source, name)
    return None


def dense_key(dtype: str) -> str:
    """The dtype under which the times of dense are kept."""
    return f"{dtype}, {DENSE}"


def dense_us(tuned: Tuned, gpu: str, out_features: int, in_features: int) -> float | None:
    """What dense took beside this entry, in the same rounds; None when it was not measured."""
    table = dict(_tables(gpu))[tuned.source].get(dense_key(tuned.dtype), {})
    cell = table.get((out_features, in_features), {}).get(tuned.tokens)
    return None if cell is None else cell[1]


def store(
    path,
    gpu: str,
    dtype: str,
    shape: tuple[int, int],
    cells: dict[int, tuple[str, float]],
    dense: Mapping[int, float] = MappingProxyType({}),
) -> None:
    """Add measured cells of one shape to a table file; those of other token counts stay.

    Args:
        path: of the file; created when missing, safe under concurrent writers.
        cells: {tokens: (variant, us)}.
        dense: {tokens: us} of the dense product, measured with them. Of cells that it lacks an
            older time is forgotten.
    """

    def change(entries):
        try:
            _parse(entries.get(gpu, {}))
        except ValueError:
            entries[gpu] = {}  # `load` would ignore it
        table, size = entries.setdefault(gpu, {}), f"{shape[0]}x{shape[1]}"
        row = table.setdefault(dtype, {}).setdefault(size, {})
        row.update({str(count): [name, round(us, 3)] for count, (name, us) in cells.items()})
        old = table.get(dense_key(dtype), {}).get(size, {})
        kept = {count: cell for count, cell in old.items() if int(count) not in cells}
        kept |= {str(count): [DENSE, round(us, 3)] for count, us in dense.items()}
        if kept or old:
            table.setdefault(dense_key(dtype), {})[size] = kept

    json_store.update(path, change, VERSION)
    forget()


def summary(gpu: str) -> str:
    """One line for `sparsekern doctor`: which tables know this GPU."""
    parts = [text for source, table in _tables(gpu) if (text := _counted(source, table))]
    if not parts:
        return "none for this GPU: heuristics decide (sparsekern tune makes one)"
    return f"{'; '.join(parts)}; heuristics decide for others"


def _counted(source: str, table: dict) -> str:
    """As "yours: 24 shapes, dense is faster in 3 of 432 cells"; "" for an empty table."""
    shapes, measured, losing = 0, 0, 0
    for dtype, rows in table.items():
        beside = table.get(dense_key(dtype), {})
        shapes += 0 if dtype.endswith(dense_key("")) else len(rows)
        for shape, row in rows.items():
            pairs = [(cell[1], beside.get(shape, {}).get(count)) for count, cell in row.items()]
            measured += sum(dense is not None for _, dense in pairs)
            losing += sum(dense is not None and dense[1] < us for us, dense in pairs)
    text = f"{source}: {shapes} shapes" if shapes else ""
    return text + (f", dense is faster in {losing} of {measured} cells" if measured else "")


def forget() -> None:
    """Read the files again at the next lookup."""
    _tables.cache_clear()


@cache
def _tables(gpu: str) -> tuple:
    """((YOURS, table), (SHIPPED, table)): {dtype: {(out, in): {tokens: (variant, us)}}}."""
    shipped: dict = {}
    for path in sorted(TABLES.glob("*.json")):
        for dtype, shapes in _load(path, gpu).items():
            shipped.setdefault(dtype, {}).update(shapes)
    return (YOURS, _load(user_path(), gpu)), (SHIPPED, shipped)


def _load(path: Path, gpu: str) -> dict:
    """The part of a file that is about this GPU; {} with a warning when it is damaged."""
    entry = json_store.load(path, VERSION).get(gpu, {})
    try:
        return _parse(entry)
    except ValueError as error:
        text = f"sparsekern: {path} is ignored for {gpu!r}: {error}. Run: sparsekern tune"
        warnings.warn(text, UserWarning, stacklevel=2)
        return {}


def _parse(entry) -> dict:
    """An entry of a file in the form of `_tables`. Raises ValueError."""

    def cells(row):
        return {_numbers(count, 1)[0]: _cell(cell) for count, cell in row.items()}

    try:
        return {
            dtype: {_numbers(shape, 2): cells(row) for shape, row in shapes.items()}
            for dtype, shapes in entry.items()
        }
    except AttributeError as error:  # no dict where one belongs
        raise ValueError(f"expected dtype, shape, tokens, [variant, us]: {error}") from error


def _numbers(text: str, count: int) -> tuple[int, ...]:
    parts = text.split("x")
    good = (part.isascii() and part.isdecimal() and len(part) < 19 and int(part) for part in parts)
    if len(parts) != count or not all(good):
        expected = "OUTxIN" if count == 2 else "a number of tokens"
        raise ValueError(f"expected {expected}, got {text[:80]!r}")
    return tuple(map(int, parts))


def _cell(cell) -> tuple[str, float]:
    good = isinstance(cell, list) and list(map(type, cell)) in ([str, float], [str, int])
    if not good or not 0 < cell[1] < _MOST_US:
        raise ValueError(f"expected [variant, microseconds], got {str(cell)[:80]}")
    return cell[0], float(cell[1])
