"""Which tile of the mma.sp kernel computes a linear layer on a GPU other than Hopper. Pure Python,
from data sheets: nothing here is measured."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from sparsekern.backends.cuda.variant import PLAIN, Bits, MmaTile


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
