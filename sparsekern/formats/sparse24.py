"""Sparse24, a weight in 2:4 form, and the public functions that make, read and check one.

Layout "rowmajor" (the layout on disk, in a state_dict and on the CPU):

    dense row   [ a 0 b 0 | 0 0 c d | ... ]        groups of 4 columns
    values      [ a b | c d | ... ]                [out, in/2], two per group, ascending columns
    metadata    nibble of group 0 = 0 | 2 << 2 = 0x8, of group 1 = 2 | 3 << 2 = 0xE -> byte 0xE8
                                                   uint8 [out, ceil(in/8)], low nibble = lower group

A nibble idx0 | idx1 << 2 always holds two distinct increasing indices: 0x4 0x8 0xC 0x9 0xD 0xE;
the unused last nibble of a row with in_features % 8 == 4 is 0x4. This is compressed-tensors'
sparse-24-bitmask with the 4-bit masks replaced by the indices that tensor cores read; `bitmask()`
and `from_bitmask()` convert. -0.0 counts as zero and is stored as +0.0.

Layout "tile64" holds the same two tensors padded and permuted for the GPU kernels (formats/tile64.py). Layout
"cusparselt" holds the vendor library's opaque blob on a GPU (backends/cusparselt/linear.py); what changes
its dtype or GPU, is copied or pickled, becomes row-major.

Source: PTX ISA, "Sparse matrix storage"; Mishra et al. 2021 (arXiv:2104.08378) for the 2:4 format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparsekern.errors import FormatError, check, message
from sparsekern.formats import codec as compression

LAYOUTS = ("rowmajor", "tile64", "cusparselt")
DTYPES = tuple(compression.INFINITY_BITS)

# The two encodings against each other; 0 marks what the other has no nibble for.
_BITMASK_OF_NIBBLE = tuple(
    (1 << (nibble & 3) | 1 << (nibble >> 2)) if nibble in compression.NIBBLES else 0
    for nibble in range(16)
)
_NIBBLE_OF_BITMASK = tuple(
    _BITMASK_OF_NIBBLE.index(bits) if bits and bits in _BITMASK_OF_NIBBLE else 0
    for bits in range(16)
)


class Sparse24:
    """A 2:4-sparse weight [out_features, in_features]: values, metadata, shape and layout.

    Args:
        values: float32 | float16 | bfloat16; layout "rowmajor": [out, in/2], layout "tile64":
            [ceil(out/64) * ceil(in/64), 2048], layout "cusparselt": [any], not numbers.
        metadata: uint8, on the same device; layout "rowmajor": [out, ceil(in/8)], layout "tile64":
            [ceil(out/64) * ceil(in/64), 512], layout "cusparselt": [0].
        shape: (out_features, in_features), counted dense; in_features % 4 == 0.
        layout: "rowmajor" | "tile64" | "cusparselt".
    Raises:
        FormatError: a shape, dtype, device or layout that does not fit. The contents are not read
            (that would wait for the GPU): use `verify` for data from outside.
    Notes:
        A plain class, not a Tensor: it supports copy, deepcopy, pickle (torch.load with
        weights_only=True) and `.to`, and shares memory with the tensors it was given.
    """

    values: Tensor
    metadata: Tensor
    shape: torch.Size
    layout: str

    def __init__(
        self, values: Tensor, metadata: Tensor, shape: Sequence[int], layout: str = "rowmajor"
    ) -> None:
        op = "sparsekern.Sparse24"
        _check(layout in LAYOUTS, op, f"layout in {LAYOUTS}", repr(layout))
        self.shape = _checked_shape(op, shape)
        for name, tensor in (("values", values), ("metadata", metadata)):
            _check(isinstance(tensor, Tensor), op, f"a tensor as {name}", type(tensor).__name__)
        _check(values.dtype in DTYPES, op, f"values of dtype in {DTYPES}", values.dtype)
        _check(metadata.dtype == torch.uint8, op, "metadata of dtype uint8", metadata.dtype)
        together = metadata.device == values.device
        _check(together, op, f"metadata on {values.device}", metadata.device)
        out_features, in_features = self.shape
        if layout == "rowmajor":
            _check_shape(op, "values", values, [out_features, in_features // 2])
            _check_shape(op, "metadata", metadata, [out_features, (in_features + 7) // 8])
        elif layout == "cusparselt":
            _check_shape(op, "values", values, [values.numel()])
            _check_shape(op, "metadata", metadata, [0])
        else:
            tiles = -(-out_features // 64) * -(-in_features // 64)
            _check_shape(op, "values", values, [tiles, 2048])
            _check_shape(op, "metadata", metadata, [tiles, 512])
        self.values = values.contiguous()
        self.metadata = metadata.contiguous()
        self.layout = layout

    @classmethod
    def from_bitmask(cls, values: Tensor, bitmask: Tensor, shape: Sequence[int]) -> Sparse24:
        """From the tensors of a sparse-24-bitmask file: `compressed`, `bitmask` and `shape`.

        Args:
            values: [out, in/2], kept elements in ascending column order.
            bitmask: uint8 [out, ceil(in/8)]; bit b of byte j keeps column 8j + b, padding bits 0.
            shape: (out_features, in_features); the file's int64 [2, 1] tensor will do.
        Raises:
            FormatError: wrong shapes or dtypes, or a group whose mask does not have two bits.
        """
        op = "sparsekern.Sparse24.from_bitmask"
        size = _checked_shape(op, shape)
        groups = size[1] // 4
        _check(isinstance(bitmask, Tensor), op, "a tensor as bitmask", type(bitmask).__name__)
        _check(bitmask.dtype == torch.uint8, op, "bitmask of dtype uint8", bitmask.dtype)
        _check_shape(op, "bitmask", bitmask, [size[0], (size[1] + 7) // 8])
        bits = compression.unpack_nibbles(bitmask, groups)
        nibbles = _lookup(_NIBBLE_OF_BITMASK, bits)
        if (nibbles == 0).any():
            row, group = (nibbles == 0).nonzero()[0].tolist()
            kept = bin(int(bits[row, group])).count("1")
            _raise_at(op, "2 bits set in each group of 4 columns", f"{kept} bits", row, group)
        if groups % 2 and (bitmask[:, -1] >> 4).any():
            row = int((bitmask[:, -1] >> 4).nonzero()[0])
            _raise_at(op, "padding bits that are 0", "a set bit", row, groups)
        metadata = compression.pack_nibbles(nibbles, compression.PADDING_NIBBLE)
        return cls(values, metadata, size)

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.metadata.nbytes

    def to(self, *args: Any, **kwargs: Any) -> Sparse24:
        """Like Tensor.to: device and/or dtype of the values. The kept slots stay as they are.

        Values that a narrower dtype rounds to zero become +0.0; `verify` finds any that overflow.
        A weight in layout "cusparselt" becomes row-major where anything changes.
        """
        if self.layout == "cusparselt":
            target = self.values[:0].to(*args, **kwargs)
            if (target.dtype, target.device) == (self.dtype, self.device):
                return self.clone() if kwargs.get("copy") else self
            return self.rowmajor().to(*args, **kwargs)
        values = self.values.to(*args, **kwargs)
        if values.dtype != self.dtype:
            values = values.masked_fill(values == 0, 0)
        metadata = self.metadata.to(values.device, non_blocking=bool(kwargs.get("non_blocking")))
        if values is self.values and metadata is self.metadata:
            return self
        return Sparse24(values, metadata, self.shape, self.layout)

    def cpu(self) -> Sparse24:
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Sparse24:
        return self.to(torch.device("cuda") if device is None else torch.device(device))

    def clone(self) -> Sparse24:
        return Sparse24(self.values.clone(), self.metadata.clone(), self.shape, self.layout)

    def detach(self) -> Sparse24:
        return Sparse24(self.values.detach(), self.metadata, self.shape, self.layout)

    def rowmajor(self) -> Sparse24:
        """The same weight in layout "rowmajor"; self when it has it already."""
        if self.layout == "rowmajor":
            return self
        if self.layout == "cusparselt":
            from sparsekern.backends.cusparselt import linear as cusparselt_backend

            return cusparselt_backend.unpack(self)
        from sparsekern.formats import tile64 as pack

        return pack.unpack(self)

    def bitmask(self) -> Tensor:
        """The kept slots as compressed-tensors writes them: uint8 [out, ceil(in/8)], padding 0."""
        metadata = self.rowmajor().metadata
        nibbles = compression.unpack_nibbles(metadata, self.in_features // 4)
        return compression.pack_nibbles(_lookup(_BITMASK_OF_NIBBLE, nibbles), 0)

    def mask(self) -> Tensor:
        """The kept slots as bool [out, in]; a kept slot may hold 0.0."""
        bits = compression.unpack_nibbles(self.bitmask(), self.in_features // 4)
        columns = torch.arange(4, device=bits.device, dtype=torch.uint8)
        return ((bits.unsqueeze(2) >> columns) & 1).bool().flatten(1)

    def to_dense(self) -> Tensor:
        """The dense weight [out, in], exact; see `decompress`."""
        return decompress(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle through the checks of __init__, because a pickle may come from anywhere."""
        op = "sparsekern.Sparse24"
        names = {"values", "metadata", "shape", "layout"}
        got = set(state) if isinstance(state, dict) else type(state).__name__
        _check(got == names, op, f"a pickled state of {sorted(names)}", got)
        self.__init__(**state)

    def __getstate__(self) -> dict[str, Any]:
        """For copy, deepcopy and pickle: the blob of layout "cusparselt" is of one GPU and version,
        so the row-major weight stands for it."""
        return self.rowmajor().__dict__ if self.layout == "cusparselt" else self.__dict__

    def __repr__(self) -> str:
        out_features, in_features = self.shape
        return (
            f"Sparse24({out_features} x {in_features}, {self.dtype}, layout={self.layout!r}, "
            f"device={str(self.device)!r}, {self.nbytes} bytes)"
        )


torch.serialization.add_safe_globals([Sparse24])


# ---- public functions ----------------------------------------------------------------------------


def compress(w: Tensor, mask: Tensor | None = None) -> Sparse24:
    """w, or w with the elements outside the mask set to zero, in 2:4 form.

    Specification: reference.compress. decompress gives back exactly what went in (-0.0 as +0.0).

    Args:
        w: [out_features, in_features] float32 | float16 | bfloat16, any strides, in_features a
            multiple of 4. Without a mask it must be 2:4 already.
        mask: bool, shape and device of w, True = kept; at most two kept non-zeros per group.
    Returns:
        Sparse24 in layout "rowmajor" on the device of w. It depends on the dense content alone:
        a kept element that is 0.0 frees its slot (see compression.SLOT_TABLE).
    Raises:
        ValueError: shape; NaN or Inf; more than two non-zeros in a group: the message names the
            row, the columns and the counts.   TypeError: dtype.
    """
    values, metadata = compression.compress_dense(w, mask)
    return Sparse24(values, metadata, w.shape)


def prune_compress(w: Tensor, scores: Tensor | None = None) -> Sparse24:
    """Keep the two best scores of each group and compress: compress(w, mask24(scores)), fused.

    On CUDA one kernel reads w (and the scores) once and writes values and metadata.

    Args:
        w: [out_features, in_features] float32 | float16 | bfloat16, in_features % 4 == 0.
        scores: floating point, shape and device of w; default |w|. Of equal scores the higher
            column is kept.
    Raises:
        ValueError: shape; NaN or Inf in w, NaN in scores, with the place.   TypeError: dtype.
    """
    values, metadata = compression.prune_compress_dense(w, scores)
    return Sparse24(values, metadata, w.shape)


def decompress(w24: Sparse24) -> Tensor:
    """The dense weight [out, in]: every stored value at its column, +0.0 elsewhere, by indexing.

    Specification: reference.decompress. Exact, on CPU and GPU. Same dtype and device as w24.
    """
    w24 = w24.rowmajor()
    return compression.decompress_dense(w24.values, w24.metadata, w24.in_features)


def verify(w24: Sparse24) -> None:
    """Check the contents: six valid nibbles, 0x4 in the padding, finite values.

    Raises:
        FormatError: naming the first row and column that break a rule, and what stands there.
    """
    op = "sparsekern.verify"
    w24 = w24.rowmajor()
    groups = w24.in_features // 4
    nibbles = compression.unpack_nibbles(w24.metadata, groups)
    invalid = _lookup(_BITMASK_OF_NIBBLE, nibbles) == 0
    if invalid.any():
        row, group = invalid.nonzero()[0].tolist()
        got = f"{int(nibbles[row, group]):#x} ({int(invalid.sum())} of {invalid.numel()} groups)"
        _raise_at(op, "two increasing column indices in each metadata nibble", got, row, group)
    if groups % 2:
        padding = w24.metadata[:, -1] >> 4
        wrong = padding != compression.PADDING_NIBBLE
        if wrong.any():
            row = int(wrong.nonzero()[0])
            _raise_at(op, "0x4 in the padding nibble", f"{int(padding[row]):#x}", row, groups)
    infinite = ~torch.isfinite(w24.values)
    if infinite.any():
        row, slot = infinite.nonzero()[0].tolist()
        got = f"{w24.values[row, slot].item()} ({int(infinite.sum())} values are NaN or Inf)"
        _raise_at(op, "finite values", got, row, slot // 2)


# ---- checks --------------------------------------------------------------------------------------


def _check(condition: bool, op: str, expected: str, got: object, remedy: str = "") -> None:
    check(condition, op, expected, got, remedy, FormatError)


def _check_shape(op: str, name: str, tensor: Tensor, expected: list[int]) -> None:
    _check(list(tensor.shape) == expected, op, f"{name} of shape {expected}", list(tensor.shape))


def _checked_shape(op: str, shape: Sequence[int]) -> torch.Size:
    size = torch.Size(int(extent) for extent in shape)
    fits = len(size) == 2 and min(size) >= 0 and size[1] % 4 == 0
    _check(fits, op, "shape (out_features, in_features) with in_features % 4 == 0", list(size))
    return size


def _lookup(table: Sequence[int], nibbles: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.uint8, device=nibbles.device)[nibbles.int()]


def _raise_at(op: str, expected: str, got: str, row: int, group: int) -> NoReturn:
    where = f"{got} at row {row}, columns {4 * group}..{4 * group + 3}"
    raise FormatError(message(op, expected, where))
