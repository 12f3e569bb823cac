"""How long the narrow kernel takes: int4 weights, x of 16 bits (csrc/linear/narrow_sm90.cuh).

    us = waves * (stages * (WIDEN + MULTIPLY * tokens of a tile) + START + STORE * tokens)
               * (1 + CROWD * share of the multiprocessors that have a thread block)
         + EXPOSED * megabytes

    waves     of clusters that run at once
    stages    of a thread block, of 256 in_features and 256 out_features
    WIDEN     the consumers' instructions, which the products do not hide
    MULTIPLY  tensor cores and their reads of x, for every token of a tile, there or not
    START     of a wave: the launch, a thread block before its first product, the meeting of parts
    STORE     sums from registers to y, of the tokens that are there
    CROWD     how much slower all multiprocessors are than few: power, L2
    EXPOSED   weights, x and y from and to memory: what no product hides

Neither sharing x (cluster_rows) nor the number of parts has a cost that the fit told from zero, but
for the clusters that run at once.

Source: every configuration with 16 to 512 tokens of 4096x4096, 6144x4096, 4096x14336 and
28672x4096 on an H200, a single run of a script (csrc/notes/narrow.md); least squares of relative
errors, those of configurations near the fastest counting most. The model is off by 5 % in the mean
and 20 % at worst; its picks are slower than the fastest by 0.7 % in the mean and 7 % at worst, also
at a shape that was left out of the fit.

With more tokens than were measured the kernel competes with a copy of the weight in 16 bits
(`pays`).

Units: microseconds, megabytes (1e6 bytes).
"""

from __future__ import annotations

from typing import NamedTuple

# int4 of so many tokens is multiplied by this kernel: of fewer by decode, of more after widening in
# memory, but where `pays`. Each of the four measured shapes was faster so.
FEWEST_TOKENS, MOST_TOKENS = 17, 512
# Up to so many, twice what was measured, it may pay: where it is expected to be faster by WORTH. At
# 512 tokens the two models together overstated how much faster it is by 18 to 21 %.
PAYING_TOKENS, WORTH = 1024, 1.2

STAGE = 256  # in_features of a stage
WIDEN, MULTIPLY = 0.656, 0.863 / 128
START, STORE = 3.0, 3.66 / 128
CROWD, EXPOSED = 0.11, 0.079

# The copy: a quarter of a byte read for a number, an eighth of metadata, a float32 for 128; 9/8
# written. It takes what its bytes take, and COPY_START (csrc/notes/widen.md).
COPIED, RATE, COPY_START = 13 / 32 + 9 / 8, 4.0, 1.5


class NarrowTile(NamedTuple):
    """One entry of SK_NARROW_CONFIGS: a tile, and the cluster's thread blocks."""

    rows: int  # out_features
    tokens: int
    cluster_rows: int  # that share x
    split: int  # that share the in_features of a tile

    def __str__(self) -> str:
        parts = "1 part" if self.split == 1 else f"{self.split} parts"
        return f"{self.rows}x{self.tokens} cluster {self.cluster_rows}x1, {parts}"


def considered(tokens: int) -> bool:
    """Whether the kernel may be chosen for so many tokens."""
    return FEWEST_TOKENS <= tokens <= PAYING_TOKENS


def copy_us(out_features: int, in_features: int) -> float:
    """The modelled time of widening an int4 weight to 16 bits in memory."""
    return out_features * in_features * COPIED / 1e6 / RATE + COPY_START


def pays(tokens: int, out_features: int, in_features: int, us: float, plain_us: float) -> bool:
    """Whether this kernel is taken for more than MOST_TOKENS.

    Args:
        us: expected of this kernel.   plain_us: of the one for weights of 16 bits.
    """
    copied = copy_us(out_features, in_features) + plain_us
    return tokens <= PAYING_TOKENS and WORTH * us <= copied


def predicted_us(
    tile: NarrowTile,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    resident: int,
) -> float:
    """The modelled time of one layer.

    Args:
        resident: clusters that run at once, by number. Of 3 and 6 thread blocks it is taken for
            nine tenths of what the multiprocessors could hold at most: on an H200 40 of 3 took two
            waves (csrc/notes/narrow.md).
    """
    size = tile.cluster_rows * tile.split
    if size % 3 == 0:
        resident = max(1, min(resident, 9 * multiprocessors // (10 * size)))
    k_tiles, tile_rows = -(-in_features // STAGE), -(-out_features // tile.rows)
    columns = -(-tokens // tile.tokens)
    wide = -(-tokens // (8 * columns)) * 8  # tokens of a column of tiles
    clusters = -(-tile_rows // tile.cluster_rows) * columns
    waves, stages = -(-clusters // resident), -(-k_tiles // tile.split)
    blocks = min(clusters, resident) * tile.cluster_rows * tile.split
    crowd = 1 + CROWD * min(1.0, blocks / multiprocessors)
    # A quarter of a byte a weight, an eighth of metadata, a float32 for 128.
    weights = tile_rows * tile.rows * k_tiles * STAGE * (1 / 4 + 1 / 8 + 1 / 32)
    megabytes = (weights + 2 * tokens * (out_features + in_features)) / 1e6
    wave = stages * (WIDEN + MULTIPLY * tile.tokens) + START + STORE * wide
    return float(waves * wave * crowd + EXPOSED * megabytes)
