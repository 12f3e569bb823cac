"""What each variant of the Hopper kernels costs: the coefficients of the formula in cost_model.py,
fitted by `python -m bench.fit`."""

from __future__ import annotations

from typing import NamedTuple

from sparsekern.backends.cuda.variant import Bits, MmaTile, RowBlocks, SplitTile, Tile, Variant


class Times(NamedTuple):
    """What a variant costs: the coefficients at the top of cost_model.py."""

    stage: float
    extra: float
    total: float
    rate: float
    item: float
    exchange: float
    crowd: float
    constant: float


# Made by `python -m bench.fit` from what an H200 measured (132 multiprocessors, 700 W, bfloat16):
# 183 cells of random shapes (`bench random` of seeds 101 to 104, most with few out_features or
# short in_features) and 144 of Llama-3 8B and 70B (`sparsekern tune`), beginning at the older
# coefficients of an H100's 432 cells; then row blocks of 64 rows or 16 splits moved (`--move`) to
# 160 cells of seeds 77 and 78; then tiles and split tiles (`--move split,prefill --trust 0.15`)
# to 275 cells of the kernels of 496fad0 (seeds 82 and 83, the former up to 2000 out_features) and
# 88 of 8B and 70B from 96 tokens on. Slower than the fastest of all variants in the 275, on
# average and at worst: with the coefficients before 3.4 and 87 %, fitted 2.2 and 32 %, in each
# shape by a fit to the others 2.5 and 32 %; in 194 cells of seeds 81 and 84 to 87, measured
# afterwards, 2.2 and 21 %, with two constants of cost_model that came of them (MMA_UNALIGNED,
# RAGGED_HALF). Row blocks and mma.sp stay: moved, too, they were picked worse. So were two more of
# mma.sp, 64x64 and 128x64, the fastest in two of the 275: of the five cells of seed 81 that were
# slower than cuBLAS 64x64 was picked in three. What is not here is never chosen. On another GPU the
# counts follow from its multiprocessors, and these coefficients, its rates above all, are a guess.
TIMES: dict[Variant, Times] = {
    RowBlocks(256, 1): Times(0.144, 0.351, 0.428, 4.29, 0.0889, 2.78, 0, 0.801),
    RowBlocks(256, 2): Times(0.153, 0.245, 0.311, 4.33, 0.0924, 4.98, 0, 0.996),
    RowBlocks(256, 4): Times(0.148, 0.25, 0.01, 4.07, 0.553, 4, 0, 0.697),
    RowBlocks(256, 8): Times(0.146, 0.175, 0.01, 3.94, 0.822, 4.44, 0, 0.451),
    RowBlocks(128, 2): Times(0.124, 0.24, 0.01, 4.48, 0.792, 2.62, 0, 0.591),
    RowBlocks(128, 1): Times(0.127, 0.229, 0.01, 4.37, 0.394, 2.47, 0, 0.383),
    RowBlocks(128, 4): Times(0.128, 0.233, 0.01, 4.03, 1.15, 2.64, 0, 0.222),
    RowBlocks(128, 8): Times(0.127, 0.154, 0.555, 3.96, 1.51, 2.34, 0, 0.0753),
    RowBlocks(128, 16): Times(0.106, 0.155, 0.492, 3.26, 1.8, 2.47, 0, 0.0849),
    RowBlocks(64, 8): Times(0.0385, 0.155, 0.236, 3.17, 2.42, 0.888, 0, 0.0921),
    RowBlocks(64, 16): Times(0.0397, 0.0738, 0.305, 2.31, 2.31, 1.75, 0, 0.087),
    Tile(256, 192, 1, 1): Times(0.541, 0.318, 0.722, 4, 1.45, 4.42, 6.98, 3.43),
    Tile(256, 192, 2, 1): Times(0.571, 0.181, 0.665, 3.83, 1.69, 3.62, 7.66, 3.26),
    Tile(256, 192, 1, 2): Times(0.611, 0.0551, 0.657, 4.02, 0.627, 4.25, 8.12, 4.13),
    Tile(256, 192, 4, 1): Times(0.575, 0.064, 0.711, 4.8, 2.01, 3.69, 8.56, 2.9),
    Tile(256, 192, 4, 2): Times(0.576, 0.0429, 0.698, 4, 1.08, 8.36, 0.103, 3.75),
    Tile(256, 192, 2, 1, True): Times(0.739, 0.123, 0.313, 3.59, 1.24, 6.27, 2.08, 3.29),
    Tile(256, 160, 1, 1): Times(0.512, 0.0529, 0.582, 4.21, 1.68, 3.68, 6.76, 3.04),
    Tile(256, 160, 2, 1): Times(0.524, 0.0508, 0.527, 4.25, 2.81, 1.52, 8.72, 1.85),
    Tile(256, 128, 1, 1): Times(0.379, 0.132, 0.522, 4.22, 0.437, 3.46, 4.98, 4.38),
    Tile(256, 128, 2, 1): Times(0.385, 0.113, 0.494, 4.14, 1.37, 3.65, 5.09, 3.02),
    Tile(256, 128, 1, 2): Times(0.396, 0.0588, 0.492, 4.33, 0.5, 2.76, 6.54, 4.24),
    Tile(256, 128, 2, 2): Times(0.394, 0.0942, 0.485, 4.8, 4, 3.27, 7.11, 0.12),
    Tile(256, 128, 4, 2): Times(0.399, 0.0401, 0.501, 4.8, 1.2, 6.33, 0.101, 3.18),
    Tile(256, 128, 2, 1, True): Times(0.494, 0.158, 0.385, 3.95, 0.675, 4.77, 1.44, 3.55),
    Tile(256, 96, 1, 1): Times(0.325, 0.122, 0.402, 4.29, 0.398, 2.01, 6.99, 3.93),
    Tile(256, 64, 1, 1): Times(0.242, 0.153, 0.312, 4.1, 0.553, 2.44, 5.11, 3.44),
    Tile(256, 208, 2, 1): Times(0.616, 0.198, 0.726, 4.12, 0.971, 0.102, 14, 4.22),
    Tile(256, 208, 1, 2): Times(0.627, 0.0535, 0.735, 4.08, 0.632, 5.89, 8.08, 4.26),
    MmaTile(64, 32, 2, 1, 2, 5): Times(0.364, 0.0373, 0.066, 4.8, 1.74, 0, 0, 0.088),
    MmaTile(64, 16, 2, 1, 4, 3): Times(0.451, 0.0597, 0.0984, 4.32, 1.16, 0, 0, 0.0791),
    MmaTile(64, 8, 2, 1, 4, 4): Times(0.174, 0.173, 0.0744, 4.43, 1.2, 0, 0, 0.0765),
    MmaTile(32, 16, 1, 1, 4, 5): Times(0.325, 0.0628, 0.0358, 4.8, 1.06, 0, 0, 0.078),
    MmaTile(32, 8, 1, 1, 4, 6): Times(0.17, 0.0808, 0.0661, 4.65, 1, 0, 0, 0.154),
    SplitTile(128, 64, 1): Times(0.145, 0.0398, 0.0724, 4.01, 2.39, 0, 0, 0.0986),
    SplitTile(128, 64, 2): Times(0.151, 0.0412, 0.0944, 4.51, 1.54, 2.19, 0, 0.0969),
    SplitTile(128, 64, 3): Times(0.148, 0.0431, 0.109, 4.8, 1.52, 2.01, 0, 0.104),
    SplitTile(128, 64, 4): Times(0.15, 0.0462, 0.124, 4.8, 1.34, 1.54, 0, 0.0979),
    SplitTile(128, 64, 6): Times(0.146, 0.046, 0.123, 4.8, 1.58, 1.77, 0, 0.104),
    SplitTile(128, 96, 2): Times(0.168, 0.0422, 0.0877, 4.61, 2.07, 2.77, 0, 0.105),
    SplitTile(128, 96, 3): Times(0.166, 0.044, 0.0951, 4.8, 1.89, 2.42, 0, 0.107),
    SplitTile(128, 128, 1): Times(0.191, 0.0413, 0.0784, 4, 2.81, 0, 0, 0.1),
    SplitTile(128, 128, 2): Times(0.194, 0.0454, 0.08, 4.47, 2.34, 3.24, 0, 0.108),
    SplitTile(128, 128, 3): Times(0.195, 0.051, 0.088, 4.8, 2.23, 2.73, 0, 0.105),
    SplitTile(256, 64, 1): Times(0.216, 0.0449, 0.0889, 3.56, 2.34, 0, 0, 0.0998),
    SplitTile(256, 96, 1): Times(0.296, 0.0429, 0.095, 4.32, 2.75, 0, 0, 0.122),
    SplitTile(256, 96, 2): Times(0.303, 0.0455, 0.0998, 3.98, 2.71, 2.83, 0, 0.109),
    SplitTile(256, 128, 1): Times(0.372, 0.0464, 0.107, 4.12, 3.21, 0, 0, 0.106),
    SplitTile(256, 128, 2): Times(0.383, 0.0476, 0.105, 4.11, 3.16, 3.35, 0, 0.104),
    SplitTile(128, 64, 8): Times(0.141, 0.0494, 0.133, 4.8, 1.66, 1.84, 0, 0.097),
    SplitTile(128, 64, 16): Times(0.214, 0.0657, 0.151, 3.41, 1.96, 2.16, 0, 0.0993),
    SplitTile(128, 128, 8): Times(0.136, 0.144, 0.125, 4.8, 2.2, 2.63, 0, 0.0983),
    SplitTile(128, 64, 4, True): Times(0.139, 0.0488, 0.0819, 4.69, 1.8, 1.9, 0.764, 0.102),
    SplitTile(128, 64, 8, True): Times(0.16, 0.05, 0.127, 4.29, 1.6, 1.77, 1.26, 0.0999),
    SplitTile(128, 128, 1, True): Times(0.156, 0.0505, 0.0953, 4.3, 3.92, 0, 1.58, 0.102),
    SplitTile(128, 128, 2, True): Times(0.152, 0.0509, 0.101, 4.8, 2.14, 3.03, 1.77, 0.101),
    SplitTile(128, 128, 4, True): Times(0.152, 0.0525, 0.0926, 4.56, 2.11, 2.65, 1.67, 0.1),
    SplitTile(256, 128, 1, True): Times(0.25, 0.0507, 0.123, 4, 6.46, 0, 1.51, 0.103),
    SplitTile(256, 128, 2, True): Times(0.333, 0.0517, 0.118, 4.06, 4.83, 3.98, 1.38, 0.102),
    Tile(256, 64, 2, 1): Times(0.254, 0.104, 0.287, 3.54, 0.476, 1.9, 4.08, 3.36),
    SplitTile(128, 96, 1): Times(0.17, 0.0302, 0.0813, 4.01, 2.4, 0, 0, 0.0884),
    SplitTile(128, 128, 4): Times(0.187, 0.0544, 0.106, 4.8, 2.06, 2.52, 0, 0.101),
    SplitTile(256, 64, 2): Times(0.216, 0.0438, 0.106, 3.92, 2, 2.36, 0, 0.102),
}


# The same for weights of 8 bits: tiles and split tiles with x of 8 bits, row blocks with x of 16.
# From an H200 (132 multiprocessors, 700 W), e4m3 with y of bfloat16. Tiles: the q+k+v, o, gate+up
# and down layers of Llama-3 8B and 70B, 13 numbers of tokens from 1 to 8192. So few cells cannot
# fit every variant, and those of tiles are an H100's of 16 bits, scaled (`scaled` in bench/fit.py),
# but for a few. How well it picks: csrc/notes/splitk.md, "8 bits"; up to 64 tokens, 20 random
# shapes among them (`bench.fit --shapes 20 --seed 110`), by 5.2 % slower than the fastest in the
# mean and 50 % at worst. Row blocks: the same layers and those shapes, 1 to 64 tokens, 127 cells,
# in which picks are slower by 2.2 and 34 %, by 2.3 and 34 % in shapes left out of the fit; before
# by 11.5 and 119 %. int8 moves the same bytes in the same clocks.
TIMES_8: dict[Variant, Times] = {
    RowBlocks(256, 1): Times(0.425, 0.666, 0.902, 4.76, 0.0953, 6.41, 0, 1.67),
    RowBlocks(256, 2): Times(0.402, 0.585, 1.01, 4.58, 2.61, 4.59, 0, 0.103),
    RowBlocks(256, 4): Times(0.309, 0.686, 0.922, 2.7, 1.18, 3.83, 0, 0.696),
    RowBlocks(128, 2): Times(0.243, 0.56, 0.456, 4.28, 2.35, 2.13, 0, 0.289),
    RowBlocks(128, 1): Times(0.295, 0.505, 0.4, 4.8, 0.669, 3.66, 0, 0.39),
    RowBlocks(128, 4): Times(0.244, 0.542, 0.474, 2.75, 1.73, 2.29, 0, 0.105),
    RowBlocks(128, 8): Times(0.266, 0.591, 0.497, 3.77, 2.57, 1.33, 0, 0.16),
    RowBlocks(256, 1, 1): Times(0.404, 0.738, 0.889, 4.04, 0.0971, 8.64, 0, 2.06),
    RowBlocks(256, 2, 1): Times(0.395, 0.765, 1.91, 4.17, 2.45, 6.61, 0, 0.105),
    RowBlocks(256, 4, 1): Times(0.47, 0.383, 2.02, 4.18, 2.51, 3.63, 0, 0.767),
    RowBlocks(256, 8, 1): Times(0.108, 0.358, 0.972, 3.52, 1.26, 6.88, 0, 2.11),
    RowBlocks(128, 1, 1): Times(0.316, 0.444, 1.2, 4.07, 2.01, 2.68, 0, 0.349),
    RowBlocks(256, 1, 2): Times(0.692, 1.06, 0.886, 4.51, 0.0943, 6.16, 0, 2),
    RowBlocks(256, 2, 2): Times(0.692, 0.665, 1.99, 4.49, 3.02, 4.63, 0, 0.1),
    RowBlocks(256, 4, 2): Times(0.742, 0.782, 1.12, 4.25, 2.6, 4.15, 0, 0.355),
    Tile(256, 192, 2, 1): Times(0.762, 0.281, 0.292, 4, 2.95, 1.93, 8.63, 1.21),
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


# Weights of int4 with x of 16 bits, up to 16 tokens. From an H200 (132 multiprocessors, 700 W),
# groups of 128, bfloat16: Llama-3 8B and 70B at 1, 2, 4, 8 and 16 tokens, 40 random shapes
# (`bench.fit --shapes`, 16 of seed 105 and 24 of seed 109) at 1, 8 and 16: 160 cells. Its picks are
# slower than the fastest by 2.2 % in the mean and 19 % at worst, by 2.4 and 19 % in shapes left out
# of the fit. Fitted to the first 88 cells alone they were by 3.1 and 15 % in the 72 of seed 109.
TIMES_4: dict[Variant, Times] = {
    RowBlocks(256, 1): Times(0.4, 1.49, 2.04, 4.31, 0.0973, 6.11, 0, 2.35),
    RowBlocks(256, 2): Times(0.418, 1.27, 2.45, 4.15, 2.47, 5.9, 0, 0.0984),
    RowBlocks(256, 4): Times(0.37, 1.37, 2.17, 2.71, 1.46, 4.32, 0, 0.362),
    RowBlocks(256, 8): Times(0.223, 1.13, 4.19, 3.14, 2.28, 4.25, 0, 0.754),
    RowBlocks(128, 2): Times(0.295, 0.817, 1.05, 3.46, 2.46, 1.24, 0, 0.27),
    RowBlocks(128, 1): Times(0.328, 0.77, 0.902, 4.52, 0.582, 4.43, 0, 0.507),
    RowBlocks(128, 4): Times(0.242, 0.907, 1.02, 2.32, 1.76, 3.64, 0, 0.1),
    RowBlocks(128, 8): Times(0.155, 0.849, 1.12, 2.38, 2.34, 2.73, 0, 0.15),
    RowBlocks(256, 1, 1): Times(0.275, 2.78, 3.69, 3.81, 0.0991, 9.26, 0, 2.03),
    RowBlocks(256, 2, 1): Times(0.324, 2.41, 3.33, 3.88, 2.18, 8.89, 0, 0.116),
    RowBlocks(256, 4, 1): Times(0.29, 2.52, 3.4, 3.71, 1.49, 6.19, 0, 1.39),
    RowBlocks(256, 8, 1): Times(0.649, 1.12, 3.6, 3.95, 1.84, 7.41, 0, 0.739),
    RowBlocks(128, 1, 1): Times(0.289, 2.19, 1.97, 4.02, 0.812, 5.47, 0, 0.258),
    RowBlocks(256, 1, 2): Times(0.539, 4.15, 2.8, 4.08, 0.0877, 9.14, 0, 0.949),
    RowBlocks(256, 2, 2): Times(0.552, 3.6, 3.57, 4.02, 2.48, 5.21, 0, 0.101),
    RowBlocks(256, 4, 2): Times(0.545, 3.6, 4.38, 3.32, 2.31, 4.48, 0, 0.389),
    RowBlocks(256, 8, 2): Times(0.542, 2.33, 4.56, 3.27, 2.27, 7.6, 0, 0.338),
}


def table(bits: Bits) -> dict[Variant, Times]:
    """The coefficients for these operands: TIMES_8, TIMES_4 or TIMES."""
    if bits.weight == 4:
        return TIMES_4
    return TIMES_8 if bits.weight == 8 else TIMES
