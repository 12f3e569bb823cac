"""Which CUDA kernel computes a linear layer, and with which tile. Pure Python: no torch, no GPU.

Up to 64 tokens the decode kernel, which chooses its row blocks itself (choose_config in
csrc/kernels/spmm_decode_sm90.cu). Above, the prefill kernel: a large tile moves fewer bytes per
product, a small one leaves fewer multiprocessors idle in the last wave.

    out_features                        a cluster of 2 x 1 tiles shares the rows of x that its tiles
    +-------+-------+-------+           both need; a cluster of 1 x 2 shares the weights
    | tile  | tile  | tile  |
    +-------+-------+-------+ tokens    waves = ceil(clusters needed / clusters that fit the GPU)
    | tile  | tile  | tile  |           cost  = waves * area of a tile / RATES[tile]
    +-------+-------+-------+

The cheapest tile wins: the one with the best rate times tiles / (waves * tiles that fit), the share
of the GPU that is busy. Parts of edge tiles that lie outside the output count as idle, too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

DECODE_TOKENS = 64  # the most that the decode kernel takes
GATED_TOKENS = 32  # the same for its gated form, which holds two sums per output


class Tile(NamedTuple):
    """One entry of csrc/configs.h: the tile of a thread block, and the cluster in tiles."""

    rows: int  # out_features
    tokens: int
    cluster_rows: int
    cluster_tokens: int

    def __str__(self) -> str:
        cluster = f"{self.cluster_rows}x{self.cluster_tokens}"
        return f"{self.rows}x{self.tokens} cluster {cluster}"


# Speed of each tile when the GPU is full of it, relative to the best one. The order is that of runs
# on an H100 (bf16, 1024 and 4096 tokens, Llama-3 layers); the steps are estimates. Tiles of
# configs.h that are not here are never chosen.
RATES = {
    Tile(256, 192, 4, 1): 1.00,
    Tile(256, 192, 2, 1): 0.985,
    Tile(256, 192, 1, 1): 0.95,
    Tile(128, 256, 2, 1): 0.90,
    Tile(256, 128, 1, 2): 0.89,
    Tile(256, 128, 2, 1): 0.89,
    Tile(256, 128, 1, 1): 0.87,
    Tile(128, 128, 2, 1): 0.66,
    Tile(128, 128, 1, 1): 0.64,
    Tile(256, 64, 1, 1): 0.60,
}


def resident_clusters(size: int, multiprocessors: int) -> int:
    """Clusters of `size` thread blocks, one block per multiprocessor, that run at once.

    A cluster lies inside a GPC, whose 16 or 18 multiprocessors 4 does not always divide: on an
    H100 (132) 33 clusters of 4 are not resident at once, 32 are.
    """
    return max(1, multiprocessors // size - (size > 2))


def cost(tile: Tile, tokens: int, out_features: int, multiprocessors: int) -> float:
    """Time of the tile's waves, in units of output elements per multiprocessor at rate 1."""
    clusters = -(-out_features // (tile.rows * tile.cluster_rows))
    clusters *= -(-tokens // (tile.tokens * tile.cluster_tokens))
    size = tile.cluster_rows * tile.cluster_tokens
    waves = -(-clusters // resident_clusters(size, multiprocessors))
    return waves * tile.rows * tile.tokens / RATES[tile]


@lru_cache(maxsize=4096)
def prefill_tile(
    tokens: int, out_features: int, multiprocessors: int, tiles: tuple[Tile, ...] = tuple(RATES)
) -> Tile:
    """The cheapest of `tiles` for this problem; of equal ones the first in RATES.

    Args:
        tiles: those that the native module was built with; unknown ones are left out.
    Raises:
        ValueError: none of them is in RATES.
    """
    known = [tile for tile in RATES if tile in tiles]
    return min(known, key=lambda tile: cost(tile, tokens, out_features, multiprocessors))
