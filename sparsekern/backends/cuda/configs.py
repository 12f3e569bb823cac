"""Which kernel and which variant of it computes a problem on a GPU: the one decider.

In this order: the user's tuned table, the shipped one (both tuned_tables.py), the cost model
(cost_model.py). Of what the native module was built with, a GPU of compute capability 9 runs
everything, others the mma.sp kernel.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from sparsekern import _native
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.backends.cuda.cost_model import MmaTile, RowBlocks, SplitTile, Tile, Variant

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


# ---- what to run ---------------------------------------------------------------------------------


def _rows(kernel: str, kind: type[Any]) -> dict[Any, int]:
    """{variant: index of its config} of one kernel of the native module."""
    rows = _native.module().kernels()[kernel]
    return {kind(*(row[field] for field in kind._fields)): row["index"] for row in rows}


@cache
def _tiles() -> dict[Tile, int]:
    return _rows("prefill", Tile)


@cache
def _mma_tiles() -> dict[MmaTile, int]:
    return _rows("mma", MmaTile)


def _built() -> dict[Variant, tuple[str, int]]:
    """{variant as in cost_model.py: (kernel, its config)} of the native module."""
    found: dict[Variant, tuple[str, int]] = {}
    for kernel, rows in (
        ("decode", _rows("decode", RowBlocks)),
        ("prefill", _tiles()),
        ("split", _rows("split", SplitTile)),
        ("mma", _mma_tiles()),
    ):
        found |= {variant: (kernel, index) for variant, index in rows.items()}
    return found


@cache
def variants() -> dict[str, tuple[str, int]]:
    """{name: (kernel, its config)} of everything that the module was built with.

    The names are what `sparsekern.explain` shows and what tuned tables hold.
    """
    return {heuristics.name(variant): of for variant, of in _built().items()}


def runnable(index: int) -> dict[str, tuple[str, int]]:
    """The variants that GPU `index` chooses among: all on Hopper, elsewhere mma."""
    hopper = _capability(index)[0] == 9
    return {name: of for name, of in variants().items() if hopper or of[0] == "mma"}


class Choice(NamedTuple):
    """What runs a problem, and why; us is its time where a table has measured just this."""

    variant: str  # a key of variants()
    why: str
    us: float | None = None


def heuristic(tokens: int, out_features: int, in_features: int, index: int) -> str:
    """The name of the variant that heuristics choose on GPU `index`."""
    if _capability(index)[0] != 9:
        return f"mma {mma_tile(tokens, out_features, in_features, index)}"
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    problem = tokens, out_features, in_features, multiprocessors
    return heuristics.name(heuristics.fastest(*problem, tuple(_built())))


def choose(tokens: int, out_features: int, in_features: int, dtype: str, index: int) -> Choice:
    """The Choice for a problem on GPU `index`; dtype is its name."""
    gpu, known = tuning.gpu_name(index), runnable(index)
    problem = dtype, out_features, in_features, tokens
    tuned = tuning.lookup(gpu, *problem, known)
    if tuned is None:
        name = heuristic(tokens, out_features, in_features, index)
        return Choice(name, "variant by heuristics, no tuned table knows this problem")
    which = "your tuned table" if tuned.source == tuning.YOURS else "the shipped tuned table"
    why, exact = f"variant from {which}", (tuned.dtype, tuned.tokens) == (problem[0], tokens)
    why += "" if tuned.tokens == tokens else f" at {tuned.tokens} tokens"
    why += "" if tuned.dtype == problem[0] else f", measured in {tuned.dtype}"
    return Choice(tuned.variant, why, tuned.us if exact else None)


def mma_tile(tokens: int, out_features: int, in_features: int, index: int) -> MmaTile:
    """The tile of the mma.sp kernel that the cost model chooses."""
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    problem = tokens, out_features, in_features, multiprocessors
    rates = heuristics.mma_rates(_capability(index))
    return heuristics.mma_tile(*problem, rates, tuple(_mma_tiles()))
