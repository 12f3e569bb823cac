"""Which CUDA kernel computes a linear layer, and with which tile. Pure Python: no torch, no GPU.

On Hopper: up to 64 tokens the decode kernel, which chooses its row blocks itself (decode_config in
csrc/kernels/spmm_decode_sm90.cu). Above, the prefill kernel with the tile whose predicted time is
the shortest: a large tile moves fewer bytes per product, a small one leaves fewer multiprocessors
idle and less of the last tiles outside the output.

    out_features                        a cluster of 2 x 1 tiles shares the rows of x that its tiles
    +-------+-------+-------+           both need; a cluster of 1 x 2 shares the weights
    | tile  | tile  | tile  |
    +-------+-------+-------+ tokens    us = stage * S + item * I + exchange * X + constant
    | tile  | tile  | tile  |           with the four coefficients of the tile in TIMES
    +-------+-------+-------+

What the busiest cluster does: it computes I tiles one after the other, in S stages of 64
in_features. When the last wave does not fill the GPU, each of its tiles is cut along in_features
into as many parts as there are clusters for (choose_splits in spmm_prefill_launch_sm90.cuh, same
folder); then S counts one part, and X is the share of its sums that a cluster exchanges with the
others.

The coefficients are fitted to times on an H100 (bf16, five shapes, 64 to 8192 tokens). On the 30
problems above 64 tokens the pick is 1.9 % slower than the best tile on average and 7.7 % at worst.
That is the fitting set, without LONG: of other problems, and of other GPUs, it says nothing. A tile that was
timed only at few or only at many tokens is chosen only there, because a fit says little outside.

Those were short bursts. A launch of several waves runs at the power limit, and there 256 rows in
clusters of 2 x 1 keep their time while the others lose: 57344 x 8192 at 4096 tokens took 1.02 to
1.04 of the prediction with them and 1.14 to 1.25 with others (csrc/NOTES.md). LONG stands for that
loss. It rests on this one problem, and the picks that it changes were not timed again; a tuned
table replaces all of this.

On other GPUs the mma.sp kernel computes every number of tokens: `mma_tile`, at the end of this
file. Its model is an estimate from the data sheets and is fitted to nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

DECODE_TOKENS = 64  # the most that the decode kernel takes
GATED_TOKENS = 32  # the same for its gated form, which holds two sums per output

# As in the kernel: in_features of a stage, the fewest stages in a part of a tile, and the fewest
# tokens that a part finishes.
STAGE, STAGES_OF_PART, TOKENS_OF_PART = 64, 4, 32


class Tile(NamedTuple):
    """One entry of csrc/configs.h: the tile of a thread block, and the cluster in tiles."""

    rows: int  # out_features
    tokens: int
    cluster_rows: int
    cluster_tokens: int
    streamed: bool = False  # how the last wave is shared: see SK_PREFILL_CONFIGS

    def __str__(self) -> str:
        cluster = f"{self.cluster_rows}x{self.cluster_tokens}"
        text = f"{self.rows}x{self.tokens} cluster {cluster}"
        return f"{text}, streamed" if self.streamed else text


class Times(NamedTuple):
    """What a tile costs, in us (see the top of the file), and at how many tokens that is known."""

    stage: float
    item: float
    exchange: float
    constant: float
    above: int = 0  # tokens
    up_to: float = math.inf  # tokens


FEW = 512
LONG, LONG_WAVES = 1.06, 3  # factor on the time of other tiles, from this many tiles per cluster on

# Tiles of configs.h that are not here are never chosen.
TIMES = {
    Tile(256, 192, 1, 1): Times(0.656, 7.5, 17.1, 3.1),
    Tile(256, 192, 2, 1): Times(0.676, 5.1, 19.5, 3.1),
    Tile(256, 192, 2, 2): Times(0.692, 5.3, 11.7, 0.0, above=FEW),
    Tile(256, 192, 4, 1): Times(0.648, 6.8, 11.1, 0.0, above=FEW),
    Tile(256, 160, 2, 1): Times(0.643, 2.8, 8.6, 0.0, above=FEW),
    Tile(256, 128, 1, 1): Times(0.486, 3.5, 9.4, 8.0),
    Tile(256, 128, 2, 1): Times(0.500, 3.2, 14.0, 5.0),
    Tile(256, 128, 1, 2): Times(0.515, 2.4, 12.0, 6.2),
    Tile(256, 96, 1, 1): Times(0.365, 10.3, 6.6, 2.2, up_to=FEW),
    Tile(256, 64, 1, 1): Times(0.328, 6.2, 3.1, 6.4, up_to=FEW),
    Tile(256, 64, 2, 1): Times(0.310, 5.6, 0.2, 8.2, up_to=FEW),
    Tile(128, 256, 2, 1): Times(0.526, 1.3, 20.0, 5.5),
    Tile(128, 128, 1, 1): Times(0.346, 0.0, 10.7, 6.6, up_to=FEW),
}


def resident_clusters(size: int, multiprocessors: int) -> int:
    """Clusters of `size` thread blocks, one block per multiprocessor, that run at once.

    A cluster lies inside a GPC, whose 16 or 18 multiprocessors 4 does not always divide: on an
    H100 (132) 33 clusters of 4 are not resident at once, 31 are.
    """
    return max(1, multiprocessors // size - 2 * (size > 2))


def predicted_us(
    tile: Tile, tokens: int, out_features: int, in_features: int, multiprocessors: int
) -> float:
    """The modelled time of one layer with this tile, one of TIMES; see the top of the file."""
    stages = -(-in_features // STAGE)
    tiles = -(-out_features // (tile.rows * tile.cluster_rows))
    tiles *= -(-tokens // (tile.tokens * tile.cluster_tokens))
    resident = resident_clusters(tile.cluster_rows * tile.cluster_tokens, multiprocessors)
    items, rest = divmod(tiles, resident)
    busiest, splits = items * stages, 1
    if rest:
        most = min(resident // rest, tile.tokens // TOKENS_OF_PART, stages // STAGES_OF_PART)
        splits = max(1, most)
        busiest += -(-stages // splits)
        items += 1
    exchanged = (splits - 1) / splits
    times = TIMES[tile]
    us = times.stage * busiest + times.item * items + times.exchange * exchanged + times.constant
    steady = (tile.rows, tile.cluster_rows, tile.cluster_tokens) == (256, 2, 1)
    return us * LONG if items >= LONG_WAVES and not steady else us


@lru_cache(maxsize=4096)
def prefill_tile(
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    tiles: tuple[Tile, ...] = tuple(TIMES),
) -> Tile:
    """The tile with the shortest predicted time for this problem; of equal ones the first in TIMES.

    Args:
        tiles: those that the native module was built with; unknown ones are left out.
    Raises:
        ValueError: none of them is in TIMES for so many tokens.
    """
    problem = tokens, out_features, in_features, multiprocessors
    known = [
        tile for tile, of in TIMES.items() if tile in tiles and of.above < tokens <= of.up_to
    ]
    return min(known, key=lambda tile: predicted_us(tile, *problem))


# ---- the mma.sp kernel ---------------------------------------------------------------------------


class MmaTile(NamedTuple):
    """One entry of SK_MMA_CONFIGS in csrc/configs.h."""

    rows: int  # out_features
    tokens: int
    warps_rows: int  # warps of a thread block along out_features
    warps_tokens: int  # along tokens
    split: int  # along in_features
    stages: int  # of 64 * split in_features

    def __str__(self) -> str:
        warps = f"{self.warps_rows}x{self.warps_tokens}x{self.split}"
        return f"{self.rows}x{self.tokens}, {warps} warps"


class Rates(NamedTuple):
    """What limits a multiprocessor, in clocks and bytes per clock."""

    mma: float  # clocks of the tensor cores for one mma.sp, 16 x 8 outputs and 32 in_features
    l2: float  # bytes that one multiprocessor gets from L2 while all of them read


# 2:4 bfloat16 with float32 sums: 624 TFLOPS of an A100 are 2 clocks, 142 of an RTX 3090 and 330 of
# a 4090 are 8. Professional cards of the same capability take 4.
DATA_CENTER, CONSUMER = Rates(2, 40), Rates(8, 16)
SHARED = 128  # bytes of shared memory per clock
LATENCY = 800  # clocks from a copy's start to its arrival
BARRIER = 60  # clocks of a stage in which nothing else proceeds
START = 1500  # clocks of a thread block before its first product


def mma_rates(capability: tuple[int, int]) -> Rates:
    """Rates by compute capability. An H100 has those of an A100 here: unmeasured, like the rest."""
    return DATA_CENTER if capability in ((8, 0), (9, 0)) else CONSUMER


def mma_clocks(
    tile: MmaTile, tokens: int, out_features: int, in_features: int, multiprocessors: int,
    rates: Rates = DATA_CENTER,
) -> float:  # fmt: skip
    """Estimated clocks of one layer with this tile of the mma.sp kernel.

        clocks = waves * (stages * (max(tensor, shared, l2, latency) + BARRIER) + START + epilogue)

    per thread block, as if it had its multiprocessor to itself; blocks that share one share its
    rates, so a wave is one block per multiprocessor. The time to read the weights from memory is
    left out: it is the same for every tile.

    Source: data sheets and csrc/NOTES.md, mma.sp. Nothing here is measured.
    """
    rows, wide, warps_rows, warps_tokens, split, ring = tile
    weight_bytes = split * rows * 72  # of a stage: values and metadata
    x_bytes = split * 128  # of a stage and token
    tensor = rows / 16 * wide / 8 * 2 * split * rates.mma
    fragments = rows * 72 * warps_tokens * split + wide * 128 * warps_rows * split
    shared = (fragments + weight_bytes + x_bytes * wide) / SHARED
    l2 = (weight_bytes + x_bytes * min(tokens, wide)) / rates.l2
    stage = max(tensor, shared, l2, LATENCY / (ring - 1)) + BARRIER
    epilogue = rows * wide / 8  # 4 bytes to shared memory and back, 2 to the output
    blocks = -(-out_features // rows) * -(-tokens // wide)
    stages = -(-in_features // (STAGE * split))
    return -(-blocks // multiprocessors) * (stages * stage + START + epilogue)


@lru_cache(maxsize=4096)
def mma_tile(
    tokens: int, out_features: int, in_features: int, multiprocessors: int, rates: Rates,
    tiles: tuple[MmaTile, ...],
) -> MmaTile:  # fmt: skip
    """The one of `tiles` with the fewest estimated clocks (`mma_clocks`); of equal ones the first.

    Raises:
        ValueError: no tiles.
    """
    problem = tokens, out_features, in_features, multiprocessors, rates
    return min(tiles, key=lambda tile: mma_clocks(tile, *problem))
