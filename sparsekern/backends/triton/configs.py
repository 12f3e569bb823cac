"""Which Triton kernel computes a linear layer, and with which tile: pure functions of shapes and
dtype. The order of summation follows from the config, so results are the same from run to run and
from GPU to GPU.

    FewTokens      few_tokens.py    one token, or up to 4: picks x by the metadata, no tensor cores
    MmaSp          mma_sp.py        up to 767, quantised up to 511: the sparse tensor cores
    LinearConfig   linear.py        any problem: expands tiles of W in registers, tl.dot
    Expanded       expanded.py      many tokens: expands W once, some rows at a time, torch.mm

Which is the fastest where was measured on an H200 (csrc/notes/triton.md).
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
FEW_TOKENS = 4  # the most of the few-token kernel; where mma.sp is not to be had it takes them
# Columns with one scale: groups are multiples of so many, and no tile is narrower.
SMALLEST_GROUP = 64
MANY_TOKENS = 512  # from here on a tile of W is expanded so often that once, to memory, is less
MMA_TOKENS = 767  # the most that mma.sp takes; with more, torch.mm of the expanded W is faster
MMA_COLUMNS = 32  # of one mma.sp: in_features are a multiple
FASTER_TOKENS = 64  # with more, dense was faster wherever it was timed; in tiles with any number
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


class MmaSp(NamedTuple):
    """One launch of the mma.sp kernel: tiles of block_out x block_tokens in warps_out x
    warps_tokens warps; a ring of `stages` stages of `steps` times 32 columns; in_features shared by
    split_in programs. Steps and stages do not change the order of summation."""

    block_out: int
    block_tokens: int
    warps_out: int
    warps_tokens: int
    steps: int
    stages: int
    split_in: int = 1
    element_bytes: int = 4  # of the two values that a group of four keeps

    def __str__(self) -> str:
        tile = f"mma_sp_out{self.block_out}_tokens{self.block_tokens}"
        warps = f"w{self.warps_out}x{self.warps_tokens}"
        return f"{tile}_split{self.split_in}_{warps}_in{MMA_COLUMNS * self.steps}_s{self.stages}"

    @property
    def shared_bytes(self) -> int:
        """Of the ring: values and metadata of a row of W, and 64 bytes of a token, a step."""
        step = (8 * self.element_bytes + 4) * self.block_out + 64 * self.block_tokens
        return self.stages * self.steps * step

    def fitting(self, shared_bytes: int) -> MmaSp:
        """The same with the tile and the ring that a GPU has room for: an A100 has 166,912 bytes
        for a thread block, an RTX 4090 101,376, an H100 232,448."""
        half = self.halved() if self.block_out > 128 else self
        fit = [self, *(half._replace(steps=2, stages=stages) for stages in (4, 3, 2))]
        return next((config for config in fit if config.shared_bytes <= shared_bytes), fit[-1])

    def halved(self) -> MmaSp:
        """With half the rows and half the warps, of which a multiprocessor holds twice as many."""
        rows, warps = self.block_out // 2, self.warps_out // 2
        return self._replace(block_out=rows, warps_out=warps, steps=2, stages=4)


Config = LinearConfig | FewTokens | MmaSp | Expanded


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pick_config(
    tokens: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    bits: int | None = None,
    group: int = 0,
    mma_sp: bool = False,
) -> Config:
    """The kernel and its sizes for one problem.

    Args:
        dtype: of x.      bits: of a quantised value; None: values have the dtype of x.
        group: columns that share a scale; 0: all.
        mma_sp: the mma.sp kernel can run (mma_sp_reason in backends/triton).
    """
    if tokens > 0 and dtype in dtypes.NATIVE:
        sparse = mma_sp and in_features > 0 and in_features % MMA_COLUMNS == 0
        if bits is not None:
            if sparse and tokens < MANY_TOKENS:
                return quantized_config(tokens, out_features, in_features, bits, group)
        elif tokens <= (1 if sparse else FEW_TOKENS) and in_features % 8 == 0:
            return few_config(out_features, in_features)
        elif sparse and tokens <= MMA_TOKENS:
            return mma_config(tokens, out_features, in_features)
        if tokens >= MANY_TOKENS:
            rows = EXPANDED_BYTES // max(1, in_features * dtype.itemsize)
            rows = min(rows, SUMS_BYTES // (4 * tokens), _cdiv(out_features, 64) * 64)
            return Expanded(max(EXPANDED_ROWS, rows // 64 * 64))
    return tile_config(tokens, out_features, in_features, dtype)


def mma_config(tokens: int, out_features: int, in_features: int) -> MmaSp:
    """The fastest tile of those that were measured, and as many parts of in_features, of 256
    columns at least, as give each multiprocessor a program, or two where it holds two."""
    wanted = PROGRAMS_WANTED // 2
    if tokens <= 64:
        block_tokens = max(8, 1 << (tokens - 1).bit_length())
        config = MmaSp(128, block_tokens, 4, 1, 4, 4 if tokens <= 16 else 3)
    elif tokens <= 128:
        config, wanted = MmaSp(64, 128, 1, 4, 2, 4), PROGRAMS_WANTED
    else:
        config = MmaSp(256, 128, 4, 2, 4, 3)
        if in_features % (4 * MMA_COLUMNS):  # a part of a stage, for which it has no registers left
            config, wanted = config.halved(), PROGRAMS_WANTED
    return _in_parts(config, tokens, out_features, in_features, wanted)


def quantized_config(
    tokens: int, out_features: int, in_features: int, bits: int, group: int
) -> MmaSp:
    """The same for quantised weights; those with groups have small tiles, because the sums of a
    stage get the scale of its group in registers of their own."""
    wanted = PROGRAMS_WANTED
    if tokens <= 64 or group > 0:
        block_tokens = max(8, 1 << (min(tokens, 64) - 1).bit_length())
        narrow = bits == 8 and tokens <= 16
        stages = 6 if narrow or tokens <= 8 else 4
        config = MmaSp(64 if narrow else 128, block_tokens, 4, 1, 4, stages, 1, bits // 4)
        if group % (4 * MMA_COLUMNS):
            config = config._replace(steps=2, stages=2 * stages)
        wanted = 3 * wanted // 4
    else:
        config = MmaSp(128, 128, 2, 2, 2, 4, 1, bits // 4)
    return _in_parts(config, tokens, out_features, in_features, wanted)


def _in_parts(
    config: MmaSp, tokens: int, out_features: int, in_features: int, wanted: int
) -> MmaSp:
    programs = _cdiv(out_features, config.block_out) * _cdiv(tokens, config.block_tokens)
    split_in = 1
    while (
        split_in < MAX_SPLIT_IN
        and programs * split_in < 0.9 * wanted
        and in_features >= 512 * split_in
    ):
        split_in *= 2
    return config._replace(split_in=split_in)


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
