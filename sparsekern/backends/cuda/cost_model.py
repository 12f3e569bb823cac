"""Which CUDA kernel computes a linear layer, and with which tile. Pure Python: no torch, no GPU.

On Hopper `fastest` predicts the time of every variant of TIMES and takes the shortest: the decode
kernel up to 64 tokens, the mma.sp kernel, too, or where there is little to compute, the prefill
kernel from 32 tokens on, the split kernel from there up to some size (`considered`). One formula
serves them all:

    us = smooth_max(stage * stages + extra * extras, total * totals, megabytes / rate)
         + item * items + exchange * exchanges + crowd * crowds + constant + copy

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

The split kernel counts as a prefill kernel whose tiles are all cut (split_work), with three
differences. Extras are the stages times the share of a tile's tokens that are there, because only
these are fetched. Totals are megabytes from L2, as in mma.sp, and not only in sustained work: with
all multiprocessors at work a stage takes longer than with half of them. Crowds are 0: the sums that
are given away stay in the cluster.

Copy: the time of `copy_us`, where the kernel cannot fetch rows of x as they are (`work`).

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
Where TIMES comes from: see there. `python -m bench.fit` makes it.

On other GPUs the mma.sp kernel computes every number of tokens: `mma_tile`, at the end of this
file. Its model is an estimate from the data sheets and is fitted to nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from sparsekern.backends.cuda import narrow_model
from sparsekern.backends.cuda.narrow_model import NarrowTile

DECODE_TOKENS = 64  # the most that the decode kernel takes
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


class Bits(NamedTuple):
    """Bits of a value of the weight and of x; y has 16. TIMES was measured with 16 of both."""

    weight: int = 16
    x: int = 16

    @property
    def stage(self) -> int:
        """in_features of a stage."""
        return STAGE * 16 // self.weight

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the weight in a stage: 64 of values, and a nibble per group of four."""
        return 64 + self.stage // 8


PLAIN = Bits()


class RowBlocks(NamedTuple):
    """One entry of SK_DECODE_CONFIGS in csrc/linear/configs.h."""

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
    promoted: bool = False  # sums of e4m3 in float32, not with the bits of the tensor cores

    def __str__(self) -> str:
        cluster = f"{self.cluster_rows}x{self.cluster_tokens}"
        text = f"{self.rows}x{self.tokens} cluster {cluster}"
        return text + ", streamed" * self.streamed + ", promoted" * self.promoted


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


Variant = RowBlocks | Tile | MmaTile | SplitTile | NarrowTile


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
    copy: float = 0.0  # us


# Made by `python -m bench.fit` from what an H200 measured (132 multiprocessors, 700 W, bfloat16):
# 183 cells of random shapes (`bench random` of seeds 101 to 104, most with few out_features or
# short in_features) and 144 of Llama-3 8B and 70B (`sparsekern tune`), beginning at the older
# coefficients of an H100's 432 cells. Of odd out_features the times of tiles and split tiles are
# left out, because their stores have changed since. Slower than the fastest of all variants, on
# average and at worst: in the fitted cells 2.6 and 73 % (7671x132, 253 tokens), in those of the
# Llama-3 shapes 1.6 and 27 %; in those of six parts of the random shapes, each by a fit to the
# others, 3.5 and 73 %; in 58 cells of other random shapes (seed 19) 1.8 and 23 %, by older
# coefficients 4.5 and 61 %. The settings of the fit were chosen by looking at both, so a new seed
# may have more; it is not measured. A variant that is not here is never chosen (`that_matter` in
# bench/fit.py). On another GPU the counts follow from its multiprocessors, and these coefficients,
# its rates above all, are a guess.
TIMES: dict[Variant, Times] = {
    RowBlocks(256, 1): Times(0.144, 0.351, 0.428, 4.29, 0.0889, 2.78, 0, 0.801),
    RowBlocks(256, 2): Times(0.153, 0.245, 0.311, 4.33, 0.0924, 4.98, 0, 0.996),
    RowBlocks(256, 4): Times(0.148, 0.25, 0.01, 4.07, 0.553, 4, 0, 0.697),
    RowBlocks(256, 8): Times(0.146, 0.175, 0.01, 3.94, 0.822, 4.44, 0, 0.451),
    RowBlocks(128, 2): Times(0.124, 0.24, 0.01, 4.48, 0.792, 2.62, 0, 0.591),
    RowBlocks(128, 1): Times(0.127, 0.229, 0.01, 4.37, 0.394, 2.47, 0, 0.383),
    RowBlocks(128, 4): Times(0.128, 0.233, 0.01, 4.03, 1.15, 2.64, 0, 0.222),
    RowBlocks(128, 8): Times(0.127, 0.154, 0.555, 3.96, 1.51, 2.34, 0, 0.0753),
    Tile(256, 192, 1, 1): Times(0.541, 0.448, 0.719, 3.79, 1.67, 5.14, 6.9, 2.89),
    Tile(256, 192, 2, 1): Times(0.552, 0.221, 0.679, 3.48, 2.16, 3.33, 8.54, 2.57),
    Tile(256, 192, 1, 2): Times(0.608, 0.0533, 0.66, 3.26, 0.63, 4.23, 8.12, 4.08),
    Tile(256, 192, 4, 1): Times(0.555, 0.0736, 0.747, 4.57, 2.18, 3.44, 9.76, 2.66),
    Tile(256, 192, 4, 2): Times(0.572, 0.0234, 0.732, 3.8, 1.16, 8.8, 0.103, 3.6),
    Tile(256, 192, 2, 1, True): Times(0.742, 0.138, 0.314, 3.23, 1.42, 6.49, 2.21, 2.58),
    Tile(256, 160, 1, 1): Times(0.505, 0.0518, 0.571, 3.9, 2.12, 3.37, 7.49, 2.56),
    Tile(256, 160, 2, 1): Times(0.537, 0.0476, 0.497, 4, 3.24, 1.13, 9.23, 1.25),
    Tile(256, 128, 1, 1): Times(0.402, 0.156, 0.51, 4.27, 0.416, 3.15, 5.71, 3.95),
    Tile(256, 128, 2, 1): Times(0.412, 0.14, 0.478, 4.16, 1.99, 3.21, 5.57, 2.34),
    Tile(256, 128, 1, 2): Times(0.432, 0.0606, 0.469, 4.8, 0.485, 2.25, 7.48, 3.88),
    Tile(256, 128, 2, 2): Times(0.396, 0.109, 0.49, 4.8, 4.26, 3.12, 6.82, 0.114),
    Tile(256, 128, 4, 2): Times(0.388, 0.0305, 0.524, 4.18, 1.4, 7.2, 0.101, 2.9),
    Tile(256, 128, 2, 1, True): Times(0.517, 0.162, 0.34, 3.95, 0.864, 4.32, 1.65, 3.31),
    Tile(256, 96, 1, 1): Times(0.322, 0.129, 0.401, 4.31, 0.437, 1.53, 7.93, 3.74),
    Tile(256, 64, 1, 1): Times(0.258, 0.194, 0.308, 4.26, 0.665, 2.51, 6.14, 3.27),
    Tile(256, 208, 2, 1): Times(0.61, 0.204, 0.732, 3.23, 1.09, 0.101, 14.4, 3.85),
    Tile(256, 208, 1, 2): Times(0.631, 0.0515, 0.737, 3.37, 0.679, 5.77, 8.24, 4.23),
    MmaTile(64, 32, 2, 1, 2, 5): Times(0.364, 0.0373, 0.066, 4.8, 1.74, 0, 0, 0.088),
    MmaTile(64, 16, 2, 1, 4, 3): Times(0.451, 0.0597, 0.0984, 4.32, 1.16, 0, 0, 0.0791),
    MmaTile(64, 8, 2, 1, 4, 4): Times(0.174, 0.173, 0.0744, 4.43, 1.2, 0, 0, 0.0765),
    MmaTile(32, 16, 1, 1, 4, 5): Times(0.325, 0.0628, 0.0358, 4.8, 1.06, 0, 0, 0.078),
    MmaTile(32, 8, 1, 1, 4, 6): Times(0.17, 0.0808, 0.0661, 4.65, 1, 0, 0, 0.154),
    SplitTile(128, 64, 1): Times(0.206, 0.0217, 0.0908, 4.54, 1.61, 0, 0, 0.0793),
    SplitTile(128, 64, 2): Times(0.217, 0.0425, 0.0939, 4.8, 1.13, 1.76, 0, 0.0996),
    SplitTile(128, 64, 3): Times(0.185, 0.0454, 0.122, 4.8, 1.44, 1.93, 0, 0.0943),
    SplitTile(128, 64, 4): Times(0.221, 0.041, 0.131, 4.8, 1.11, 1.31, 0, 0.0924),
    SplitTile(128, 64, 6): Times(0.14, 0.0458, 0.162, 4.8, 1.75, 1.95, 0, 0.1),
    SplitTile(128, 96, 2): Times(0.227, 0.044, 0.0921, 4.8, 1.31, 2.03, 0, 0.0989),
    SplitTile(128, 96, 3): Times(0.214, 0.0445, 0.115, 4.8, 1.54, 2.04, 0, 0.0989),
    SplitTile(128, 128, 1): Times(0.23, 0.0382, 0.0846, 4.27, 1.94, 0, 0, 0.0969),
    SplitTile(128, 128, 2): Times(0.234, 0.042, 0.0883, 4.8, 1.6, 2.48, 0, 0.0987),
    SplitTile(128, 128, 3): Times(0.226, 0.0462, 0.107, 4.51, 1.88, 2.38, 0, 0.0989),
    SplitTile(256, 64, 1): Times(0.223, 0.0391, 0.0896, 4.14, 1.99, 0, 0, 0.0938),
    SplitTile(256, 96, 1): Times(0.293, 0.0319, 0.0999, 4.2, 3.28, 0, 0, 0.115),
    SplitTile(256, 96, 2): Times(0.29, 0.0462, 0.103, 4.43, 2.86, 2.91, 0, 0.105),
    SplitTile(256, 128, 1): Times(0.366, 0.0378, 0.11, 4.03, 3.69, 0, 0, 0.102),
    SplitTile(256, 128, 2): Times(0.381, 0.0508, 0.112, 4.31, 3.15, 3.35, 0, 0.101),
    SplitTile(128, 64, 8): Times(0.183, 0.0467, 0.142, 4.68, 1.79, 1.99, 0, 0.0978),
    SplitTile(128, 64, 16): Times(0.262, 0.0599, 0.167, 2.59, 2.1, 2.32, 0, 0.1),
    SplitTile(128, 128, 8): Times(0.169, 0.189, 0.0952, 3.58, 1.98, 2.36, 0, 0.0908),
}

# The same for weights of 8 bits: tiles and split tiles with x of 8 bits, row blocks with x of 16.
# From an H200 (132 multiprocessors, 700 W), e4m3 with y of bfloat16: the q+k+v, o, gate+up and down
# layers of Llama-3 8B and 70B, 13 numbers of tokens from 1 to 8192, up to 64 with x of 16 bits: 152
# cells. So few cannot fit every variant, and those of tiles are an H100's of 16 bits, scaled
# (`scaled` in bench/fit.py), but for a few. How well it picks: csrc/notes/splitk.md, "8
# bits". int8 moves the same bytes in the same clocks.
TIMES_8: dict[Variant, Times] = {
    RowBlocks(256, 1): Times(0.379, 0.719, 0.831, 4.73, 0, 2.05, 0, 3.87),
    RowBlocks(256, 2): Times(0.406, 0.519, 0.943, 3.97, 1.8, 5.98, 0, 0),
    RowBlocks(256, 4): Times(0.294, 0.716, 0.985, 2.69, 0.656, 3.4, 0, 1.26),
    RowBlocks(128, 2): Times(0.219, 0.54, 0.475, 4.28, 3.36, 1.31, 0, 0.291),
    Tile(256, 192, 2, 1): Times(0.762, 0.281, 0.292, 4, 2.95, 1.93, 8.63, 1.21),
    Tile(256, 192, 2, 2): Times(0.683, 0.434, 0.479, 4, 3.31, 7.3, 8.28, 0),
    Tile(256, 160, 2, 1): Times(0.668, 0.0186, 0.396, 3.4, 2.1, 0.523, 9.06, 0.4),
    Tile(256, 128, 2, 1): Times(0.574, 0.113, 0.331, 3.67, 1.4, 2.48, 9.91, 0.43),
    Tile(256, 128, 1, 2): Times(0.565, 0.00634, 0.279, 4, 0.489, 1.35, 6.84, 2.57),
    Tile(256, 128, 4, 2): Times(0.559, 0, 0.313, 4, 0.826, 6.99, 0.000863, 0.374),
    Tile(256, 96, 1, 1): Times(0.446, 0.123, 0.29, 3.93, 0.44, 0.717, 11.5, 0.899),
    Tile(256, 208, 2, 1): Times(0.845, 0.162, 0.321, 3.39, 0.969, 0.0574, 14.6, 2.78),
    SplitTile(128, 64, 2): Times(0.309, 0, 0.0925, 4.91, 1.32, 0.294, 0, 0),
    SplitTile(128, 64, 3): Times(0.172, 0, 0.0907, 4.63, 3.26, 0.572, 0, 0),
    SplitTile(128, 64, 4): Times(0.276, 0, 0.0763, 4.41, 1.78, 0.284, 0, 0),
    SplitTile(128, 64, 6): Times(0.00201, 0, 0.135, 4.95, 2.64, 0.405, 0, 0),
    SplitTile(128, 96, 1): Times(0.243, 0, 0.0907, 4.82, 2.02, 0, 0, 0),
    SplitTile(128, 96, 2): Times(0.308, 0, 0.079, 4.95, 1.94, 0.409, 0, 0),
    SplitTile(128, 96, 3): Times(0.236, 0, 0.0969, 4.38, 2.88, 0.509, 0, 0),
    SplitTile(128, 128, 1): Times(0.286, 0, 0.0943, 4.61, 1.89, 0, 0, 0),
    SplitTile(128, 128, 2): Times(0.341, 0, 0.08, 4.75, 2.13, 0.459, 0, 0),
    SplitTile(128, 128, 3): Times(0.248, 0, 0.0943, 3.93, 3.43, 0.572, 0, 0),
    SplitTile(128, 128, 4): Times(0.144, 0, 0.0848, 4.95, 3.66, 0.609, 0, 0),
    SplitTile(256, 64, 1): Times(0.3, 0, 0.0996, 4.13, 3.04, 0, 0, 0),
    SplitTile(256, 96, 2): Times(0.367, 0, 0.0952, 4.08, 3.95, 0.55, 0, 0),
    SplitTile(256, 128, 2): Times(0.593, 0, 0.0556, 3.87, 4.52, 0.647, 0, 0),
    Tile(256, 192, 1, 1): Times(0.604, 0.522, 0.727, 4.25, 2.95, 0.855, 10.4, 0),
    Tile(256, 192, 1, 2): Times(0.687, 0, 0.626, 2.9, 2.89, 0, 14.4, 0),
    Tile(256, 192, 4, 1): Times(0.648, 0, 0.688, 4.8, 3.23, 0, 15.3, 1.07),
    Tile(256, 192, 2, 1, True): Times(0.269, 0.797, 0.779, 3.65, 2.94, 8.26, 1.89, 1.32),
    Tile(256, 128, 1, 1): Times(0.56, 0.269, 0.327, 4.02, 1.49, 0, 9.86, 1.41),
    Tile(256, 128, 2, 1, True): Times(0.398, 0.305, 0.519, 3.92, 1.44, 11.4, 1.24, 0),
    Tile(256, 64, 2, 1): Times(0.304, 0, 0.355, 4, 1.01, 1.78, 6.74, 2.56),
    Tile(256, 208, 1, 2): Times(0.85, 0, 0.436, 3.17, 3.74, 1.89, 13.2, 0),
}


# Weights of int4: row blocks as of 8 bits, which are widened at about the same cost (SASS,
# csrc/notes/decode.md), with twice the in_features in a stage. Not a fit: of 64 tokens it gives
# 42.5, 13.5, 14.0 and 34.0 us for what took 47.6, 14.7, 15.5 and 38.8 on an H200 (28672x4096 in 256
# rows, split 1; 4096x4096, 6144x4096 and 4096x14336 in 256 rows, split 4); of 1 to 16 tokens 1.2 to
# 1.6 times of what it takes, whatever the variant. TIMES would give 256 rows, split 1 for 6144x4096
# at 1 token, 24 thread blocks, which took 12.0 us.
TIMES_4: dict[Variant, Times] = {
    variant: times._replace(stage=2 * times.stage, extra=2 * times.extra, total=2 * times.total)
    for variant, times in TIMES_8.items()
    if isinstance(variant, RowBlocks)
}


def table(bits: Bits) -> dict[Variant, Times]:
    """The coefficients for these operands: TIMES_8, TIMES_4 or TIMES."""
    if bits.weight == 4:
        return TIMES_4
    return TIMES_8 if bits.weight == 8 else TIMES


def name(variant: Variant) -> str:
    """What `sparsekern.explain` calls it: the kernel, then the variant."""
    kernels = {RowBlocks: "decode", Tile: "prefill", MmaTile: "mma", SplitTile: "split"}
    kernel = kernels.get(type(variant), "narrow")
    return f"{kernel} {variant}"


def considered(
    variant: Variant, tokens: int, out_features: int, in_features: int, bits: Bits = PLAIN
) -> bool:
    """True when the variant may be chosen for this problem on Hopper. Of 8-bit x those for many
    tokens are considered for few, too: it has no others."""
    if bits.x == 8:
        tokens = max(tokens, PREFILL_TOKENS)
    if isinstance(variant, Tile):
        return tokens >= PREFILL_TOKENS
    if isinstance(variant, RowBlocks):
        return tokens <= DECODE_TOKENS
    if isinstance(variant, SplitTile):
        return split_considered(tokens, out_features, in_features)
    if isinstance(variant, NarrowTile):
        return narrow_model.considered(tokens)
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
    and 6 two fewer than fit by number are assumed, of 16 one.
    """
    return max(1, multiprocessors // size - {3: 2, 4: 2, 6: 2, 8: 1, 16: 1}.get(size, 0))


def work(
    variant: Variant,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> Work:
    """What this variant does for one layer."""
    problem = tokens, out_features, in_features, multiprocessors, bits
    if isinstance(variant, Tile):
        counts = prefill_work(variant, *problem)
    else:
        other = {RowBlocks: decode_work, MmaTile: mma_work, SplitTile: split_work}
        counts = other[type(variant)](variant, *problem)
    copied = bits.x == 16 and in_features % 8 != 0 and not isinstance(variant, MmaTile)
    return counts._replace(copy=copy_us(tokens, in_features)) if copied else counts


def us(times: Times, of: Work) -> float:
    """The time of this work: the formula at the top of the file."""
    busiest = times.stage * of.stages + times.extra * of.extras
    shared, memory = times.total * of.totals, of.megabytes / times.rate
    loop = (busiest**SMOOTH + shared**SMOOTH + memory**SMOOTH) ** (1 / SMOOTH)
    rest = times.item * of.items + times.exchange * of.exchanges + times.crowd * of.crowds
    return loop + rest + times.constant + of.copy


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
    what is lost because that does not overlap. Within a third of what it took on an H200, 3.7 to 50
    us of x of 8 KB to 43 MB."""
    return 4.0 + 2 * tokens * in_features / 1e6


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


def split_work(
    tile: SplitTile,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    bits: Bits = PLAIN,
) -> Work:
    """What the split kernel does with this tile; see the top of the file."""
    stages, columns = -(-in_features // bits.stage), -(-tokens // tile.tokens)
    wide = -(-tokens // (8 * columns)) * 8  # tokens of a column of tiles, which are equally wide
    tiles = -(-out_features // tile.rows) * columns
    waves = -(-tiles // resident_clusters(tile.split, multiprocessors))
    busiest = waves * -(-stages // tile.split)
    read = tiles * stages * (bits.row_bytes * tile.rows + 128 * wide)
    return Work(
        stages=busiest,
        extras=busiest * wide / tile.tokens,
        totals=read / 1e6,
        megabytes=_megabytes(tokens, out_features, in_features, bits),
        items=waves,
        exchanges=waves * (tile.split - 1) / tile.split,
        crowds=0.0,
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
    waves = -(-rows // resident_clusters(blocks.split, multiprocessors))
    busiest = waves * -(-stages // blocks.split)
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


# ---- the mma.sp kernel on other GPUs -------------------------------------------------------------


class Rates(NamedTuple):
    """What limits a multiprocessor, in clocks and bytes per clock."""

    mma: float  # clocks of the tensor cores for one mma.sp, 16 x 8 outputs and 32 in_features or,
    # at 8 bits, 64
    l2: float  # bytes that one multiprocessor gets from L2 while all of them read


# 2:4 bfloat16 with float32 sums: 624 TFLOPS of an A100 are 2 clocks, 142 of an RTX 3090 and 330 of
# a 4090 are 8. Professional cards of the same capability take 4.
# 8 bits: 1248 TOPS of an A100 are 2 clocks again, 568 of an RTX 3090 and 1321 of a 4090 are 4; for
# e4m3 with float32 sums GeForce cards take 8.
DATA_CENTER, CONSUMER, CONSUMER_8 = Rates(2, 40), Rates(8, 16), Rates(4, 16)
SHARED = 128  # bytes of shared memory per clock
LATENCY = 800  # clocks from a copy's start to its arrival
BARRIER = 60  # clocks of a stage in which nothing else proceeds
START = 1500  # clocks of a thread block before its first product


def mma_rates(capability: tuple[int, int], bits: Bits = PLAIN) -> Rates:
    """Rates by compute capability. An H100 has those of an A100 here: unmeasured, like the rest."""
    if capability in ((8, 0), (9, 0)):
        return DATA_CENTER
    return CONSUMER_8 if bits.weight == 8 else CONSUMER


def mma_clocks(
    tile: MmaTile,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    rates: Rates = DATA_CENTER,
    bits: Bits = PLAIN,
) -> float:
    """Estimated clocks of one layer with this tile of the mma.sp kernel.

        clocks = waves * (stages * (max(tensor, shared, l2, latency) + BARRIER) + START + epilogue)

    per thread block, as if it had its multiprocessor to itself; blocks that share one share its
    rates, so a wave is one block per multiprocessor. The time to read the weights from memory is
    left out: it is the same for every tile.

    Source: data sheets and csrc/NOTES.md, mma.sp. Nothing here is measured.
    """
    rows, wide, warps_rows, warps_tokens, split, ring = tile
    weight_bytes = split * rows * bits.row_bytes  # of a stage: values and metadata
    x_bytes = split * 128  # of a stage and token
    tensor = rows / 16 * wide / 8 * 2 * split * rates.mma
    fragments = weight_bytes * warps_tokens + wide * x_bytes * warps_rows
    shared = (fragments + weight_bytes + x_bytes * wide) / SHARED
    l2 = (weight_bytes + x_bytes * min(tokens, wide)) / rates.l2
    stage = max(tensor, shared, l2, LATENCY / (ring - 1)) + BARRIER
    epilogue = rows * wide / 8  # 4 bytes to shared memory and back, 2 to the output
    blocks = -(-out_features // rows) * -(-tokens // wide)
    stages = -(-in_features // (bits.stage * split))
    return -(-blocks // multiprocessors) * (stages * stage + START + epilogue)


@lru_cache(maxsize=4096)
def mma_tile(
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    rates: Rates,
    tiles: tuple[MmaTile, ...],
    bits: Bits = PLAIN,
) -> MmaTile:
    """The one of `tiles` with the fewest estimated clocks (`mma_clocks`); of equal ones the first.

    Raises:
        ValueError: no tiles.
    """
    problem = tokens, out_features, in_features, multiprocessors, rates, bits
    return min(tiles, key=lambda tile: mma_clocks(tile, *problem))
