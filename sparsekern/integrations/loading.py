"""Models as the commands take them: a folder, dense or pruned, or a GGUF file, each with its
tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_WANTED = (
    "Give a folder with config.json and safetensors files, a .gguf file, or the id of a model on "
    "the Hub."
)


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
) -> tuple[Any, Any]:
    """A model for any command.

    Args:
        path: folder with config.json and safetensors (dense or compressed), a .gguf file, or the id
            of a model on the Hub.
        device, dtype: as in from_pretrained; a GGUF is rounded to bfloat16 first in any case.
    Returns:
        (model in eval mode, tokenizer or None when the folder has none).
    Raises:
        FileNotFoundError, FormatError; TypeError: path is none.
    """
    from sparsekern.checkpoint import from_pretrained
    from sparsekern.checkpoint.arguments import (
        ModelNotFound,
        find_folder,
        folder_path,
        parse_dtype,
    )

    place = folder_path("sparsekern.load_model", "path", path)
    if place.suffix.lower() == ".gguf" and not place.is_dir():
        from sparsekern.integrations.gguf.model import load_gguf

        wanted = parse_dtype("sparsekern", dtype)
        model, tokenizer = load_gguf(place)
        return cast_weights(model, wanted).to(device), tokenizer
    try:
        folder = find_folder("sparsekern", path)
    except ModelNotFound as error:
        raise FileNotFoundError(f"sparsekern: no model at {path}. {_WANTED} ({error})") from None
    if not folder.is_dir():
        raise FileNotFoundError(f"sparsekern: no model at {path}. {_WANTED}")
    return from_pretrained(folder, device=device, dtype=dtype), load_tokenizer(folder)


def cast_weights(model: Any, dtype: torch.dtype | None) -> Any:
    """Cast parameters and compressed weights to `dtype` in place, and return the model.

    Unlike model.to(dtype) this keeps buffers such as the rotary frequencies in float32. With dtype
    None nothing changes.
    """
    from sparsekern.checkpoint.configs import set_dtype

    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        for module in model.modules():
            if type(module).__module__.startswith("sparsekern.nn."):
                module.to(dtype)
        if hasattr(getattr(model, "config", None), "sub_configs"):
            set_dtype(model.config, dtype)
    return model


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX); where it does not, float32 is
    the faster dtype."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(ask is not None and ask())


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer or None; nothing is downloaded and no code of the folder runs."""
    if not any(folder.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    from sparsekern.errors import FormatError, message
    from sparsekern.utils.files import open_regular

    try:
        for path in folder.glob("*token*"):
            open_regular(path).close()  # no pipe, which would make the next line wait
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        tokenizer("a")  # some damage shows only in use
    except BaseException as error:  # whatever Transformers, and Rust below it, make of these files
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        got = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        expected = "a tokenizer that Transformers can load"
        remedy = "Copy the tokenizer's files of the model there."
        raise FormatError(message(f"sparsekern: {folder}", expected, got, remedy)) from error
    return tokenizer


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
