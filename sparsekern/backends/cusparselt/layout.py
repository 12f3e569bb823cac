"""Layout "cusparselt": the vendor library's opaque blob, on one GPU and of one version.

    values      the blob, viewed in the dtype of the values: [its bytes / those of a value]
    metadata    uint8 [0]
    (scales)    as they are; the blob holds the levels

It is made at load and never saved: what is copied, moved or pickled becomes row-major. Packing
multiplies the blob with the identity and compares; so does unpacking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekern import _native
from sparsekern.backends import compress
from sparsekern.backends.cusparselt.library import (
    DTYPES,
    library,
    refusal,
    shape_refusal,
    sparse_multiple,
)
from sparsekern.backends.cusparselt.linear import LAYOUT, linear, product
from sparsekern.errors import check, message
from sparsekern.formats import dtypes
from sparsekern.formats.layouts import (
    Layout,
    Tensors,
    WeightSpec,
    check_tensor_shape,
    register_layout,
)
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24

NAME = LAYOUT
_UNPACK_ELEMENTS = 2**25  # of the dense slices that unpacking has in memory at a time


def packs(device: torch.device) -> bool:
    """True where a module that asks for this layout gets it: on a GPU. Elsewhere weights stay
    row-major, so that a module can be moved to the CPU, saved and loaded there."""
    return device.type == "cuda"


def _check(op: str, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> None:
    values = tensors["values"]
    check_tensor_shape(op, "values", values, [values.numel()])
    check_tensor_shape(op, "metadata", tensors["metadata"], [0])


def _pack(spec: WeightSpec, tensors: Tensors) -> Tensors:
    """Row-major tensors -> the blob.

    Raises:
        TypeError: dtype.   ValueError: shape.   NotImplementedError: no library, or a combination
        that it or this module refuses; the message says why.   RuntimeError: the library fails, or
        gives back another weight.
    Notes:
        About 0.56 of the dense bytes. Needs the dense weight for a moment, twice.
    """
    op, remedy = "sparsekern.cusparselt_backend.pack", "Use layout=None for this layer."
    kind, storage = spec.element, spec.element.storage
    known = (kind.plain or kind.scaled) and storage in DTYPES and spec.dtype in dtypes.NATIVE
    check(
        known,
        op,
        f"a weight of 8-bit levels, {dtypes.native_names()}",
        spec.dtype if kind.plain else f"{spec.storage} of {spec.dtype}",
        "Call weight.to(torch.bfloat16).",
        TypeError,
    )
    why = shape_refusal(*spec.shape, storage)
    check(not why, op, "a weight that the library takes", why, remedy)
    index, code = tensors["values"].get_device(), DTYPES[storage]
    why = refusal(index, storage)
    check(not why, op, "a usable cuSPARSELt", why, remedy, NotImplementedError)
    native: Any = _native.module()
    out_features, in_features = spec.shape
    with torch.cuda.device(index):
        dense = compress.decompress(_levels(spec, tensors))
        stored = dense.to(storage)
        blob_bytes, buffer_bytes = native.cusparselt_compressed_bytes(index, code, *spec.shape)
        values = stored.new_empty(-(-blob_bytes // storage.itemsize))
        buffer = dense.new_empty(max(1, buffer_bytes), dtype=torch.uint8)
        native.cusparselt_compress(
            device=index,
            dtype=code,
            out_features=out_features,
            in_features=in_features,
            dense=stored.data_ptr(),
            blob=values.data_ptr(),
            buffer=buffer.data_ptr(),
            stream=torch.cuda.current_stream(index).cuda_stream if index >= 0 else 0,
        )
        packed = {**tensors, "values": values, "metadata": tensors["metadata"].new_empty(0)}
        for start, columns in _dense_columns(spec, packed):
            if not torch.equal(columns, dense[:, start : start + columns.shape[1]]):
                found = library()[0]
                name = "the library" if found is None else found.name
                got = f"another one from {name}, from column {start} on"
                raise RuntimeError(message(op, "the weight back from its blob", got, remedy))
    return packed


def _levels(spec: WeightSpec, tensors: Tensors) -> Sparse24:
    """The row-major weight with its levels as numbers, which every 16-bit dtype holds exactly."""
    if spec.element.plain:
        return Sparse24.from_tensors(spec, tensors)
    levels = dtypes.scaled_codec(spec.storage).unpack(tensors["values"]).to(spec.dtype)
    return Sparse24(levels, tensors["metadata"], spec.shape)


def _unpack(spec: WeightSpec, tensors: Tensors) -> Tensors:
    """The blob -> row-major tensors, bit for bit as `compress` makes them from the dense weight.

    By multiplying with the identity: each sum has one product that is not zero, so it is exact. In
    slices of columns, so that no dense copy exists as a whole.
    """
    out_features, in_features = spec.shape
    values = tensors["values"].new_empty(out_features, in_features // 2)
    metadata = tensors["metadata"].new_empty(out_features, in_features // 8)
    for start, columns in _dense_columns(spec, tensors):
        part, stop = compress.compress(columns), start + columns.shape[1]
        values[:, start // 2 : stop // 2] = part.values.to(values.dtype)
        metadata[:, start // 8 : stop // 8] = part.metadata
    return {**tensors, "values": values, "metadata": metadata}


def _dense_columns(spec: WeightSpec, tensors: Tensors) -> Iterator[tuple[int, Tensor]]:
    """Yields (start, W[:, start:stop]) over the columns of a weight in this layout: of the levels
    where it has such."""
    out_features, in_features = spec.shape
    plain, storage = spec.element.plain, spec.element.storage
    tensors = dict(tensors)
    if not plain:
        tensors[SCALE] = torch.ones_like(tensors[SCALE])
    w24 = Sparse24.from_tensors(spec.with_(layout=LAYOUT), tensors)
    multiple = sparse_multiple(storage)
    size = _UNPACK_ELEMENTS // (out_features + in_features)
    size = max(1, size // multiple) * multiple
    for start in range(0, in_features, size):
        count = min(size, in_features - start)
        # Of spec.dtype first: torch cannot fill a diagonal of every 8-bit dtype.
        identity = torch.zeros(count, in_features, dtype=spec.dtype, device=w24.device)
        identity.diagonal(start).fill_(1)
        multiply = linear if plain else product
        yield start, multiply(identity.to(storage), w24).t()


register_layout(
    Layout(LAYOUT, _check, _pack, _unpack, converts=False, lives_on=lambda device: packs(device))
)
