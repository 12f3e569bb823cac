"""The pruners on one layer: magnitude, Wanda, SparseGPT, and refining its kept weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsekern.prune import magnitude_mask, sparsegpt, wanda_mask
from sparsekern.prune.refine import refine


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "refine"])
def test_prune(benchmark: Any, case: Any, name: str) -> None:
    size = min(case.size, 512 if case.device == "cpu" else 4096)
    weight = case.weight[:size, :size].float()
    inputs = case.x(2 * size)[:, :size].float()
    hessian = 2 * inputs.t() @ inputs / len(inputs)
    mask = magnitude_mask(weight)
    call = {
        "magnitude": lambda: magnitude_mask(weight),
        "wanda": lambda: wanda_mask(weight, inputs.square().sum(0).sqrt()),
        "sparsegpt": lambda: sparsegpt(weight, hessian),
        "refine": lambda: refine(weight, weight * mask, mask, hessian, steps=16),
    }[name]

    def whole() -> object:
        result = call()
        if case.device == "cuda":
            torch.cuda.synchronize()
        return result

    assert whole() is not None
    benchmark.group = f"prune {size}x{size}, {case.device}"
    benchmark.pedantic(whole, rounds=5, warmup_rounds=1)
