"""Layout "tile64": the packed form of a 2:4 weight that the CUDA kernels read, and the way back.

One copy on the device serves decode and prefill. This file is the layout's specification (the
drawing is in csrc/layout/tile64.cuh): tiles of 64 rows x 64 bytes of kept values, which are 64
dense columns at 16 bits, 128 at 8 and 256 at 4, grouped in tile row groups of 4 row panels,

    for row group: for k_tile: for panel in row group: tile

so that 256 rows of a k_tile are one contiguous copy. Both tensors of a Sparse24 keep their meaning
and are only padded and permuted, so `.to(dtype)` and `.to(device)` need no special case:

    values    [tiles, 2048] of a 16-bit dtype, [tiles, 4096] of an 8-bit one: 8-row x 16-byte core
              matrices, as wgmma and ldmatrix read them
    metadata  [tiles, 512] or [tiles, 1024] uint8: one or two 32-bit words per thread of a
              warpgroup, as mma.sp and wgmma.sp take them

int4, which no kernel multiplies before it has widened it, lies as is best for that:

    values    [tiles, 4096] uint8: the same core matrices, but the 32 bits of a row at byte 4t of
              64 columns are the kept pairs j = 0 .. 3 of the groups 4j + t (of 4 columns), first
              value at bit 4j, second at bit 16 + 4j, each plus 8
    metadata  [tiles, 2048 + n] uint8: that of four 16-bit tiles side by side, then a copy of the
              tile's scales, float32 [groups of columns, 64 rows], where rows have several: n is
              512 for groups of 128 columns and 1024 for 64, else 0

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
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24

LAYOUT = "tile64"
TILE = 64  # rows of a tile, and bytes of a row's kept values in it
PANELS = 4  # row panels of a tile row group
_CHUNK = 16  # bytes of a row of a core matrix
_PADDING_BYTE = 0x44
_SCALE_GROUPS = (0, 64, 128)  # of int4 in tiles


def tile_columns(bits: int = 16) -> int:
    """Dense columns of a tile: 64 for values of 16 bits, 128 for 8, 256 for 4."""
    return 2 * TILE * 8 // bits


def scale_group(spec: WeightSpec) -> int:
    """Columns that share one of the scales which a tile's metadata holds, too; 0: it has none.

    int4 has them where a row has several; the tensor weight_scale stays beside, as it is.
    """
    return spec.group if spec.element.bits == 4 and spec.group < spec.shape[1] else 0


def packed_shape(out_features: int, in_features: int, bits: int = 16) -> tuple[int, int]:
    """(row panels, column tiles) of a packed weight; their product is the number of tiles."""
    return -(-out_features // TILE), -(-in_features // tile_columns(bits))


def _bits(spec: WeightSpec) -> int:
    """Of a value that decides the tiles. A packed weight that became float32 (.to, .float()) keeps
    those of 16 bits until it is unpacked."""
    return min(spec.element.bits, 16)


def packable(w24: Sparse24) -> bool:
    """True when the weight's storage type fits this layout."""
    return fits(w24.spec)


def fits(spec: WeightSpec) -> bool:
    """True when such a weight has this layout, whatever its present one."""
    if spec.storage == "int4":
        return scale_group(spec) in _SCALE_GROUPS
    kind = spec.element
    return kind.native_code is not None if kind.plain else kind.bits == 8


def pack(w24: Sparse24) -> Sparse24:
    """The same weight in layout "tile64"; w24 itself when it has it already.

    Args:
        w24: Sparse24 of float16 | bfloat16, of values of 8 bits, or of int4 with one scale a row or
            in groups of 64 | 128; any shape.
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
        fits(spec),
        "sparsekern.pack",
        f"a weight of 8-bit values, of int4 in groups of 64 or 128, {dtypes.native_names()}",
        f"{spec.storage}, group {spec.group}" if spec.element.bits == 4 else spec.element.storage,
        "Call weight.to(torch.bfloat16).",
        TypeError,
    )
    rows, bits = tensors["values"], tensors["metadata"]
    of_values, of_metadata = _packed_sizes(spec)
    if spec.element.bits == 4:
        values, metadata = _pack_int4(spec, tensors)
    elif rows.device.type == "cuda" and _native.available() and of_values[0]:
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
    bits = _bits(spec)
    panels, k_tiles = packed_shape(spec.shape[0], spec.shape[1], bits)
    tiles, per_byte = panels * k_tiles, max(1, 8 // bits)
    metadata = TILE * tile_columns(bits) // 8
    if group := scale_group(spec):
        metadata += tile_columns(bits) // group * TILE * 4
    return [tiles, TILE * TILE * 8 // bits // per_byte], [tiles, metadata]


def _unpack(spec: WeightSpec, tensors: Tensors) -> Tensors:
    (out_features, in_features), bits = spec.shape, _bits(spec)
    if bits == 4:
        return _unpack_int4(spec, tensors)
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
    panels, k_tiles = packed_shape(spec.shape[0], spec.shape[1], bits)
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


def _pack_int4(spec: WeightSpec, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Word t of a row's 16 bytes of 64 columns: the pairs of the groups t, 4 + t, 8 + t, 12 + t;
    all first values, then all second ones, each as level + 8."""
    panels, k_tiles = packed_shape(spec.shape[0], spec.shape[1], 4)
    stored = tensors["values"]
    nibbles = torch.stack((stored & 0xF, stored >> 4), dim=2).flatten(1) ^ 8
    nibbles = _padded(nibbles, panels * TILE, k_tiles * 128, 8)
    # row = (panel, 8 rows, row of them), kept column = (k_tile, chunk, pair of a word, t, half)
    nibbles = nibbles.view(panels, 8, 8, k_tiles, 4, 4, 4, 2).permute(0, 3, 4, 1, 2, 6, 7, 5)
    nibbles = nibbles.reshape(panels, k_tiles, TILE * TILE, 2)
    values = nibbles[..., 0] | nibbles[..., 1] << 4
    metadata = _padded(tensors["metadata"], panels * TILE, k_tiles * 32, _PADDING_BYTE)
    # as of four tiles of 16 bits
    metadata = metadata.view(panels, 4, 2, 8, k_tiles, 4, 4, 2).permute(0, 4, 5, 1, 3, 6, 2, 7)
    metadata = metadata.reshape(panels, k_tiles, TILE * 32)
    if group := scale_group(spec):
        scale = _padded(tensors[SCALE], panels * TILE, k_tiles * 256 // group, 0)
        scale = scale.view(panels, TILE, k_tiles, 256 // group).permute(0, 2, 3, 1)
        scale = scale.contiguous().view(torch.uint8).view(panels, k_tiles, 1024 // group * TILE)
        metadata = torch.cat((metadata, scale), dim=2)
    return _to_groups(values), _to_groups(metadata)


def _unpack_int4(spec: WeightSpec, tensors: Tensors) -> Tensors:
    (out_features, in_features), (panels, k_tiles) = (
        spec.shape,
        packed_shape(spec.shape[0], spec.shape[1], 4),
    )
    values = _from_groups(tensors["values"], panels, k_tiles)
    nibbles = torch.stack((values & 0xF, values >> 4), dim=3) ^ 8
    nibbles = nibbles.view(panels, k_tiles, 4, 8, 8, 4, 2, 4).permute(0, 3, 4, 1, 2, 7, 5, 6)
    nibbles = nibbles.reshape(panels * TILE, k_tiles * 128)[:out_features, : in_features // 2]
    metadata = _from_groups(tensors["metadata"], panels, k_tiles)[..., : TILE * 32]
    metadata = metadata.reshape(panels, k_tiles, 4, 4, 8, 4, 2, 2).permute(0, 3, 6, 4, 1, 2, 5, 7)
    metadata = metadata.reshape(panels * TILE, k_tiles * 32)
    metadata = metadata[:out_features, : -(-in_features // 8)].contiguous()
    values = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return {**tensors, "values": values, "metadata": metadata}


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
