"""Matmuls in full float32, whatever the caller's settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_float32(device: torch.device | str) -> Iterator[None]:
    """Run float32 matmuls on `device` in float32: no TF32, no bf16, no autocast, no autograd.

    torch has two sets of switches for this. Mixing them is an error in torch, so each is only
    touched where it is not exact already, and every value is restored on the way out.
    """
    matmuls: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    )
    knobs = [matmul for matmul in matmuls if hasattr(matmul, "fp32_precision")]
    before = [knob.fp32_precision for knob in knobs]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the newer switches were used, and the older cannot express them
        legacy = "highest"
    if legacy != "highest":
        torch.set_float32_matmul_precision("highest")
    for knob in knobs:
        if knob.fp32_precision not in ("none", "ieee"):
            knob.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        if legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
        for knob, precision in zip(knobs, before):
            if knob.fp32_precision != precision:
                knob.fp32_precision = "none"  # inherit, where that gives the value that was seen
                if knob.fp32_precision != precision:
                    knob.fp32_precision = precision


def exact_on_cpu() -> contextlib.AbstractContextManager[None]:
    """exact_float32("cpu"), or nothing where matmuls are exact already: for calls of microseconds,
    without autograd and autocast."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if hasattr(matmul, "fp32_precision"):
        exact = matmul.fp32_precision in ("none", "ieee")
    else:
        exact = torch.get_float32_matmul_precision() == "highest"
    return contextlib.nullcontext() if exact else exact_float32("cpu")
