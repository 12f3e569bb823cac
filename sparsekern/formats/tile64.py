"""Layout "tile64": the packed form of a 2:4 weight that the CUDA kernels read, and the way back.

One copy on the device serves decode and prefill. This file is the layout's specification (the
drawing is in csrc/layout/tile64.cuh): tiles of 64 rows x 64 bytes of kept values, which are 64
dense columns at 16 bits and 128 at 8 bits, grouped in tile row groups of 4 row panels,

    for row group: for k_tile: for panel in row group: tile

so that 256 rows of a k_tile are one contiguous copy. Both tensors of a Sparse24 keep their meaning
and are only padded and permuted, so `.to(dtype)` and `.to(device)` need no special case:

    values    [tiles, 2048] of a 16-bit dtype, [tiles, 4096] of an 8-bit one: 8-row x 16-byte core
              matrices, as wgmma and ldmatrix read them
    metadata  [tiles, 512] or [tiles, 1024] uint8: one or two 32-bit words per thread of a
              warpgroup, as mma.sp and wgmma.sp take them

Rows are padded to 64 and columns to whole tiles with zero values and the nibble 0x4. What else a
weight has (scales) is left as it is, without padding. On CUDA with the native module one kernel
packs at memory speed; everywhere else, and for unpack, the permutation is done by torch.

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
TILE = 64  # rows of a tile, and bytes of a row's kept values in it
PANELS = 4  # row panels of a tile row group
_CHUNK = 16  # bytes of a row of a core matrix
_PADDING_BYTE = 0x44


def tile_columns(bits: int = 16) -> int:
    """Dense columns of a tile: 64 for values of 16 bits, 128 for 8."""
    return 2 * TILE * 8 // bits


def packed_shape(out_features: int, in_features: int, bits: int = 16) -> tuple[int, int]:
    """(row panels, column tiles) of a packed weight; their product is the number of tiles."""
    return -(-out_features // TILE), -(-in_features // tile_columns(bits))


def packable(w24: Sparse24) -> bool:
    """True when the weight's storage type fits this layout."""
    return _fits(w24.spec)


def _fits(spec: WeightSpec) -> bool:
    return spec.element.native_code is not None


def pack(w24: Sparse24) -> Sparse24:
    """The same weight in layout "tile64"; w24 itself when it has it already.

    Args:
        w24: Sparse24 of float16 | bfloat16, or of values of 8 bits; any shape.
    Returns:
        Sparse24 whose values and metadata are new; 9/16 of the dense 16-bit bytes, or 5/8 of the
        dense 8-bit ones, plus padding to whole tiles.
    Raises:
        TypeError: another storage type.
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
        _fits(spec),
        "sparsekern.pack",
        f"a weight of 8-bit values, {dtypes.native_names()}",
        spec.element.storage,
        "Call weight.to(torch.bfloat16).",
        TypeError,
    )
    rows, bits = tensors["values"], tensors["metadata"]
    of_values, of_metadata = _packed_sizes(spec)
    if rows.device.type == "cuda" and _native.available() and of_values[0]:
        values, metadata = rows.new_empty(of_values), bits.new_empty(of_metadata)
        with torch.cuda.device(rows.device):
            _native.module().pack(
                values=rows.data_ptr(),
                metadata=bits.data_ptr(),
                packed_values=values.data_ptr(),
                packed_metadata=metadata.data_ptr(),
                out_features=spec.shape[0],
                in_features=spec.shape[1],
                storage_bits=spec.element.bits,
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


def _packed_sizes(spec: WeightSpec) -> tuple[list[int], list[int]]:
    """Shapes of the packed values and of the packed metadata."""
    bits = spec.element.bits
    panels, k_tiles = packed_shape(*spec.shape, bits)
    tiles = panels * k_tiles
    return [tiles, TILE * TILE * 8 // bits], [tiles, TILE * tile_columns(bits) // 8]


def _unpack(spec: WeightSpec, tensors: Tensors) -> Tensors:
    (out_features, in_features), bits = spec.shape, spec.element.bits
    panels, k_tiles = packed_shape(out_features, in_features, bits)
    kept, bytes_k, chunk = TILE * 8 // bits, tile_columns(bits) // 8, _CHUNK * 8 // bits
    stored = tensors["values"]
    values = _from_groups(_movable(stored), panels, k_tiles)
    values = values.view(panels, k_tiles, 4, 8, 8, chunk).permute(0, 3, 4, 1, 2, 5)
    values = values.reshape(panels * TILE, k_tiles * kept)[:out_features, : in_features // 2]
    metadata = _from_groups(tensors["metadata"], panels, k_tiles)
    if bits == 16:
        metadata = metadata.view(panels, k_tiles, 4, 8, 4, 2, 2).permute(0, 2, 5, 3, 1, 4, 6)
    else:
        words = metadata.view(panels, k_tiles, 2, 4, 8, 2, 2, 4)
        metadata = words.permute(0, 3, 6, 4, 1, 2, 5, 7)
    metadata = metadata.reshape(panels * TILE, k_tiles * bytes_k)
    metadata = metadata[:out_features, : -(-in_features // 8)]
    values = values.contiguous().view(stored.dtype)
    return {**tensors, "values": values, "metadata": metadata.contiguous()}


def _pack_torch(spec: WeightSpec, rows: Tensor, nibbles: Tensor) -> tuple[Tensor, Tensor]:
    bits = spec.element.bits
    panels, k_tiles = packed_shape(*spec.shape, bits)
    kept, bytes_k, chunk = TILE * 8 // bits, tile_columns(bits) // 8, _CHUNK * 8 // bits
    values = _padded(_movable(rows), panels * TILE, k_tiles * kept, 0)
    # row = (panel, 8 rows, row of them), kept column = (k_tile, 16-byte chunk, element)
    values = values.view(panels, 8, 8, k_tiles, 4, chunk).permute(0, 3, 4, 1, 2, 5)
    metadata = _padded(nibbles, panels * TILE, k_tiles * bytes_k, _PADDING_BYTE)
    # row = (panel, warp, half of its 16 rows, g)
    if bits == 16:
        # byte = (k_tile, t, byte of 16 dense columns); a word is both halves of one t
        metadata = metadata.view(panels, 4, 2, 8, k_tiles, 4, 2).permute(0, 4, 1, 3, 5, 2, 6)
    else:
        # byte = (k_tile, k step, t / 2, byte of 32 dense columns); t % 2 is the half
        words = metadata.view(panels, 4, 2, 8, k_tiles, 2, 2, 4)
        metadata = words.permute(0, 4, 5, 1, 3, 6, 2, 7)
    packed = _to_groups(values.reshape(panels, k_tiles, TILE * kept)).view(rows.dtype)
    return packed, _to_groups(metadata.reshape(panels, k_tiles, TILE * bytes_k))


def _movable(tensor: Tensor) -> Tensor:
    """As bytes where a value is one: torch cannot fill or concatenate every 8-bit dtype."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _check(op: str, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> None:
    of_values, of_metadata = _packed_sizes(spec)
    check_tensor_shape(op, "values", tensors["values"], of_values)
    check_tensor_shape(op, "metadata", tensors["metadata"], of_metadata)


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
