"""Eager calls of linear, SparseLinear and nn.Linear: the host's time alone ("host", the GPU's queue
is drained between rounds and never full), and until the result is there ("call")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sparsekern as sk

CALLS = 32  # of one round of "host": far below the length of a stream's queue


def layer_call(case: Any, name: str, tokens: int) -> Callable[[], torch.Tensor]:
    """One eager call, its result checked."""
    x = case.x(tokens)
    if name == "nn.Linear":
        dense = nn.Linear(case.size, case.size, bias=False, device=case.device, dtype=case.dtype)
        dense.weight.data = case.pruned
        call = lambda: dense(x)  # noqa: E731
    elif name == "SparseLinear":
        sparse = sk.SparseLinear.from_sparse24(case.w24)
        call = lambda: sparse(x)  # noqa: E731
    else:
        call = lambda: sk.linear(x, case.w24)  # noqa: E731
    expected = x.double() @ case.pruned.double().t()
    assert (call().detach().double() - expected).abs().max() <= 0.05 * expected.abs().max()
    return call


def synchronize(case: Any) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize("name", ["nn.Linear", "SparseLinear", "linear"])
def test_call(benchmark: Any, case: Any, name: str, tokens: int) -> None:
    call = layer_call(case, name, tokens)
    with torch.inference_mode():

        def whole() -> None:
            call()
            synchronize(case)

        benchmark.group = f"call, {case.device}, {tokens} tokens"
        benchmark(whole)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize("name", ["nn.Linear", "SparseLinear", "linear"])
def test_host(benchmark: Any, case: Any, name: str, tokens: int) -> None:
    """Time of CALLS calls without waiting for the GPU."""
    call = layer_call(case, name, tokens)
    with torch.inference_mode():

        def batch() -> None:
            for _ in range(CALLS):
                call()

        benchmark.group = f"host, {CALLS} calls, {tokens} tokens"
        options = dict(setup=lambda: synchronize(case), rounds=200, warmup_rounds=5)
        benchmark.pedantic(batch, **options)
