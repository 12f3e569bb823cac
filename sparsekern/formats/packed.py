"""int4 levels as compressed-tensors packs them, and its marlin-24 tensors: reading, and writing the
first.

    words       8 levels of a row in an int32, level + 8, the lowest column in the lowest nibble;
                the last word of a row is filled with 0. compressed-tensors' pack-quantized holds
                all columns that way, ours the kept ones
    marlin-24   weight_packed int32 [in/32, out * bits/2], scale_packed float16 [groups, out], meta
                int16 [in/32, 2 * out]: kept levels, scales and index nibbles in the order in which
                the Sparse-Marlin kernel reads them

Source: compressed-tensors 0.14.0, PackedQuantizationCompressor and Marlin24Compressor; the order of
meta is CUTLASS' reorder_meta in ColumnMajorInterleaved<2>.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.errors import FormatError, check
from sparsekern.formats import codec

_MARLIN_TILE = 16  # rows of a tile of kept columns, and columns of out_features
_MARLIN_GROUP = 128


def pack_words(levels: Tensor, bits: int = 4) -> Tensor:
    """Levels [rows, n], of -2^(bits-1) .. 2^(bits-1) - 1, -> int32 [rows, ceil(n * bits / 32)]."""
    each = 32 // bits
    codes = levels.to(torch.int64) + (1 << bits - 1)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    shifts = bits * torch.arange(each, device=levels.device)
    words = (codes.view(levels.shape[0], -1, each) << shifts).sum(dim=2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_words(words: Tensor, count: int, bits: int = 4) -> Tensor:
    """The inverse: float32 levels [rows, count]."""
    shifts = bits * torch.arange(32 // bits, device=words.device, dtype=torch.int32)
    codes = (words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return (codes.flatten(1)[:, :count] - (1 << bits - 1)).float()


def from_dense_levels(op: str, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(kept levels [out, in/2], metadata) of dense levels float32 [out, in].

    Raises:
        FormatError: more than two of four are not 0.
    """
    counts = (levels != 0).view(levels.shape[0], -1, 4).sum(2)
    if bool((counts > 2).any()):
        row, group = (counts > 2).nonzero()[0].tolist()
        got = f"{int(counts[row, group])} at row {row}, columns {4 * group}..{4 * group + 3}"
        remedy = "These weights are not 2:4: prune the model before it is quantised."
        check(False, op, "at most 2 non-zeros in each group of 4", got, remedy, FormatError)
    return codec.compress_dense(levels)


def marlin24(packed: Tensor, scales: Tensor, meta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a marlin-24 layer as row-major ones.

    Args:
        packed, scales, meta: weight_packed, scale_packed and meta, of shapes that fit together.
    Returns:
        (levels float32 [out, in/2], metadata uint8 [out, ceil(in/8)], scale float32 [out, groups]).
    """
    out_features, kept = meta.shape[1] // 2, 16 * meta.shape[0]
    bits = 32 * packed.numel() // (out_features * kept)
    tiles = torch.empty(kept * out_features, dtype=torch.float32, device=packed.device)
    tiles = tiles.view(-1, 1024)
    order = _marlin_order(bits).to(packed.device)
    tiles[:, order] = unpack_words(packed, packed.shape[1] * 32 // bits, bits).reshape(-1, 1024)
    tile = _MARLIN_TILE
    rows = tiles.view(kept // tile, out_features // tile, tile, tile).transpose(1, 2)
    levels = rows.reshape(kept, out_features).t().contiguous()

    numbers = scales.float()
    if scales.shape[0] > 1 and kept > _MARLIN_GROUP:
        # Of 8 columns 0, 4, 1, 5, ... are stored.
        numbers = numbers.reshape(-1, 4, 2).transpose(1, 2).reshape(scales.shape)
    words = meta.reshape(-1)[_meta_order(out_features, kept // 8, meta.device)].int() & 0xFFFF
    shifts = 4 * torch.arange(4, device=meta.device, dtype=torch.int32)
    nibbles = ((words.view(out_features, -1, 1) >> shifts) & 0xF).flatten(1).to(torch.uint8)
    return levels, codec.pack_nibbles(nibbles, codec.PADDING_NIBBLE), numbers.t().contiguous()


def _marlin_order(bits: int) -> Tensor:
    """Place in a 16 x 64 tile, row by row of 16 x 16 parts, of the codes in the order of words.

    Thread i of a warp reads, for each of 4 offsets j, 8 codes: of columns 4b + j + 8c' of the part
    c // 2 (b = 0, 1; c = i // 4, c' = c % 2), rows 2t, 2t + 1, 2t + 8, 2t + 9 with t = i % 4.
    """
    thread, offset, block, row = torch.meshgrid(*map(torch.arange, (32, 4, 2, 4)), indexing="ij")
    column, t = thread // 4, thread % 4
    rows = 2 * t + row % 2 + 8 * (row // 2)
    place = 256 * (column // 2) + 16 * rows + 8 * (column % 2) + 4 * block + offset
    inside = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}[bits]
    return place.reshape(-1, len(inside))[:, list(inside)].reshape(-1)


def _meta_order(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows, columns]: where in the flat meta tensor the word of a row and 16 dense columns is."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)[None, :]
    # Rows of 64: bit 0 goes to bit 1, bit 2 to bit 0, bit 1 to bit 5, bits 3..5 to bits 2..4.
    moved = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    # The two off the diagonal of each 2 x 2 block change places.
    swap = (moved % 2) != (column % 2)
    step = torch.where(moved % 2 == 0, 1, -1)
    moved, column = torch.where(swap, moved + step, moved), torch.where(swap, column - step, column)
    return column // 2 * (2 * rows) + 2 * moved + column % 2
