"""The variants of the CUDA kernels of a linear layer, as csrc/linear/configs.h lists them, and what
they are called. Pure Python: no torch, no GPU."""

from __future__ import annotations

from typing import NamedTuple

from sparsekern.backends.cuda.narrow_model import NarrowTile

STAGE = 64  # in_features of a stage of the kernels, with weights of 16 bits


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
    paired: int = 0  # 1: with another thread block on its multiprocessor; 2: two teams in it

    def __str__(self) -> str:
        pair = ("", ", two a multiprocessor", ", two teams")[self.paired]
        return f"{self.rows} rows, split {self.split}{pair}"


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
    across: bool = False  # several clusters share them, where there are few tiles

    def __str__(self) -> str:
        parts = "1 part" if self.split == 1 else f"{self.split} parts"
        return f"{self.rows}x{self.tokens}, {parts}" + ", across clusters" * self.across


Variant = RowBlocks | Tile | MmaTile | SplitTile | NarrowTile


def variant_name(variant: Variant) -> str:
    """What `sparsekern.explain` calls it: the kernel, then the variant."""
    kernels = {RowBlocks: "decode", Tile: "prefill", MmaTile: "mma", SplitTile: "split"}
    kernel = kernels.get(type(variant), "narrow")
    return f"{kernel} {variant}"
