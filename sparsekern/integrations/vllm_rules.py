"""What the vLLM plugin knows of a folder, without vLLM: which layers are 2:4, and what fits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekern.errors import FormatError, check, message
from sparsekern.formats import dtypes
from sparsekern.formats.disk import FORMAT, METHOD, compressed_layers, join
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


def unreadable(config: Mapping[str, Any]) -> str | None:
    """What of a quantization_config with 2:4 weights cannot be run; None when all of it can.

    Weights may be quantised to 8 bits, one symmetric scale per output channel. How activations are
    quantised is left to the kernels: not at all for few tokens, dynamically per token for many.
    """
    groups = config.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        kind = weights.get("num_bits"), weights.get("strategy"), weights.get("symmetric", True)
        if kind != (8, "channel", True):
            words = "num_bits", "strategy", "symmetric"
            return f"{name}: weights {dict(zip(words, kind))}"
        activations = group.get("input_activations")
        if isinstance(activations, dict) and not activations.get("dynamic", True):
            return f"{name}: activations with stored scales"
    return None


@dataclass
class Layers:
    """Which linear layers of a folder are 2:4, by their names on disk or, once mapped, in vLLM.

    sparse: names with a tensor `compressed`, where the files could be asked; None otherwise.
    dense: what `ignore` in config.json lists, names or "re:..." patterns; used without `sparse`.
    coded: {name: element type} of those whose values are quantised.
    """

    sparse: list[str] | None = None
    dense: list[str] = field(default_factory=list)
    coded: dict[str, str] = field(default_factory=dict)

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
        parts = _parts(prefix, fused)
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

    def storage(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> str | None:
        """The element type of a 2:4 layer's values; None where they have the model's dtype.

        Raises:
            ValueError: the fused layers have several.
        """
        parts = _parts(prefix, fused)
        kinds = {self.coded.get(part) for part in parts}
        if len(kinds) > 1:
            got = ", ".join(f"{part} {self.coded.get(part, 'not quantised')}" for part in parts)
            expected = f"{prefix}, one launch in vLLM, to have values of one type"
            raise ValueError(message(OP, expected, got, "Quantise all of them or none."))
        return kinds.pop()


def _parts(prefix: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the layers on disk that a layer of vLLM is made of."""
    parent, _, name = prefix.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in fused.get(name, (name,))]


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


def coded_layers(folder: str) -> dict[str, str]:
    """{name: element type} of the quantised 2:4 layers in a local folder, by its headers."""
    if sparse_layers(folder) is None:
        return {}
    files = TensorFiles(Path(folder))
    of_storage = {kind.storage: kind.name for kind in dtypes.elements() if not kind.plain}
    found = {}
    for layer in compressed_layers(files):
        info = files.info.get(join(layer, "compressed"))
        if info is not None and info.dtype in of_storage:
            found[layer] = of_storage[info.dtype]
    return found


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


def has_8bit_kernels(device: torch.device) -> bool:
    """Whether products of 8-bit activations and weights have kernels there: Hopper's wgmma.sp."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def require_cuda_kernels(device: torch.device) -> None:
    """NotImplementedError with the reason where the weights could only run row-major on a GPU."""
    from sparsekern.backends.cuda.linear import refusal

    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    why = refusal(index)
    check(not why, OP, "the CUDA kernels", why, "See: sparsekern doctor", NotImplementedError)
