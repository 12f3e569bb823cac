"""Triton kernels of prune/quantize.py: the sweep, a pass of coordinate descent and the choice of
scales over one block of columns, for a tile of rows.

As in sparsegpt.py rows do not see each other: a program keeps [BLOCK_ROWS, BLOCK_COLS] numbers in
registers, walks the columns, and subtracts what each leaves from the columns to its right. One
launch replaces some ten torch operations a column. Specification and oracle: prune/quantize.py,
_sweep_block_torch and _descend_block_torch, and formats/scaled.py, least_squares.

    tensor      shape (all float32 but keep)   access
    block       [columns, out_features]        weights, transposed; becomes the quantised numbers
    keep        [columns, out_features] uint8  1 = kept; written by the joint sweep
    scale       [out_features]                 of the block
    v           [columns, columns], strided    rows of the factor over their diagonal
    ranks       [columns]                      1/d² up to a common factor
    removed     [columns, out_features]        written: w − q
    slope       [columns, out_features]        G of the block, with all earlier moves in it
    a           [columns, columns], strided    the damped Hessian's block
    moved       [columns, out_features]        written: new q − old q

The nearest level, ties to even, is (x + m) − m with m = 1.5 · 2²³ · step: the sum's last bit is
worth one step. The step is 1 for integers and 2^(e − 3) for an e4m3 number of exponent e >= −6.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from sparsekern.backends.triton.sparsegpt import _column, _keep_two, refusal
from sparsekern.formats.scaled import SHRINK, SHRINKS, ScaledCodec

__all__ = ["descend_block", "fit", "refusal", "sweep_block"]

_BLOCK_ROWS = 16
_BLOCK_COLS = 128  # most columns of a block; one size, so that few kernels are compiled


@triton.jit
def _level(x, top, low, FLOAT: tl.constexpr):
    """The nearest level of x, saturating; NaN stays NaN."""
    x = tl.where(x > top, top, x)
    x = tl.where(x < low, low, x)
    if FLOAT:
        exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
        power = (tl.maximum(exponent, 121) + 20) << 23  # 2^(e − 3 + 23)
        m = power.to(tl.float32, bitcast=True) * 1.5
    else:
        m = 12582912.0
    return (x + m) - m


@triton.jit
def _settle(
    block_ptr, removed_ptr, offset, inside, w, keep, scale, inverse, top, low, FLOAT: tl.constexpr
):
    """Quantise a column, store it, and return what it leaves to its right."""
    q = tl.where(keep, _level(w * inverse, top, low, FLOAT) * scale, 0.0)
    tl.store(block_ptr + offset, q, mask=inside)
    tl.store(removed_ptr + offset, w - q, mask=inside)
    return w - q


@triton.jit
def _sweep_kernel(
    block_ptr,
    keep_ptr,
    scale_ptr,
    v_ptr,
    ranks_ptr,
    removed_ptr,
    columns,
    out_features,
    v_stride,
    top,
    low,
    CHOOSE: tl.constexpr,
    FLOAT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    inside = rows < out_features
    scale = tl.load(scale_ptr + rows, mask=inside, other=1.0)
    inverse = tl.div_rn(1.0, scale)
    tile = tl.load(
        block_ptr + cols[None, :] * out_features + rows[:, None],
        mask=inside[:, None] & (cols < columns)[None, :],
        other=0.0,
    )
    # The stores below go to the memory just read, by other threads of this program.
    tl.debug_barrier()
    for g in range(0, columns, 4):
        w0 = _column(tile, cols, g)
        w1 = _column(tile, cols, g + 1)
        w2 = _column(tile, cols, g + 2)
        w3 = _column(tile, cols, g + 3)
        o0 = g * out_features + rows
        o1 = o0 + out_features
        o2 = o1 + out_features
        o3 = o2 + out_features
        if CHOOSE:
            keep0, keep1, keep2, keep3 = _keep_two(
                w0 * w0 * tl.load(ranks_ptr + g),
                w1 * w1 * tl.load(ranks_ptr + g + 1),
                w2 * w2 * tl.load(ranks_ptr + g + 2),
                w3 * w3 * tl.load(ranks_ptr + g + 3),
            )
            tl.store(keep_ptr + o0, keep0.to(tl.uint8), mask=inside)
            tl.store(keep_ptr + o1, keep1.to(tl.uint8), mask=inside)
            tl.store(keep_ptr + o2, keep2.to(tl.uint8), mask=inside)
            tl.store(keep_ptr + o3, keep3.to(tl.uint8), mask=inside)
        else:
            keep0 = tl.load(keep_ptr + o0, mask=inside, other=0) != 0
            keep1 = tl.load(keep_ptr + o1, mask=inside, other=0) != 0
            keep2 = tl.load(keep_ptr + o2, mask=inside, other=0) != 0
            keep3 = tl.load(keep_ptr + o3, mask=inside, other=0) != 0

        v0_ptr = v_ptr + g * v_stride
        v1_ptr = v0_ptr + v_stride
        v2_ptr = v1_ptr + v_stride
        v3_ptr = v2_ptr + v_stride
        r0 = _settle(block_ptr, removed_ptr, o0, inside, w0, keep0, scale, inverse, top, low, FLOAT)
        w1 -= r0 * tl.load(v0_ptr + g + 1)
        r1 = _settle(block_ptr, removed_ptr, o1, inside, w1, keep1, scale, inverse, top, low, FLOAT)
        w2 -= r0 * tl.load(v0_ptr + g + 2) + r1 * tl.load(v1_ptr + g + 2)
        r2 = _settle(block_ptr, removed_ptr, o2, inside, w2, keep2, scale, inverse, top, low, FLOAT)
        w3 -= (
            r0 * tl.load(v0_ptr + g + 3)
            + r1 * tl.load(v1_ptr + g + 3)
            + r2 * tl.load(v2_ptr + g + 3)
        )
        r3 = _settle(block_ptr, removed_ptr, o3, inside, w3, keep3, scale, inverse, top, low, FLOAT)

        right = (cols >= g + 4) & (cols < columns)
        tile -= (
            r0[:, None] * tl.load(v0_ptr + cols, mask=right, other=0.0)[None, :]
            + r1[:, None] * tl.load(v1_ptr + cols, mask=right, other=0.0)[None, :]
            + r2[:, None] * tl.load(v2_ptr + cols, mask=right, other=0.0)[None, :]
            + r3[:, None] * tl.load(v3_ptr + cols, mask=right, other=0.0)[None, :]
        )


@triton.jit
def _descend_kernel(
    old_ptr,
    slope_ptr,
    keep_ptr,
    scale_ptr,
    a_ptr,
    inverse_diagonal_ptr,
    new_ptr,
    moved_ptr,
    columns,
    out_features,
    a_stride,
    top,
    low,
    FLOAT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    inside = rows < out_features
    scale = tl.load(scale_ptr + rows, mask=inside, other=1.0)
    inverse = tl.div_rn(1.0, scale)
    tile = tl.load(
        slope_ptr + cols[None, :] * out_features + rows[:, None],
        mask=inside[:, None] & (cols < columns)[None, :],
        other=0.0,
    )
    for c in range(columns):
        offset = c * out_features + rows
        old = tl.load(old_ptr + offset, mask=inside, other=0.0)
        keep = tl.load(keep_ptr + offset, mask=inside, other=0) != 0
        right = (cols > c) & (cols < columns)
        row = tl.load(a_ptr + c * a_stride + cols, mask=right, other=0.0)
        # A level's best place is q / s − G / (A_ii · s).
        factor = tl.load(inverse_diagonal_ptr + c) * inverse
        place = old * inverse - _column(tile, cols, c) * factor
        new = tl.where(keep, _level(place, top, low, FLOAT) * scale, 0.0)
        move = new - old
        tl.store(new_ptr + offset, new, mask=inside)
        tl.store(moved_ptr + offset, move, mask=inside)
        tile += move[:, None] * row[None, :]


@triton.jit
def _kept_tile(w_ptr, keep_ptr, rows, cols, inside, columns, out_features):
    offset = cols[None, :] * out_features + rows[:, None]
    there = inside[:, None] & (cols < columns)[None, :]
    keep = tl.load(keep_ptr + offset, mask=there, other=0) != 0
    return tl.load(w_ptr + offset, mask=there & keep, other=0.0)


@triton.jit
def _fit_kernel(
    w_ptr,
    keep_ptr,
    importance_ptr,
    scale_ptr,
    columns,
    out_features,
    top,
    low,
    SMALLEST: tl.constexpr,
    SHRINKS: tl.constexpr,
    SHRINK: tl.constexpr,
    FLOAT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.arange(0, BLOCK_COLS)
    inside = rows < out_features
    tile = _kept_tile(w_ptr, keep_ptr, rows, first, inside, columns, out_features)
    worth = tl.load(importance_ptr + first, mask=first < columns, other=0.0)
    most = tl.max(tl.abs(tile), axis=1)
    if not ONE_TILE:
        for start in range(BLOCK_COLS, columns, BLOCK_COLS):
            tile = _kept_tile(w_ptr, keep_ptr, rows, start + first, inside, columns, out_features)
            most = tl.maximum(most, tl.max(tl.abs(tile), axis=1))
    largest = tl.maximum(tl.div_rn(most, top), SMALLEST)
    best = tl.full([BLOCK_ROWS], float("inf"), tl.float32)
    chosen = largest
    for step in range(SHRINKS):
        scale = tl.maximum(largest * (1.0 - SHRINK * step), SMALLEST)
        error = tl.zeros([BLOCK_ROWS], tl.float32)
        if ONE_TILE:
            level = _level(tile / scale[:, None], top, low, FLOAT)
            gap = tile - level * scale[:, None]
            error += tl.sum(gap * gap * worth[None, :], axis=1)
        else:
            for start in range(0, columns, BLOCK_COLS):
                cols = start + first
                part = _kept_tile(w_ptr, keep_ptr, rows, cols, inside, columns, out_features)
                worth = tl.load(importance_ptr + cols, mask=cols < columns, other=0.0)
                level = _level(part / scale[:, None], top, low, FLOAT)
                gap = part - level * scale[:, None]
                error += tl.sum(gap * gap * worth[None, :], axis=1)
        better = error < best
        best = tl.where(better, error, best)
        chosen = tl.where(better, scale, chosen)
    tl.store(scale_ptr + rows, tl.where(most == 0, 1.0, chosen), mask=inside)


def _device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def fit(
    codec: ScaledCodec, wt: torch.Tensor, keep: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    """The "mse" scale of every row, as ScaledCodec.least_squares of the kept numbers.

    Args:
        wt: float32 [columns, out_features], contiguous: weights, transposed.
        keep: bool, same shape, contiguous.      importance: float32 [columns], contiguous.
    Returns:
        float32 [out_features]; 1 where no weight but zero is kept.
    """
    columns, out_features = wt.shape
    scale = torch.empty(out_features, device=wt.device, dtype=torch.float32)
    with _device(wt):
        _fit_kernel[(triton.cdiv(out_features, _BLOCK_ROWS),)](
            wt,
            keep.view(torch.uint8),
            importance,
            scale,
            columns,
            out_features,
            float(codec.top),
            float(codec.low),
            SMALLEST=torch.finfo(torch.float32).tiny,
            SHRINKS=SHRINKS,
            SHRINK=SHRINK,
            FLOAT=codec.storage.is_floating_point,
            ONE_TILE=columns <= _BLOCK_COLS,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLS=_BLOCK_COLS,
            num_warps=4,
        )
    return scale


def sweep_block(
    codec: ScaledCodec,
    scale: torch.Tensor,
    choose: bool,
    block: torch.Tensor,
    keep: torch.Tensor,
    removed: torch.Tensor,
    v: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    """Sweep one block of columns in place, choosing its mask or under the one that it has.

    Args:
        scale: float32 [out_features].      choose: write keep; it is read otherwise.
        block: float32 [columns, out_features], contiguous; columns % 4 == 0.
        keep, removed, v, ranks: as keep, removed, v, weight of sparsegpt.sweep_block.
    """
    columns, out_features = block.shape
    with _device(block):
        _sweep_kernel[(triton.cdiv(out_features, _BLOCK_ROWS),)](
            block,
            keep.view(torch.uint8),
            scale,
            v,
            ranks,
            removed,
            columns,
            out_features,
            v.stride(0),
            float(codec.top),
            float(codec.low),
            CHOOSE=choose,
            FLOAT=codec.storage.is_floating_point,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLS=_BLOCK_COLS,
            num_warps=4,
        )


def descend_block(
    codec: ScaledCodec,
    scale: torch.Tensor,
    block: torch.Tensor,
    keep: torch.Tensor,
    slope: torch.Tensor,
    a: torch.Tensor,
    inverse_diagonal: torch.Tensor,
) -> torch.Tensor:
    """One pass over a block of quantised numbers, in place; returns what was added to them.

    Args:
        scale: float32 [out_features].
        block, slope: float32 [columns, out_features], contiguous.      keep: bool, likewise.
        a: float32 [columns, columns], unit stride along the last dimension.
        inverse_diagonal: float32 [columns], contiguous: 1 / A_ii.
    """
    columns, out_features = block.shape
    moved = torch.empty_like(block)
    with _device(block):
        _descend_kernel[(triton.cdiv(out_features, _BLOCK_ROWS),)](
            block.clone(),  # read by threads that another one, which stores, may overtake
            slope,
            keep.view(torch.uint8),
            scale,
            a,
            inverse_diagonal,
            block,
            moved,
            columns,
            out_features,
            a.stride(0),
            float(codec.top),
            float(codec.low),
            FLOAT=codec.storage.is_floating_point,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLS=_BLOCK_COLS,
            num_warps=4,
        )
    return moved
