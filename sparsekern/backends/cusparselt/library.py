"""Where NVIDIA's cuSPARSELt is found and loaded, and what is refused with it, with the reason.

It is loaded at run time (csrc/cusparselt/cusparselt.h), once per process, when the first weight is
packed for it or the doctor asks; its absence is a sentence, never an error.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from sparsekern import _native
from sparsekern.formats import dtypes

VARIABLE = "SPARSEKERN_CUSPARSELT"  # path of the library, before every other place
SYSTEM_NAMES = ("libcusparseLt.so.0", "libcusparseLt.so")  # for the system's own search
# What a weight's values may be stored as, and their DType in csrc/core/dtype.h.
DTYPES = {
    row.storage: row.native_code
    for row in dtypes.elements()
    if row.native_code is not None and row.bits >= 8
}
_FP8_CAPABILITY = (8, 9)


def sparse_multiple(storage: torch.dtype) -> int:
    """What a weight's sizes are multiples of: 16 at 16 bits, 32 at 8."""
    return 32 // storage.itemsize


def dense_multiple(storage: torch.dtype) -> int:
    """What tokens and the row strides of x are multiples of: 8 at 16 bits, 16 at 8."""
    return 16 // storage.itemsize


def scales_channels(storage: torch.dtype) -> bool:
    """Whether a product multiplies with a vector, the scales of the channels: that of int8. With
    e4m3 the library (0.8.0, on an H200) refuses the vector."""
    return storage == torch.int8


# ---- the library ---------------------------------------------------------------------------------


class Library(NamedTuple):
    version: tuple[int, int, int]  # (major, minor, patch)
    path: str

    @property
    def name(self) -> str:
        return "cuSPARSELt " + ".".join(map(str, self.version))


def candidates() -> list[str]:
    """Where the library is looked for, in order: $SPARSEKERN_CUSPARSELT alone if it is set; else
    the pip wheels (nvidia-cusparselt-cu12, -cu13), torch's own folder, LD_LIBRARY_PATH and system.
    """
    if chosen := os.environ.get(VARIABLE):
        return [chosen]
    folders = []
    for package, below in (("nvidia", "*/lib"), ("cusparselt", "lib"), ("torch", "lib")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            folders += sorted(Path(place).glob(below))
    found = [path for folder in folders for path in sorted(folder.glob("libcusparseLt.so*"))]
    return [str(path) for path in found] + list(SYSTEM_NAMES)


@cache
def library() -> tuple[Library | None, str]:
    """(Library, "") after loading the first candidate that works, or (None, why there is none)."""
    if not _native.available():
        return None, _native.reason()
    native, refusals = _native.module(), []
    for path in candidates():
        try:
            version = native.cusparselt_load(path)
        except (RuntimeError, ValueError) as error:
            refusals.append(str(error))
            continue
        atexit.register(native.cusparselt_unload)  # while the CUDA driver is still there
        return Library(version, path), ""
    return None, refusals[0]


# ---- refusals ------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """A combination that is known to fail: versions from first to last on one kind of GPU."""

    first: tuple[int, int, int]
    last: tuple[int, int, int]
    capability: tuple[int, int]
    dtype: torch.dtype
    reason: str


_HALF = dtypes.element("float16").storage
_POISONS = "which poisons the CUDA context of the whole process. Use bfloat16 or another version"
REFUSALS = (
    # Measured on an H100: every shape tried; 0.10.0 works there, bfloat16 works with both.
    Refusal(
        (0, 8, 0),
        (0, 8, 0),
        (9, 0),
        _HALF,
        f"its float16 kernels die with 'illegal instruction' on this GPU, {_POISONS}",
    ),
    # Reported for an H100 by github.com/bcacdwk/vllmbench (README, 15.1); not measured here.
    Refusal(
        (0, 8, 1),
        (0, 8, 1),
        (9, 0),
        _HALF,
        f"its float16 kernels are reported to die with 'illegal instruction' on this GPU, "
        f"{_POISONS}",
    ),
)


def _capability(index: int) -> tuple[int, int] | None:
    """(major, minor) of GPU `index`; None for the CPU (-1)."""
    return torch.cuda.get_device_capability(index) if index >= 0 else None


@cache
def refusal(index: int, dtype: torch.dtype) -> str:
    """Why the library cannot be used on GPU `index` for weights whose values are stored as this
    dtype; empty when it can."""
    if dtype not in DTYPES:
        known = f"8-bit levels, {dtypes.native_names()}"
        return f"backend 'cusparselt' needs {known}, got {dtype}"
    capability = _capability(index)
    if capability is None:
        return "backend 'cusparselt' needs x and the weight on a GPU, got the CPU"
    if capability < (8, 0):
        got = ".".join(map(str, capability))
        return f"backend 'cusparselt' needs compute capability 8.0 or newer, cuda:{index} has {got}"
    if dtype.itemsize == 1 and dtype.is_floating_point and capability < _FP8_CAPABILITY:
        got = ".".join(map(str, capability))
        return f"backend 'cusparselt' needs compute capability 8.9 for {dtype}, got {got}"
    found, why = library()
    if found is None:
        return f"backend 'cusparselt' needs the library: {why}"
    for rule in REFUSALS:
        concerned = (capability, dtype) == (rule.capability, rule.dtype)
        if concerned and rule.first <= found.version <= rule.last:
            return f"backend 'cusparselt' refuses {dtype} with {found.name}: {rule.reason}"
    return ""


def shape_refusal(
    out_features: int, in_features: int, storage: torch.dtype = dtypes.DEFAULT_16_BIT
) -> str:
    """Why the library does not take a weight of this shape; empty when it does."""
    multiple = sparse_multiple(storage)
    small = min(out_features, in_features) < multiple
    if not small and out_features % multiple == in_features % multiple == 0:
        return ""
    return (
        "backend 'cusparselt' needs out_features and in_features that are multiples of "
        f"{multiple}, got {out_features} and {in_features}"
    )
