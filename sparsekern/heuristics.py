"""Which CUDA kernel computes a linear layer, and with which tile. Pure Python: no torch, no GPU.

On Hopper `fastest` predicts the time of every variant of TIMES and takes the shortest: the decode
kernel up to 64 tokens, the mma.sp kernel, too, or where there is little to compute, the prefill
kernel from 32 tokens on, the split kernel from there up to some size (`considered`). One formula
serves them all:

    us = smooth_max(stage * stages + extra * extras, total * totals, megabytes / rate)
         + item * items + exchange * exchanges + crowd * crowds + constant

    smooth_max(a, b, c) = (a^4 + b^4 + c^4)^(1/4)

The products, first, are what can be the limit of the main loop: the busiest cluster of thread
blocks, which computes its stages one after the other; something that all blocks share; the memory,
which delivers weights, x and y once. The others are added because nothing hides them. The
coefficients, on the left of each product, are those of the variant in TIMES. The counts, on the
right, follow from the problem and the number of multiprocessors (Work; of 64 in_features a stage):

                 prefill (prefill_work)     decode (decode_work)       mma.sp (mma_work)
    stages       of the busiest cluster     of the busiest cluster     of a multiprocessor's blocks,
                                                                       those at once counted once
    extras       the same, times the        the same, times tokens     all of a multiprocessor's
                 share of a tile's tokens   / 64, rounded up to the    blocks
                 that are not there         kernel's 8, 16, 32, 64
    totals       all stages / multi-        extras of all clusters     megabytes from L2
                 processors, but only in    / multiprocessors
                 sustained work: power
    megabytes    weights (9/16 of the dense ones) + x + y
    items        tiles of a cluster         row blocks of a cluster    blocks of a multiprocessor,
                                                                       those at once counted once
    exchanges    share of its sums that     items, times tokens        0
                 a cluster gives away       as in extras
    crowds       the same, of all clusters  0                          0
                 per multiprocessor

The split kernel counts as a prefill kernel whose tiles are all cut (split_work), with three
differences. Extras are the stages times the share of a tile's tokens that are there, because only
these are fetched. Totals are megabytes from L2, as in mma.sp, and not only in sustained work: with
all multiprocessors at work a stage takes longer than with half of them. Crowds are 0: the sums that
are given away stay in the cluster.

How many clusters run at once decides the first count (`resident_clusters`). The prefill kernel cuts
the tiles of a last, partly filled wave along in_features into as many parts as there are clusters
for, or streams them: every cluster takes an equal piece (choose_splits, choose_stream in
csrc/kernels/spmm_prefill_launch_sm90.cuh). In a streamed wave one cluster adds up all pieces of a
tile; their number stands for crowds there.

Power: a GPU that multiplies for long lowers its clock until it draws what it may. Then the time
follows the energy, which idle multiprocessors do not use: all stages count, not those of the
busiest cluster, and each variant pays for the bytes that it moves per product. SUSTAINED_PRODUCTS
says from when on, which is where measurements begin to be made in bursts (tuner.py).

Units: microseconds; megabytes are 1e6 bytes, so rate is in megabytes per microsecond, TB/s.
Where TIMES comes from: see there. `python -m bench.fit` makes it.

On other GPUs the mma.sp kernel computes every number of tokens: `mma_tile`, at the end of this
file. Its model is an estimate from the data sheets and is fitted to nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

DECODE_TOKENS = 64  # the most that the decode kernel takes
GATED_TOKENS = 32  # the same for its gated form, which holds two sums per output
# On Hopper the mma.sp kernel is considered up to so many tokens, or tokens * out * in.
MMA_TOKENS, MMA_PRODUCTS = 64, 2**30
PREFILL_TOKENS = 32  # the fewest at which the prefill kernel is, and the split kernel
SPLIT_PRODUCTS = 2**36  # the split kernel is considered up to so many tokens * out * in

# As in the kernels: in_features of a stage, the fewest stages in a part of a tile, the fewest
# tokens that a part finishes, and rows of a tile of tile64.
STAGE, STAGES_OF_PART, TOKENS_OF_PART, PANEL = 64, 4, 32, 64

SMOOTH = 4  # exponent of the smooth maximum
SUSTAINED_PRODUCTS = 2**33  # tokens * out * in that draw all the power there is, one after another
SM_BYTES, BLOCK_BYTES = 228 * 1024, 1024  # shared memory of a multiprocessor; the system's, a block


class RowBlocks(NamedTuple):
    """One entry of SK_DECODE_CONFIGS in csrc/configs.h."""

    rows: int  # out_features of a row block
    split: int  # thread blocks, a cluster, that share its in_features

    def __str__(self) -> str:
        return f"{self.rows} rows, split {self.split}"


class Tile(NamedTuple):
    """One entry of SK_PREFILL_CONFIGS: the tile of a thread block, and the cluster in tiles."""

    rows: int  # out_features
    tokens: int
    cluster_rows: int
    cluster_tokens: int
    streamed: bool = False  # how the last wave is shared: see SK_PREFILL_CONFIGS

    def __str__(self) -> str:
        cluster = f"{self.cluster_rows}x{self.cluster_tokens}"
        text = f"{self.rows}x{self.tokens} cluster {cluster}"
        return f"{text}, streamed" if self.streamed else text


class MmaTile(NamedTuple):
    """One entry of SK_MMA_CONFIGS."""

    rows: int  # out_features
    tokens: int
    warps_rows: int  # warps of a thread block along out_features
    warps_tokens: int  # along tokens
    split: int  # along in_features
    stages: int  # of 64 * split in_features

    def __str__(self) -> str:
        warps = f"{self.warps_rows}x{self.warps_tokens}x{self.split}"
        return f"{self.rows}x{self.tokens}, {warps} warps"


class SplitTile(NamedTuple):
    """One entry of SK_SPLIT_CONFIGS: a tile whose in_features a cluster shares."""

    rows: int  # out_features
    tokens: int
    split: int  # thread blocks of the cluster

    def __str__(self) -> str:
        parts = "1 part" if self.split == 1 else f"{self.split} parts"
        return f"{self.rows}x{self.tokens}, {parts}"


Variant = RowBlocks | Tile | MmaTile | SplitTile


class Times(NamedTuple):
    """What a variant costs: the coefficients at the top of the file."""

    stage: float
    extra: float
    total: float
    rate: float
    item: float
    exchange: float
    crowd: float
    constant: float


class Work(NamedTuple):
    """What a variant does for a problem: the counts at the top of the file."""

    stages: float
    extras: float
    totals: float
    megabytes: float
    items: float
    exchanges: float
    crowds: float


# Made by `python -m bench.fit` from what `sparsekern tune` measured in three runs on an H100 SXM
# (132 multiprocessors, 700 W, bfloat16; without times of tiles that changed in between, and without
# single samples that undercut the winner of sustained work): the 24 shapes of Llama-3 1B, 3B, 8B
# and 70B (tuner.SHAPES), 18 numbers of tokens from 1 to 8192. In these 432 cells the pick is 0.80 %
# slower than the fastest of all variants on average and 20.1 % at worst (2048x8192, 192 tokens); in
# the 132 of the 8B and 70B models from 96 tokens on it is 0.55 % and 10.4 %, from 128 tokens on and
# without their k, v, gate and up layers 0.36 % and 6.6 %. Shapes that were left out of a fit to
# slightly older times: 1.4 % and 28.7 %. The coefficients are made to pick well, not to predict. A
# variant that is not here is never chosen: with it the picks would gain less than what MISSED in
# bench/fit.py asks for. On another GPU the counts follow from its multiprocessors, and these
# coefficients, its rates above all, are a guess: in the same cells of an H200 `tune` found its picks
# 2.4 % slower than the winners on average, 33.6 % at worst.
TIMES: dict[Variant, Times] = {
    RowBlocks(256, 1): Times(0.138, 0.423, 1.06, 3.35, 0, 2.25, 0, 2.15),
    RowBlocks(256, 8): Times(0.324, 0.311, 0, 3.14, 1.03, 2.81, 0, 1.04),
    RowBlocks(128, 2): Times(0.124, 0.222, 0, 3.15, 1.61, 1.68, 0, 1.22),
    RowBlocks(128, 8): Times(0.147, 0.0037, 1.06, 3.32, 2.55, 1.16, 0, 0.0127),
    Tile(256, 192, 2, 1): Times(0.651, 0, 0.454, 2.73, 2.26, 12.4, 9.43, 1.83),
    Tile(256, 192, 2, 2): Times(0.563, 0, 0.752, 2.62, 0.938, 6.77, 8.4, 5.49),
    Tile(256, 192, 4, 2): Times(0.617, 0, 0.597, 3.35, 1.13, 18.2, 21.4, 0.973),
    Tile(256, 192, 2, 1, True): Times(0.695, 0, 0.0104, 1.59, 6.16, 7.99, 3.32, 1.11),
    Tile(256, 128, 1, 1): Times(0.535, 0.15, 0.445, 3.35, 2.17, 2.08, 18.8, 0.907),
    Tile(256, 128, 1, 2): Times(0.371, 0.0808, 0.466, 2.78, 3.08, 2.92, 8.45, 2.14),
    Tile(256, 128, 4, 2): Times(0.467, 0, 0.366, 2.11, 0, 10.4, 6.16, 2.17),
    Tile(256, 64, 1, 1): Times(0.356, 0, 0.256, 3.35, 1.42, 2.02, 11.4, 3.48),
    Tile(256, 64, 2, 1): Times(0.31, 0, 0.241, 2.81, 1.23, 2.45, 3.87, 2.82),
    MmaTile(64, 32, 2, 1, 2, 5): Times(0.384, 0, 0.079, 3.12, 1.8, 0, 0, 0),
    MmaTile(64, 16, 2, 1, 4, 3): Times(0.608, 0.0308, 0.105, 3.35, 1.25, 0, 0, 0),
    MmaTile(64, 8, 2, 1, 4, 4): Times(0.226, 0.173, 0.0889, 2.93, 1.12, 0, 0, 0),
    MmaTile(32, 16, 1, 1, 4, 5): Times(0.329, 0.0492, 0.0422, 3.05, 0.802, 0, 0, 0.0251),
    MmaTile(32, 8, 1, 1, 4, 6): Times(0.17, 0.0714, 0.112, 3.14, 0.553, 0, 0, 0.232),
    SplitTile(128, 64, 1): Times(0.188, 0.0277, 0.0758, 3.27, 2.65, 0, 0, 0),
    SplitTile(128, 64, 2): Times(0.233, 0.00616, 0.104, 3.13, 1.15, 1.73, 0, 0),
    SplitTile(128, 64, 4): Times(0.27, 0.0112, 0.0847, 3.19, 1.26, 1.45, 0, 0),
    SplitTile(128, 64, 6): Times(0, 0.0764, 0.187, 3.35, 1.88, 2.07, 0, 0),
    SplitTile(128, 96, 1): Times(0.24, 0.0166, 0.0698, 3.15, 2.24, 0, 0, 0),
    SplitTile(128, 96, 2): Times(0.298, 0, 0.0609, 3.15, 1.42, 2.2, 0, 0),
    SplitTile(128, 128, 1): Times(0.255, 0.0223, 0.0792, 3, 2.21, 0, 0, 0),
    SplitTile(128, 128, 2): Times(0.314, 0, 0.0713, 3.19, 1.76, 2.8, 0, 0),
    SplitTile(128, 128, 4): Times(0.19, 0.132, 0.0877, 3.35, 1.93, 2.29, 0, 0),
    SplitTile(256, 96, 1): Times(0.333, 0.03, 0.0707, 2.72, 2.87, 0, 0, 0),
    SplitTile(256, 96, 2): Times(0.34, 0.0099, 0.0839, 2.73, 3.16, 3.49, 0, 0),
    SplitTile(256, 128, 2): Times(0.469, 0.0609, 0.0661, 1.92, 2.6, 3.05, 0, 0),
}


def name(variant: Variant) -> str:
    """What `sparsekern.explain` calls it: the kernel, then the variant."""
    kernels = {RowBlocks: "decode", Tile: "prefill", MmaTile: "mma", SplitTile: "split"}
    kernel = kernels[type(variant)]
    return f"{kernel} {variant}"


def considered(variant: Variant, tokens: int, out_features: int, in_features: int) -> bool:
    """True when the variant may be chosen for this problem on Hopper."""
    if isinstance(variant, Tile):
        return tokens >= PREFILL_TOKENS
    if isinstance(variant, RowBlocks):
        return tokens <= DECODE_TOKENS
    if isinstance(variant, SplitTile):
        return split_considered(tokens, out_features, in_features)
    return mma_considered(tokens, out_features, in_features)


def mma_considered(tokens: int, out_features: int, in_features: int) -> bool:
    """`considered` for every tile of the mma.sp kernel."""
    return tokens <= MMA_TOKENS or tokens * out_features * in_features <= MMA_PRODUCTS


def split_considered(tokens: int, out_features: int, in_features: int) -> bool:
    """`considered` for every tile of the split kernel."""
    return tokens >= PREFILL_TOKENS and tokens * out_features * in_features <= SPLIT_PRODUCTS


def resident_clusters(size: int, multiprocessors: int) -> int:
    """Clusters of `size` thread blocks, one block per multiprocessor, that run at once.

    A cluster lies inside a GPC, whose 16 or 18 multiprocessors 4 and 8 do not always divide: on an
    H100 (132) there are 33 times 4, and 31 clusters of 4 resident at once; of 8, 16 and 15. Of 3
    and 6 two fewer than fit by number are assumed.
    """
    return max(1, multiprocessors // size - {3: 2, 4: 2, 6: 2, 8: 1}.get(size, 0))


def work(
    variant: Variant,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
) -> Work:
    """What this variant does for one layer."""
    problem = tokens, out_features, in_features, multiprocessors
    if isinstance(variant, Tile):
        return prefill_work(variant, *problem)
    other = {RowBlocks: decode_work, MmaTile: mma_work, SplitTile: split_work}
    return other[type(variant)](variant, *problem)


def us(times: Times, of: Work) -> float:
    """The time of this work: the formula at the top of the file."""
    busiest = times.stage * of.stages + times.extra * of.extras
    shared, memory = times.total * of.totals, of.megabytes / times.rate
    loop = (busiest**SMOOTH + shared**SMOOTH + memory**SMOOTH) ** (1 / SMOOTH)
    rest = times.item * of.items + times.exchange * of.exchanges + times.crowd * of.crowds
    return loop + rest + times.constant


def predicted_us(
    variant: Variant, tokens: int, out_features: int, in_features: int, multiprocessors: int
) -> float:
    """The modelled time of one layer with this variant, one of TIMES."""
    return us(TIMES[variant], work(variant, tokens, out_features, in_features, multiprocessors))


@lru_cache(maxsize=4096)
def fastest(
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    variants: tuple[Variant, ...] = tuple(TIMES),
) -> Variant:
    """The variant for a problem on Hopper: the shortest predicted time; of equal ones the first.

    Args:
        variants: those that the native module was built with; what TIMES lacks is left out.
    Raises:
        ValueError: none of them is in TIMES and takes so many tokens.
    """
    problem = tokens, out_features, in_features, multiprocessors
    known = [v for v in TIMES if v in variants and considered(v, tokens, out_features, in_features)]
    return min(known, key=lambda variant: predicted_us(variant, *problem))


def _megabytes(tokens, out_features, in_features):
    weights = -(-out_features // PANEL) * PANEL * -(-in_features // STAGE) * STAGE * 9 / 8
    return (weights + 2 * tokens * (out_features + in_features)) / 1e6


def prefill_work(
    tile: Tile, tokens: int, out_features: int, in_features: int, multiprocessors: int
) -> Work:
    """What the prefill kernel does with this tile; see the top of the file."""
    stages = -(-in_features // STAGE)
    size = tile.cluster_rows * tile.cluster_tokens
    columns = -(-tokens // (tile.tokens * tile.cluster_tokens))
    tiles = -(-out_features // (tile.rows * tile.cluster_rows)) * columns
    resident = resident_clusters(size, multiprocessors)
    absent = 1 - tokens / (columns * tile.tokens * tile.cluster_tokens)  # of all columns

    waves, rest = divmod(tiles, resident)
    busiest = waves * stages
    items, exchanges, crowds = waves, 0.0, 0.0
    if rest and tile.streamed and rest * stages >= STAGES_OF_PART * resident:
        busiest += rest * stages / resident
        items, exchanges, crowds = items + 1, 1.0, resident / rest
    elif rest:
        most = min(resident // rest, tile.tokens // TOKENS_OF_PART, stages // STAGES_OF_PART)
        splits = max(1, most)
        busiest += -(-stages // splits)
        items, exchanges = items + 1, (splits - 1) / splits
        crowds = exchanges * rest * splits * size / multiprocessors
    sustained = tokens * out_features * in_features >= SUSTAINED_PRODUCTS
    return Work(
        stages=busiest,
        extras=busiest * absent,
        totals=tiles * stages * size / multiprocessors if sustained else 0.0,
        megabytes=_megabytes(tokens, out_features, in_features),
        items=items,
        exchanges=exchanges,
        crowds=crowds,
    )


def split_work(
    tile: SplitTile, tokens: int, out_features: int, in_features: int, multiprocessors: int
) -> Work:
    """What the split kernel does with this tile; see the top of the file."""
    stages, columns = -(-in_features // STAGE), -(-tokens // tile.tokens)
    wide = -(-tokens // (8 * columns)) * 8  # tokens of a column of tiles, which are equally wide
    tiles = -(-out_features // tile.rows) * columns
    waves = -(-tiles // resident_clusters(tile.split, multiprocessors))
    busiest = waves * -(-stages // tile.split)
    read = tiles * stages * (72 * tile.rows + 128 * wide)
    return Work(
        stages=busiest,
        extras=busiest * wide / tile.tokens,
        totals=read / 1e6,
        megabytes=_megabytes(tokens, out_features, in_features),
        items=waves,
        exchanges=waves * (tile.split - 1) / tile.split,
        crowds=0.0,
    )


def decode_work(
    blocks: RowBlocks, tokens: int, out_features: int, in_features: int, multiprocessors: int
) -> Work:
    """What the decode kernel does with these row blocks."""
    stages, rows = -(-in_features // STAGE), -(-out_features // blocks.rows)
    wide = next(wide for wide in (8, 16, 32, 64) if tokens <= wide or wide == DECODE_TOKENS) / 64
    waves = -(-rows // resident_clusters(blocks.split, multiprocessors))
    busiest = waves * -(-stages // blocks.split)
    return Work(
        stages=busiest,
        extras=busiest * wide,
        totals=rows * stages * wide / multiprocessors,
        megabytes=_megabytes(tokens, out_features, in_features),
        items=waves,
        exchanges=waves * wide,
        crowds=0.0,
    )


def mma_work(
    tile: MmaTile, tokens: int, out_features: int, in_features: int, multiprocessors: int
) -> Work:
    """What the mma.sp kernel does with this tile on Hopper, where shared memory alone limits how
    many blocks of a small tile a multiprocessor holds."""
    stages = -(-in_features // (STAGE * tile.split))
    blocks = -(-out_features // tile.rows) * -(-tokens // tile.tokens)
    weight_bytes, x_bytes = tile.split * tile.rows * 72, tile.split * 128  # x: of a token
    ring = tile.stages * (weight_bytes + x_bytes * tile.tokens)
    waves = -(-blocks // (multiprocessors * max(1, SM_BYTES // (ring + BLOCK_BYTES))))
    read = blocks * stages * (weight_bytes + x_bytes * min(tokens, tile.tokens))
    return Work(
        stages=waves * stages,
        extras=-(-blocks // multiprocessors) * stages,
        totals=read / 1e6,
        megabytes=_megabytes(tokens, out_features, in_features),
        items=waves,
        exchanges=0.0,
        crowds=0.0,
    )


# ---- the mma.sp kernel on other GPUs -------------------------------------------------------------


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
