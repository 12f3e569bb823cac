"""Element types: the one table of what the kept values of a weight may be stored as.

An element type says how many bits a value takes and in which torch dtype they lie, what sums are
accumulated in, how scales belong to it, and which backends can have kernels for it. Two kinds:

    plain   float32, float16, bfloat16: the stored numbers are the weight's numbers
    coded   everything else: a Codec turns numbers into stored values and further named tensors
            (scales), and back. Those of the package are the quantised ones (formats/scaled.py);
            without a codec a coded type is declared and cannot be stored yet

No other file of the package lists dtypes: `PLAIN`, `names` and the fields here serve all of them.
`register_dtype` adds a type, or gives a declared one its codec, from outside the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from sparsekern.errors import check, message
from sparsekern.formats.scaled import ScaledCodec
from sparsekern.utils.arguments import check_fields, checked

_OP = "sparsekern.register_dtype"


@runtime_checkable
class Codec(Protocol):
    """How numbers become the stored tensors of a coded element type, on whole tensors in torch.

    `values` is always among the stored tensors: [out, in/2 * bits / (8 * itemsize)] in the type's
    storage dtype, row-major; layouts permute it. `tensors` names the others, in order.

    It may have two methods more, (op, spec, tensors) -> None, which raise FormatError: `check` for
    shapes and dtypes of its tensors, `verify` for their contents.
    """

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the stored tensors beside "values", e.g. ("weight_scale",)."""

    def encode(self, values: Tensor, group: int) -> Mapping[str, Tensor]:
        """Kept numbers [out, in/2] of a plain dtype -> {"values": ..., and every other tensor}."""

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, group: int) -> Tensor:
        """The inverse: kept numbers [out, in/2] in the plain dtype."""


@dataclass(frozen=True)
class ElementType:
    """One row of the table.

    Args:
        name: what specs, files and messages call it; one word.
        storage: torch dtype of the values tensor.
        bits: of one value.
        infinity_bits: bit pattern of +infinity, for plain types; None for the others.
        accumulator: torch dtype of sums.
        scale: None, or what one scale belongs to: "row", or "group" of columns.
        backends: names of those that can register kernels for it; the CPU decodes every type.
        native_code: DType in csrc/core/problem.h, None where there are no native kernels.
        codec: None for plain types, and for declared ones that cannot be stored yet.
    """

    name: str
    storage: torch.dtype
    bits: int
    infinity_bits: int | None = None
    accumulator: torch.dtype = torch.float32
    scale: str | None = None
    backends: tuple[str, ...] = ("cpu",)
    native_code: int | None = None
    codec: Codec | None = None

    def __post_init__(self) -> None:
        check_fields("sparsekern.ElementType", self, bits=(1, 64))

    @property
    def plain(self) -> bool:
        """True when the stored numbers are the weight's numbers."""
        return self.infinity_bits is not None

    @property
    def scaled(self) -> bool:
        """True for the quantised types of the package, whose codec is a ScaledCodec."""
        return isinstance(self.codec, ScaledCodec)

    @property
    def values_per_byte(self) -> float:
        """2 for a 4-bit type, 0.25 for float32."""
        return 8 / self.bits

    @property
    def storable(self) -> bool:
        """False for a declared type without a codec."""
        return self.plain or self.codec is not None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors beside values and metadata."""
        return self.codec.tensors if self.codec is not None else ()

    def columns(self, in_features: int) -> int:
        """Columns of a row-major values tensor: in/2 values, counted in words of `storage`."""
        return in_features // 2 * self.bits // (8 * self.storage.itemsize)


_GPU = ("cpu", "triton", "cuda", "cuda-mma", "cusparselt")
_QUANTIZED_ON = ("cpu", "triton", "cuda", "cuda-a16")
_TABLE: dict[str, ElementType] = {
    row.name: row
    for row in (
        ElementType("float32", torch.float32, 32, 0x7F800000, backends=("cpu", "triton")),
        ElementType("float16", torch.float16, 16, 0x7C00, backends=_GPU, native_code=0),
        ElementType("bfloat16", torch.bfloat16, 16, 0x7F80, backends=_GPU, native_code=1),
        ElementType(
            "float8_e4m3fn",
            torch.float8_e4m3fn,
            8,
            scale="row",
            backends=(*_QUANTIZED_ON, "cuda-mma", "cuda-precise", "cusparselt"),
            native_code=2,
            codec=ScaledCodec(torch.float8_e4m3fn, 448, -448, 8),
        ),
        ElementType(
            "int8",
            torch.int8,
            8,
            accumulator=torch.int32,
            scale="row",
            backends=(*_QUANTIZED_ON, "cuda-mma", "cusparselt"),
            native_code=3,
            codec=ScaledCodec(torch.int8, 127, -127, 8),
        ),
        ElementType(
            "int4",
            torch.uint8,
            4,
            scale="group",
            backends=_QUANTIZED_ON,
            codec=ScaledCodec(torch.uint8, 7, -8, 4),
        ),
    )
}
# Called whenever a type comes or goes: a name may then stand for another codec.
watchers: list[Callable[[], None]] = []
# Short names that users write.
ALIASES = {"fp8": "float8_e4m3fn"}
# What a scale may belong to.
SCALES = ("row", "group")
# What weights are quantised to, in users' words.
QUANTIZED = ("fp8", "int8", "int4")

# Plain element types by their torch dtype: what weights, scores and inputs may have.
PLAIN: dict[torch.dtype, ElementType] = {row.storage: row for row in _TABLE.values() if row.plain}
# Those with native kernels: {torch dtype: DType in csrc/core/problem.h}.
NATIVE: dict[torch.dtype, int] = {
    dtype: row.native_code for dtype, row in PLAIN.items() if row.native_code is not None
}
# What systems of equations are solved in: the quick one, then the one that fails last.
SOLVERS = (torch.float32, torch.float64)
# What data goes to where the GPU has kernels: the wider range of the two.
DEFAULT_16_BIT = torch.bfloat16


def elements() -> tuple[ElementType, ...]:
    """Every row of the table, the registered ones last."""
    return tuple(_TABLE.values())


def element(name: str | torch.dtype, op: str = "sparsekern.element") -> ElementType:
    """The row of a name ("fp8" is that of float8_e4m3fn), or of a plain torch dtype.

    Raises:
        TypeError: there is none.
    """
    if isinstance(name, torch.dtype):
        known, found = names(), PLAIN.get(name)
    else:
        known, found = ", ".join(_TABLE), _TABLE.get(ALIASES.get(name, name))
    if found is None:
        remedy = f"Quantised types go by name: {', '.join(map(repr, QUANTIZED))}."
        raise TypeError(message(op, f"dtype: an element type in {known}", repr(name), remedy))
    return found


def scaled_codec(name: str) -> ScaledCodec:
    """The codec of a quantised type.

    Raises:
        TypeError: there is no such type, or it is none of the package's quantised ones.
    """
    codec = element(name).codec
    if not isinstance(codec, ScaledCodec):
        expected = f"a quantised type ({', '.join(QUANTIZED)})"
        raise TypeError(message("sparsekern.element", expected, repr(name)))
    return codec


def quantized(op: str, name: object, argument: str = "dtype") -> ElementType:
    """The row that users call "fp8", "int8" or "int4" (or by its own name) in an argument.

    Raises:
        ValueError: none of them.
    """
    found = _TABLE.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    expected = f"{argument}: one of {', '.join(map(repr, QUANTIZED))}"
    if found is None or not found.scaled:
        raise ValueError(message(op, expected, repr(name)))
    return found


def names(separator: str = ", ") -> str:
    """The plain dtypes for messages: "float32, float16, bfloat16"."""
    return separator.join(row.name for row in PLAIN.values())


def native_names(separator: str = " or ") -> str:
    """The dtypes with native kernels for messages: "float16 or bfloat16"."""
    return separator.join(PLAIN[dtype].name for dtype in NATIVE)


@checked("sparsekern.register_dtype")
def register_dtype(new: ElementType) -> ElementType:
    """Add a coded element type to the table, or give a declared one its codec.

    Args:
        new: its codec is not None, its name is one word, `values` and `metadata` are not among the
            codec's tensors.
    Returns:
        new, which `sparsekern.compress(w, dtype=new.name)` takes from now on.
    Raises:
        ValueError: the name is taken by a type that can be stored already, or is not one word; no
            codec, or infinity_bits, which plain types have; an unknown scale; a tensor's name that
            is taken.   TypeError: the codec is a class.
    """
    check(
        new.name.isidentifier(),
        _OP,
        "a name that is one word (letters, digits, _)",
        repr(new.name),
    )
    old = _TABLE.get(new.name)
    check(
        new.name not in ALIASES and (old is None or not old.storable),
        _OP,
        "the name of no element type that can be stored already",
        repr(new.name),
        "Choose another name.",
    )
    if new.codec is None:
        raise ValueError(message(_OP, "a codec", "None", "Pass ElementType(..., codec=...)."))
    remedy = "Leave it out: plain types alone have it."
    check(new.infinity_bits is None, _OP, "infinity_bits=None", new.infinity_bits, remedy)
    known = new.scale is None or new.scale in SCALES
    check(known, _OP, f"scale in {SCALES} or None", repr(new.scale), "Leave it None.")
    made = not isinstance(new.codec, type)
    check(made, _OP, "a codec that is an object", new.codec, "Pass codec=YourCodec().", TypeError)
    taken = {"values", "metadata"} & set(new.codec.tensors)
    check(not taken, _OP, "codec.tensors without values and metadata", sorted(taken))
    _TABLE[new.name] = new
    _changed()
    return new


def unregister_dtype(name: str) -> None:
    """Take a type that `register_dtype` added out of the table; weights of it cannot be read then.

    Raises:
        ValueError: no such type, or a plain one.
    """
    found = _TABLE.get(name)
    known = found is not None and not found.plain
    check(known, "sparsekern.unregister_dtype", "a registered element type", repr(name))
    del _TABLE[name]
    _changed()


def _changed() -> None:
    for forget in watchers:
        forget()
