"""The words of Transformers' own load and save functions: folders and Hub ids, dtypes, devices,
sizes. Each becomes a plain value, or an error that names the argument.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekern.errors import FormatError, check, message
from sparsekern.utils.arguments import usable_device
from sparsekern.utils.files import require_reachable
from sparsekern.utils.safetensors_io import CONFIG_FILE, read_json, variant_names

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
# Of a repository besides the weights, which may be there in several forms.
DOWNLOADED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "SHA256SUMS")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*(|B|[KMGT]i?B)", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # of device_map


class ModelNotFound(FormatError, FileNotFoundError):
    """Neither a folder nor a model that the Hub's cache, or the Hub, has."""


def folder_path(op: str, name: str, value: Any) -> Path:
    """A path argument as Path; TypeError for anything but a str or os.PathLike, OSError or
    ValueError for one that no system call can follow."""
    check(
        isinstance(value, (str, os.PathLike)) and not isinstance(value, bytes),
        op,
        f"{name} to be a path",
        type(value).__name__,
        exc=TypeError,
    )
    text = os.fspath(value)
    check(
        isinstance(text, str) and bool(text) and "\0" not in text,
        op,
        f"{name} to be a path",
        repr(value),
    )
    require_reachable(op, name, text)
    return Path(text)


def check_mapping(op: str, key_mapping: Mapping[str, str] | None) -> None:
    """ValueError for a key_mapping that is none."""
    for pattern, replacement in (key_mapping or {}).items():
        try:
            re.sub(pattern, "" + replacement, "")
        except (re.error, TypeError) as error:
            got = f"{pattern!r}: {replacement!r} ({error})"
            expected = "key_mapping to be {regular expression: replacement}"
            raise ValueError(message(op, expected, got, "Write plain dots as '\\.'.")) from error


def find_folder(
    op: str,
    name: Any,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | os.PathLike[str] = "",
    variant: str | None = None,
) -> Path:
    """The folder that from_pretrained's first argument means.

    Args:
        name: a folder, or the id of a model on the Hub ("org/name"), which is taken from the local
            cache and downloaded only where that does not hold it (or with force_download).
        revision, cache_dir, token, local_files_only, force_download: as in huggingface_hub.
        subfolder: of the model in the folder or repository; plain names only.
        variant: of the weights' files, as in Transformers.
    Raises:
        ModelNotFound: nothing of this name. TypeError: no path.
    """
    path = folder_path(op, "the model", name)
    inner = Path(subfolder or "")
    check(
        not inner.is_absolute() and ".." not in inner.parts,
        op,
        "subfolder to be a folder inside the model's",
        repr(subfolder),
    )
    if path.exists() or path.is_symlink():
        return path / inner
    text = os.fspath(path)
    if not _HUB_ID.fullmatch(text) or ".." in text or "--" in text:
        remedy = "Check the path."
        raise ModelNotFound(
            message(op, "a model folder or the id of a model on the Hub", text, remedy)
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        remedy = "pip install huggingface_hub to load models of the Hub by id."
        raise ModelNotFound(
            message(op, "a model folder", f"{text!r}, no folder", remedy)
        ) from error
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    why = ""
    for offline in (True,) if local_files_only else (False,) if force_download else (True, False):
        try:
            get = functools.partial(
                snapshot_download,
                text,
                local_files_only=offline,
                force_download=force_download,
                **options,
            )
            found = Path(get(allow_patterns=[str(inner / p) for p in DOWNLOADED]))
            weights = [str(inner / name) for name in _weights(found / inner, variant)]
            found = Path(get(allow_patterns=weights, revision=found.name))
        except Exception as error:  # of the network, the cache, or the Hub: one clear line
            why = " ".join(str(error).split())[:160] or type(error).__name__
            continue
        folder = found / inner
        complete = all((folder / name).is_file() for name in _weights(folder, variant))
        if complete and (folder / CONFIG_FILE).is_file():
            return folder
        why = "it holds no config.json with complete safetensors files"
    remedy = f"Check the name and the network, or give a folder ({why})."
    got = f"{text!r}, which is neither a folder nor in the local cache"
    got += "" if local_files_only else ", and could not be downloaded"
    raise ModelNotFound(message(op, "a model folder or the id of a model on the Hub", got, remedy))


def _weights(folder: Path, variant: str | None) -> list[str]:
    """Names of the weights' files of a snapshot that has at least its index."""
    single, index = variant_names(variant)
    if (folder / single).is_file() or not (folder / index).is_file():
        return [single]
    names = read_json(folder / index).get("weight_map")
    return sorted({*map(str, names.values())}) if isinstance(names, dict) else [single]


def parse_dtype(op: str, value: Any, config: Mapping[str, Any] | None = None) -> torch.dtype | None:
    """dtype argument: None, a torch.dtype, its name ("bfloat16", "torch.half"), or "auto", which
    means what config.json says (None where it says nothing).
    """
    if isinstance(value, str):
        name = value.removeprefix("torch.")
        if name == "auto":
            raw = config or {}
            sub = raw.get("text_config")
            sub = sub if isinstance(sub, Mapping) else {}
            found = [m.get(key) for m in (raw, sub) for key in ("dtype", "torch_dtype")]
            stated = next((entry for entry in found if isinstance(entry, str)), "")
            return DTYPES.get(stated.removeprefix("torch."))
        known = getattr(torch, name, None)
        value = known if isinstance(known, torch.dtype) else value
    check(
        value is None or (isinstance(value, torch.dtype) and value in DTYPES.values()),
        op,
        f"dtype 'auto' or one of {', '.join(DTYPES)}",
        repr(value),
        exc=TypeError if not isinstance(value, (str, torch.dtype)) else ValueError,
    )
    return value  # type: ignore[no-any-return]


def parse_size(op: str, value: Any) -> int:
    """max_shard_size argument in bytes: an int, or text such as "2GB" (10^9) or "500MiB" (2^20)."""
    if isinstance(value, str):
        found = _SIZE.fullmatch(value.strip())
        check(found is not None, op, "max_shard_size such as '2GB'", repr(value)[:80])
        assert found is not None
        value = int(float(found[1]) * _UNITS[found[2].lower()])
    check(
        isinstance(value, int) and not isinstance(value, bool),
        op,
        "max_shard_size as a number of bytes or text such as '2GB'",
        repr(value)[:80],
        exc=TypeError,
    )
    check(value > 0, op, "max_shard_size > 0", value)
    return int(value)


DeviceOf = Callable[[str], torch.device]


def place(
    op: str, model: nn.Module, device: Any, device_map: Any, max_memory: Any, nbytes: int
) -> tuple[DeviceOf, dict[str, Any] | None]:
    """Where each module of a model goes.

    Args:
        model: its tree. device: where all goes without a device_map.
        device_map: None, a device, {module name: device}, or "auto" | "balanced" |
            "balanced_low_0" | "sequential". "auto" takes the first GPU where everything fits on it
            and the CPU where there is no GPU; otherwise accelerate decides.
        nbytes: of the files.
    Returns:
        (function from module name to device, map to dispatch by; None for a single device).
    Raises:
        ImportError: more than one device without the package accelerate.
        ValueError, TypeError: no device; "disk", which is not supported; modules without one.
    """
    if device_map is None:
        single = usable_device(op, device, "device")
        return (lambda name: single), None
    if isinstance(device_map, str) and device_map in STRATEGIES:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0 and max_memory is None:
            device_map = "cpu"
        elif max_memory is None and (count == 1 or device_map == "auto") and _fits(nbytes):
            device_map = "cuda:0"
        else:
            device_map = _inferred(op, model, device_map, max_memory)
    if not isinstance(device_map, Mapping):
        single = usable_device(op, device_map, "device_map")
        return (lambda name: single), None
    known = {name for name, _ in model.named_modules()}
    where = {}
    for name, target in device_map.items():
        check(name in known, op, "device_map to name modules of the model", repr(name)[:80])
        check(target != "disk", op, "device_map without 'disk'", "disk", "Use the CPU.")
        where[name] = usable_device(op, target, "device_map")

    def device_of(name: str) -> torch.device:
        while name not in where and name:
            name = name.rpartition(".")[0]
        check(name in where, op, "device_map to cover every module", "none for the rest", "Add ''.")
        return where[name]

    for name, module in model.named_modules():
        if module._parameters or module._buffers:
            device_of(name)
    if len(set(where.values())) < 2:
        return device_of, None
    accelerate(op)
    return device_of, dict(where)


def _fits(nbytes: int) -> bool:
    free, _ = torch.cuda.mem_get_info(0)
    return nbytes < 0.9 * free


def accelerate(op: str) -> Any:
    """The package accelerate, or ImportError that says what needs it."""
    try:
        return importlib.import_module("accelerate")
    except ImportError as error:
        raise ImportError(
            message(
                op,
                "the package accelerate for a model on more than one device",
                "an environment without it",
                "pip install accelerate, or pass device='cuda:0'.",
            )
        ) from error


def _inferred(op: str, model: nn.Module, kind: str, max_memory: Any) -> dict[str, Any]:
    package = accelerate(op)
    rigid = sorted(getattr(model, "_no_split_modules", None) or ())
    if kind != "sequential":
        max_memory = package.utils.get_balanced_memory(
            model,
            max_memory=max_memory,
            no_split_module_classes=rigid,
            low_zero=kind == "balanced_low_0",
        )
    return dict(
        package.infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=rigid)
    )
