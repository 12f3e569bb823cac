"""Models as the commands take them: a folder, dense or pruned, or a GGUF file, each with its
tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """A model for any command.

    Args:
        path: folder with config.json and safetensors (dense or compressed), or a .gguf file.
        device, dtype: None keeps the stored dtype; a GGUF is rounded to bfloat16 first in any case.
    Returns:
        (model in eval mode, tokenizer or None when the folder has none).
    Raises:
        FileNotFoundError, FormatError.
    """
    from sparsekern.checkpoint import from_pretrained

    place = Path(path)
    if place.suffix == ".gguf":
        from sparsekern.integrations.gguf.model import load_gguf

        model, tokenizer = load_gguf(place)
        return cast_weights(model, dtype).to(device), tokenizer
    if not place.is_dir():
        raise FileNotFoundError(
            f"sparsekern: no model at {path}. "
            "Give a folder with config.json and safetensors files, or a .gguf file."
        )
    return from_pretrained(place, device=device, dtype=dtype), load_tokenizer(place)


def cast_weights(model: Any, dtype: torch.dtype | None) -> Any:
    """Cast parameters and compressed weights to `dtype` in place, and return the model.

    Unlike model.to(dtype) this keeps buffers such as the rotary frequencies in float32. With dtype
    None nothing changes.
    """
    from sparsekern.nn.sparse_linear import SparseLinear

    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        for module in model.modules():
            if isinstance(module, SparseLinear):
                module.weight = module.weight.to(dtype=dtype)
    return model


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer or None; nothing is downloaded and no code of the folder runs."""
    if not any(folder.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
