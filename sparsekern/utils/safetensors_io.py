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

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sparsekern.errors import FormatError, check, message

OP = "sparsekern.checkpoint"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
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
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor; offsets count from the end of the header."""

    dtype: torch.dtype
    shape: tuple
    start: int
    end: int

    @property
    def nbytes(self):
        return self.end - self.start


def require(condition, where, expected, got, remedy=""):
    """FormatError "<where>: expected <expected>, got <got>. <remedy>" unless condition holds."""
    check(condition, where, expected, got, remedy, FormatError)


def parse_json(text, where):
    """JSON object from bytes. FormatError for duplicate keys, bad encoding, other JSON values."""

    def unique(pairs):
        found = {}
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
    return value


def read_json(path):
    """JSON object in the file at `path` (see parse_json)."""
    where = f"{OP}: {path.name}"
    try:
        size = path.stat().st_size
        require(size <= MAX_JSON_BYTES, where, f"at most {MAX_JSON_BYTES} bytes", size)
        return parse_json(path.read_bytes(), where)
    except OSError as error:
        raise FormatError(
            message(
                where,
                "a readable file",
                error.strerror or str(error),
                f"Is {path.parent} a model folder?",
            )
        ) from error


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor_info(where, entry):
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


def read_header(path):
    """Validated header of one safetensors file: {tensor name: TensorInfo}, in order of offset.

    Raises:
        FormatError: naming file and tensor, when the length is wrong, the JSON is invalid or has
            duplicate keys, a dtype is unknown, a shape and its offsets disagree, or tensors
            overlap, leave holes or end anywhere but at the end of file.
    """
    file = f"{OP}: {path.name}"
    require(path.is_file(), file, "a regular file", "none of this name", "A shard is missing.")
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            prefix = handle.read(8)
            require(
                len(prefix) == 8, file, "at least 8 bytes", len(prefix), "The file is truncated."
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


def _weight_files(folder):
    """(file names, weight_map or None) of a folder; the map only ever names files inside it."""
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE], None
    if not (folder / INDEX_FILE).is_file():
        pickles = (
            sorted(p.name for p in folder.glob("*") if p.suffix in PICKLE_SUFFIXES)
            if folder.is_dir()
            else []
        )
        require(
            not pickles,
            f"{OP}: {folder}",
            "safetensors files",
            f"pickle files only ({', '.join(pickles[:3])})",
            "Pickles can run code and are never read: convert the model to safetensors.",
        )
        raise FormatError(
            message(
                f"{OP}: {folder}",
                f"{SINGLE_FILE} or {INDEX_FILE}",
                "neither",
                "Is it a model folder?",
            )
        )
    where = f"{OP}: {INDEX_FILE}"
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    require(
        isinstance(weight_map, dict) and weight_map,
        where,
        "a non-empty object 'weight_map'",
        type(weight_map).__name__,
    )
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


class TensorFiles:
    """The tensors of one model folder: headers checked on construction, data read on demand.

    Attributes:
        info: {tensor name: TensorInfo};  file_of: {tensor name: file name};  files: names of the
            weight files.
    Raises:
        FormatError: see read_header; also when index and files disagree.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.files, weight_map = _weight_files(self.folder)
        self.info, self.file_of = {}, {}
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
                    f"{INDEX_FILE} to name this file",
                    repr((weight_map or {}).get(name)),
                    "Files of two checkpoints are mixed.",
                )
                self.info[name], self.file_of[name] = info, file
        missing = [name for name in weight_map or () if name not in self.info]
        require(
            not missing,
            f"{OP}: {INDEX_FILE}",
            "every tensor of the index in its file",
            f"missing {listed(missing)}",
            "A shard is damaged or of another checkpoint.",
        )

    def where(self, name):
        """'file: tensor' prefix for messages about one tensor."""
        return f"{OP}: {self.file_of.get(name, self.folder.name)}: tensor {name!r}"

    def read(self, *names, device="cpu"):
        """The named tensors as a list, on `device`, owning their memory (no view of the file
        survives the call).
        """
        tensors = {}
        for file in dict.fromkeys(self.file_of[name] for name in names):
            try:
                with safe_open(self.folder / file, framework="pt", device=str(device)) as handle:
                    for name in (n for n in names if self.file_of[n] == file):
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


def listed(names, limit=12):
    """'a, b, c and 5 more' for messages."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
