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
from sparsekern.utils.safetensors_io import CONFIG_FILE, TensorFiles, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAME = METHOD
TESTED = "0.24"
OP = "sparsekern.vllm"
# Names of experts' matrices in files that have a tensor for each.
_EXPERT = re.compile(r"(^|\.)experts\.(\d+\.|gate_up_proj$|down_proj$)")


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
    """Names of the 2:4 layers in a local folder, by its files' headers; None for other places.

    Raises:
        NotImplementedError: experts are among them.
    """
    if not Path(folder).is_dir() or not any(Path(folder).glob("*.safetensors")):
        return None
    names = compressed_layers(TensorFiles(Path(folder)))
    own: Any = {}
    if (Path(folder) / CONFIG_FILE).is_file():
        own = read_json(Path(folder) / CONFIG_FILE).get("sparsekern") or {}
    stacked = bool(own.get("experts")) if isinstance(own, dict) else False
    experts = [name for name in names if _EXPERT.search(name)]
    refuse_experts(experts[0] if experts else folder, bool(experts) or stacked)
    return names


def refuse_experts(what: str, sparse: bool) -> None:
    """NotImplementedError where experts are 2:4: vLLM computes all of a layer in kernels of its
    own, which read dense weights."""
    check(
        not sparse,
        OP,
        f"dense experts in {what}",
        "2:4 ones, which vLLM's fused experts cannot read",
        "Run the model with sparsekern.from_pretrained, or write dense weights with zeros: "
        "sparsekern export DIR OUT --to dense.",
        NotImplementedError,
    )


def has_sparse_experts(layers: Layers, prefix: str) -> bool:
    """Whether experts that vLLM has at `prefix` are 2:4 in the folder, as far as is known."""
    if layers.sparse is not None:
        return any(name.startswith(f"{prefix}.") or name == prefix for name in layers.sparse)
    return bool(layers.dense) and not any(
        re.match(rule[3:], prefix) if rule.startswith("re:") else rule.startswith(f"{prefix}.")
        for rule in layers.dense
    )


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
