"""Sparse24, a weight in 2:4 form: a spec and named tensors.

Layout "rowmajor" (the layout on disk, in a state_dict and on the CPU):

    dense row   [ a 0 b 0 | 0 0 c d | ... ]        groups of 4 columns
    values      [ a b | c d | ... ]                [out, in/2], two per group, ascending columns
    metadata    nibble of group 0 = 0 | 2 << 2 = 0x8, of group 1 = 2 | 3 << 2 = 0xE -> byte 0xE8
                                                   uint8 [out, ceil(in/8)], low nibble = lower group

A nibble idx0 | idx1 << 2 always holds two distinct increasing indices: 0x4 0x8 0xC 0x9 0xD 0xE;
the unused last nibble of a row with in_features % 8 == 4 is 0x4. This is compressed-tensors'
sparse-24-bitmask with the 4-bit masks replaced by the indices that tensor cores read; `bitmask()`
and `from_bitmask()` convert. -0.0 counts as zero and is stored as +0.0.

Other layouts (formats/layouts.py) hold the same two tensors differently: "tile64" pads and permutes
them for the GPU kernels (formats/tile64.py), "cusparselt" holds the vendor library's opaque blob on
a GPU (backends/cusparselt/layout.py); what changes its dtype or GPU, is copied or pickled, becomes
row-major there. A coded element type (formats/dtypes.py) adds tensors of its own, such as scales.

The functions at the end make, read and check row-major weights in torch alone; ops/compress.py has
the public ones of the same names, which take the kernels where there are any.

Source: PTX ISA, "Sparse matrix storage"; Mishra et al. 2021 (arXiv:2104.08378) for the 2:4 format.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from sparsekern.errors import FormatError, check, message
from sparsekern.formats import codec, dtypes, layouts, scaled
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec, check_tensor_shape, checked_shape
from sparsekern.formats.scaled import ScaledCodec
from sparsekern.formats.weight_like import OP as _OP
from sparsekern.formats.weight_like import WeightLike
from sparsekern.utils.arguments import check_data, shown

_STATE_VERSION = 2  # of pickles; those without a version are of the first one

# The two encodings against each other; 0 marks what the other has no nibble for.
_BITMASK_OF_NIBBLE = tuple(
    (1 << (nibble & 3) | 1 << (nibble >> 2)) if nibble in codec.NIBBLES else 0
    for nibble in range(16)
)
_NIBBLE_OF_BITMASK = tuple(
    _BITMASK_OF_NIBBLE.index(bits) if bits and bits in _BITMASK_OF_NIBBLE else 0
    for bits in range(16)
)


class _Twin(NamedTuple):
    """A weight in another layout, and what it was made of: tensors and their versions; `more` has
    (name, tensor, version) of those that a coded type adds."""

    weight: Sparse24
    values: Tensor
    metadata: Tensor
    versions: tuple[int, int]
    more: tuple[tuple[str, Tensor, int], ...]


class Sparse24(WeightLike):
    """A 2:4-sparse weight [out_features, in_features]: values, metadata, shape and layout.

    Args:
        values: float32 | float16 | bfloat16; layout "rowmajor": [out, in/2], layout "tile64":
            [ceil(out/64) * ceil(in/64), 2048], layout "cusparselt": [any], not numbers.
        metadata: uint8, on the same device; layout "rowmajor": [out, ceil(in/8)], layout "tile64":
            [ceil(out/64) * ceil(in/64), 512], layout "cusparselt": [0].
        shape: (out_features, in_features), counted dense; in_features % 4 == 0.
        layout: name of a registered layout.
    Raises:
        FormatError: a shape, dtype, device or layout that does not fit. The contents are not read
            (that would wait for the GPU): use `verify` for data from outside.
    Notes:
        A plain class, not a Tensor: it supports copy, deepcopy, pickle (torch.load with
        weights_only=True) and `.to`, and shares memory with the tensors it was given. `spec` says
        what it is, `tensors` holds its data by name; `from_tensors` makes one of these two, which
        is the way to weights of coded element types.
    """

    spec: WeightSpec
    tensors: dict[str, Tensor]
    # False: `sparsekern.linear` makes no twin. SparseLinear's weights, whose layout it chose.
    keeps_twin: bool = True
    _twin: _Twin | None = None

    def __init__(
        self, values: Tensor, metadata: Tensor, shape: Sequence[int], layout: str = ROWMAJOR
    ) -> None:
        layouts.layout(layout, _OP)
        size = checked_shape(_OP, shape)
        _check(isinstance(values, Tensor), _OP, "a tensor as values", type(values).__name__)
        known = f"values of dtype in {tuple(dtypes.PLAIN)}"
        _check(values.dtype in dtypes.PLAIN, _OP, known, values.dtype)
        self._set(WeightSpec.of(size, values.dtype, layout), dict(values=values, metadata=metadata))

    @classmethod
    def from_tensors(cls, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> Sparse24:
        """The weight of this spec with these tensors, checked as by the constructor."""
        w24 = cls.__new__(cls)
        w24._set(spec, tensors)
        return w24

    @classmethod
    def unchecked(cls, spec: WeightSpec, tensors: dict[str, Tensor]) -> Sparse24:
        """`from_tensors` for tensors that have passed its checks, or have no data (meta)."""
        w24 = cls.__new__(cls)
        w24.spec, w24.tensors = spec, tensors
        return w24

    def _set(self, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> None:
        _check(isinstance(spec, WeightSpec), _OP, "a WeightSpec as spec", type(spec).__name__)
        given = type(tensors).__name__
        _check(isinstance(tensors, Mapping), _OP, "a dict of tensors", given)
        layout, kind = layouts.layout(spec.layout, _OP), spec.element
        stored = f"an element type with a codec ({spec.storage})"
        _check(kind.storable, _OP, stored, "none", "Register one with sparsekern.register_dtype.")
        names = list(spec.tensors)
        _check(set(tensors) == set(names), _OP, f"tensors {names}", sorted(tensors))
        for name in names:
            got = tensors[name]
            _check(isinstance(got, Tensor), _OP, f"a tensor as {name}", type(got).__name__)
            _check(got.layout is torch.strided, _OP, f"a dense tensor as {name}", got.layout)
        values, metadata = tensors["values"], tensors["metadata"]
        _check(values.dtype == kind.storage, _OP, f"values of dtype {kind.storage}", values.dtype)
        _check(metadata.dtype == torch.uint8, _OP, "metadata of dtype uint8", metadata.dtype)
        for name in names[1:]:
            device = tensors[name].device
            _check(device == values.device, _OP, f"{name} on {values.device}", device)
        layout.check(_OP, spec, tensors)
        own_check = getattr(kind.codec, "check", None)
        if own_check is not None:
            own_check(_OP, spec, tensors)
        self.spec = spec
        self.tensors = {name: tensors[name].contiguous() for name in names}
        self._twin = None

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
        metadata = metadata_of_bitmask(bitmask, shape, "sparsekern.Sparse24.from_bitmask")
        return cls(values, metadata, shape)

    # ------------------------------------------------------------------ what it is

    @property
    def values(self) -> Tensor:
        """The kept values, as the layout and the element type hold them."""
        return self.tensors["values"]

    @values.setter
    def values(self, values: Tensor) -> None:
        _check(isinstance(values, Tensor), _OP, "a tensor as values", type(values).__name__)
        spec = self.spec
        if spec.element.plain and values.dtype in dtypes.PLAIN:
            spec = spec.with_(dtype=values.dtype)
        self._set(spec, {**self.tensors, "values": values})

    @property
    def metadata(self) -> Tensor:
        """Which columns are kept, as the layout holds them."""
        return self.tensors["metadata"]

    @metadata.setter
    def metadata(self, metadata: Tensor) -> None:
        self._set(self.spec, {**self.tensors, "metadata": metadata})

    @property
    def layout(self) -> str:
        return self.spec.layout

    @property
    def out_features(self) -> int:
        return self.spec.shape[0]

    @property
    def in_features(self) -> int:
        return self.spec.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without a copy that `twin` remembers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    # ------------------------------------------------------------------ copies

    def to(self, *args: Any, **kwargs: Any) -> Sparse24:
        """Like Tensor.to: device and/or dtype of the numbers. The kept slots stay as they are.

        Values that a narrower dtype rounds to zero become +0.0; `verify` finds any that overflow.
        A coded type keeps its stored tensors: dtype is that of the numbers they stand for. A weight
        in layout "cusparselt" becomes row-major where anything changes.
        """
        spec, values = self.spec, self.tensors["values"]
        probe = torch.empty(0, dtype=spec.dtype, device=values.device).to(*args, **kwargs)
        copied = bool(kwargs.get("copy"))
        if (probe.dtype, probe.device) == (spec.dtype, values.device):
            return self.clone() if copied else self
        if not layouts.layout(spec.layout).converts:
            return self.rowmajor().to(*args, **kwargs)
        known = f"a dtype in {dtypes.names()}"
        remedy = "Pass one of these as dtype=, or call sparsekern.decompress_model afterwards."
        check(probe.dtype in dtypes.PLAIN, f"{_OP}.to", known, probe.dtype, remedy, FormatError)
        # Of its own dtype, when it does not change: the device and how to get there.
        later, device = bool(kwargs.get("non_blocking")), probe.device
        tensors = {
            name: tensor.to(device, non_blocking=later, copy=copied)
            for name, tensor in self.tensors.items()
        }
        if spec.element.plain and probe.dtype != spec.dtype:
            values = tensors["values"].to(probe.dtype)
            tensors["values"] = values.masked_fill(values == 0, 0)
        return Sparse24.from_tensors(spec.with_(dtype=probe.dtype), tensors)

    def cpu(self) -> Sparse24:
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Sparse24:
        return self.to(torch.device("cuda") if device is None else torch.device(device))

    def clone(self) -> Sparse24:
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return Sparse24.from_tensors(self.spec, tensors)

    def detach(self) -> Sparse24:
        tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}
        return Sparse24.from_tensors(self.spec, tensors)

    # ------------------------------------------------------------------ layouts

    def to_layout(self, name: str) -> Sparse24:
        """The same weight in a registered layout; self when it has it already.

        Raises:
            FormatError: no such layout.   TypeError, ValueError, NotImplementedError: the layout
            cannot hold this weight (dtype, shape, device); the message says what to do.
        """
        new, old = layouts.layout(name, f"{_OP}.to_layout"), layouts.layout(self.spec.layout)
        if new is old:
            return self
        plain, tensors = self.spec.with_(layout=ROWMAJOR), self.tensors
        if old.name != ROWMAJOR:
            tensors = old.unpack(self.spec, tensors)
        if new.name == ROWMAJOR:
            return Sparse24.from_tensors(plain, tensors)
        tensors = new.pack(plain, tensors)
        w24 = Sparse24.from_tensors(self.spec.with_(layout=name), tensors)
        if new.complete is not None:
            new.complete(w24.values)
        return w24

    def rowmajor(self) -> Sparse24:
        """The same weight in layout "rowmajor"; self when it has it already."""
        return self if self.spec.layout == ROWMAJOR else self.to_layout(ROWMAJOR)

    def narrow(self, dim: int, start: int, length: int) -> Sparse24:
        """Rows (dim 0) or columns (dim 1) start .. start + length of the weight, never dense.

        Args:
            dim: 0 for out_features, 1 for in_features.
            start, length: counted dense. Along columns both are multiples of 8, where a byte of the
                metadata ends (length may also reach the last column), and of `group` where scales
                belong to groups of columns.
        Returns:
            Sparse24 in the same layout, which shares no memory with this one.
        Raises:
            ValueError: a range outside of the weight, or columns that cannot be cut there.
        """
        op, size = f"{_OP}.narrow", self.spec.shape
        check(type(dim) is int and dim in (0, 1), op, "dim 0 or 1", repr(dim))
        for name, value in (("start", start), ("length", length)):
            integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            check(integral, op, f"{name}: a whole number", repr(value), exc=TypeError)
        inside = 0 <= start and 0 <= length and start + length <= size[dim]
        check(inside, op, f"a range within 0..{size[dim]}", f"{start}..{start + length}")
        spec, whole = self.spec, self.rowmajor()
        tensors = whole.tensors
        if dim == 0:
            cut = {name: t.narrow(0, start, length).clone() for name, t in tensors.items()}
            shape = (length, size[1])
        else:
            unit = 8 if spec.scale != "group" else math.lcm(8, spec.group)
            ends = start % unit == 0 and (length % unit == 0 or start + length == size[1])
            got, remedy = f"{start}..{start + length}", "Cut elsewhere, or along rows."
            check(ends, op, f"columns cut at multiples of {unit}", got, remedy)
            kind, shape = spec.element, (size[0], length)
            ranges = {
                "values": (kind.columns(start), kind.columns(length)),
                "metadata": (start // 8, -(-length // 8)),
            }
            if spec.scale == "group":
                ranges |= dict.fromkeys(
                    kind.tensors, (start // spec.group, -(-length // spec.group))
                )
            cut = {
                name: t.narrow(1, *ranges[name]).clone() if name in ranges else t.clone()
                for name, t in tensors.items()
            }
        of = WeightSpec.of(shape, spec.storage, ROWMAJOR, spec.dtype, spec.scale, spec.group)
        return Sparse24.from_tensors(of, cut).to_layout(spec.layout)

    def twin(self, name: str) -> Sparse24:
        """The same weight in another layout, made at the first call and remembered on this object.

        It is made anew after a tensor was replaced or changed in place. It takes as much memory as
        the weight itself, for as long as the weight lives; copies and pickles do not have it.

        Raises:
            As `to_layout`.   RuntimeError: the tensors are inference tensors, whose changes cannot
            be seen.
        """
        twin = self.fresh_twin()
        if twin is None or twin.spec.layout != name:
            values, metadata = self.tensors["values"], self.tensors["metadata"]
            versions = values._version, metadata._version
            added = ((key, self.tensors[key]) for key in self.spec.element.tensors)
            more = tuple((key, tensor, tensor._version) for key, tensor in added)
            twin = self.to_layout(name)
            self._twin = _Twin(twin, values, metadata, versions, more)
        return twin

    def fresh_twin(self) -> Sparse24 | None:
        """The remembered weight of `twin` while it is still the same weight, else None."""
        twin = self._twin
        if twin is None:
            return None
        tensors = self.tensors
        values, metadata = tensors["values"], tensors["metadata"]
        if values is not twin.values or metadata is not twin.metadata:
            return None
        for key, tensor, version in twin.more:
            if tensors[key] is not tensor or tensor._version != version:
                return None
        return twin.weight if (values._version, metadata._version) == twin.versions else None

    # ------------------------------------------------------------------ contents

    def bitmask(self) -> Tensor:
        """The kept slots as compressed-tensors writes them: uint8 [out, ceil(in/8)], padding 0."""
        metadata = self.rowmajor().metadata
        nibbles = codec.unpack_nibbles(metadata, self.in_features // 4)
        return codec.pack_nibbles(_lookup(_BITMASK_OF_NIBBLE, nibbles), 0)

    def mask(self) -> Tensor:
        """The kept slots as bool [out, in]; a kept slot may hold 0.0."""
        bits = codec.unpack_nibbles(self.bitmask(), self.in_features // 4)
        columns = torch.arange(4, device=bits.device, dtype=torch.uint8)
        return ((bits.unsqueeze(2) >> columns) & 1).bool().flatten(1)

    def columns(self) -> Tensor:
        """The dense column of every kept number, int64 [out, in/2]."""
        groups = self.in_features // 4
        nibbles = codec.unpack_nibbles(self.rowmajor().metadata, groups).long()
        within = torch.stack((nibbles & 3, nibbles >> 2), dim=2)
        first = 4 * torch.arange(groups, device=nibbles.device)[:, None]
        return (within + first).flatten(1)

    def numbers(self, dtype: torch.dtype | None = None) -> Tensor:
        """The kept numbers [out, in/2], row-major: `values`, decoded where coded.

        Args:
            dtype: plain; None for `self.dtype`, to which a coded type rounds its numbers.
        """
        w24 = self.rowmajor()
        dtype = self.spec.dtype if dtype is None else dtype
        known = f"a dtype in {dtypes.names()}"
        plain = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        check(plain, f"{_OP}.numbers", known, repr(dtype), exc=TypeError)
        coder = self.spec.element.codec
        if coder is None:
            return w24.values.to(dtype)
        decoded = coder.decode(w24.tensors, dtype, self.spec.group)
        wanted = [self.out_features, self.in_features // 2]
        fits = isinstance(decoded, Tensor) and list(decoded.shape) == wanted
        expected = f"numbers {wanted} from the decode of {self.spec.storage!r}"
        _check(fits, f"{_OP}.numbers", expected, shown(decoded))
        return decoded.to(dtype)

    def to_dense(self) -> Tensor:
        """The dense weight [out, in], exact, in torch alone; `sparsekern.decompress` is faster
        where there are kernels."""
        return decompress(self)

    # ------------------------------------------------------------------ pickles

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle through the checks of __init__, because a pickle may come from anywhere."""
        got: object = set(state) if isinstance(state, dict) else type(state).__name__
        if got == {"values", "metadata", "shape", "layout"}:  # of 0.1
            Sparse24.__init__(self, **state)
            return
        names = {"version", "spec", "tensors"}
        _check(got == names, _OP, f"a pickled state of {sorted(names)}", got)
        newer = "Read it with a newer sparsekern."
        version, tensors = state["version"], state["tensors"]
        known = isinstance(version, int) and 1 < version <= _STATE_VERSION
        _check(known, _OP, f"a pickled state of version {_STATE_VERSION}", version, newer)
        _check(isinstance(tensors, dict), _OP, "a dict of tensors", type(tensors).__name__)
        spec = WeightSpec.parse(state["spec"])
        self._set(spec, from_pickle(spec, tensors))

    def __getstate__(self) -> dict[str, Any]:
        """For copy, deepcopy and pickle. What one GPU alone can read (the blob of "cusparselt") is
        not part of it: the row-major weight stands for it."""
        w24 = self if layouts.layout(self.spec.layout).converts else self.rowmajor()
        return dict(version=_STATE_VERSION, spec=w24.spec.text, tensors=for_pickle(w24.tensors))

    def __repr__(self) -> str:
        out_features, in_features = self.spec.shape
        plain = str(self.dtype) == f"torch.{self.spec.storage}"  # also of a type that is gone
        stored = "" if plain else f" as {self.spec.storage}"
        return (
            f"Sparse24({out_features} x {in_features}, {self.dtype}{stored}, "
            f"layout={self.layout!r}, device={str(self.device)!r}, {self.nbytes} bytes)"
        )


# The second is its name in files of 0.1.
torch.serialization.add_safe_globals([Sparse24, (Sparse24, "sparsekern.sparse24.Sparse24")])


def for_pickle(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with fp8 as bytes: torch's fp8 tensors cannot be unpickled by pickle alone."""
    kinds = [kind.storage for kind in dtypes.elements() if kind.bits == 8]
    floats = [kind for kind in kinds if kind.is_floating_point]
    return {k: t.view(torch.uint8) if t.dtype in floats else t for k, t in tensors.items()}


def from_pickle(spec: WeightSpec, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `for_pickle`."""
    values, wanted = tensors.get("values"), spec.element.storage
    if isinstance(values, Tensor) and values.dtype == torch.uint8 and wanted.itemsize == 1:
        return {**tensors, "values": values.view(wanted)}
    return dict(tensors)


# ---- row-major weights, in torch alone -----------------------------------------------------------


def compress(w: Tensor, mask: Tensor | None = None) -> Sparse24:
    """w, or w with the elements outside the mask set to zero, row-major; see ops.compress."""
    values, metadata = codec.compress_dense(w, mask)
    return Sparse24(values, metadata, w.shape)


def prune_compress(w: Tensor, scores: Tensor | None = None) -> Sparse24:
    """The two best scores of each group of w, row-major; see ops.compress."""
    values, metadata = codec.prune_compress_dense(w, scores)
    return Sparse24(values, metadata, w.shape)


def encode(w24: Sparse24, storage: str | torch.dtype, group: int = 0) -> Sparse24:
    """A row-major weight of a plain dtype, stored as a coded element type.

    Args:
        storage: name of the element type; that of a plain one is w24.to(its dtype).
        group: columns of in_features that share a scale; 0: the codec's choice.
    Raises:
        TypeError: no such type, or it has no codec.   FormatError: the codec made tensors of
        another form than the table says.
    """
    kind = dtypes.element(storage, "sparsekern.compress")
    if kind.plain:
        if kind.storage is w24.dtype:
            return w24
        narrowed = w24.to(kind.storage)
        remedy = "Store it in a dtype that holds its numbers, as bfloat16 does."
        check_finite("sparsekern.compress", narrowed, remedy)
        return narrowed
    if kind.codec is None:
        expected = f"an element type with a codec, not only declared ({storage!r})"
        remedy = "Register one with sparsekern.register_dtype."
        raise TypeError(message("sparsekern.compress", expected, "none", remedy))
    spec = WeightSpec.of(w24.shape, kind.name, ROWMAJOR, w24.dtype, None, group)
    if isinstance(kind.codec, ScaledCodec):
        numbers = w24.numbers()
        scale = kind.codec.absmax(numbers, spec.group)
        return of_levels(spec, kind.codec.levels(numbers, scale, spec.group), scale, w24.metadata)
    stored = kind.codec.encode(w24.numbers(), spec.group)
    by_name, got = isinstance(stored, Mapping), type(stored).__name__
    _check(by_name, "sparsekern.compress", f"a dict from the encode of {kind.name!r}", got)
    return Sparse24.from_tensors(spec, {**stored, "metadata": w24.metadata})


def of_levels(spec: WeightSpec, levels: Tensor, scale: Tensor, metadata: Tensor) -> Sparse24:
    """The row-major weight of a quantised type with these levels, whose zeros free their slots.

    Args:
        levels: float32 [out, in/2], of the kept slots.
        scale: float32 [out, groups].   metadata: uint8 [out, ceil(in/8)].
    Returns:
        Sparse24 that depends on the dense content alone, as `compress` makes it: a group with less
        than two levels other than 0 has the slots of codec.SLOT_TABLE.
    """
    coder = dtypes.scaled_codec(spec.storage)
    values, metadata = codec.settle_slots(levels, metadata)
    tensors = {"values": coder.pack(values), "metadata": metadata, scaled.SCALE: scale}
    return Sparse24.from_tensors(spec, tensors)


def metadata_of_bitmask(
    bitmask: Tensor, shape: Sequence[int], op: str = "sparsekern.Sparse24.from_bitmask"
) -> Tensor:
    """Row-major metadata uint8 [out, ceil(in/8)] of a file's bitmask, which is as large.

    Raises:
        FormatError: as `Sparse24.from_bitmask`.
    """
    size = checked_shape(op, shape)
    groups = size[1] // 4
    _check(isinstance(bitmask, Tensor), op, "a tensor as bitmask", type(bitmask).__name__)
    _check(bitmask.dtype == torch.uint8, op, "bitmask of dtype uint8", bitmask.dtype)
    check_tensor_shape(op, "bitmask", bitmask, [size[0], (size[1] + 7) // 8])
    check_data(op, "bitmask", bitmask)
    bits = codec.unpack_nibbles(bitmask, groups)
    nibbles = _lookup(_NIBBLE_OF_BITMASK, bits)
    if (nibbles == 0).any():
        row, group = (nibbles == 0).nonzero()[0].tolist()
        kept = bin(int(bits[row, group])).count("1")
        _raise_at(op, "2 bits set in each group of 4 columns", f"{kept} bits", row, group)
    if groups % 2 and (bitmask[:, -1] >> 4).any():
        row = int((bitmask[:, -1] >> 4).nonzero()[0])
        _raise_at(op, "padding bits that are 0", "a set bit", row, groups)
    return codec.pack_nibbles(nibbles, codec.PADDING_NIBBLE)


def split_rows(w24: Sparse24, rows: Sequence[int]) -> list[Sparse24]:
    """The weights whose rows, one after the other, are those of a row-major w24; shares memory."""
    parts, start = [], 0
    for count in rows:
        old = w24.spec
        shape = (count, old.shape[1])
        spec = WeightSpec.of(shape, old.storage, old.layout, old.dtype, old.scale, old.group)
        some = {name: tensor[start : start + count] for name, tensor in w24.tensors.items()}
        parts.append(Sparse24.from_tensors(spec, some))
        start += count
    return parts


def decompress(w24: Sparse24) -> Tensor:
    """The dense weight [out, in]: every number at its column, +0.0 elsewhere; see ops.compress."""
    w24 = w24.rowmajor()
    return codec.decompress_dense(w24.numbers(), w24.metadata, w24.in_features)


def verify(w24: Sparse24) -> None:
    """Check the contents: six valid nibbles, 0x4 in the padding, finite values and good scales.

    Raises:
        FormatError: naming the first row and column that break a rule, and what stands there.
        TypeError: no Sparse24.   ValueError: on "meta", where there is nothing to check.
    """
    op = "sparsekern.verify"
    check_is_sparse24(op, w24, "w24")
    remedy = "Load the weight first, for example with load_state_dict(..., assign=True)."
    check(w24.device.type != "meta", op, "w24 with data", "one on device meta", remedy)
    w24 = w24.rowmajor()
    groups = w24.in_features // 4
    nibbles = codec.unpack_nibbles(w24.metadata, groups)
    invalid = _lookup(_BITMASK_OF_NIBBLE, nibbles) == 0
    if invalid.any():
        row, group = invalid.nonzero()[0].tolist()
        got = f"{int(nibbles[row, group]):#x} ({int(invalid.sum())} of {invalid.numel()} groups)"
        _raise_at(op, "two increasing column indices in each metadata nibble", got, row, group)
    if groups % 2:
        padding = w24.metadata[:, -1] >> 4
        wrong = padding != codec.PADDING_NIBBLE
        if wrong.any():
            row = int(wrong.nonzero()[0])
            _raise_at(op, "0x4 in the padding nibble", f"{int(padding[row]):#x}", row, groups)
    own_verify = getattr(w24.spec.element.codec, "verify", None)
    if own_verify is not None:
        own_verify(op, w24.spec, w24.tensors)
    check_finite(op, w24)


def check_finite(op: str, w24: Sparse24, remedy: str = "") -> None:
    """FormatError for a row-major weight with a number that is NaN or infinite, by its place. One
    on "meta" has none."""
    numbers = w24.numbers()
    infinite = ~torch.isfinite(numbers)
    if not numbers.is_meta and infinite.any():
        row, slot = infinite.nonzero()[0].tolist()
        got = f"{numbers[row, slot].item()} ({int(infinite.sum())} values are NaN or Inf)"
        _raise_at(op, "finite values", got, row, slot // 2, remedy)


# ---- checks --------------------------------------------------------------------------------------


def check_is_sparse24(op: str, w24: object, name: str = "weight", dense: str = "") -> None:
    """TypeError unless w24 is a Sparse24. dense: what to do with a dense tensor."""
    if not isinstance(w24, Sparse24):
        got, remedy = type(w24).__name__, dense or "Call sparsekern.compress(w)."
        if isinstance(getattr(w24, "weight", None), Sparse24):
            remedy = "Pass its attribute weight."
        elif isinstance(w24, torch.nn.Module):
            remedy = "Pass the weight of one layer; sparsekern.compress_model takes a model."
        elif isinstance(w24, Tensor):
            got = f"{got} {list(w24.shape)}"
        raise TypeError(message(op, f"{name} of type Sparse24", got, remedy))


def _check(condition: bool, op: str, expected: str, got: object, remedy: str = "") -> None:
    check(condition, op, expected, got, remedy, FormatError)


def _lookup(table: Sequence[int], nibbles: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.uint8, device=nibbles.device)[nibbles.int()]


def _raise_at(op: str, expected: str, got: str, row: int, group: int, remedy: str = "") -> NoReturn:
    where = f"{got} at row {row}, columns {4 * group}..{4 * group + 3}"
    raise FormatError(message(op, expected, where, remedy))
