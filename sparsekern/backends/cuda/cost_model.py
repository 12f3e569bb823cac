"""Which CUDA kernel computes a linear layer, and with which tile. Pure Python: no torch, no GPU.

On Hopper `fastest` predicts the time of every variant of TIMES and takes the shortest: the decode
kernel up to 64 tokens, the mma.sp kernel, too, or where there is little to compute, the prefill
kernel from 32 tokens on, the split kernel from there up to some size (`considered`). One formula
serves them all:

    us = smooth_max(stage * stages + extra * extras, total * totals, megabytes / rate)
         + item * items + exchange * exchanges + crowd * crowds + constant * launches
         + copy + ragged

    smooth_max(a, b, c) = (a^4 + b^4 + c^4)^(1/4)

The products, first, are what can be the limit of the main loop: the busiest cluster of thread
blocks, which computes its stages one after the other; something that all blocks share; the memory,
which delivers weights, x and y once. The others are added because nothing hides them. The
coefficients, on the left of each product, are those of the variant in TIMES. The counts, on the
right, follow from the problem and the number of multiprocessors (Work; of 64 in_features a stage,
of 128 with 8-bit weights, 256 with int4):

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

The split kernel counts as a prefill kernel whose tiles are all cut (split_work), with these
differences. Extras are the stages times the share of a tile's tokens that are there, because only
these are fetched. Totals are megabytes from L2, as in mma.sp, and not only in sustained work: with
all multiprocessors at work a stage takes longer than with half of them. Crowds are 0, because the
sums that are given away stay in the cluster, but where clusters share a tile (clusters_of_tile,
choose_clusters in csrc/linear/splitk_launch_sm90.cuh): there they are 1 for writing, counting and
the way back, plus the bytes that the last thread block of a tile reads in SUMS_READ.

Rows of x of 16 bits that 16 bytes do not divide (in_features % 8 == 4) the copy engine cannot fetch
as they are, but for every other one. So either x is copied first, and copy is the time of that
(`copy_us`); or half of it is, and there are two launches, of the even and of the odd tokens, whose
counts are added (`work`). What is expected to be faster is done (`in_halves`).

Rows of y that 16 bytes do not divide (out_features % 8) are put together by threads; ragged is the
time of that (`ragged_us`). Rows of x that are no multiple of a stage (in_features % 64 at 16 bits)
are in memory's count twice where the split kernel has more than one row of tiles: 184x11336 with
3211 tokens, x of 73 MB, takes 44 us in two rows of 128 and 28 in one of 256, 256x12800 with 6559
tokens 65 and 69. Why they are not found in L2 then is not known.

How many clusters run at once decides the first count (`resident_clusters`). The prefill kernel cuts
the tiles of a last, partly filled wave along in_features into as many parts as there are clusters
for, or streams them: every cluster takes an equal piece (choose_splits, choose_stream in
csrc/linear/prefill_launch_sm90.cuh). In a streamed wave one cluster adds up all pieces of a
tile; their number stands for crowds there.

Power: a GPU that multiplies for long lowers its clock until it draws what it may. Then the time
follows the energy, which idle multiprocessors do not use: all stages count, not those of the
busiest cluster, and each variant pays for the bytes that it moves per product. SUSTAINED_PRODUCTS
says from when on, which is where measurements begin to be made in bursts (profiling/tune.py).

Why no less: each term pays. In the 432 cells of the shipped table of an H100, picks of the model
with the coefficients that were fitted to them, and without one term, are slower than its own by so
much (by its own times; on average, at worst), and hit the measured winner less often:

    all terms                           288 of 432 winners
    max in place of the smooth maximum  254     0.9 %    17 %
    without totals                      268     0.8 %    26 %
    without extras                      264     1.2 %    88 %
    without constant                    268     1.7 %    30 %
    without crowds                      245     4.3 %   116 %
    without crowds and exchanges        212     7.3 %   163 %
    without items                       186    10.9 %   144 %
    the most frequent winner of other
    shapes at this number of tokens     125    21.6 %   223 %

8-bit operands: a stage has the bytes of a 16-bit one, but for its metadata, and takes the tensor
cores as long, for twice as many in_features. So the counts are those of the 16-bit variant with
half the stages and with the bytes of the types (Bits), and the coefficients their own (TIMES_8),
because widening weights costs a decode stage much of what its bytes save. int4 has TIMES_4, and
from narrow_model.FEWEST_TOKENS on a kernel and a model of its own. The promoted tiles are not in
it, because they are asked for by name (`promoted_tile`).

Units: microseconds; megabytes are 1e6 bytes, so rate is in megabytes per microsecond, TB/s.
TIMES is in coefficients.py, which says where it comes from; `python -m bench.fit` makes it. The
variants themselves are in variant.py. On other GPUs the mma.sp kernel computes every number of
tokens (mma_model.py).
"""

from __future__ import annotations

from functools import lru_cache
from operator import add
from typing import Any, NamedTuple

from sparsekern.backends.cuda import narrow_model
from sparsekern.backends.cuda.coefficients import TIMES, Times, table
from sparsekern.backends.cuda.narrow_model import NarrowTile
from sparsekern.backends.cuda.variant import (
    PLAIN,
    Bits,
    MmaTile,
    RowBlocks,
    SplitTile,
    Tile,
    Variant,
)

DECODE_TOKENS = 64  # the most that the decode kernel takes
PAIRED_TOKENS = 16  # the most with which its thread blocks or teams are paired (RowBlocks.paired)
# With more tokens than this and x of 16 bits, weights of 8 or 4 bits are widened to 16 bits in
# memory, and the kernel for those follows; else the decode kernel widens them in registers.
# Estimate, int4 of 28672x4096 on an H200: 48 MB read and 132 written at 4.0 TB/s are 45 us, beside
# the 16-bit kernel's 37 at 65 tokens and 219 at 1024, against 48 for every 64 tokens in decode; of
# 4096x14336 23 + 21 against 46. A wide weight would be faster in two parts up to some 80 tokens: 65
# against 82.
WIDEN_TOKENS = DECODE_TOKENS
# int4 has a kernel between the two, from narrow_model.FEWEST_TOKENS to this, and beyond where it
# pays (narrow_model.pays).
NARROW_TOKENS = narrow_model.MOST_TOKENS
GATED_TOKENS = 32  # the most of the decode kernel's gated form, which holds two sums per output
# On Hopper the mma.sp kernel is considered up to so many tokens, or tokens * out * in; with x that
# the copy engine can fetch up to MMA_MOST tokens. With more it was picked in five of 586 cells of
# an H200, and 3 to 17 % slower than the fastest in each. With x that it cannot fetch, 8 bytes at a
# time here, and more than MMA_TOKENS tokens it took 0.9 to 1.7 times what the formula says from
# 7000 in_features on, and was the fastest in none of 7 cells: up to MMA_UNALIGNED in_features.
MMA_TOKENS, MMA_PRODUCTS, MMA_MOST, MMA_UNALIGNED = 64, 2**30, 1024, 4096
PREFILL_TOKENS = 32  # the fewest at which the prefill kernel is, and the split kernel
SPLIT_PRODUCTS = 2**36  # the split kernel is considered up to so many tokens * out * in

# As in the kernels: the fewest stages in a part of a tile, the fewest tokens that a part finishes,
# and rows of a tile of tile64.
STAGES_OF_PART, TOKENS_OF_PART, PANEL = 4, 32, 64
# In the split kernel: the most clusters that share a tile, and the tokens of the smallest part of a
# tile that a thread block finishes.
CLUSTERS_OF_TILE, TOKENS_OF_SUMS = 16, 16
# Bytes of sums that one multiprocessor was estimated to read from L2 while it writes, counts and
# comes back, 2 us at 50 bytes a clock; what a crowd of them takes is fitted.
SUMS_READ = 170_000

# us, and us a megabyte of y, after the medians of an H200 in 130 cells beside a fit to aligned
# ones: 0.5 to 0.8 a megabyte of tiles and split tiles, 1.5 to 3 of mma.sp. Row blocks had too few
# cells with so much of y, and are taken to store as mma.sp does. Split tiles of 128 rows take 0.4
# more than those of 256 (medians of 667 and 334 times of more than a megabyte).
RAGGED: dict[type, tuple[float, float]] = {
    RowBlocks: (0.2, 2.0),
    MmaTile: (0.3, 2.0),
    SplitTile: (0.5, 0.6),
    Tile: (0.5, 0.6),
}
RAGGED_HALF = 0.4  # us a megabyte more, split tiles of 128 rows

SMOOTH = 4  # exponent of the smooth maximum
SUSTAINED_PRODUCTS = 2**33  # tokens * out * in that draw all the power there is, one after another
SM_BYTES, BLOCK_BYTES = 228 * 1024, 1024  # shared memory of a multiprocessor; the system's, a block


class Work(NamedTuple):
    """What a variant does for a problem: the counts at the top of the file."""

    stages: float
    extras: float
    totals: float
    megabytes: float
    items: float
    exchanges: float
    crowds: float
    copy: float = 0.0  # us
    launches: float = 1.0
    ragged: float = 0.0  # us


def considered(
    variant: Variant, tokens: int, out_features: int, in_features: int, bits: Bits = PLAIN
) -> bool:
    """True when the variant may be chosen for this problem on Hopper. Of 8-bit x those for many
    tokens are considered for few, too: it has no others."""
    if bits.x == 8:
        tokens = max(tokens, PREFILL_TOKENS)
    if isinstance(variant, Tile):
        # Tiles of 208 tokens take 1.1 to 2.4 times those of 192 where rows of y are not aligned: 25
        # cells of an H200 with more than 150 tokens.
        whole = variant.tokens % TOKENS_OF_PART == 0 or out_features % 8 == 0
        return tokens >= PREFILL_TOKENS and whole
    if isinstance(variant, RowBlocks):
        return tokens <= DECODE_TOKENS
    if isinstance(variant, SplitTile):
        return split_considered(tokens, out_features, in_features)
    if isinstance(variant, NarrowTile):
        return narrow_model.considered(tokens)
    return mma_considered(tokens, out_features, in_features)


def mma_considered(tokens: int, out_features: int, in_features: int) -> bool:
    """`considered` for every tile of the mma.sp kernel."""
    little = tokens <= MMA_TOKENS or tokens * out_features * in_features <= MMA_PRODUCTS
    if in_features % 8:
        return little and (tokens <= MMA_TOKENS or in_features <= MMA_UNALIGNED)
    return little and tokens <= MMA_MOST


def split_considered(tokens: int, out_features: int, in_features: int) -> bool:
    """`considered` for every tile of the split kernel."""
    return tokens >= PREFILL_TOKENS and tokens * out_features * in_features <= SPLIT_PRODUCTS


def resident_clusters(size: int, multiprocessors: int) -> int:
    """Clusters of `size` thread blocks, one block per multiprocessor, that run at once.

    A cluster lies inside a GPC, whose 16 or 18 multiprocessors few sizes divide: of 132 there are
    33 times 4, and 31 clusters of 4 resident at once; of 8, 16 and 15. Of 3, 6 and 16 as the times
    of an H200 say: one more, and there is a second wave.
    """
    return max(1, multiprocessors // size - {3: 5, 4: 2, 6: 5, 8: 1, 16: 2}.get(size, 0))


def work(
    variant: Variant,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> Work:
    """What this variant does for one layer whose x is contiguous."""
    problem = tokens, out_features, in_features, multiprocessors, bits
    of, fetched = _counts, bits.x != 16 or tokens < 2 or in_features % 8 == 0
    if not fetched and not isinstance(variant, MmaTile):
        of = _halves if in_halves(variant, *problem) else _copied
    counts = of(variant, *problem)
    return counts._replace(ragged=ragged_us(variant, tokens, out_features))


def in_halves(
    variant: Variant,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> bool:
    """Whether half of an x of which the variant can fetch every other row is copied, for two
    launches, and not all: where that is expected to be faster. Not with weights of fewer than 16
    bits, which would be widened twice, and not where no coefficients say what it costs."""
    times = table(PLAIN).get(variant)
    if bits != PLAIN or tokens < 2 or times is None or isinstance(variant, MmaTile):
        return False
    problem = tokens, out_features, in_features, multiprocessors
    return us(times, _halves(variant, *problem)) < us(times, _copied(variant, *problem))


def _counts(variant: Variant, *problem: Any) -> Work:
    """Of one launch, of x as it is."""
    if isinstance(variant, Tile):
        return prefill_work(variant, *problem)
    other = {RowBlocks: decode_work, MmaTile: mma_work, SplitTile: split_work}
    return other[type(variant)](variant, *problem)


def _copied(variant: Variant, tokens: int, out_features: int, in_features: int, *gpu: Any) -> Work:
    counts = _counts(variant, tokens, out_features, in_features, *gpu)
    return counts._replace(copy=copy_us(tokens, in_features))


def _halves(variant: Variant, tokens: int, *layer: Any) -> Work:
    """Of two launches and a copy of half the tokens. Sums: of two equal launches the formula gives
    twice the time then."""
    even, odd = tokens - tokens // 2, tokens // 2
    both = map(add, _counts(variant, even, *layer), _counts(variant, odd, *layer))
    return Work(*both)._replace(copy=copy_us(odd, layer[1]))


def us(times: Times, of: Work) -> float:
    """The time of this work: the formula at the top of the file."""
    busiest = times.stage * of.stages + times.extra * of.extras
    shared, memory = times.total * of.totals, of.megabytes / times.rate
    loop = (busiest**SMOOTH + shared**SMOOTH + memory**SMOOTH) ** (1 / SMOOTH)
    rest = times.item * of.items + times.exchange * of.exchanges + times.crowd * of.crowds
    return loop + rest + times.constant * of.launches + of.copy + of.ragged


def predicted_us(
    variant: Variant,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> float:
    """The modelled time of one layer with this variant, one of its `table` or a NarrowTile."""
    if isinstance(variant, NarrowTile):
        resident = resident_clusters(variant.cluster_rows * variant.split, multiprocessors)
        size = tokens, out_features, in_features
        return narrow_model.predicted_us(variant, *size, multiprocessors, resident)
    problem = tokens, out_features, in_features, multiprocessors, bits
    return us(table(bits)[variant], work(variant, *problem))


@lru_cache(maxsize=4096)
def fastest(
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    variants: tuple[Variant, ...] = tuple(TIMES),
    bits: Bits = PLAIN,
) -> Variant:
    """The variant for a problem on Hopper: the shortest predicted time; of equal ones the first.
    Of the narrow kernel's where one is considered.

    Args:
        variants: those that the native module was built with for these types; what their `table`
            lacks is left out.
    Raises:
        ValueError: none of them is in the table and takes so many tokens.
    """
    problem = tokens, out_features, in_features, multiprocessors, bits
    size = tokens, out_features, in_features, bits
    known = [v for v in table(bits) if v in variants and considered(v, *size)]
    known = [v for v in known if not same_as_another(v, *problem)]
    narrow = [v for v in variants if isinstance(v, NarrowTile) and considered(v, *size)]
    return min(narrow or known, key=lambda variant: predicted_us(variant, *problem))


@lru_cache(maxsize=4096)
def promoted_tile(
    tokens: int, out_features: int, multiprocessors: int, tiles: tuple[Tile, ...]
) -> Tile:
    """The one of the promoted `tiles` that leaves the fewest outputs to the busiest multiprocessor;
    of equal ones the one with the largest cluster, whose tiles share x. Nothing here is measured.

    Raises:
        ValueError: no tiles.
    """

    def cost(tile: Tile) -> tuple[int, int]:
        size = tile.cluster_rows * tile.cluster_tokens
        columns = -(-tokens // (tile.tokens * tile.cluster_tokens))
        count = -(-out_features // (tile.rows * tile.cluster_rows)) * columns
        waves = -(-count // resident_clusters(size, multiprocessors))
        return waves * tile.rows * tile.tokens, -size

    return min(tiles, key=cost)


def quantize_us(tokens: int, features: int) -> float:
    """Modelled time of quantising x to 8 bits, on top of the product that follows it: the start, a
    row in one thread block, the bytes of all rows.

    Source: w8a8+quantize against w8a8 in bench/records/2026-11-29-nvidia-h200.jsonl, 1 to 64 tokens
    and 4096 to 28672 features; within 0.8 us of all 24.
    """
    return 0.5 + 1e-4 * features + 3 * tokens * features / 2.4e6


def copy_us(tokens: int, in_features: int) -> float:
    """Modelled time of copying x of 16 bits to rows that 16 bytes divide, ahead of a kernel, with
    what is lost because that does not overlap: 4.0 us as an H200 took, and bytes read and written
    at 4 TB/s. Element by element it took up to twice as long, 50 us of x of 43 MB; 8 bytes at a
    time, as it is copied now, it is not timed."""
    return 4.0 + tokens * in_features / 1e6


def ragged_us(variant: Variant, tokens: int, out_features: int) -> float:
    """What rows of y cost that 16 bytes do not divide, because their ends and pieces are put
    together by threads (RAGGED); 0 of others."""
    if out_features % 8 == 0:
        return 0.0
    start, of_megabyte = RAGGED[type(variant)]
    if isinstance(variant, SplitTile) and variant.rows == 2 * PANEL:
        of_megabyte += RAGGED_HALF
    return start + of_megabyte * tokens * out_features * 2 / 1e6


def _megabytes(tokens: int, out_features: int, in_features: int, bits: Bits) -> float:
    stages = -(-in_features // bits.stage)
    weights = -(-out_features // PANEL) * PANEL * stages * bits.row_bytes
    return (weights + tokens * (2 * out_features + bits.x / 8 * in_features)) / 1e6


def prefill_work(
    tile: Tile,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> Work:
    """What the prefill kernel does with this tile; see the top of the file."""
    stages = -(-in_features // bits.stage)
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
        megabytes=_megabytes(tokens, out_features, in_features, bits),
        items=items,
        exchanges=exchanges,
        crowds=crowds,
    )


def may_cut(tile: Tile, tokens: int, out_features: int, multiprocessors: int) -> bool:
    """Whether the prefill kernel may cut tiles along in_features, for which it needs a workspace.
    False only where it surely does not: its tiles are one wave, of more than half of the clusters
    that could ever run at once (choose_splits)."""
    size = tile.cluster_rows * tile.cluster_tokens
    columns = -(-tokens // (tile.tokens * tile.cluster_tokens))
    tiles = -(-out_features // (tile.rows * tile.cluster_rows)) * columns
    one_wave = tiles <= resident_clusters(size, multiprocessors)
    return tile.streamed or not (one_wave and 2 * tiles > multiprocessors // size)


def columns_of_tiles(tile: SplitTile, tokens: int, out_features: int, multiprocessors: int) -> int:
    """Columns of tiles of the split kernel, as choose_columns in csrc/linear has them."""
    fewest = -(-tokens // tile.tokens)
    if tile.across or out_features > tile.rows or out_features >= tokens:
        return fewest
    most = -(-tokens // (tile.tokens // 2))
    return max(fewest, min(most, resident_clusters(tile.split, multiprocessors)))


def clusters_of_tile(
    tile: SplitTile,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> int:
    """Clusters of the split kernel that share a tile; 1 but across clusters."""
    if not tile.across:
        return 1
    tiles = -(-out_features // tile.rows) * -(-tokens // tile.tokens)
    resident = resident_clusters(tile.split, multiprocessors)
    most = -(-in_features // bits.stage) // (tile.split * STAGES_OF_PART)
    return max(1, min(resident // tiles, most, CLUSTERS_OF_TILE))


def same_as_another(
    variant: Variant,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> bool:
    """True where what runs is another variant: for a tile across clusters of which each would get
    one, and for paired row blocks with more tokens than PAIRED_TOKENS."""
    if isinstance(variant, RowBlocks):
        return variant.paired > 0 and tokens > PAIRED_TOKENS
    problem = tokens, out_features, in_features, multiprocessors, bits
    across = variant if isinstance(variant, SplitTile) and variant.across else None
    return across is not None and clusters_of_tile(across, *problem) == 1


def split_work(
    tile: SplitTile,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> Work:
    """What the split kernel does with this tile; see the top of the file."""
    stages, rows = -(-in_features // bits.stage), -(-out_features // tile.rows)
    columns = columns_of_tiles(tile, tokens, out_features, multiprocessors)
    wide = -(-tokens // (8 * columns)) * 8  # tokens of a column of tiles, which are equally wide
    columns = -(-tokens // wide)
    tiles = rows * columns
    problem = tokens, out_features, in_features, multiprocessors, bits
    clusters = clusters_of_tile(tile, *problem)
    waves = -(-tiles * clusters // resident_clusters(tile.split, multiprocessors))
    busiest = waves * -(-stages // (tile.split * clusters))
    panels = -(-out_features // PANEL) * PANEL  # a tile fetches those that there are
    read = stages * (columns * bits.row_bytes * panels + tiles * 128 * wide)
    own = -(-tile.tokens // (TOKENS_OF_SUMS * tile.split)) * TOKENS_OF_SUMS
    sums = clusters * own * tile.rows * 4  # bytes
    x_bytes = tokens * in_features * bits.x / 8
    again = x_bytes if rows > 1 and in_features % bits.stage else 0.0
    return Work(
        stages=busiest,
        extras=busiest * wide / tile.tokens,
        totals=read / 1e6,
        megabytes=_megabytes(tokens, out_features, in_features, bits) + again / 1e6,
        items=waves,
        exchanges=waves * (tile.split - 1) / tile.split,
        crowds=1 + sums / SUMS_READ if clusters > 1 else 0.0,
    )


def decode_work(
    blocks: RowBlocks,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> Work:
    """What the decode kernel does with these row blocks."""
    stages, rows = -(-in_features // bits.stage), -(-out_features // blocks.rows)
    wide = next(wide for wide in (8, 16, 32, 64) if tokens <= wide or wide == DECODE_TOKENS) / 64
    resident = resident_clusters(blocks.split, multiprocessors) * (2 if blocks.paired == 1 else 1)
    waves = -(-rows // resident)
    busiest = waves * -(-stages // (blocks.split * (2 if blocks.paired == 2 else 1)))
    return Work(
        stages=busiest,
        extras=busiest * wide,
        totals=rows * stages * wide / multiprocessors,
        megabytes=_megabytes(tokens, out_features, in_features, bits),
        items=waves,
        exchanges=waves * wide,
        crowds=0.0,
    )


def mma_work(
    tile: MmaTile,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> Work:
    """What the mma.sp kernel does with this tile on Hopper, where shared memory alone limits how
    many blocks of a small tile a multiprocessor holds."""
    stages = -(-in_features // (bits.stage * tile.split))
    blocks = -(-out_features // tile.rows) * -(-tokens // tile.tokens)
    weight_bytes, x_bytes = tile.split * tile.rows * bits.row_bytes, tile.split * 128  # x: a token
    ring = tile.stages * (weight_bytes + x_bytes * tile.tokens)
    waves = -(-blocks // (multiprocessors * max(1, SM_BYTES // (ring + BLOCK_BYTES))))
    read = blocks * stages * (weight_bytes + x_bytes * min(tokens, tile.tokens))
    return Work(
        stages=waves * stages,
        extras=-(-blocks // multiprocessors) * stages,
        totals=read / 1e6,
        megabytes=_megabytes(tokens, out_features, in_features, bits),
        items=waves,
        exchanges=0.0,
        crowds=0.0,
    )
