"""Early starts between our kernels and those that Inductor generates (csrc/notes/decode.md).

With the option triton.enable_pdl a Triton kernel of Inductor tells the GPU, after its last load,
that the next kernel may start, and waits for the one before it, at its first load at the latest.
One that loads nothing does not wait, so it may end before its predecessor has, and what comes
behind it waits for it alone. `complete` makes that one wait, too: then each kernel ends after all
before it.

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


def complete() -> bool:
    """From now on generated kernels wait where they load nothing, too; idempotent. False where this
    torch has other names, and nothing is changed."""
    try:
        from torch._inductor.codegen.triton import TritonKernel

        kernel: Any = TritonKernel
        filter_pdl, wait, _ = kernel._filter_pdl, kernel.GDC_WAIT, kernel._enable_pdl_codegen
    except (ImportError, AttributeError):
        return False
    if getattr(filter_pdl, "waits_everywhere", False):
        return True

    @functools.wraps(filter_pdl)
    def waiting(self: Any, code: Any) -> None:
        filter_pdl(self, code)
        waits = any(isinstance(line, str) and wait in line for line in code._lines)
        if not waits and self._enable_pdl_codegen():
            code._lines.insert(0, wait)

    waiting.waits_everywhere = True  # type: ignore[attr-defined]
    kernel._filter_pdl = waiting
    return True
