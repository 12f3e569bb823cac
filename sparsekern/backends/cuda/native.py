"""What the native kernels leave to their caller to decide (csrc/linear/configs.h has the rows)."""

from __future__ import annotations

from functools import lru_cache

from sparsekern import _native

_MOST_BLOCKS, _FEW_BLOCKS = (
    96,
    66,
)  # thread blocks that keep the memory busy; measured: csrc/NOTES.md
_PANEL, _PANELS, _STAGE = 64, 4, 64  # rows of a panel, panels of a tile row group, in_features


@lru_cache(maxsize=4096)
def gated_config(out_features: int, in_features: int) -> int:
    """The config of the kernel "decode_gated" for a pair of weights.

    Row blocks and a split of in_features that keep the memory busy, and no more thread blocks than
    that: each split adds a reduction.
    """
    groups = -(-out_features // (_PANEL * _PANELS))
    stages, split = -(-in_features // _STAGE), 1
    while split < 8 and groups * split * 2 <= _MOST_BLOCKS and stages >= 4 * split:
        split *= 2
    panels = 2 if split == 2 and groups * split <= _FEW_BLOCKS else _PANELS
    rows = {(c["rows"], c["split"]): c["index"] for c in _native.module().kernels()["decode_gated"]}
    return int(rows[_PANEL * panels, split])
