"""Which kernel and which variant of it computes a problem on a GPU: the one decider.

In this order: the user's tuned table, the shipped one (both tuned_tables.py), the cost model
(cost_model.py). Of what the native module was built with, a GPU of compute capability 9 runs
everything, others the mma.sp kernel: of e4m3 from 8.9 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from sparsekern import _native
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda import mma_model
from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.backends.cuda.narrow_model import NarrowTile
from sparsekern.backends.cuda.variant import (
    Bits,
    MmaTile,
    RowBlocks,
    SplitTile,
    Tile,
    Variant,
    variant_name,
)
from sparsekern.formats import dtypes

# ---- what can run --------------------------------------------------------------------------------


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def refusal(index: int) -> str:
    """Why the kernels cannot run on GPU `index`; empty when they can."""
    if not _native.available():
        return _native.reason()
    capability = _capability(index)
    gpu = "{}.{}".format(*capability)
    if capability < (8, 0):
        return f"backend 'cuda' needs compute capability 8.0 or newer, cuda:{index} has {gpu}"
    archs = _native.module().build_info()["archs"]
    if capability[0] != 9 and not has_code(capability, archs):
        return (
            f"the CUDA module was built for {', '.join(archs)}, cuda:{index} has {gpu}; "
            "install sparsekern again without SPARSEKERN_CUDA_ARCHS"
        )
    return ""


def has_code(capability: tuple[int, int], archs: list[str]) -> bool:
    """True when a module built for `archs` ("80", "90a", ...) holds code for such a GPU.

    Machine code runs on the same major and no lower minor version; of the last arch without a
    suffix there is PTX, too, which newer GPUs compile (see CMakeLists.txt).
    """
    plain = [divmod(int(arch), 10) for arch in archs if arch.isdigit()]
    native = any(arch[0] == capability[0] and arch <= capability for arch in plain)
    return native or (bool(plain) and plain[-1] <= capability)


def hopper_refusal(index: int) -> str:
    """The same for the kernels that need Hopper: decode, prefill and the gated pair."""
    major, minor = _capability(index)
    if major == 9:
        return refusal(index)
    return f"the kernel needs compute capability 9.x, cuda:{index} has {major}.{minor}"


def hopper(index: int) -> bool:
    """Whether GPU `index` is one."""
    return _capability(index)[0] == 9


def mma_refusal(index: int, types: Types) -> str:
    """Why the mma.sp kernel cannot run for these types on GPU `index`; empty when it can."""
    if why := refusal(index):
        return why
    if not _mma_tiles(types):
        return f"the mma.sp kernel was not built for weights of {types.weight}"
    capability = _capability(index)
    if types.weight == _E4M3 and capability < _E4M3_CAPABILITY:
        need, has = ("{}.{}".format(*of) for of in (_E4M3_CAPABILITY, capability))
        return f"mma.sp of {types.weight} needs compute capability {need}, cuda:{index} has {has}"
    return ""


# ---- what to run ---------------------------------------------------------------------------------


class Types(NamedTuple):
    """Names of element types: of a weight's values, of x and of y."""

    weight: str
    x: str
    y: str

    @staticmethod
    def of(dtype: str) -> Types:
        """All the same."""
        return Types(dtype, dtype, dtype)

    @property
    def key(self) -> str:
        """What tuned tables call them: y matters little."""
        return self.x if self.weight == self.x else f"{self.weight} weight, {self.x}"

    @property
    def bits(self) -> Bits:
        return Bits(dtypes.element(self.weight).bits, dtypes.element(self.x).bits)


_E4M3, _E4M3_CAPABILITY = "float8_e4m3fn", (8, 9)
_PLAIN = Types.of(dtypes.PLAIN[dtypes.DEFAULT_16_BIT].name)


def _rows(kernel: str, kind: type[Any], types: Types) -> dict[Any, int]:
    """{variant: index of its config} of one kernel of the native module, for these types."""
    rows = (row for row in _native.module().kernels().get(kernel, ()) if types in row["types"])
    return {kind(*(row[field] for field in kind._fields)): row["index"] for row in rows}


@cache
def _tiles(types: Types = _PLAIN) -> dict[Tile, int]:
    return _rows("prefill", Tile, types)


@cache
def _mma_tiles(types: Types = _PLAIN) -> dict[MmaTile, int]:
    return _rows("mma", MmaTile, types)


def built(types: Types = _PLAIN) -> dict[Variant, tuple[str, int]]:
    """{variant as in cost_model.py: (kernel, its config)} of the native module."""
    found: dict[Variant, tuple[str, int]] = {}
    for kernel, rows in (
        ("decode", _rows("decode", RowBlocks, types)),
        ("prefill", _tiles(types)),
        ("split", _rows("split", SplitTile, types)),
        ("narrow", _rows("narrow", NarrowTile, types)),
        ("mma", _mma_tiles(types)),
    ):
        found |= {variant: (kernel, index) for variant, index in rows.items()}
    return found


@cache
def variants(types: Types = _PLAIN) -> dict[str, tuple[str, int]]:
    """{name: (kernel, its config)} of everything that the module was built with for these types.

    The names are what `sparsekern.explain` shows and what tuned tables hold.
    """
    return {variant_name(variant): of for variant, of in built(types).items()}


def runnable(index: int, types: Types = _PLAIN) -> dict[str, tuple[str, int]]:
    """The variants that GPU `index` chooses among: on Hopper all but the promoted ones and, with x
    of 8 bits, mma, which are asked for by name; elsewhere mma."""
    if not hopper(index):
        return {name: of for name, of in variants(types).items() if of[0] == "mma"}
    asked_for = {*_promoted_names(types)}
    return {
        name: of
        for name, of in variants(types).items()
        if name not in asked_for and not (of[0] == "mma" and types.bits.x == 8)
    }


def _promoted_names(types: Types) -> list[str]:
    return [variant_name(tile) for tile in _tiles(types) if tile.promoted]


class Choice(NamedTuple):
    """What runs a problem, and why; us is its time where a table has measured just this, and
    dense_us what dense took beside it."""

    variant: str  # a key of variants()
    why: str
    us: float | None = None
    dense_us: float | None = None


def heuristic(
    tokens: int, out_features: int, in_features: int, index: int, types: Types = _PLAIN
) -> str:
    """The name of the variant that heuristics choose on GPU `index`."""
    if not hopper(index):
        return f"mma {mma_tile(tokens, out_features, in_features, index, types)}"
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    problem = tokens, out_features, in_features, multiprocessors
    return variant_name(heuristics.fastest(*problem, tuple(built(types)), types.bits))


@lru_cache(maxsize=4096)
def in_halves(
    kernel: str,
    config: int,
    tokens: int,
    out_features: int,
    in_features: int,
    index: int,
    types: Types = _PLAIN,
) -> bool:
    """Whether x of which this variant can fetch every other row is copied in half, on GPU `index`
    (cost_model.in_halves)."""
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    problem = tokens, out_features, in_features, multiprocessors, types.bits
    number = kernel, config
    of = (variant for variant, known in built(types).items() if known == number)
    return any(heuristics.in_halves(variant, *problem) for variant in of)


def promoted(tokens: int, out_features: int, index: int, types: Types) -> str:
    """The name of the variant with promoted sums for a problem on GPU `index`."""
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    tiles = tuple(tile for tile in _tiles(types) if tile.promoted)
    return variant_name(heuristics.promoted_tile(tokens, out_features, multiprocessors, tiles))


def choose(
    tokens: int, out_features: int, in_features: int, dtype: str | Types, index: int
) -> Choice:
    """The Choice for a problem on GPU `index`; dtype is the name of all its types, or they."""
    types = Types.of(dtype) if isinstance(dtype, str) else dtype
    gpu, known = tuning.gpu_name(index), runnable(index, types)
    problem = types.key, out_features, in_features, tokens
    tuned = tuning.lookup(gpu, *problem, known)
    if tuned is None:
        name = heuristic(tokens, out_features, in_features, index, types)
        return Choice(name, "variant by heuristics, no tuned table knows this problem")
    which = "your tuned table" if tuned.source == tuning.YOURS else "the shipped tuned table"
    why, exact = f"variant from {which}", (tuned.dtype, tuned.tokens) == (problem[0], tokens)
    why += "" if tuned.tokens == tokens else f" at {tuned.tokens} tokens"
    why += "" if tuned.dtype == problem[0] else f", measured in {tuned.dtype}"
    dense_us = tuning.dense_us(tuned, gpu, out_features, in_features)
    if dense_us is not None and dense_us < tuned.us:
        why += f"; dense is faster: {dense_us:g} us, measured beside {tuned.us:g}"
    return Choice(tuned.variant, why, *((tuned.us, dense_us) if exact else ()))


def expected_us(
    tokens: int, out_features: int, in_features: int, kinds: Sequence[Types], index: int
) -> list[float]:
    """Times of one problem in each of these types, to be compared: those that tuned tables have,
    at the number of tokens that decides there, where they know all; else those of the cost model.
    Hopper only."""
    gpu, size = tuning.gpu_name(index), (out_features, in_features, tokens)
    cells = [tuning.lookup(gpu, types.key, *size, runnable(index, types)) for types in kinds]
    known = [cell.us for cell in cells if cell is not None]
    if len(known) == len(kinds):
        return known
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    problem = tokens, out_features, in_features, multiprocessors
    modelled = []
    for types in kinds:
        variant = heuristics.fastest(*problem, tuple(built(types)), types.bits)
        modelled.append(heuristics.predicted_us(variant, *problem, types.bits))
    return modelled


def mma_tile(
    tokens: int, out_features: int, in_features: int, index: int, types: Types = _PLAIN
) -> MmaTile:
    """The tile of the mma.sp kernel that the cost model chooses."""
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    problem = tokens, out_features, in_features, multiprocessors
    rates = mma_model.mma_rates(_capability(index), types.bits)
    return mma_model.mma_tile(*problem, rates, tuple(_mma_tiles(types)), types.bits)
