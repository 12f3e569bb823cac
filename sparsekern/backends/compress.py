"""Compressing and decompressing on whatever is the fastest for a tensor: kernels or torch.

    CUDA, magnitude pruning of 16-bit weights    backends/cuda/compress.py
    CUDA with Triton, everything else            backends/triton/compress.py
    anything else                                formats/codec.py, in torch

All give the same bits and the same errors; arguments as in formats/codec.py.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from sparsekern.backends import triton
from sparsekern.backends.cuda import compress as cuda_compress
from sparsekern.formats import codec, dtypes, tile64
from sparsekern.formats.sparse24 import Sparse24


def mask24(scores: Tensor) -> Tensor:
    """codec.mask24: True for the two largest of every four consecutive scores."""
    kernels = _triton(scores)
    if kernels is None:
        return codec.mask24(scores)
    op = "sparsekern.mask24"
    scores = codec.checked_scores(scores, op)
    mask: Tensor
    mask, bad = kernels.mask24(scores)
    if int(bad):
        codec.raise_nan_scores(op, scores)
    return mask


def compress(w: Tensor, mask: Tensor | None = None) -> Sparse24:
    """codec.compress_dense: w, or w with the elements outside the mask set to zero, row-major."""
    kernels = _triton(w)
    if kernels is None:
        values, metadata = codec.compress_dense(w, mask)
    else:
        op = "sparsekern.compress"
        w = codec.checked_weight(w, op)
        mask = codec.checked_mask(mask, w, op)
        mode = "exact" if mask is None else "mask"
        values, metadata, bad = kernels.compress(w, mode, mask)
        if int(bad):
            codec.raise_unfit(op, w, mask)
    return Sparse24(values, metadata, w.shape)


def prune_compress(w: Tensor, scores: Tensor | None = None) -> Sparse24:
    """codec.prune_compress_dense: the two best scores of each group of w, row-major."""
    kernels = _triton(w)
    if scores is None and isinstance(w, Tensor) and w.is_cuda and w.dim() == 2:
        contiguous = w.detach().contiguous()
        if cuda_compress.supported(contiguous):
            values, metadata, bad = cuda_compress.prune_compress(contiguous)
            if int(bad):
                codec.raise_unfit("sparsekern.prune_compress", contiguous, None, None, pruned=True)
            return Sparse24(values, metadata, w.shape)
    if kernels is None or not (scores is None or scores.dtype in dtypes.PLAIN):
        values, metadata = codec.prune_compress_dense(w, scores)
    else:
        op = "sparsekern.prune_compress"
        w = codec.checked_weight(w, op)
        scores = None if scores is None else codec.checked_scores(scores, op, w)
        mode = "magnitude" if scores is None else "scores"
        values, metadata, bad = kernels.compress(w, mode, scores)
        if int(bad):
            codec.raise_unfit(op, w, None, scores, pruned=True)
    return Sparse24(values, metadata, w.shape)


def decompress(w24: Sparse24) -> Tensor:
    """codec.decompress_dense: the dense weight [out, in], exact, from any layout."""
    dense: Tensor
    spec, values = w24.spec, w24.values
    if spec.layout == tile64.LAYOUT and spec.element.plain and values.element_size() == 2:
        if (kernels := _triton(values)) is not None:
            dense = kernels.decompress_tile64(values, w24.metadata.contiguous(), spec.shape)
            return dense
    w24 = w24.rowmajor()
    numbers, metadata, in_features = w24.numbers(), w24.metadata, w24.in_features
    kernels = _triton(numbers)
    if kernels is None:
        return codec.decompress_dense(numbers, metadata, in_features)
    dense = kernels.decompress(numbers.contiguous(), metadata.contiguous(), in_features)
    return dense


def _triton(tensor: object) -> ModuleType | None:
    """The Triton kernels when they take this tensor."""
    fits = isinstance(tensor, Tensor) and tensor.is_cuda and tensor.dtype in dtypes.PLAIN
    if not fits or not triton.available():
        return None
    from sparsekern.backends.triton import compress as kernels

    return kernels
