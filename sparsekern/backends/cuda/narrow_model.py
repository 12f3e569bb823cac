"""How long the narrow kernel takes: int4 weights, x of 16 bits (csrc/linear/narrow_sm90.cuh).

    us = max(waves * (stages * stage + START + sums) / CLOCK, megabytes / RATE) + CONSTANT

of clocks of a thread block, one per multiprocessor, for a stage of 256 in_features and 256
out_features:

    stage = max(shared, ISSUE, l2)
    shared  what the tensor cores read of x, 16 for every token of a tile whether it is there or
            not, and the copies into shared memory and out of it
    ISSUE   instructions that widen: the consumers' loop (SASS, csrc/notes/narrow.md)
    l2      x and weights from L2; the thread blocks of a cluster that lie one below the other fetch
            x together

Nothing here is measured: it is the estimate of csrc/notes/narrow.md. Units: clocks, bytes per
clock, megabytes (1e6 bytes) and microseconds.
"""

from __future__ import annotations

from typing import NamedTuple

# int4 of so many tokens is multiplied by this kernel: of fewer by decode, of more after widening in
# memory. Where the next kernel is expected to be as fast.
FEWEST_TOKENS, MOST_TOKENS = 17, 512

STAGE, PANEL = 256, 64  # in_features of a stage; rows of a panel, four of which are a tile
ISSUE = 1250  # of a stage: 4 warps of a scheduler, 285 instructions each, and what they wait for
PORT, L2 = 128, 26  # bytes per clock of shared memory, and of L2 for one multiprocessor of all
REMOTE = 24  # bytes per clock of sums from another multiprocessor
START = 2500  # clocks of a thread block before its first product
CLOCK, RATE = 1700.0, 4.0  # clocks per us; megabytes per us
CONSTANT = 1.5


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
    return FEWEST_TOKENS <= tokens <= MOST_TOKENS


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
        resident: clusters that run at once.
    """
    k_tiles, tile_rows = -(-in_features // STAGE), -(-out_features // tile.rows)
    columns = -(-tokens // tile.tokens)
    wide = -(-tokens // (8 * columns)) * 8  # tokens of a column of tiles
    clusters = -(-tile_rows // tile.cluster_rows) * columns
    waves, stages = -(-clusters // resident), -(-k_tiles // tile.split)
    panels = tile.rows // PANEL
    # A quarter of a byte a weight, an eighth of metadata, a float32 for 128.
    weight_bytes = tile.rows * STAGE * (1 / 4 + 1 / 8 + 1 / 32)
    x_bytes = wide * STAGE * 2
    shared = panels * tile.tokens * 4 + (2 * weight_bytes + x_bytes) / PORT
    busy = min(1.0, clusters * tile.cluster_rows * tile.split / multiprocessors)
    l2 = (weight_bytes + x_bytes / tile.cluster_rows) / L2 * busy
    sums_bytes = wide * tile.rows * 4
    sums = 3 * sums_bytes / PORT + (tile.split - 1) / tile.split * sums_bytes / REMOTE
    loop = stages * max(shared, ISSUE, l2)
    megabytes = tile_rows * k_tiles * weight_bytes + 2 * tokens * (out_features + in_features)
    fixed = waves * (START + sums) / CLOCK + CONSTANT
    return float(max(waves * loop / CLOCK, megabytes / 1e6 / RATE) + fixed)
