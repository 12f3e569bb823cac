"""What the vLLM plugin knows of a folder, without vLLM: which layers are 2:4, and what fits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekern.errors import FormatError, check, message
from sparsekern.formats.disk import FORMAT, METHOD, compressed_layers
from sparsekern.utils.safetensors_io import TensorFiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAME = METHOD
TESTED = "0.24"
OP = "sparsekern.vllm"


def sparsity_entry(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The entry of a quantization_config that describes 2:4 weights; None for other formats."""
    if not isinstance(config, dict):
        return None
    entry = config.get("sparsity_config") or {}
    known = isinstance(entry, dict) and entry.get("format") == FORMAT
    return entry if known else None


@dataclass
class Layers:
    """Which linear layers of a folder are 2:4, by their names on disk or, once mapped, in vLLM.

    sparse: names with a tensor `compressed`, where the files could be asked; None otherwise.
    dense: what `ignore` in config.json lists, names or "re:..." patterns; used without `sparse`.
    """

    sparse: list[str] | None = None
    dense: list[str] = field(default_factory=list)

    def is_sparse(self, name: str) -> bool:
        if self.sparse is not None:
            return name in self.sparse
        return not any(
            re.match(rule[3:], name) if rule.startswith("re:") else rule == name
            for rule in self.dense
        )

    def runs_sparse(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> bool:
        """Whether a layer of vLLM is 2:4.

        Args:
            prefix: its name in vLLM, such as "model.layers.0.self_attn.qkv_proj".
            fused: name of a fused layer -> names of the layers on disk that it is made of.
        Raises:
            ValueError: some of the fused layers are 2:4 and others dense.
        """
        parent, _, name = prefix.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in fused.get(name, (name,))]
        sparse = [part for part in parts if self.is_sparse(part)]
        if sparse and len(sparse) != len(parts):
            rest = sorted(set(parts) - set(sparse))
            raise ValueError(
                message(
                    OP,
                    f"{prefix}, one launch in vLLM, to be 2:4 as a whole or dense as a whole",
                    f"{', '.join(sparse)} 2:4 and {', '.join(rest)} dense",
                    "Prune again with a skip list that names all of them or none.",
                )
            )
        return bool(sparse)


def sparse_layers(folder: str) -> list[str] | None:
    """Names of the 2:4 layers in a local folder, by its files' headers; None for other places."""
    if not Path(folder).is_dir() or not any(Path(folder).glob("*.safetensors")):
        return None
    return compressed_layers(TensorFiles(Path(folder)))


def check_columns(prefix: str, in_features: int, per_rank: int) -> None:
    """Whether the columns of a rank end where a byte of the bitmask does. Raises ValueError."""
    check(
        per_rank == in_features or per_rank % 8 == 0,
        OP,
        f"in_features of {prefix} on each rank to be a multiple of 8",
        f"{per_rank} of {in_features}",
        "Choose a smaller tensor_parallel_size.",
    )


def check_shape(prefix: str, stored: Tensor, in_features: int) -> None:
    """The tensor `shape` of a layer on disk against the layer of the model. Raises FormatError."""
    good = stored.numel() == 2 and int(stored.flatten()[1]) == in_features
    check(
        good,
        OP,
        f"'shape' of {prefix} to end in {in_features}",
        stored.flatten().tolist(),
        "The folder is damaged, or its config.json is of another model.",
        FormatError,
    )


def require_cuda_kernels(device: torch.device) -> None:
    """NotImplementedError with the reason where the weights could only run row-major on a GPU."""
    from sparsekern.backends.cuda.linear import refusal

    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    why = refusal(index)
    check(not why, OP, "the CUDA kernels", why, "See: sparsekern doctor", NotImplementedError)
