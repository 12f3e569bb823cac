"""Early starts between our kernels and those that Inductor generates (csrc/notes/pdl.md).

With the option triton.enable_pdl a Triton kernel of Inductor waits for the kernel before it at its
first load that needs it, and tells the GPU behind its last load that the next may start: in a
reduction with loops, which a norm is, that is its end. One that loads nothing does not wait, and so
may end before its predecessor has, while what comes behind it waits for it alone.

`at_once` makes each of them begin with both: it waits, then lets the next one start. Nothing is
touched before the wait, every kernel ends after all before it, and ours, which start then, stream
their weights during the whole of it.

Source: torch/_inductor/codegen/triton.py of torch 2.11 to 2.13, TritonKernel._filter_pdl.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

PDL, VARIABLE = "triton.enable_pdl", "TORCHINDUCTOR_ENABLE_PDL"  # of a compilation, of a process


def known() -> bool:
    """Whether this torch's Inductor has the option, for CUDA."""
    from torch._inductor import config

    return torch.version.hip is None and hasattr(getattr(config, "triton", None), "enable_pdl")


def at_once() -> bool:
    """From now on what is generated with the option begins with the wait and the permission;
    without it all stays as it is. Idempotent. False where this torch has other names, and
    nothing is changed."""
    try:
        from torch._inductor.codegen.triton import TritonKernel

        kernel: Any = TritonKernel
        filter_pdl, _ = kernel._filter_pdl, kernel._enable_pdl_codegen
        begin = [kernel.GDC_WAIT, kernel.GDC_LAUNCH]
    except (ImportError, AttributeError):
        return False
    if getattr(filter_pdl, "at_once", False):
        return True

    @functools.wraps(filter_pdl)
    def filter_and_begin(self: Any, code: Any) -> None:
        filter_pdl(self, code)
        if self._enable_pdl_codegen():
            code._lines[:0] = begin  # those of the kernel itself have no effect any more

    filter_and_begin.at_once = True  # type: ignore[attr-defined]
    kernel._filter_pdl = filter_and_begin
    return True
