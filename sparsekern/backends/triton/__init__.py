"""Triton kernels, imported only when a CUDA tensor asks for them.

`available()` says whether they can run in this process and `reason()` why not; neither imports a
kernel, so that a machine without Triton or without a GPU never needs either.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch

_broken: list[str] = []  # why mma_sp.py, which there is, did not compile


@functools.cache
def reason() -> str:
    """Why the Triton kernels cannot run here; "" when they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); install the torch build that brings it"
    return ""


def available() -> bool:
    """Whether the Triton kernels can run on the current CUDA device."""
    return not reason()


@functools.cache
def _gluon_reason() -> str:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "Gluon does not run in Triton's interpreter"
    try:
        importlib.import_module("sparsekern.backends.triton.mma_sp")
    except (ImportError, AttributeError) as error:
        return f"this Triton has no Gluon that does it ({error}); 3.6 and 3.9 have"
    return ""


def mma_sp_reason() -> str:
    """Why the kernel on the sparse tensor cores cannot run here, so that W is expanded; "" when it
    can. It is written in Gluon, which is experimental and changes from release to release."""
    return _broken[0] if _broken else _gluon_reason()


def mma_sp_failed(error: Exception) -> None:
    """Does without that kernel from now on, and says so once: `error` is what compiling it said."""
    if not _broken:
        import triton

        what = str(error).strip().splitlines() or [type(error).__name__]
        _broken.append(f"triton {triton.__version__} does not compile it ({what[-1][:200]})")
        warnings.warn(
            f"sparsekern: no sparse tensor cores by Triton: {_broken[0]}; the kernels that expand "
            "W, which are slower, are used instead. Triton 3.6 and 3.9 compile it.",
            RuntimeWarning,
            stacklevel=2,
        )
