"""torch's own 2:4 tensors, `torch.sparse.SparseSemiStructuredTensorCUTLASS`, to and from Sparse24.

Both keep the two values of a group of four side by side and four bits of metadata, first column |
second column << 2, so nothing becomes dense on the way. Theirs are reordered for CUTLASS's kernels
(ReorderMeta in cutlass/util/host_reorder.h): words of 16 bits, of 16 columns of one row, of which
32 rows and two words stand together.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24, verify
from sparsekern.utils.arguments import shown

OP = "sparsekern.integrations.semi_structured"
ROWS, COLUMNS, WORD = 32, 64, 16  # what sizes are multiples of; columns of a word


def to_semi_structured(w24: Sparse24) -> SparseSemiStructuredTensorCUTLASS:
    """The weight [out, in] as torch's tensor, which `torch.mm` and nn.Linear's weight take.

    Args:
        w24: float16 or bfloat16, any layout; out_features a multiple of 32, in_features of 64.
    Raises:
        TypeError: no Sparse24.   ValueError: another dtype, sizes that CUTLASS's kernels do not
        take.
    """
    op = f"{OP}.to_semi_structured"
    check(isinstance(w24, Sparse24), op, "w24: a Sparse24", shown(w24), exc=TypeError)
    rows, columns = w24.shape
    plain, got = w24.spec.element.plain and w24.dtype.itemsize == 2, f"{w24.spec.storage}"
    remedy = "Call sparsekern.dequantize or .to(torch.bfloat16) first."
    check(plain, op, "w24: float16 or bfloat16", got, remedy)
    expected = f"w24: [out, in] multiples of {ROWS} and {COLUMNS}"
    remedy = "Use w24.to_dense(), as torch has no 2:4 kernel for it."
    check(rows % ROWS == 0 and columns % COLUMNS == 0, op, expected, (rows, columns), remedy)
    w24 = w24.rowmajor()
    words = w24.metadata.contiguous().view(torch.int16).flatten()
    meta = torch.empty_like(words).scatter_(0, _places(rows, columns, words.device), words)
    return SparseSemiStructuredTensorCUTLASS(
        torch.Size((rows, columns)),
        packed=w24.values.contiguous(),
        meta=meta.view(rows, columns // WORD),
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )


def from_semi_structured(tensor: Tensor) -> Sparse24:
    """torch's tensor as a Sparse24, layout "rowmajor".

    Args:
        tensor: what `torch.sparse.to_sparse_semi_structured` gives with CUTLASS's format, float16
            or bfloat16.
    Raises:
        TypeError: another tensor; that of cuSPARSELt, whose format is not public.
        ValueError: another dtype, a tensor for training that has its transpose, too, in a format of
            its own.   FormatError: metadata that is none.
    """
    op = f"{OP}.from_semi_structured"
    remedy = "Call .to_dense(), then sparsekern.compress."
    known = isinstance(tensor, SparseSemiStructuredTensorCUTLASS)
    got = type(tensor).__name__ if isinstance(tensor, SparseSemiStructuredTensor) else shown(tensor)
    check(known, op, "tensor: a SparseSemiStructuredTensorCUTLASS", got, remedy, TypeError)
    ours = cast(SparseSemiStructuredTensorCUTLASS, tensor)
    values, meta = ours.packed, ours.meta
    check(ours.dtype.itemsize == 2, op, "tensor: float16 or bfloat16", ours.dtype, remedy)
    whole = values is not None and meta is not None and meta.ndim == 2 and values.ndim == 2
    check(whole, op, "tensor: values and metadata of one matrix", "another form", remedy)
    assert values is not None and meta is not None
    (rows, columns), flat = ours.shape, meta.contiguous().flatten()
    words = flat.gather(0, _places(rows, columns, flat.device))
    metadata = words.view(torch.uint8).view(rows, columns // 8)
    w24 = Sparse24(values.detach().clone(), metadata, (rows, columns))
    verify(w24)
    return w24


def _places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Where the words of the metadata, row by row, stand in CUTLASS's order; int64 [rows * words].

    Of 32 rows r = 8 a + b the order is 4 b + a; then the upper right and the lower left of each two
    by two words change places; then two columns of words stand side by side, pair after pair.
    """
    row = torch.arange(rows, device=device)[:, None]
    word = torch.arange(columns // WORD, device=device)
    row = row // ROWS * ROWS + row % 8 * 4 + row % ROWS // 8
    swap = (row + word) % 2 * (word % 2 - row % 2)  # 1: down and left, -1: up and right
    row, word = row + swap, word - swap
    return (word // 2 * 2 * rows + row * 2 + word % 2).flatten()
