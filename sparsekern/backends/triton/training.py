"""Triton kernels of sparse training: transposable masks, kept elements of a dense gradient, and
stored values in another order.

    tile_kernel     16 scores of a 4 x 4 tile -> the best of the 90 patterns, or the greedy choice
    kept_kernel     dense [out, in] and metadata -> the elements that the metadata keeps
    gather_kernel   out[j] = values[index[j]], 0 where the index is -1, in out's dtype

Launchers expect contiguous tensors whose dtypes and shapes have been checked.

Specification: finetune/transposable.py and finetune/training.py, which have the same in torch.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl


@triton.jit
def _best(s, j, patterns_ptr, PATTERNS: tl.constexpr):
    """The pattern of largest sum for each tile, the first of equal ones. s: float64 [16, tiles]."""
    best = tl.sum(s, axis=0) * 0.0 - float("inf")
    chosen = tl.load(patterns_ptr) + tl.sum((s > float("inf")).to(tl.int32), axis=0)  # the first
    for number in range(PATTERNS):
        bits = tl.load(patterns_ptr + number)
        inside = ((bits >> j) & 1) != 0
        total = tl.sum(tl.where(inside[:, None], s, 0.0), axis=0)
        better = total > best
        best = tl.where(better, total, best)
        chosen = tl.where(better, bits, chosen)
    return chosen


@triton.jit
def _greedy(s, j):
    """(Bits of the tile that eight picks keep, the highest score first, the later of equal ones;
    their count: fewer than eight where rows and columns allow no more). s: float64 [16, tiles]."""
    row, column = j // 4, j % 4
    kept = (s > float("inf")).to(tl.int32)  # none
    free = kept + 1
    for _ in range(8):
        highest = tl.max(tl.where(free != 0, s, -float("inf")), axis=0)
        among = (free != 0) & (s == highest[None, :])
        place = tl.max(tl.where(among, j[:, None], -1), axis=0)
        now = (j[:, None] == place[None, :]).to(tl.int32)
        kept = kept + now
        # A row or a column with two is closed.
        for other in tl.static_range(4):
            in_row = tl.sum(tl.where((row == other)[:, None], kept, 0), axis=0)
            free = tl.where((row == other)[:, None] & (in_row >= 2)[None, :], 0, free)
            in_column = tl.sum(tl.where((column == other)[:, None], kept, 0), axis=0)
            free = tl.where((column == other)[:, None] & (in_column >= 2)[None, :], 0, free)
        free = tl.where(now != 0, 0, free)
    return tl.sum(kept << j[:, None], axis=0), tl.sum(kept, axis=0)


@triton.jit
def tile_kernel(
    scores_ptr,
    patterns_ptr,  # int32 [PATTERNS], bit i = element i of the tile, rows one after another
    mask_ptr,  # uint8 0 | 1, shape of the scores
    tiles,
    tiles_per_row,
    columns,
    GREEDY: tl.constexpr,
    PATTERNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tile < tiles
    j = tl.arange(0, 16)
    first = (tile // tiles_per_row) * 4 * columns + (tile % tiles_per_row) * 4
    # A tile along the first axis: a thread has whole tiles, and sums cost no shuffles.
    places = first[None, :] + ((j // 4) * columns + j % 4)[:, None]
    s = tl.load(scores_ptr + places, mask=inside[None, :], other=0.0).to(tl.float64)
    # Sums of eight stay finite, so that infinite scores have an order, too.
    s = tl.minimum(tl.maximum(s, -1e300), 1e300)
    if GREEDY:
        chosen, count = _greedy(s, j)
        if tl.min(count, axis=0) < 8:
            chosen = tl.where(count < 8, _best(s, j, patterns_ptr, PATTERNS), chosen)
    else:
        chosen = _best(s, j, patterns_ptr, PATTERNS)
    bits = ((chosen[None, :] >> j[:, None]) & 1).to(tl.uint8)
    tl.store(mask_ptr + places, bits, mask=inside[None, :])


@triton.jit
def kept_kernel(
    dense_ptr, metadata_ptr, values_ptr, total, in_features, metadata_bytes, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    kept = in_features // 2
    row, k = place // kept, place % kept
    byte = tl.load(metadata_ptr + row * metadata_bytes + k // 4, mask=inside, other=0).to(tl.int32)
    shift = (4 * ((k // 2) % 2) + 2 * (k % 2)).to(tl.int32)
    column = 4 * (k // 2) + ((byte >> shift) & 3)
    value = tl.load(dense_ptr + row * in_features + column, mask=inside)
    tl.store(values_ptr + place, value.to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gather_kernel(values_ptr, index_ptr, out_ptr, total, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    index = tl.load(index_ptr + place, mask=inside, other=-1)
    value = tl.load(values_ptr + index, mask=inside & (index >= 0), other=0.0)
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------


def tile_mask(scores: torch.Tensor, patterns: torch.Tensor, greedy: bool) -> torch.Tensor:
    """bool like scores [out, in], both sizes multiples of 4, True = kept.

    Args:
        scores: floating point, contiguous.      patterns: int32 [count], see tile_kernel.
    """
    mask = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    tiles, block = scores.numel() // 16, 128
    if tiles:
        with _on(scores):
            tile_kernel[(triton.cdiv(tiles, block),)](
                scores,
                patterns,
                mask,
                tiles,
                scores.shape[1] // 4,
                scores.shape[1],
                GREEDY=greedy,
                PATTERNS=patterns.numel(),
                BLOCK=block,
            )
    return mask.view(torch.bool)


def kept(dense: torch.Tensor, metadata: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dense [out, in] at the places of row-major metadata, [out, in / 2] of a dtype."""
    out_features, in_features = dense.shape
    values = torch.empty(out_features, in_features // 2, dtype=dtype, device=dense.device)
    if values.numel():
        with _on(dense):
            kept_kernel[(triton.cdiv(values.numel(), 1024),)](
                dense, metadata, values, values.numel(), in_features, metadata.shape[1], BLOCK=1024
            )
    return values


def gather(values: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """out = values[index], flat, in out's dtype; 0 where the index is -1. index: int32 like out."""
    if out.numel():
        with _on(values):
            gather_kernel[(triton.cdiv(out.numel(), 1024),)](
                values, index, out, out.numel(), BLOCK=1024
            )


def _on(tensor: torch.Tensor):
    cuda = tensor.device.type == "cuda"
    return torch.cuda.device(tensor.device) if cuda else contextlib.nullcontext()
