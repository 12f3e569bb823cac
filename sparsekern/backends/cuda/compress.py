"""Magnitude 2:4 pruning and compression of a 16-bit weight in one pass: the CUDA kernel.

backends/compress.py comes here with dense 16-bit CUDA tensors when the native module is there;
everything else goes to Triton or torch, with the same bits. The kernel, and what it costs,
is csrc/weights/prune_compress.cu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern import _native
from sparsekern.formats import dtypes


def supported(w: Tensor) -> bool:
    """True for a contiguous 16-bit weight on a GPU whose rows are whole 16-byte chunks."""
    return (
        w.device.type == "cuda"
        and w.dtype in dtypes.NATIVE
        and w.shape[1] % 8 == 0
        and w.is_contiguous()
        and w.data_ptr() % 16 == 0
        and _native.available()
    )


def prune_compress(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values [out, in/2], metadata uint8 [out, in/8], and how many chunks hold NaN or Inf.

    The first two mean nothing unless the count (int32 [1]) is 0; reading it waits for the kernel.
    """
    out_features, in_features = w.shape
    values = w.new_empty(out_features, in_features // 2)
    metadata = w.new_empty(out_features, in_features // 8, dtype=torch.uint8)
    bad = torch.zeros(1, dtype=torch.int32, device=w.device)
    with torch.cuda.device(w.device):
        _native.module().prune_compress(
            w=w.data_ptr(),
            values=values.data_ptr(),
            metadata=metadata.data_ptr(),
            bad_chunks=bad.data_ptr(),
            elements=w.numel(),
            dtype=dtypes.NATIVE[w.dtype],
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return values, metadata, bad
