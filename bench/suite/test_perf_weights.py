"""compress, prune_compress, pack and decompress of one weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsekern as sk
from sparsekern.formats.tile64 import pack


@pytest.mark.parametrize("name", ["compress", "prune_compress", "decompress", "pack"])
def test_weights(benchmark: Any, case: Any, name: str) -> None:
    rowmajor = sk.compress(case.pruned.to("cpu", torch.bfloat16)).to(case.device)
    call: Any = {
        "compress": lambda: sk.compress(case.weight, case.mask),
        "prune_compress": lambda: sk.prune_compress(case.weight),
        "decompress": lambda: sk.decompress(rowmajor),
        "pack": lambda: pack(rowmajor),
    }[name]

    def whole() -> Any:
        result = call()
        if case.device == "cuda":
            torch.cuda.synchronize()
        return result

    result = whole()
    dense = result if isinstance(result, torch.Tensor) else sk.decompress(result)
    assert torch.equal(dense, case.pruned.to(dense.dtype))
    benchmark.group = f"weights, {case.device}"
    benchmark(whole)
