"""The header of a GGUF file, read and checked before anything else looks at the file.

The readers of `gguf` and Transformers trust every count, offset and length: one flipped bit makes
them allocate or loop without end, and two tensors may share bytes. So the header is read here once,
bounded by the file's own size, and only what it says is used afterwards:

    counts, lengths   of strings, arrays and lists fit the bytes that are left
    tensors           lie side by side in the order of the list, aligned, without gap or overlap, up
                      to the end of the file: a changed type, shape or offset breaks that
    values            numbers of the metadata are finite, rope bases and epsilons positive

Nothing is copied from arrays of numbers and from tensors: they are views of the file's bytes.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from sparsekern.errors import FormatError, check, message
from sparsekern.utils.files import LFS_POINTER, NotRegular, open_regular

OP = "sparsekern.load_gguf"
MAGIC = 0x46554747  # "GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # without general.alignment
MAX_ALIGNMENT = 2**16
MAX_NAME = 2**10  # bytes of a key or of a tensor's name
MAX_DIMENSIONS = 4
READ_WHOLE = 2**28  # bytes; larger files are mapped
STRING, ARRAY = 8, 9
# Value type -> numpy type, of those that have a fixed size.
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
POSITIVE = ("freq_base", "freq_base_swa", "epsilon", "rms_epsilon")  # ends of keys; numbers > 0
T = TypeVar("T")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: shape in torch's order, bytes [start, start + nbytes) of the file."""

    name: str
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    values: {key: bool, int, float, str, list of str, or array of numbers}
    spans: {key: (start, end)} of the whole entry in the file, key included
    """

    path: Path
    version: int
    values: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: tuple[TensorEntry, ...]
    data: bytes | mmap.mmap

    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """The value of an optional key; FormatError when it has another type."""
        if key not in self.values:
            return default
        value = self.values[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        good = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        self.require(good, f"{key} of type {kind.__name__}", type(value).__name__)
        return value  # type: ignore[no-any-return]

    def need(self, key: str, kind: type[T]) -> T:
        """The value of a key; FormatError when it is missing or has another type."""
        value = self.get(key, kind)
        if value is None:
            raise FormatError(message(OP, f"metadata key {key!r}", "none", f"File: {self.path}."))
        return value

    def numbers(self, key: str) -> list[int] | None:
        """An optional array of integers."""
        array = self.get(key, np.ndarray)
        self.require(array is None or array.dtype.kind in "iu", f"{key} of integers", array)
        return None if array is None else array.tolist()

    def require(self, condition: bool, expected: str, got: object) -> None:
        """FormatError that names the file, unless condition holds."""
        check(condition, OP, expected, got, f"File: {self.path}.", exc=FormatError)

    def bytes_of(self, entry: TensorEntry) -> np.ndarray:
        """The stored bytes of one tensor, uint8 [nbytes]; a view of the file."""
        return np.frombuffer(self.data, np.uint8, entry.nbytes, entry.start)


class _Cursor:
    """A position in the mapped file; every read is bounded by the file's end."""

    def __init__(self, data: bytes | mmap.mmap, path: Path):
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def fail(self, expected: str, got: object) -> FormatError:
        what = f"{got} at byte {self.at} of {self.size} in {self.path}"
        return FormatError(message(OP, expected, what, "Fetch the file again."))

    def take(self, count: int, what: str) -> int:
        """Advance by so many bytes; returns where they begin."""
        if count > self.size - self.at:
            raise self.fail("a complete GGUF file", f"{what} of {count} bytes")
        start, self.at = self.at, self.at + count
        return start

    def number(self, form: str, what: str) -> Any:
        start = self.take(struct.calcsize(form), what)
        return struct.unpack_from(form, self.data, start)[0]

    def string(self, what: str, most: int | None = None) -> str:
        length = self.number("<Q", what)
        if most is not None and length > most:
            raise self.fail(f"{what} of at most {most} bytes", length)
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} in UTF-8", "other bytes") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string(key)
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise self.fail(f"{key} of a known type", f"type {kind}")
        form = np.dtype(SCALARS[kind])
        start = self.take(form.itemsize, key)
        if kind == 7 and self.data[start] > 1:
            raise self.fail(f"{key} to be true or false", self.data[start])
        return np.frombuffer(self.data, form, 1, start)[0].item()

    def array(self, key: str) -> Any:
        kind, count = self.number("<I", key), self.number("<Q", key)
        if kind in SCALARS:
            form = np.dtype(SCALARS[kind])
            start = self.take(count * form.itemsize, f"{key} with {count} elements")
            return np.frombuffer(self.data, form, count, start)
        if kind != STRING:
            raise self.fail(f"{key} to be a list of numbers or strings", f"type {kind}")
        if count > (self.size - self.at) // 8:  # a string has 8 bytes of length at least
            raise self.fail("a complete GGUF file", f"{key} with {count} strings")
        return [self.string(key) for _ in range(count)]


def _mapped(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_header(path: str | Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        FileNotFoundError: no such file.   ModuleNotFoundError: `gguf` is not installed.
        FormatError: no GGUF file, cut off, or damaged in what the header says.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise FormatError(message(OP, "a complete GGUF file", str(path), "Fetch it again."))
            # A mapped file that somebody shortens kills the process that reads on.
            data = file.read(size) if size <= READ_WHOLE else _mapped(file)
    except (FileNotFoundError, NotADirectoryError, NotRegular):
        raise FileNotFoundError(f"{OP}: no file at {path}.") from None
    if data[: len(LFS_POINTER)] == LFS_POINTER:
        got = f"a pointer of Git LFS to one, {path}"
        raise FormatError(message(OP, "a GGUF file", got, "Run 'git lfs pull' in its folder."))
    cursor = _Cursor(data, path)
    magic, version = cursor.number("<I", "the magic"), cursor.number("<I", "the version")
    if magic != MAGIC or version not in VERSIONS:
        text = f"magic {magic:#x}, version {version}"
        raise cursor.fail("a complete GGUF file of version 2 or 3, little-endian", text)
    tensor_count, value_count = cursor.number("<Q", "a count"), cursor.number("<Q", "a count")
    for count, least in ((tensor_count, 24), (value_count, 13)):  # bytes of one, at least
        if count > (cursor.size - cursor.at) // least:
            raise cursor.fail("a complete GGUF file", f"a list of {count} entries")
    values, spans = _values(cursor, value_count)
    tensors = _tensors(cursor, tensor_count, values.get("general.alignment", ALIGNMENT))
    header = Header(path, version, values, spans, tensors, data)
    _check_values(header)
    return header


def _values(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        start = cursor.at
        key = cursor.string("a metadata key", MAX_NAME)
        if key in values:
            raise cursor.fail("each metadata key once", repr(key))
        values[key] = cursor.value(cursor.number("<I", key), key)
        spans[key] = start, cursor.at
    return values, spans


def _tensors(cursor: _Cursor, count: int, alignment: Any) -> tuple[TensorEntry, ...]:
    """The list of tensors, once their bytes are known to tile the rest of the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment % 8:
        raise cursor.fail(f"general.alignment in steps of 8 to {MAX_ALIGNMENT}", alignment)
    listed, names = [], set()
    for _ in range(count):
        name = cursor.string("a tensor's name", MAX_NAME)
        if name in names:
            raise cursor.fail("each tensor once", repr(name))
        names.add(name)
        dimensions = cursor.number("<I", name)
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise cursor.fail(f"{name} with 1 to {MAX_DIMENSIONS} dimensions", dimensions)
        shape = tuple(cursor.number("<Q", name) for _ in range(dimensions))
        kind, offset = cursor.number("<I", name), cursor.number("<Q", name)
        try:
            kind = GGMLQuantizationType(kind)
        except ValueError:
            raise cursor.fail(f"{name} of a type that the gguf package knows", kind) from None
        listed.append((name, shape, kind, offset))
    start = cursor.at = -(-cursor.at // alignment) * alignment
    entries, at = [], 0
    for name, shape, kind, offset in listed:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        elements = math.prod(shape)
        if not elements or shape[0] % block:
            raise cursor.fail(f"{name} with rows of whole blocks of {block}", list(shape))
        nbytes = elements // block * block_bytes
        if offset != at or nbytes > cursor.size - start - at:
            raise cursor.fail(
                "a complete GGUF file with its tensors side by side",
                f"{name} ({nbytes} bytes) at offset {offset} instead of {at}",
            )
        entries.append(TensorEntry(name, shape[::-1], kind, start + at, nbytes))
        at = -(-(at + nbytes) // alignment) * alignment
    end = entries[-1].start + entries[-1].nbytes if entries else start
    if not end <= cursor.size <= max(start + at, end):
        raise cursor.fail("a complete GGUF file that ends with its last tensor", f"{end} used")
    return tuple(entries)


def _check_values(header: Header) -> None:
    parts = header.get("split.count", int, 1)
    if parts > 1:
        remedy = "Join them with llama.cpp's llama-gguf-split --merge."
        got = f"one of {parts}, {header.path}"
        raise FormatError(message(OP, "a GGUF file in one part", got, remedy))
    for key, value in header.values.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            finite = bool(np.isfinite(value).all())
            header.require(finite, f"{key} of finite numbers", "others")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            header.require(math.isfinite(value), f"{key} to be finite", value)
            if key.endswith(POSITIVE):
                header.require(value > 0, f"{key} > 0", value)
