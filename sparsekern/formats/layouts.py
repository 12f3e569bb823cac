"""Layouts: what the tensors of a weight look like, by name, and what a weight is (WeightSpec).

A weight is a spec and an ordered dict of named tensors: values, metadata, and whatever its element
type adds (scales). The layout says how values and metadata lie in memory; the other tensors lie as
their codec made them, whatever the layout. Each layout is one `Layout`, in one file:

    rowmajor     formats/layouts.py               on disk, in a state_dict, on the CPU, for Triton
    tile64       formats/tile64.py                for the CUDA kernels
    cusparselt   backends/cusparselt/layout.py    the vendor library's blob, on one GPU

Row-major is what every other layout is packed from and unpacked to.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparsekern.errors import FormatError, check, message
from sparsekern.formats import dtypes, scaled
from sparsekern.formats.dtypes import ElementType
from sparsekern.utils.arguments import check_fields, checked

Tensors = dict[str, Tensor]
ROWMAJOR = "rowmajor"


# ---- what a weight is ----------------------------------------------------------------------------


class WeightSpec:
    """What a weight is apart from its data; equal specs are one object, so `is` compares them.

    Make one with `WeightSpec.of`. Attributes:

        shape       torch.Size (out_features, in_features), counted dense
        storage     name of the element type of the values (formats/dtypes.py)
        dtype       the plain dtype of the numbers: that of x, bias and y
        layout      name of the layout
        scale       None, or what one scale belongs to: "row" or "group"
        group       columns of a group of scales; 0 where there are none
        text        all of this as one string without quotes; `WeightSpec.parse` reads it
        tensors     names of the tensors, in order
    """

    shape: torch.Size
    storage: str
    dtype: torch.dtype
    layout: str
    scale: str | None
    group: int
    text: str
    tensors: tuple[str, ...]

    @staticmethod
    def of(
        shape: Sequence[int],
        storage: str | torch.dtype,
        layout: str = ROWMAJOR,
        dtype: torch.dtype | None = None,
        scale: str | None = None,
        group: int = 0,
    ) -> WeightSpec:
        """The spec of these properties.

        Args:
            storage: name of an element type, or a plain dtype.
            dtype: None for that of a plain type; float32 for a coded one.
            scale: None for what the element type says.
            group: columns that share a scale; 0: one a row, or 128 columns where the element type
                has scales of groups.
        Raises:
            FormatError: sizes, or a group that does not fit.   TypeError: no such element type, or
            a dtype that is not plain or not that of a plain type.   ValueError: an unknown scale.
        """
        op = "sparsekern.WeightSpec"
        kind = dtypes.element(storage, op)
        size = checked_shape(op, shape)
        plain = (kind.storage if kind.plain else torch.float32) if dtype is None else dtype
        fits = plain is kind.storage if kind.plain else plain in dtypes.PLAIN
        expected = f"dtype {kind.name} or None" if kind.plain else f"a dtype in {dtypes.names()}"
        check(fits, op, expected, repr(dtype), "Leave it None.", TypeError)
        check(type(group) is int, op, "group: a whole number", repr(group), exc=TypeError)
        known = scale is None or scale in dtypes.SCALES
        check(known, op, f"scale in {dtypes.SCALES} or None", repr(scale), "Leave it None.")
        scale = kind.scale if scale is None else scale
        if kind.scaled:
            group = scaled.checked_group(kind.name, scale, group, size[1])
        return _spec((*size, kind.name, plain, layout, scale, group))

    @staticmethod
    def parse(text: str) -> WeightSpec:
        """The spec of a `text`; whoever sends another string gets a FormatError."""
        return _parse(text)

    @property
    def element(self) -> ElementType:
        return dtypes.element(self.storage)

    @property
    def levels(self) -> str:
        """A coded type in users' words, "fp8" or "int4 g128"; "" for a plain one."""
        if self.element.plain:
            return ""
        name = next((k for k, v in dtypes.ALIASES.items() if v == self.storage), self.storage)
        return f"{name} g{self.group}" if self.group else name

    def with_(self, *, layout: str | None = None, dtype: torch.dtype | None = None) -> WeightSpec:
        """The same weight in another layout, or with other numbers (a plain type changes)."""
        dtype = self.dtype if dtype is None else dtype
        storage = dtypes.element(dtype).name if self.element.plain else self.storage
        layout = self.layout if layout is None else layout
        return WeightSpec.of(self.shape, storage, layout, dtype, self.scale, self.group)

    def __repr__(self) -> str:
        return f"WeightSpec({self.text})"

    def __copy__(self) -> WeightSpec:
        return self

    def __deepcopy__(self, memo: object) -> WeightSpec:
        return self

    def __reduce__(self) -> tuple[Callable[[str], WeightSpec], tuple[str]]:
        return WeightSpec.parse, (self.text,)


_SPECS: WeakValueDictionary[tuple[object, ...], WeightSpec] = WeakValueDictionary()


def _spec(key: tuple[Any, ...]) -> WeightSpec:
    found = _SPECS.get(key)
    if found is not None:
        return found
    spec, shape = WeightSpec(), torch.Size(key[:2])
    spec.shape, (spec.storage, spec.dtype, spec.layout, spec.scale, spec.group) = shape, key[2:]
    spec.tensors = ("values", "metadata", *spec.element.tensors)
    plain = str(spec.dtype).removeprefix("torch.")
    parts = (f"{shape[0]}x{shape[1]}", spec.storage, plain, spec.layout, spec.scale or "-")
    spec.text = " ".join((*parts, str(spec.group)))
    return _SPECS.setdefault(key, spec)


# What torch.compiler.assume_constant_result does, without importing the compiler, which cannot
# trace weak references.
_spec._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _parse(text: str) -> WeightSpec:
    op = "sparsekern.WeightSpec.parse"
    parts = text.split(" ") if isinstance(text, str) else []
    sizes = parts[0].split("x") if len(parts) == 6 else []
    number = len(sizes) == 2 and all(part.isdecimal() for part in (*sizes, parts[5]))
    dtype = getattr(torch, parts[2], None) if number else None
    if not isinstance(dtype, torch.dtype) or dtype not in dtypes.PLAIN:
        expected = "'OUTxIN storage dtype layout scale group'"
        raise FormatError(message(op, expected, repr(text)))
    scale = None if parts[4] == "-" else parts[4]
    return WeightSpec.of(list(map(int, sizes)), parts[1], parts[3], dtype, scale, int(parts[5]))


def _forget() -> None:
    _SPECS.clear()
    _parse.cache_clear()


dtypes.watchers.append(_forget)


def checked_shape(op: str, shape: Sequence[int]) -> torch.Size:
    """(out_features, in_features) of a 2:4 weight, or FormatError."""
    expected = "shape (out_features, in_features) with in_features % 4 == 0"
    try:
        size = torch.Size(operator.index(extent) for extent in shape)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FormatError(message(op, expected, repr(shape)[:60])) from error
    fits = len(size) == 2 and min(size) >= 0 and size[1] % 4 == 0
    check(fits, op, expected, list(size), exc=FormatError)
    return size


def check_tensor_shape(op: str, name: str, tensor: Tensor, expected: list[int]) -> None:
    """FormatError unless `tensor`, which messages call `name`, has just this shape."""
    got = list(tensor.shape)
    check(got == expected, op, f"{name} of shape {expected}", got, exc=FormatError)


# ---- the registry --------------------------------------------------------------------------------


def _everywhere(device: torch.device) -> bool:
    return True


@dataclass(frozen=True)
class Layout:
    """How values and metadata lie in memory.

    Args:
        name: one word; what Sparse24.layout, `layout=` and messages say.
        check: (op, spec, tensors) -> None; raises FormatError for shapes that do not fit.
        pack: (row-major spec, tensors) -> tensors in this layout, new or shared; those that a coded
            type adds, as they are. Raises TypeError, ValueError or NotImplementedError with a
            remedy for what it cannot hold.
        unpack: (spec, tensors) -> row-major tensors, exactly.
        converts: True when the values are numbers that `.to(dtype)` and `.to(device)` may convert
            in place; False: the weight becomes row-major where anything changes, and for copies
            and pickles.
        lives_on: device -> False where a module that asks for this layout stays row-major until it
            moves (SparseLinear).
        complete: values -> None; waits until a weight that was just written can be read by kernels
            that do not wait for the work queued ahead of them.
    """

    name: str
    check: Callable[[str, WeightSpec, Mapping[str, Tensor]], None]
    pack: Callable[[WeightSpec, Tensors], Tensors]
    unpack: Callable[[WeightSpec, Tensors], Tensors]
    converts: bool = True
    lives_on: Callable[[torch.device], bool] = _everywhere
    complete: Callable[[Tensor], None] | None = None

    def __post_init__(self) -> None:
        check_fields("sparsekern.Layout", self)


_LAYOUTS: dict[str, Layout] = {}


@checked("sparsekern.register_layout")
def register_layout(new: Layout) -> Layout:
    """Add a layout, from inside or outside the package; every `layout=` takes its name then.

    Raises:
        ValueError: the name is taken, or not one word.
    """
    op = "sparsekern.register_layout"
    check(new.name.isidentifier(), op, "a name that is one word", repr(new.name))
    check(new.name not in _LAYOUTS, op, "a new name", repr(new.name), "Choose another.")
    _LAYOUTS[new.name] = new
    return new


def unregister_layout(name: str) -> None:
    """Take back what `register_layout` did; weights of this layout cannot be used then.

    Raises:
        ValueError: no such layout, or "rowmajor".
    """
    op = "sparsekern.unregister_layout"
    check(name in _LAYOUTS and name != ROWMAJOR, op, "a registered layout", repr(name))
    del _LAYOUTS[name]


def layouts() -> tuple[str, ...]:
    """Names of the layouts, in the order in which they were registered."""
    return tuple(_LAYOUTS)


def layout(name: object, op: str = "sparsekern.layout") -> Layout:
    """The layout of this name.

    Raises:
        FormatError (a ValueError): there is none; the message lists them.
    """
    found = _LAYOUTS.get(name) if isinstance(name, str) else None
    if found is None:
        raise FormatError(message(op, f"layout in {layouts()}", repr(name)))
    return found


# ---- row-major -----------------------------------------------------------------------------------


def _check_rowmajor(op: str, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> None:
    out_features, in_features = spec.shape
    columns = spec.element.columns(in_features)
    check_tensor_shape(op, "values", tensors["values"], [out_features, columns])
    metadata = [out_features, (in_features + 7) // 8]
    check_tensor_shape(op, "metadata", tensors["metadata"], metadata)


def _same(spec: WeightSpec, tensors: Tensors) -> Tensors:
    return tensors


register_layout(Layout(ROWMAJOR, _check_rowmajor, _same, _same))
