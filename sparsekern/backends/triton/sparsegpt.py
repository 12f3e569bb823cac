"""Triton kernel: SparseGPT's column sweep over one block of columns, 2:4, for a tile of rows.

Rows do not see each other: given the block of the factor, a program keeps [BLOCK_ROWS, BLOCK_COLS]
weights in registers and walks the columns four at a time. Per group: take its four columns out of
the tile, choose the mask by w² · weight, sweep them one after the other, store them, and subtract
their errors from the columns to the right. One launch replaces some fifty torch operations per
group. Specification and oracle: prune/sparsegpt.py, _sweep_block_torch.

    tensor    shape (all float32 but keep)   access
    block     [columns, out_features]        read as a tile at the start, written column by column
    v         [columns, columns], strided    four rows per group, factor rows over their diagonal
    weight    [columns]                      1/d² up to a common factor
    removed   [columns, out_features]        written: w − q
    keep      [columns, out_features] uint8  written: 1 = kept
"""

from __future__ import annotations

import contextlib
import os

import torch
import triton
import triton.language as tl

from sparsekern.backends.triton import reason

_BLOCK_ROWS = 16
_MAX_COLUMNS = 256  # the tile is 16 x 256 floats over 128 threads: 32 registers each


@triton.jit
def _column(tile, cols, index):
    """Column `index` of the tile: an exact sum, because all other terms are zero."""
    return tl.sum(tl.where(cols[None, :] == index, tile, 0.0), axis=1)


@triton.jit
def _keep_two(s0, s1, s2, s3):
    """Whether each of four scores is among the best two; a tie goes to the higher column."""
    # b_ij = column i goes before column j > i.
    b01 = (s0 > s1).to(tl.int32)
    b02 = (s0 > s2).to(tl.int32)
    b03 = (s0 > s3).to(tl.int32)
    b12 = (s1 > s2).to(tl.int32)
    b13 = (s1 > s3).to(tl.int32)
    b23 = (s2 > s3).to(tl.int32)
    keep0 = b01 + b02 + b03 >= 2
    keep1 = (1 - b01) + b12 + b13 >= 2
    keep2 = (1 - b02) + (1 - b12) + b23 >= 2
    keep3 = (1 - b03) + (1 - b13) + (1 - b23) >= 2
    return keep0, keep1, keep2, keep3


@triton.jit
def _store(block_ptr, removed_ptr, keep_ptr, offset, inside, w, keep):
    tl.store(block_ptr + offset, tl.where(keep, w, 0.0), mask=inside)
    tl.store(removed_ptr + offset, tl.where(keep, 0.0, w), mask=inside)
    tl.store(keep_ptr + offset, keep.to(tl.uint8), mask=inside)


@triton.jit
def _sweep_kernel(
    block_ptr,
    v_ptr,
    weight_ptr,
    removed_ptr,
    keep_ptr,
    out_features,
    v_stride,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    inside = rows < out_features
    tile = tl.load(
        block_ptr + cols[None, :] * out_features + rows[:, None],
        mask=inside[:, None] & (cols < COLUMNS)[None, :],
        other=0.0,
    )
    # The stores below go to the memory just read, by other threads of this program.
    tl.debug_barrier()
    for g in range(0, COLUMNS, 4):
        w0 = _column(tile, cols, g)
        w1 = _column(tile, cols, g + 1)
        w2 = _column(tile, cols, g + 2)
        w3 = _column(tile, cols, g + 3)

        keep0, keep1, keep2, keep3 = _keep_two(
            w0 * w0 * tl.load(weight_ptr + g),
            w1 * w1 * tl.load(weight_ptr + g + 1),
            w2 * w2 * tl.load(weight_ptr + g + 2),
            w3 * w3 * tl.load(weight_ptr + g + 3),
        )

        # Sweep the group; r = w - q is what a pruned weight leaves to its right.
        v0_ptr = v_ptr + g * v_stride
        v1_ptr = v0_ptr + v_stride
        v2_ptr = v1_ptr + v_stride
        v3_ptr = v2_ptr + v_stride
        r0 = tl.where(keep0, 0.0, w0)
        w1 -= r0 * tl.load(v0_ptr + g + 1)
        r1 = tl.where(keep1, 0.0, w1)
        w2 -= r0 * tl.load(v0_ptr + g + 2) + r1 * tl.load(v1_ptr + g + 2)
        r2 = tl.where(keep2, 0.0, w2)
        w3 -= (
            r0 * tl.load(v0_ptr + g + 3)
            + r1 * tl.load(v1_ptr + g + 3)
            + r2 * tl.load(v2_ptr + g + 3)
        )
        r3 = tl.where(keep3, 0.0, w3)

        offset = g * out_features + rows
        _store(block_ptr, removed_ptr, keep_ptr, offset, inside, w0, keep0)
        _store(block_ptr, removed_ptr, keep_ptr, offset + out_features, inside, w1, keep1)
        _store(block_ptr, removed_ptr, keep_ptr, offset + 2 * out_features, inside, w2, keep2)
        _store(block_ptr, removed_ptr, keep_ptr, offset + 3 * out_features, inside, w3, keep3)

        right = (cols >= g + 4) & (cols < COLUMNS)
        tile -= (
            r0[:, None] * tl.load(v0_ptr + cols, mask=right, other=0.0)[None, :]
            + r1[:, None] * tl.load(v1_ptr + cols, mask=right, other=0.0)[None, :]
            + r2[:, None] * tl.load(v2_ptr + cols, mask=right, other=0.0)[None, :]
            + r3[:, None] * tl.load(v3_ptr + cols, mask=right, other=0.0)[None, :]
        )


def interpreted() -> bool:
    """True where Triton runs its kernels as Python on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refusal(w: torch.Tensor, blocksize: int) -> str | None:
    """Why the kernel cannot sweep w [out_features, in_features] in such blocks, or None."""
    if not interpreted():
        if not w.is_cuda:
            return f"w is on {w.device} and Triton needs a GPU"
        if reason():
            return reason()
    if blocksize > _MAX_COLUMNS:
        return f"blocksize {blocksize} is above {_MAX_COLUMNS}"
    if w.shape[0] == 0:
        return "w has no rows"
    return None


def sweep_block(
    block: torch.Tensor,
    keep: torch.Tensor,
    removed: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    offset: int,
) -> None:
    """Sweep one block of columns in place, choosing its 2:4 mask.

    Args:
        block: float32 [columns, out_features], the weights of the block, transposed, contiguous;
            becomes the pruned and compensated weights. columns % 4 == 0.
        keep: bool [columns, out_features], contiguous; written, True = kept.
        removed: float32 [columns, out_features], contiguous; written, w − q.
        v: float32 [columns, columns], unit stride along the last dimension: the block of the
            factor, each row over its diagonal.
        weight: float32 [columns], contiguous: the score of w is w² · weight.
        offset: first column of the block in the weight; not needed here.
    """
    columns, out_features = block.shape
    grid = (triton.cdiv(out_features, _BLOCK_ROWS),)
    with torch.cuda.device(block.device) if block.is_cuda else contextlib.nullcontext():
        _sweep_kernel[grid](
            block,
            v,
            weight,
            removed,
            keep.view(torch.uint8),
            out_features,
            v.stride(0),
            COLUMNS=columns,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLS=triton.next_power_of_2(columns),
            num_warps=4,
        )
