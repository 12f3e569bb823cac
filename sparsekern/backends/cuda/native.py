"""The decode kernel's configs for a gated pair, which no tuned table knows."""

from __future__ import annotations

from functools import cache, lru_cache

from sparsekern import _native

_TILE = 64  # rows of a row panel, and in_features of a column tile
_GROUP = 256  # rows of a tile row group
_BLOCKS = 96  # thread blocks that keep the memory busy
_FEW_BLOCKS = 66  # up to so many: twice as many of half the rows


@cache
def _indices() -> dict[tuple[int, int], int]:
    """{(rows, split): index} of the kernel's configs."""
    configs = _native.module().kernels()["decode_gated"]
    built = (config for config in configs if config["types"])
    return {(config["rows"], config["split"]): config["index"] for config in built}


@lru_cache(maxsize=4096)
def gated_config(out_features: int, in_features: int) -> int:
    """Index of the config of the kernel "decode_gated" for a pair of weights [out, in].

    The split of in_features doubles while that leaves at most 96 thread blocks, and 4 column tiles
    of 64 for each: 32 to 96 blocks keep the memory of an H100 busy, and each split adds a reduction
    (8192 x 28672 at 1 token: splits 1, 2, 4, 8 took 96, 106, 101, 98 us). A split of 2 that leaves
    at most 66 blocks takes blocks of 128 rows: twice as many without another split. Measured on the
    decode kernel of one weight (csrc/notes/decode.md).
    """
    groups, column_tiles = -(-out_features // _GROUP), -(-in_features // _TILE)
    split = 1
    while split < 8 and groups * split * 2 <= _BLOCKS and column_tiles >= 4 * split:
        split *= 2
    halved = split == 2 and groups * split <= _FEW_BLOCKS
    return int(_indices()[_GROUP // 2 if halved else _GROUP, split])
