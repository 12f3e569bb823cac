"""Layout "tile64": the packed form of a 2:4 weight that the CUDA kernels read, and the way back.

One copy on the device serves decode and prefill. This file is the layout's specification (the
drawing is in csrc/layout/tile64.cuh): tiles of 64 rows x 64 dense columns, grouped in tile row
groups of 4 row panels,

    for row group: for k_tile: for panel in row group: tile

so that 256 rows x 64 columns are one contiguous copy. Both tensors of a Sparse24 keep their meaning
and are only padded and permuted, so `.to(dtype)` and `.to(device)` need no special case:

    values    [tiles, 2048] of the weight's dtype: 8-row x 16-byte core matrices, as wgmma and
              ldmatrix read them
    metadata  [tiles, 512] uint8: one 32-bit word per thread of a warpgroup, as mma.sp and wgmma.sp
              take it

Rows are padded to 64 and columns to 64 with zero values and the nibble 0x4. On CUDA with the native
module one kernel packs at memory speed; everywhere else, and for unpack, the permutation is done by
torch.

Source: PTX ISA, "Sparse matrix storage" and "Shared memory matrix layout".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekern import _native
from sparsekern.errors import check
from sparsekern.formats import dtypes
from sparsekern.formats.layouts import (
    ROWMAJOR,
    Layout,
    Tensors,
    WeightSpec,
    check_tensor_shape,
    register_layout,
)
from sparsekern.formats.sparse24 import Sparse24

LAYOUT = "tile64"
TILE = 64  # rows, and dense columns, of a tile
PANELS = 4  # row panels of a tile row group
_PADDING_BYTE = 0x44


def packed_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """(row panels, column tiles) of a packed weight; their product is the number of tiles."""
    return -(-out_features // TILE), -(-in_features // TILE)


def packable(w24: Sparse24) -> bool:
    """True when the weight's dtype has kernels for this layout."""
    return w24.spec.storage in _packable_names()


def _packable_names() -> list[str]:
    return [dtypes.PLAIN[dtype].name for dtype in dtypes.NATIVE]


def pack(w24: Sparse24) -> Sparse24:
    """The same weight in layout "tile64"; w24 itself when it has it already.

    Args:
        w24: Sparse24 float16 | bfloat16, any shape.
    Returns:
        Sparse24 whose tensors are new; 9/16 of the dense bytes, plus padding to 64 x 64.
    Raises:
        TypeError: another dtype.
    Notes:
        On a GPU this waits until the weight is packed. The decode kernel is launched with
        programmatic stream serialization and reads its weights before the work queued ahead of it
        has finished: weights must be complete in memory before it is launched, not only queued.
    """
    return w24.to_layout(LAYOUT)


def unpack(w24: Sparse24) -> Sparse24:
    """The same weight in layout "rowmajor": the exact inverse of `pack`."""
    return w24.to_layout(ROWMAJOR)


def _pack(spec: WeightSpec, tensors: Tensors) -> Tensors:
    check(
        spec.storage in _packable_names(),
        "sparsekern.pack",
        f"a weight of dtype {dtypes.native_names()}",
        spec.element.storage,
        "Call weight.to(torch.bfloat16).",
        TypeError,
    )
    rows, bits = tensors["values"], tensors["metadata"]
    panels, k_tiles = packed_shape(*spec.shape)
    tiles = panels * k_tiles
    if rows.device.type == "cuda" and _native.available() and tiles:
        values = rows.new_empty(tiles, TILE * TILE // 2)
        metadata = bits.new_empty(tiles, TILE * TILE // 8)
        with torch.cuda.device(rows.device):
            _native.module().pack(
                values=rows.data_ptr(),
                metadata=bits.data_ptr(),
                packed_values=values.data_ptr(),
                packed_metadata=metadata.data_ptr(),
                out_features=spec.shape[0],
                in_features=spec.shape[1],
                stream=torch.cuda.current_stream().cuda_stream,
            )
    else:
        values, metadata = _pack_torch(spec, rows, bits)
    return {**tensors, "values": values, "metadata": metadata}


def wait_for_weight(values: Tensor) -> None:
    """Wait until the work queued on the GPU of a packed weight, which may write it, is done.

    Needed once after every change of a packed weight (see `pack`); nothing to do on the CPU.
    """
    if values.device.type == "cuda":
        torch.cuda.current_stream(values.device).synchronize()


def _unpack(spec: WeightSpec, tensors: Tensors) -> Tensors:
    out_features, in_features = spec.shape
    panels, k_tiles = packed_shape(out_features, in_features)
    values = tensors["values"].view(panels * k_tiles, TILE * TILE // 2)
    values = _from_groups(values, panels, k_tiles)
    values = values.view(panels, k_tiles, 4, 8, 8, 8).permute(0, 3, 4, 1, 2, 5)
    values = values.reshape(panels * TILE, k_tiles * TILE // 2)[:out_features, : in_features // 2]
    metadata = tensors["metadata"].view(panels * k_tiles, TILE * TILE // 8)
    metadata = _from_groups(metadata, panels, k_tiles)
    metadata = metadata.view(panels, k_tiles, 4, 8, 4, 2, 2).permute(0, 2, 5, 3, 1, 4, 6)
    metadata = metadata.reshape(panels * TILE, k_tiles * TILE // 8)
    metadata = metadata[:out_features, : -(-in_features // 8)]
    return {**tensors, "values": values.contiguous(), "metadata": metadata.contiguous()}


def _pack_torch(spec: WeightSpec, rows: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    panels, k_tiles = packed_shape(*spec.shape)
    values = _padded(rows, panels * TILE, k_tiles * TILE // 2, 0)
    # row = (panel, 8 rows, row of them), kept column = (k_tile, 16-byte chunk, element)
    values = values.view(panels, 8, 8, k_tiles, 4, 8).permute(0, 3, 4, 1, 2, 5)
    metadata = _padded(bits, panels * TILE, k_tiles * TILE // 8, _PADDING_BYTE)
    # row = (panel, warp, half of the word, g), byte = (k_tile, t, byte of 16 dense columns)
    metadata = metadata.view(panels, 4, 2, 8, k_tiles, 4, 2).permute(0, 4, 1, 3, 5, 2, 6)
    return (
        _to_groups(values.reshape(panels, k_tiles, TILE * TILE // 2)),
        _to_groups(metadata.reshape(panels, k_tiles, TILE * TILE // 8)),
    )


def _check(op: str, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> None:
    panels, k_tiles = packed_shape(*spec.shape)
    tiles = panels * k_tiles
    check_tensor_shape(op, "values", tensors["values"], [tiles, TILE * TILE // 2])
    check_tensor_shape(op, "metadata", tensors["metadata"], [tiles, TILE * TILE // 8])


def _padded(tensor: Tensor, rows: int, columns: int, fill: int) -> Tensor:
    if tuple(tensor.shape) == (rows, columns):
        return tensor
    result = tensor.new_full((rows, columns), fill)
    result[: tensor.shape[0], : tensor.shape[1]] = tensor
    return result


def _to_groups(tiles: Tensor) -> Tensor:
    """[panels, k_tiles, bytes] -> [tiles, bytes] in the order row group, k_tile, panel."""
    panels, k_tiles, size = tiles.shape
    full = panels // PANELS * PANELS
    head = tiles[:full].view(full // PANELS, PANELS, k_tiles, size).transpose(1, 2)
    tail = tiles[full:].transpose(0, 1)
    return torch.cat([head.reshape(-1, size), tail.reshape(-1, size)])


def _from_groups(tiles: Tensor, panels: int, k_tiles: int) -> Tensor:
    """The inverse of _to_groups."""
    full, size = panels // PANELS * PANELS, tiles.shape[1]
    head = tiles[: full * k_tiles].view(full // PANELS, k_tiles, PANELS, size).transpose(1, 2)
    tail = tiles[full * k_tiles :].view(k_tiles, panels - full, size).transpose(0, 1)
    return torch.cat([head.reshape(full, k_tiles, size), tail])


register_layout(Layout(LAYOUT, _check, _pack, _unpack, complete=wait_for_weight))
