"""Triton kernels, imported only when a CUDA tensor asks for them.

`available()` says whether they can run in this process and `reason()` why not; neither imports a
kernel, so that a machine without Triton or without a GPU never needs either.
"""

from __future__ import annotations

import functools

import torch


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
