"""config.json and generation_config.json of a folder, as the caller and the model want them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsekern.checkpoint.arguments import folder_path
from sparsekern.checkpoint.skeleton import import_transformers
from sparsekern.errors import FormatError, check, message
from sparsekern.formats.config_json import FILE_KEYS
from sparsekern.utils.safetensors_io import CONFIG_FILE, OP, read_json

MAX_SMALL_JSON = 2**24


def with_config(op: str, raw: dict[str, Any], config: Any) -> dict[str, Any]:
    """config.json with the values of the caller's config in it."""
    if config is None:
        return raw
    if isinstance(config, (str, os.PathLike)):
        path = folder_path(op, "config", config)
        config = read_json(path / CONFIG_FILE if path.is_dir() else path)
    to_dict = getattr(config, "to_dict", None)
    given = to_dict() if callable(to_dict) else config
    expected, got = "config to be a Transformers config, a dict or a path", type(config).__name__
    check(isinstance(given, Mapping), op, expected, got, exc=TypeError)
    kept = {key: value for key, value in given.items() if key not in FILE_KEYS}
    if not kept.get("architectures"):
        kept.pop("architectures", None)
    return {**raw, **kept}


def set_dtype(config: Any, dtype: torch.dtype) -> None:
    """What a config says of the weights' dtype, that of its parts included."""
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if part is not None:
            setattr(part, "dtype" if hasattr(part, "dtype") else "torch_dtype", dtype)


def generation_config(folder: Path) -> Any:
    transformers = import_transformers("to read generation_config.json")
    raw = read_json(folder / "generation_config.json", MAX_SMALL_JSON)
    try:
        config = transformers.GenerationConfig.from_dict(raw)
        # Transformers saves only valid ones, and those that are as they were published.
        config._original_object_hash = hash(config)
        return config
    except Exception as error:
        raise FormatError(
            message(f"{OP}: generation_config.json", "a generation config", str(error), "")
        ) from error
