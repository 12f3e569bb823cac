"""Which Triton kernel computes a linear layer, and with which tile: pure functions of shapes and
dtype. The order of summation follows from the config, so results are the same from run to run and
from GPU to GPU.

    FewTokens      few_tokens.py    up to 4 tokens: picks x by the metadata, no tensor cores
    LinearConfig   linear.py        any problem: expands tiles of W in registers, tl.dot
    Expanded       expanded.py      many tokens: expands W once, some rows at a time, torch.mm

Of these only LinearConfig was measured (bench/records); the estimates are in csrc/notes/triton.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsekern.formats import dtypes

# Two programs for each of an H100's 132 multiprocessors. A constant, not the device's own count, so
# that the order of summation does not change with the GPU.
PROGRAMS_WANTED = 264
WARPS_WANTED = 8 * PROGRAMS_WANTED  # of the few-token kernel: what keeps the memory busy
MAX_SPLIT_IN = 8
FEW_TOKENS = 4
SMALLEST_GROUP = (
    64  # of columns with one scale; groups are multiples of it, and no tile is narrower
)
MANY_TOKENS = 512  # from here on a tile of W is expanded so often that once, to memory, is less
# Of dense rows at a time, of their sums, and the fewest rows that torch.mm has work with.
EXPANDED_BYTES, SUMS_BYTES, EXPANDED_ROWS = 2**26, 2**27, 512


class LinearConfig(NamedTuple):
    """Tile sizes of one launch; `str()` is the name that sparsekern.explain shows."""

    block_out: int
    block_in: int
    block_tokens: int
    split_in: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        tile = f"out{self.block_out}_in{self.block_in}_tokens{self.block_tokens}"
        return f"{tile}_split{self.split_in}_w{self.num_warps}_s{self.num_stages}"


class FewTokens(NamedTuple):
    """One launch of the few-token kernel: `rows` of W a program, `unroll` times 256 * num_warps
    columns of them in a turn of its loop; in_features shared by split_in programs."""

    rows: int
    unroll: int
    split_in: int
    num_warps: int

    def __str__(self) -> str:
        return f"few_rows{self.rows}_unroll{self.unroll}_split{self.split_in}_w{self.num_warps}"


class Expanded(NamedTuple):
    """W is expanded `rows` rows at a time, and multiplied by torch.mm."""

    rows: int

    def __str__(self) -> str:
        return f"expanded_rows{self.rows}"


Config = LinearConfig | FewTokens | Expanded


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pick_config(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype, plain: bool = True
) -> Config:
    """The kernel and its sizes for one problem.

    Args:
        dtype: of x.      plain: values have the dtype of x; quantised ones take tiles.
    """
    if plain and dtype in dtypes.NATIVE:
        if 0 < tokens <= FEW_TOKENS and in_features % 8 == 0:
            return few_config(out_features, in_features)
        if tokens >= MANY_TOKENS:
            rows = EXPANDED_BYTES // max(1, in_features * dtype.itemsize)
            rows = min(rows, SUMS_BYTES // (4 * tokens), _cdiv(out_features, 64) * 64)
            return Expanded(max(EXPANDED_ROWS, rows // 64 * 64))
    return tile_config(tokens, out_features, in_features, dtype)


def few_config(out_features: int, in_features: int) -> FewTokens:
    """Warps, then parts of in_features, until there are WARPS_WANTED; each part has a whole turn of
    the loop at least."""
    rows, unroll, warps, split_in = 2, 2, 1, 1
    programs = _cdiv(out_features, rows)
    columns = 256 * unroll  # of a warp's turn
    while warps < 4 and programs * warps < WARPS_WANTED and in_features >= 2 * warps * columns:
        warps *= 2
    while (
        split_in < MAX_SPLIT_IN
        and programs * warps * split_in < WARPS_WANTED
        and in_features >= 2 * split_in * warps * columns
    ):
        split_in *= 2
    return FewTokens(rows, unroll, split_in, warps)


def tile_config(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype
) -> LinearConfig:
    """The tile sizes of linear.py for one problem."""
    if dtype == torch.float32:
        # input_precision="ieee" runs on the FMA units, all operands in registers: small tiles.
        block_out, block_in, block_tokens, num_warps, num_stages = 64, 32, 32, 8, 2
        if tokens <= 16:
            block_tokens, num_warps = 16, 4
    elif tokens <= 64:
        block_tokens = max(16, 1 << (tokens - 1).bit_length())
        block_out, block_in, num_warps, num_stages = 64, 128 if tokens <= 32 else 64, 4, 3
    else:
        block_out, block_in, block_tokens, num_warps, num_stages = 128, 64, 128, 8, 3
    programs = _cdiv(out_features, block_out) * _cdiv(tokens, block_tokens)
    split_in = 1
    # Each program keeps at least two tiles along in_features, or the reduction would dominate.
    while (
        split_in < MAX_SPLIT_IN
        and programs * split_in < PROGRAMS_WANTED
        and in_features >= 4 * split_in * block_in
    ):
        split_in *= 2
    return LinearConfig(block_out, block_in, block_tokens, split_in, num_warps, num_stages)
