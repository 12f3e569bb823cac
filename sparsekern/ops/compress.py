"""compress, prune_compress, decompress, verify: from dense weights to Sparse24 and back.

On a GPU with kernels one pass reads the dense weight; the result is in the layout that its linear
kernels read there ("tile64" for 16-bit weights with the CUDA module), so that
`linear(x, compress(w))` is as fast as SparseLinear. `layout="rowmajor"` asks for the published
form, which every other function gets from any layout by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import compress as fastest
from sparsekern.backends import registry
from sparsekern.errors import message
from sparsekern.formats import dtypes, sparse24
from sparsekern.formats.layouts import layout as layout_named
from sparsekern.formats.sparse24 import Sparse24, verify

__all__ = ["compress", "decompress", "prune_compress", "verify"]


def compress(
    w: Tensor,
    mask: Tensor | None = None,
    *,
    layout: str | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
) -> Sparse24:
    """w, or w with the elements outside the mask set to zero, in 2:4 form.

    Specification: reference.compress. decompress gives back exactly what went in (-0.0 as +0.0),
    unless a dtype rounds it.

    Args:
        w: [out_features, in_features] float32 | float16 | bfloat16, any strides, in_features a
            multiple of 4. Without a mask it must be 2:4 already.
        mask: bool, shape and device of w, True = kept; at most two kept non-zeros per group.
        layout: None for the one that the kernels of w's device read best ("rowmajor" on the CPU),
            or the name of a registered layout.
        dtype: None for that of w, or the element type to store the values as: a plain dtype, or
            the name of a coded type that has a codec (formats/dtypes.py).
        quantize: None, or "fp8" | "int8" | "int4", as sparsekern.quantize(compress(w), quantize),
            which has more options. Not together with dtype.
    Returns:
        Sparse24 on the device of w. It depends on the dense content alone: a kept element that is
        0.0 frees its slot (see codec.SLOT_TABLE).
    Raises:
        ValueError: shape; unknown layout; NaN or Inf; more than two non-zeros in a group: the
            message names the row, the columns and the counts.   TypeError: dtype.   And what
            Sparse24.to_layout raises.
    """
    op = "sparsekern.compress"
    if quantize is not None:
        dtypes.quantized(op, quantize, "quantize")
        if dtype is not None:
            got = f"dtype={dtype!r} and quantize={quantize!r}"
            raise ValueError(message(op, "one of dtype and quantize", got, "Leave dtype out."))
        dtype = quantize
    return _finished(op, fastest.compress(w, mask), layout, dtype)


def prune_compress(
    w: Tensor,
    scores: Tensor | None = None,
    *,
    layout: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> Sparse24:
    """Keep the two best scores of each group and compress: one pass over w on CUDA.

    Args:
        w: [out_features, in_features] float32 | float16 | bfloat16, in_features % 4 == 0.
        scores: floating point, shape and device of w; default |w|. Of equal scores the higher
            column is kept.
        layout, dtype: as for `compress`.
    Raises:
        ValueError: shape; NaN or Inf in w, NaN in scores, with the place.   TypeError: dtype.   And
            what Sparse24.to_layout raises.
    """
    return _finished("sparsekern.prune_compress", fastest.prune_compress(w, scores), layout, dtype)


def _finished(
    op: str, w24: Sparse24, layout: str | None, dtype: str | torch.dtype | None
) -> Sparse24:
    if layout is not None:
        layout_named(layout, op)
    if dtype is not None:
        if not isinstance(dtype, (str, torch.dtype)):
            got = type(dtype).__name__
            raise TypeError(message(op, "dtype None, a torch.dtype or a name", got))
        w24 = sparse24.encode(w24, dtype)
    if layout is None:
        layout = registry.best_layout(w24.spec, w24.device)
    return w24.to_layout(layout)


def decompress(w24: Sparse24) -> Tensor:
    """The dense weight [out, in]: every stored value at its column, +0.0 elsewhere, by indexing.

    Specification: reference.decompress. Exact, on CPU and GPU, from every layout. dtype and device
    of w24.
    """
    sparse24.check_is_sparse24("sparsekern.decompress", w24, "w24")
    return fastest.decompress(w24)
