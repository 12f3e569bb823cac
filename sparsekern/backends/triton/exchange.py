"""Triton kernel: what each of the 16 exchanges of one column between two groups of four would lose.

One program has one pair of groups and reads its eight columns once; what stays is 17 sums. The
torch operations that it replaces (oneshot/permutation.py, _costs: its oracle) read and write them
some thirty times.

    tensor    shape                            access
    columns   float32 [columns, rows]          eight of them read by each program
    eight     int64 [pairs, 8]                 the columns of the first group, then of the second
    sums      float32 [pairs, 17]              written: as they are, then i, j: 4·i + j
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.errors import check

OP = "sparsekern.backends.triton.exchange.costs"
_BLOCK = 512  # rows at a time: 17 sums and eight columns of them over 128 threads


@triton.jit
def _least(x, y, z):
    """The two smallest of three, in order."""
    low, high = tl.minimum(x, y), tl.maximum(x, y)
    return tl.minimum(low, z), tl.minimum(tl.maximum(low, z), high)


@triton.jit
def _column(columns_ptr, eight_ptr, number, rows, at, inside):
    first = tl.load(eight_ptr + number) * rows
    return tl.load(columns_ptr + first + at, mask=inside, other=0.0)


@triton.jit
def _costs_kernel(columns_ptr, eight_ptr, sums_ptr, rows, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    eight_ptr += pair * 8
    sums_ptr += pair * 17
    none = tl.zeros([BLOCK], tl.float32)
    now = none
    s00, s01, s02, s03 = none, none, none, none
    s10, s11, s12, s13 = none, none, none, none
    s20, s21, s22, s23 = none, none, none, none
    s30, s31, s32, s33 = none, none, none, none
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < rows
        x0 = _column(columns_ptr, eight_ptr, 0, rows, at, inside)
        x1 = _column(columns_ptr, eight_ptr, 1, rows, at, inside)
        x2 = _column(columns_ptr, eight_ptr, 2, rows, at, inside)
        x3 = _column(columns_ptr, eight_ptr, 3, rows, at, inside)
        y0 = _column(columns_ptr, eight_ptr, 4, rows, at, inside)
        y1 = _column(columns_ptr, eight_ptr, 5, rows, at, inside)
        y2 = _column(columns_ptr, eight_ptr, 6, rows, at, inside)
        y3 = _column(columns_ptr, eight_ptr, 7, rows, at, inside)
        # Without column i a group loses a_i + min(b_i, what comes in its place).
        a0, b0 = _least(x1, x2, x3)
        a1, b1 = _least(x0, x2, x3)
        a2, b2 = _least(x0, x1, x3)
        a3, b3 = _least(x0, x1, x2)
        c0, d0 = _least(y1, y2, y3)
        c1, d1 = _least(y0, y2, y3)
        c2, d2 = _least(y0, y1, y3)
        c3, d3 = _least(y0, y1, y2)
        now += a0 + tl.minimum(b0, x0) + c0 + tl.minimum(d0, y0)
        s00 += a0 + tl.minimum(b0, y0) + c0 + tl.minimum(d0, x0)
        s01 += a0 + tl.minimum(b0, y1) + c1 + tl.minimum(d1, x0)
        s02 += a0 + tl.minimum(b0, y2) + c2 + tl.minimum(d2, x0)
        s03 += a0 + tl.minimum(b0, y3) + c3 + tl.minimum(d3, x0)
        s10 += a1 + tl.minimum(b1, y0) + c0 + tl.minimum(d0, x1)
        s11 += a1 + tl.minimum(b1, y1) + c1 + tl.minimum(d1, x1)
        s12 += a1 + tl.minimum(b1, y2) + c2 + tl.minimum(d2, x1)
        s13 += a1 + tl.minimum(b1, y3) + c3 + tl.minimum(d3, x1)
        s20 += a2 + tl.minimum(b2, y0) + c0 + tl.minimum(d0, x2)
        s21 += a2 + tl.minimum(b2, y1) + c1 + tl.minimum(d1, x2)
        s22 += a2 + tl.minimum(b2, y2) + c2 + tl.minimum(d2, x2)
        s23 += a2 + tl.minimum(b2, y3) + c3 + tl.minimum(d3, x2)
        s30 += a3 + tl.minimum(b3, y0) + c0 + tl.minimum(d0, x3)
        s31 += a3 + tl.minimum(b3, y1) + c1 + tl.minimum(d1, x3)
        s32 += a3 + tl.minimum(b3, y2) + c2 + tl.minimum(d2, x3)
        s33 += a3 + tl.minimum(b3, y3) + c3 + tl.minimum(d3, x3)
    tl.store(sums_ptr, tl.sum(now))
    tl.store(sums_ptr + 1, tl.sum(s00))
    tl.store(sums_ptr + 2, tl.sum(s01))
    tl.store(sums_ptr + 3, tl.sum(s02))
    tl.store(sums_ptr + 4, tl.sum(s03))
    tl.store(sums_ptr + 5, tl.sum(s10))
    tl.store(sums_ptr + 6, tl.sum(s11))
    tl.store(sums_ptr + 7, tl.sum(s12))
    tl.store(sums_ptr + 8, tl.sum(s13))
    tl.store(sums_ptr + 9, tl.sum(s20))
    tl.store(sums_ptr + 10, tl.sum(s21))
    tl.store(sums_ptr + 11, tl.sum(s22))
    tl.store(sums_ptr + 12, tl.sum(s23))
    tl.store(sums_ptr + 13, tl.sum(s30))
    tl.store(sums_ptr + 14, tl.sum(s31))
    tl.store(sums_ptr + 15, tl.sum(s32))
    tl.store(sums_ptr + 16, tl.sum(s33))


def costs(columns: Tensor, eight: Tensor) -> tuple[Tensor, Tensor]:
    """What pairs of groups lose: as they are [pairs], and after each exchange [pairs, 4, 4].

    Args:
        columns: float32 [columns, rows], contiguous: the importance of each weight.
        eight: int64 [pairs, 8], contiguous: which columns the two groups of a pair have.
    """
    for name, tensor in (("columns", columns), ("eight", eight)):
        strides = tensor.stride()
        check(tensor.is_contiguous(), OP, f"contiguous {name}", f"strides {strides}", "Copy it.")
    sums = torch.empty(len(eight), 17, device=columns.device, dtype=torch.float32)
    here = torch.cuda.device(columns.device) if columns.is_cuda else contextlib.nullcontext()
    with here:
        _costs_kernel[(len(eight),)](
            columns, eight, sums, columns.shape[1], BLOCK=_BLOCK, num_warps=4
        )
    return sums[:, 0], sums[:, 1:].view(-1, 4, 4)
