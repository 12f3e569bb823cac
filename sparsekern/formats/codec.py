"""Masks, compression and decompression on plain tensors, in torch alone: what kernels must equal.

A weight [out, in] is cut into groups of 4 consecutive columns. Of each group two elements are
stored (values [out, in/2], ascending columns) with one nibble idx0 | idx1 << 2 that says which
(metadata uint8 [out, ceil(in/8)], lower group in the low nibble, 0x4 in the last nibble of a row
with an odd number of groups). What is stored is a function of the dense weight alone: a group with
fewer than two non-zeros fills its free slots from SLOT_TABLE, whichever mask led to it.

It runs on every device. Where there are kernels backends/compress.py takes them instead; all give
the same bits. Elements are handled as integers of their own width: magnitudes order like bits
without the sign, and no float mode (flush to zero, say) can lose one. Of equal scores the higher
column is kept, as in the published code: prune/masks.py has the reason.

Specification: reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparsekern.errors import check, message
from sparsekern.formats import dtypes
from sparsekern.utils.arguments import check_data, check_strided

# Non-zero columns of a group (bit c = column c) -> the nibble stored for it; 0 = more than two.
# The free slots of groups with fewer than two follow compressed-tensors 0.14.0 (torch.topk over
# four magnitudes), so that both write the same bytes for the same dense weight.
SLOT_TABLE = (0xE, 0x8, 0xD, 0x4, 0xE, 0x8, 0x9, 0, 0xE, 0xC, 0xD, 0, 0xE, 0, 0, 0)

# The six nibbles with two distinct increasing indices, as (0,1) (0,2) (0,3) (1,2) (1,3) (2,3).
NIBBLES = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)
PADDING_NIBBLE = 0x4

# The torch code works on blocks of about this many elements: small enough that temporaries stay in
# a CPU's cache, large enough on a GPU that launches do not dominate.
BLOCK_ELEMENTS_CPU = 1 << 18
BLOCK_ELEMENTS_GPU = 1 << 25


# ---- public to the package -----------------------------------------------------------------------


def mask24(scores: Tensor) -> Tensor:
    """True for the two largest of every four consecutive scores; of equal ones the higher column.

    Args:
        scores: [out, in] floating point, in % 4 == 0; infinities are allowed.
    Returns:
        bool [out, in], exactly two True in each group.
    Raises:
        ValueError: shape, or a NaN score.   TypeError: not floating point.
    Specification: reference.nm_mask.
    """
    op = "sparsekern.mask24"
    scores = checked_scores(scores, op)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for rows in _row_blocks(scores):
        if torch.isnan(scores[rows]).any():
            raise_nan_scores(op, scores)
        mask[rows] = _best_two(scores[rows])
    return mask


def compress_dense(w: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """values and metadata of w, or of w with the elements outside the mask set to zero.

    Arguments and errors as in ops.compress.compress; specification: reference.compress.
    """
    op = "sparsekern.compress"
    w, mask = checked_weight(w, op), checked_mask(mask, w, op)
    values, metadata = _empty(w)
    for rows in _row_blocks(w):
        bits = _magnitudes_ok(op, w, rows, mask)
        if mask is not None:
            bits = bits.masked_fill(~mask[rows], 0)
        if not _encode(bits, w.dtype, values[rows], metadata[rows]):
            raise_unfit(op, w, mask)
    return values, metadata


def prune_compress_dense(w: Tensor, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """values and metadata of w pruned to the two best scores (default: |w|) of each group.

    Arguments and errors as in ops.compress.prune_compress; equal to
    compress_dense(w, mask24(scores)), in one pass over w on the GPU.
    """
    op = "sparsekern.prune_compress"
    w = checked_weight(w, op)
    scores = None if scores is None else checked_scores(scores, op, w)
    values, metadata = _empty(w)
    for rows in _row_blocks(w):
        bits = _magnitudes_ok(op, w, rows, None)
        if scores is None:
            keep = _best_two(bits & _magnitude_mask(w.dtype))
        else:
            if torch.isnan(scores[rows]).any():
                raise_nan_scores(op, scores)
            keep = _best_two(scores[rows])
        _encode(bits.masked_fill(~keep, 0), w.dtype, values[rows], metadata[rows])
    return values, metadata


def decompress_dense(values: Tensor, metadata: Tensor, in_features: int) -> Tensor:
    """Dense [out, in] with every stored value at its column, bit for bit, and +0.0 elsewhere.

    Shapes must agree (Sparse24 checks them); an invalid nibble gives a wrong group, never an
    access outside it. Specification: reference.decompress.
    """
    out_features, groups = values.shape[0], in_features // 4
    dense = values.new_zeros(out_features, groups, 4)
    pairs = values.reshape(out_features, groups, 2)
    for rows in _row_blocks(dense):
        index = _indices(unpack_nibbles(metadata[rows], groups))
        dense[rows].scatter_(2, index, pairs[rows])
    return dense.view(out_features, in_features)


def settle_slots(kept: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    """Kept numbers and metadata as `compress_dense` makes them of the same dense weight.

    Args:
        kept: [out, in/2] of a plain dtype, zeros among them.   metadata: uint8 [out, ceil(in/8)].
    Returns:
        (kept, metadata), new: groups with a kept zero have the slots of SLOT_TABLE.
    """
    groups = kept.shape[1] // 2
    nibbles = unpack_nibbles(metadata, groups)
    first, second = nibbles & 3, nibbles >> 2
    a, b = kept.reshape(kept.shape[0], groups, 2).unbind(2)
    one = torch.ones((), dtype=torch.uint8, device=kept.device)
    code = (a != 0).to(torch.uint8) * (one << first) | (b != 0).to(torch.uint8) * (one << second)
    settled = torch.tensor(SLOT_TABLE, dtype=torch.uint8, device=kept.device)[code.int()]

    def at(column: Tensor) -> Tensor:
        return torch.where(column == first, a, torch.where(column == second, b, 0))

    values = torch.stack((at(settled & 3), at(settled >> 2)), dim=2).flatten(1)
    return values, pack_nibbles(settled, PADDING_NIBBLE)


def unpack_nibbles(metadata: Tensor, groups: int) -> Tensor:
    """metadata or bitmask uint8 [out, ceil(groups/2)] -> uint8 [out, groups], one nibble each."""
    nibbles = torch.stack((metadata & 0xF, metadata >> 4), dim=2)
    return nibbles.flatten(1)[:, :groups]


def pack_nibbles(nibbles: Tensor, padding: int) -> Tensor:
    """Inverse of unpack_nibbles; `padding` fills the last nibble of rows with odd groups."""
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=padding)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


# ---- groups of four ------------------------------------------------------------------------------


def _best_two(keys: Tensor) -> Tensor:
    """mask24 without checks: who wins at least two of the three comparisons inside its group."""
    k0, k1, k2, k3 = keys.view(keys.shape[0], -1, 4).unbind(2)
    c01, c02, c03 = k0 > k1, k0 > k2, k0 > k3
    c12, c13, c23 = k1 > k2, k1 > k3, k2 > k3
    flags = (
        _majority(c01, c02, c03),
        _majority(~c01, c12, c13),
        _majority(~c02, ~c12, c23),
        _majority(~c03, ~c13, ~c23),
    )
    return torch.stack(flags, dim=2).view(keys.shape)


def _majority(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x & y) | (z & (x | y))


def _encode(bits: Tensor, dtype: torch.dtype, values: Tensor, metadata: Tensor) -> bool:
    """Write values and metadata of bit patterns [rows, in]; False if a group has a third one."""
    zero = bits & _magnitude_mask(dtype) == 0
    bits = bits.masked_fill(zero, 0)  # -0.0 becomes +0.0
    # Four bool bytes 0 | 1 make an int32; the product moves byte c to bit 24 + c.
    flags = (~zero).view(torch.int32)
    code = ((flags * (1 << 24 | 1 << 17 | 1 << 10 | 1 << 3)) >> 24) & 0xF
    nibbles = torch.tensor(SLOT_TABLE, dtype=torch.uint8, device=bits.device)[code]
    if (nibbles == 0).any():
        return False
    pairs = bits.view(*nibbles.shape, 4).gather(2, _indices(nibbles))
    values.copy_(pairs.flatten(1).view(dtype))
    metadata.copy_(pack_nibbles(nibbles, PADDING_NIBBLE))
    return True


def _indices(nibbles: Tensor) -> Tensor:
    """Nibbles [out, groups] -> the two column indices int64 [out, groups, 2]."""
    return torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()


def _integer(dtype: torch.dtype) -> torch.dtype:
    return {1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]


def _infinity(dtype: torch.dtype) -> int:
    bits = dtypes.PLAIN[dtype].infinity_bits
    return 0 if bits is None else bits


def _magnitude_mask(dtype: torch.dtype) -> int:
    return (1 << (8 * dtype.itemsize - 1)) - 1


def _magnitudes_ok(op: str, w: Tensor, rows: slice, mask: Tensor | None) -> Tensor:
    """The bit patterns of a block of rows, all finite."""
    bits = w[rows].view(_integer(w.dtype))
    if (bits & _magnitude_mask(w.dtype) >= _infinity(w.dtype)).any():
        raise_unfit(op, w, mask)
    return bits


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    if matrix.numel() == 0:
        return
    limit = BLOCK_ELEMENTS_CPU if matrix.device.type == "cpu" else BLOCK_ELEMENTS_GPU
    rows = max(1, limit // matrix[0].numel())
    for start in range(0, matrix.shape[0], rows):
        yield slice(start, start + rows)


def _empty(w: Tensor) -> tuple[Tensor, Tensor]:
    out_features, in_features = w.shape
    values = w.new_empty(out_features, in_features // 2)
    return values, w.new_empty(out_features, (in_features + 7) // 8, dtype=torch.uint8)


# ---- checks and errors ---------------------------------------------------------------------------


def _check_matrix(tensor: Tensor, op: str, name: str) -> None:
    kind = type(tensor).__name__
    remedy = "Call torch.as_tensor."
    check(isinstance(tensor, Tensor), op, f"{name} as a Tensor", kind, remedy, TypeError)
    remedy = "Call its dequantize(), to_dense() or full_tensor() first."
    plain = not is_traceable_wrapper_subclass(tensor)
    check(plain, op, f"{name} as a tensor with its own memory", kind, remedy, TypeError)
    check_strided(op, name, tensor)
    check_data(op, name, tensor)
    check(tensor.ndim == 2, op, f"{name} of shape [out, in]", f"shape {list(tensor.shape)}")
    check(
        tensor.shape[1] % 4 == 0,
        op,
        f"{name}.shape[1] % 4 == 0",
        tensor.shape[1],
        "Pad in_features with zero columns to a multiple of 4, or leave this layer dense.",
    )


def checked_weight(w: Tensor, op: str) -> Tensor:
    """w, detached and contiguous, when it is a matrix of a plain dtype; else an error."""
    _check_matrix(w, op, "w")
    check(
        w.dtype in dtypes.PLAIN,
        op,
        f"w of dtype {dtypes.names(' | ')}",
        w.dtype,
        "Convert it first, for example with w.to(torch.bfloat16).",
        TypeError,
    )
    return w.detach().as_subclass(Tensor).contiguous()


def checked_mask(mask: Tensor | None, w: Tensor, op: str) -> Tensor | None:
    """The mask, contiguous, when it is a bool companion of w, or None."""
    if mask is None:
        return None
    _check_companion(mask, w, op, "mask")
    check(mask.dtype == torch.bool, op, "a bool mask", mask.dtype, exc=TypeError)
    return mask.contiguous()


def checked_scores(scores: Tensor, op: str, w: Tensor | None = None) -> Tensor:
    """The scores, detached and contiguous, when they are a floating-point matrix, like w."""
    if w is None:
        _check_matrix(scores, op, "scores")
    else:
        _check_companion(scores, w, op, "scores")
    floating = scores.is_floating_point()
    check(floating, op, "floating-point scores", scores.dtype, exc=TypeError)
    scores = scores.detach()
    # float8 has no comparisons; float32 holds its numbers.
    return (scores.float() if scores.element_size() == 1 else scores).contiguous()


def _check_companion(tensor: Tensor, w: Tensor, op: str, name: str) -> None:
    got = type(tensor).__name__
    check(isinstance(tensor, Tensor), op, f"{name} as a Tensor", got, exc=TypeError)
    check_strided(op, name, tensor)
    check(
        tensor.shape == w.shape,
        op,
        f"{name}.shape == w.shape ({list(w.shape)})",
        list(tensor.shape),
    )
    check(
        tensor.device == w.device,
        op,
        f"{name} on the device of w ({w.device})",
        tensor.device,
        f"Move it with {name}.to(w.device).",
    )


def _first(flags: Tensor) -> tuple[int, int]:
    row, column = flags.nonzero()[0].tolist()
    return row, column


def raise_nan_scores(op: str, scores: Tensor) -> NoReturn:
    """Name the first score that is NaN."""
    nan = torch.isnan(scores)
    row, column = _first(nan)
    where = f"NaN at row {row}, column {column} ({int(nan.sum())} of {nan.numel()} scores)"
    raise ValueError(message(op, "scores without NaN", where))


def raise_unfit(
    op: str,
    w: Tensor,
    mask: Tensor | None,
    scores: Tensor | None = None,
    pruned: bool = False,
) -> NoReturn:
    """Name the first element or group that makes w impossible to store."""
    infinite = ~torch.isfinite(w)
    if infinite.any():
        row, column = _first(infinite)
        where = f"{w[row, column].item()} at row {row}, column {column}"
        count = f"{int(infinite.sum())} of {w.numel()} elements are NaN or Inf"
        raise ValueError(message(op, "finite weights", f"{where} ({count})"))
    if pruned and scores is not None:
        raise_nan_scores(op, scores)
    kept = w if mask is None else w.masked_fill(~mask, 0)
    counts = (kept != 0).view(w.shape[0], -1, 4).sum(2)
    row, group = _first(counts > 2)
    where = f"{int(counts[row, group])} at row {row}, columns {4 * group}..{4 * group + 3}"
    got = f"{where} ({int((counts > 2).sum())} of {counts.numel()} groups have more than 2)"
    remedy = "Prune first, with sparsekern.prune_compress, or pass mask= with 2 kept per group."
    raise ValueError(message(op, "at most 2 non-zeros in each group of 4 columns", got, remedy))
