"""Reading checkpoint folders that nobody vouches for.

`TensorFiles` looks at every header of a folder before any tensor is touched. A header is
small JSON, so all the arithmetic that a damaged or hostile file could upset (lengths, offsets,
products of shapes) is done here on Python integers; the tensors themselves are then read by the
safetensors library, one at a time, straight to the device. Nothing is ever unpickled: a folder
that holds only pickle files is refused.

By hand: the safetensors library checks one file when it opens it; a folder, its index and the
shapes before anything is read are checked by no library.

Source: safetensors format, https://github.com/huggingface/safetensors#format; index as written by
Transformers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsekern.errors import FormatError, check, message
from sparsekern.utils import files

OP = "sparsekern.checkpoint"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
SUMS_FILE = "SHA256SUMS"  # one "<hex digest>  <file name>" a line, as sha256sum writes and checks
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_JSON_BYTES = 256_000_000  # an index of a million tensors is about 100 MB
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor; offsets count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def require(condition: object, where: str, expected: object, got: object, remedy: str = "") -> None:
    """FormatError "<where>: expected <expected>, got <got>. <remedy>" unless condition holds."""
    check(bool(condition), where, str(expected), got, remedy, FormatError)


def open_regular(path: Path, where: str) -> BinaryIO:
    """A file opened for reading; FormatError for a pipe, a device, a folder, or what cannot be
    read. It never waits: opening a pipe without a writer would."""
    try:
        return files.open_regular(path)
    except files.NotRegular:
        got = "a pipe, a device or a folder of this name"
        raise FormatError(message(where, "a regular file", got)) from None
    except (OSError, ValueError) as error:
        raise FormatError(
            message(
                where,
                "a readable file",
                getattr(error, "strerror", None) or str(error),
                f"Is {path.parent} a model folder?",
            )
        ) from error


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """JSON object from bytes. FormatError for duplicate keys, bad encoding, other JSON values."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            require(
                key not in found, where, "every key once", f"{key!r} twice", "The file is damaged."
            )
            found[key] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, too, and bad JSON
        raise FormatError(
            message(
                where,
                "valid UTF-8 JSON",
                f"{type(error).__name__}: {error}",
                "The file is damaged.",
            )
        ) from error
    require(isinstance(value, dict), where, "a JSON object", type(value).__name__)
    return value  # type: ignore[no-any-return]


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """JSON object in the file at `path` (see parse_json)."""
    where = f"{OP}: {path.name}"
    return parse_json(_read_small(path, where, max_bytes), where)


def _read_small(path: Path, where: str, max_bytes: int) -> bytes:
    with open_regular(path, where) as handle:
        size = os.fstat(handle.fileno()).st_size
        require(size <= max_bytes, where, f"at most {max_bytes} bytes", size)
        try:
            return handle.read(max_bytes + 1)
        except OSError as error:
            got = error.strerror or str(error)
            raise FormatError(message(where, "a readable file", got)) from error


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor_info(where: str, entry: Any) -> TensorInfo:
    require(
        isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
        where,
        "the fields dtype, shape, data_offsets",
        sorted(entry) if isinstance(entry, dict) else type(entry).__name__,
    )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    require(
        isinstance(dtype, str) and dtype in DTYPES,
        where,
        f"a dtype among {', '.join(DTYPES)}",
        repr(dtype),
    )
    require(
        isinstance(shape, list) and len(shape) <= 64 and all(map(_is_size, shape)),
        where,
        "a shape of at most 64 non-negative integers",
        str(shape)[:80],
    )
    require(
        isinstance(offsets, list)
        and len(offsets) == 2
        and all(map(_is_size, offsets))
        and offsets[0] <= offsets[1],
        where,
        "data_offsets [begin, end] with begin <= end",
        str(offsets)[:80],
    )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    require(
        offsets[1] - offsets[0] == nbytes,
        where,
        f"{nbytes} bytes for {dtype} {shape}",
        offsets[1] - offsets[0],
        "Shape and offsets contradict each other.",
    )
    return TensorInfo(DTYPES[dtype], tuple(shape), *offsets)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Validated header of one safetensors file: {tensor name: TensorInfo}, in order of offset.

    Raises:
        FormatError: naming file and tensor, when the length is wrong, the JSON is invalid or has
            duplicate keys, a dtype is unknown, a shape and its offsets disagree, or tensors
            overlap, leave holes or end anywhere but at the end of file.
    """
    file = f"{OP}: {path.name}"
    require(path.is_file(), file, "a regular file", "none of this name", "A shard is missing.")
    try:
        with open_regular(path, file) as handle:
            size = os.fstat(handle.fileno()).st_size
            prefix = handle.read(8)
            require(
                len(prefix) == 8, file, "at least 8 bytes", len(prefix), "The file is truncated."
            )
            require(
                not files.LFS_POINTER.startswith(prefix),
                file,
                "tensors",
                "a pointer of Git LFS to them",
                "Run 'git lfs pull' in the folder.",
            )
            length = int.from_bytes(prefix, "little")
            require(
                length <= min(MAX_HEADER_BYTES, size - 8),
                file,
                f"a header of at most {min(MAX_HEADER_BYTES, size - 8)} bytes",
                length,
                "The file is truncated or not safetensors.",
            )
            header = parse_json(handle.read(length), file)
    except OSError as error:
        raise FormatError(
            message(file, "a readable file", error.strerror or str(error), "")
        ) from error

    header.pop("__metadata__", None)
    infos = {
        name: _tensor_info(f"{file}: tensor {name!r}", entry) for name, entry in header.items()
    }
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)))
    end, room = 0, size - 8 - length
    for name, info in infos.items():
        require(
            info.end <= room,
            f"{file}: tensor {name!r}",
            f"data_offsets inside the {room} bytes of data",
            [info.start, info.end],
            "The file is truncated.",
        )
    for name, info in infos.items():
        require(
            info.start == end,
            f"{file}: tensor {name!r}",
            f"data_offsets to begin at {end}, where the previous tensor ends",
            info.start,
            "Tensors overlap or leave a hole.",
        )
        end = info.end
    require(end == room, file, f"{end} bytes of data", room, "There are trailing bytes.")
    return infos


def variant_names(variant: str | None) -> tuple[str, str]:
    """(name of the single file, name of the index) of a folder, as Transformers' variant= has
    them: model.fp16.safetensors, model.safetensors.index.fp16.json."""
    if variant is None:
        return SINGLE_FILE, INDEX_FILE
    return tuple(f".{variant}.".join(n.rsplit(".", 1)) for n in (SINGLE_FILE, INDEX_FILE))


def variant_of(files: Collection[str]) -> str | None:
    """The variant by whose names these weight files stand in their folder; None for none."""
    folder, names = Path(min(files)).parent, {Path(file).name for file in files}
    for entry in sorted(os.listdir(folder)):
        found = re.fullmatch(r"model\.(?:safetensors\.index\.(.+)\.json|(.+)\.safetensors)", entry)
        with contextlib.suppress(FormatError):  # of another variant, which nobody asked for
            if found and names == set(_weight_files(folder, found[1] or found[2])[0]):
                return found[1] or found[2]
    return None


def _weight_files(
    folder: Path, variant: str | None = None
) -> tuple[list[str], dict[str, str] | None]:
    """(file names, weight_map or None) of a folder; the map only ever names files inside it."""
    single, index = variant_names(variant)
    if (folder / single).is_file():
        return [single], None
    if not (folder / index).is_file():
        _refuse_folder(folder, single, index)
    where = f"{OP}: {index}"
    weight_map = read_json(folder / index).get("weight_map")
    require(
        isinstance(weight_map, dict) and weight_map,
        where,
        "a non-empty object 'weight_map'",
        type(weight_map).__name__,
    )
    assert isinstance(weight_map, dict)
    for name, file in weight_map.items():
        plain = (
            isinstance(file, str)
            and file.endswith(".safetensors")
            and not any(c in file for c in "/\\:\0")
        )
        require(
            plain,
            f"{where}: tensor {name!r}",
            "the plain name of a .safetensors file in the same folder",
            repr(file),
        )
    return sorted(set(weight_map.values())), weight_map


def _refuse_folder(folder: Path, single: str, index: str) -> NoReturn:
    """FormatError for a folder without weights, by what is there in their place."""
    where, expected = f"{OP}: {folder}", f"{single} or {index}"
    suffixes = (".safetensors", ".gguf", *PICKLE_SUFFIXES)
    for name in (single, index):
        if os.path.lexists(folder / name):  # and is no regular file
            open_regular(folder / name, f"{OP}: {name}").close()
    other = sorted(p.name for p in folder.glob("*") if p.suffix in suffixes)
    require(
        not other or not all(name.endswith(PICKLE_SUFFIXES) for name in other),
        where,
        "safetensors files",
        f"pickle files only ({listed(other, 3)})",
        "Pickles can run code and are never read: where you trust the folder, load it with "
        "Transformers and save it again, which writes safetensors.",
    )
    got, remedy = f"only {listed(other, 3)}" if other else "neither", "Is it a model folder?"
    if folder.is_file():
        expected, got, remedy = "a folder", "a file", f"Give the folder it is in, {folder.parent}."
    for name in other or [folder.name]:
        if name.endswith(".gguf"):
            remedy = "Load a GGUF file with sparsekern.integrations.loading.load_model."
        elif name.startswith("adapter_"):
            remedy = "It holds adapters: load the model that they are for, then them with peft."
        elif found := re.fullmatch(r"model(?:\.([\w-]+?))?(-\d{5}-of-\d{5})?\.safetensors", name):
            if folder.is_dir() and variant_names(found[1])[0] == single:
                remedy = f"{index} is missing, which names the shards: get it again."
            elif folder.is_dir():
                remedy = f"Pass variant={found[1]!r}, or rename the files."
    raise FormatError(message(where, expected, got, remedy))


# Bytes that are read from a file before it is opened anew.
HELD_BYTES = 2**22


class TensorFiles:
    """The tensors of one model folder: headers checked on construction, data read on demand.

    Args:
        folder: of the files. variant: of their names (see variant_names).
    Attributes:
        info: {tensor name: TensorInfo};  file_of: {tensor name: file name};  files: names of the
            weight files.
    Raises:
        FormatError: see read_header; also when index and files disagree.
    """

    def __init__(self, folder: str | os.PathLike[str], variant: str | None = None) -> None:
        self.folder = Path(folder)
        index = variant_names(variant)[1]
        self._held: tuple[tuple[object, ...], Any] | None = None
        self._held_bytes = 0
        self.files, weight_map = _weight_files(self.folder, variant)
        self.info: dict[str, TensorInfo] = {}
        self.file_of: dict[str, str] = {}
        headers = {file: read_header(self.folder / file) for file in self.files}
        for file, header in headers.items():
            for name, info in header.items():
                where = f"{OP}: {file}: tensor {name!r}"
                require(
                    name not in self.info,
                    where,
                    "every tensor in one file",
                    f"also in {self.file_of.get(name)}",
                )
                require(
                    weight_map is None or weight_map.get(name) == file,
                    where,
                    f"{index} to name this file",
                    repr((weight_map or {}).get(name)),
                    "Files of two checkpoints are mixed.",
                )
                self.info[name], self.file_of[name] = info, file
        missing = [name for name in weight_map or () if name not in self.info]
        require(
            not missing,
            f"{OP}: {index}",
            "every tensor of the index in its file",
            f"missing {listed(missing)}",
            "A shard is damaged or of another checkpoint.",
        )

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the folder; {} where it has none."""
        path = self.folder / CONFIG_FILE
        return read_json(path) if os.path.lexists(path) else {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.info.values())

    def where(self, name: str) -> str:
        """'file: tensor' prefix for messages about one tensor."""
        return f"{OP}: {self.file_of.get(name, self.folder.name)}: tensor {name!r}"

    def read(self, *names: str, device: str | torch.device = "cpu") -> list[Tensor]:
        """The named tensors as a list, on `device`, owning their memory (no view of the file
        survives the call).
        """
        tensors: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.file_of[name] for name in names):
            try:
                wanted = [n for n in names if self.file_of[n] == file]
                handle = self._opened(file, str(device), sum(self.info[n].nbytes for n in wanted))
                for name in wanted:
                    tensor = handle.get_tensor(name)
                    tensors[name] = tensor.clone() if tensor.device.type == "cpu" else tensor
            except (SafetensorError, OSError) as error:
                raise FormatError(
                    message(
                        f"{OP}: {file}",
                        "readable tensors",
                        str(error),
                        "The file changed or is damaged.",
                    )
                ) from error
        for name, tensor in tensors.items():
            info = self.info[name]
            require(
                (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape),
                self.where(name),
                f"{info.dtype} {info.shape} as in the header",
                f"{tensor.dtype} {tuple(tensor.shape)}",
                "The file changed while it was read.",
            )
        return [tensors[name] for name in names]

    def _opened(self, file: str, device: str, nbytes: int) -> Any:
        """A file open for reading, the one of the call before where it is the same and unchanged:
        each opening reads the whole header, which is long where layers have many experts. What was
        read stays in memory while the file is open: not beyond HELD_BYTES."""
        status = os.stat(self.folder / file)
        key = (file, device, status.st_ino, status.st_size, status.st_mtime_ns)
        held = self._held
        self._held_bytes += nbytes
        if held is None or held[0] != key or self._held_bytes > HELD_BYTES:
            self._held, self._held_bytes = None, nbytes
            del held
            handle = safe_open(self.folder / file, framework="pt", device=device)
            held = self._held = (key, handle)
        return held[1]


def sha256(path: Path, where: str) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open_regular(path, where) as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_sums(folder: Path) -> dict[str, str] | None:
    """Files of a folder against its SHA256SUMS.

    Returns:
        {file name: what is wrong with it}, empty when every listed file has its bytes; None for a
        folder without the file, as other programs write it.
    Raises:
        FormatError: SHA256SUMS is damaged, names a file outside the folder, or does not list the
            weights or config.json.
    """
    where = f"{OP}: {SUMS_FILE}"
    if not os.path.lexists(folder / SUMS_FILE):
        return None
    text = _read_small(folder / SUMS_FILE, where, 2**24)
    sums: dict[str, str] = {}
    for line in text.decode("utf-8", "replace").splitlines():
        found = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\\0]+)", line)
        require(
            found is not None and found[2] not in sums and found[2] not in (".", ".."),
            where,
            "lines '<sha256>  <name of a file in the folder>', each name once",
            repr(line[:100]),
            "The file is damaged.",
        )
        assert found is not None
        sums[found[2]] = found[1]
    present = sorted(p.name for p in folder.glob("model*.safetensors*"))
    present += [CONFIG_FILE] if (folder / CONFIG_FILE).exists() else []
    wrong = {name: f"not listed in {SUMS_FILE}" for name in present if name not in sums}
    for name, expected in sums.items():
        if not os.path.lexists(folder / name):
            wrong[name] = "expected a regular file, got none"
            continue
        try:
            got = sha256(folder / name, f"{OP}: {name}")
        except FormatError as error:
            wrong[name] = str(error)
            continue
        if got != expected:
            wrong[name] = f"sha256 {got[:16]}..., written as {expected[:16]}..."
    return wrong


def require_sums(folder: Path) -> None:
    """FormatError unless every file of the folder is as SHA256SUMS, where there is one, has it."""
    wrong = check_sums(folder)
    require(
        not wrong,
        f"{OP}: {folder}",
        f"the files that were written ({SUMS_FILE})",
        "; ".join(f"{name}: {why}" for name, why in list((wrong or {}).items())[:6]),
        "The folder was changed or damaged; get it again.",
    )


def require_inside(folder: Path, names: Iterable[str]) -> None:
    """FormatError for a link that leads out of the folder; the cache of the Hub, whose snapshots
    are links into its blobs, counts as inside."""
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    for name in names:
        target = (folder / name).resolve()
        require(
            any(target.is_relative_to(place) for place in homes),
            f"{OP}: {name}",
            "a file of the folder",
            f"a link to {target}",
            "Replace the link by a copy if the file belongs to the model.",
        )


def listed(names: Iterable[str], limit: int = 12) -> str:
    """'a, b, c and 5 more' for messages."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
