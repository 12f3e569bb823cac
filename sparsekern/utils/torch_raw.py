"""Torch's raw functions for the current GPU and its memory, which every eager call needs.

The public ones build objects (torch.cuda.Stream) or go through the dispatcher, and cost more than
the rest of a small call. None of these is a public function of torch; a torch without CUDA lacks
them, and has no tensor that would get to them. Used by
backends/cuda/linear.py and backends/cusparselt/linear.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _absent(*arguments: object) -> int:
    raise RuntimeError("sparsekern: this torch has no CUDA")


current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _absent)
# index of a GPU -> address of its current stream
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _absent)


def empty_strided_dispatched(
    size: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(size, strides, dtype=dtype, device="cuda")


# Memory of the current GPU as torch.compile's generated code takes it: from the same allocator, but
# without the dispatcher, in about half the time of x.new_empty. Size and strides must be tuples.
empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    torch._C._dynamo.guards, "_empty_strided_cuda", empty_strided_dispatched
)
