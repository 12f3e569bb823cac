"""What the vLLM plugin knows of a folder, without vLLM: which layers are 2:4, and what fits."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekern.errors import FormatError, check, message
from sparsekern.formats import dtypes
from sparsekern.formats.config_json import METHOD, running_transforms, scale_group
from sparsekern.formats.forms import (
    LEVELS,
    PLAIN,
    WORDS,
    compressed_layers,
    form_of,
    join,
    layer_shape,
    storage_of,
)
from sparsekern.formats.scaled import SCALE
from sparsekern.integrations import inductor_pdl
from sparsekern.utils.safetensors_io import CONFIG_FILE, TensorFiles, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

NAME = METHOD
TESTED = "0.24"
OP = "sparsekern.vllm"
# Names of experts' matrices in files that have a tensor for each.
_EXPERT = re.compile(r"(^|\.)experts\.(\d+\.|gate_up_proj$|down_proj$)")


def unreadable(config: Mapping[str, Any]) -> str | None:
    """What of a quantization_config with 2:4 weights cannot be run; None when all of it can.

    Weights may be quantised to 8 bits, one symmetric scale per output channel, and in our own
    folders to int4 with groups. How activations are quantised is left to the kernels: not at all
    for few tokens, dynamically per token for many.
    """
    known = [(8, "channel", True)]
    if config.get("quant_method") == METHOD:
        known += [(4, "channel", True), (4, "group", True)]
    for name, weights, activations in _groups(config):
        kind = weights.get("num_bits"), weights.get("strategy"), weights.get("symmetric", True)
        if kind not in known:
            words = "num_bits", "strategy", "symmetric"
            return f"{name}: weights {dict(zip(words, kind))}"
        if isinstance(activations, dict) and not activations.get("dynamic", True):
            return f"{name}: activations with stored scales"
    running = running_transforms(config)
    return f"transform_config of {running}" if running else None


def _groups(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(name, weights, input_activations) of the config_groups that quantise weights."""
    groups = config.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield name, weights, group.get("input_activations")


@dataclass(frozen=True)
class Coding:
    """How the values of a layer are quantised.

    storage: name of the element type. group: columns that share a scale; 0: those of a row.
    """

    storage: str
    group: int = 0

    def __str__(self) -> str:
        return f"{self.storage} in groups of {self.group}" if self.group else self.storage


@dataclass
class Layers:
    """Which linear layers of a folder are 2:4, by their names on disk or, once mapped, in vLLM.

    sparse: names with a tensor `compressed`, where the files could be asked; None otherwise.
    dense: what `ignore` in config.json lists, names or "re:..." patterns; used without `sparse`.
    coded: {name: Coding} of those whose values are quantised.
    """

    sparse: list[str] | None = None
    dense: list[str] = field(default_factory=list)
    coded: dict[str, Coding] = field(default_factory=dict)

    def is_sparse(self, name: str) -> bool:
        if self.sparse is not None:
            return name in self.sparse
        return not any(
            re.match(rule[3:], name) if rule.startswith("re:") else rule == name
            for rule in self.dense
        )

    def sparse_parts(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> list[bool]:
        """Which parts of a layer of vLLM are 2:4.

        Args:
            prefix: its name in vLLM, such as "model.layers.0.self_attn.qkv_proj".
            fused: name of a fused layer -> names of the layers on disk that it is made of.
        """
        return [self.is_sparse(part) for part in _parts(prefix, fused)]

    def coding(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> Coding | None:
        """How the 2:4 parts of a layer are quantised; None where they have the model's dtype.

        Raises:
            ValueError: they are in several ways.
        """
        parts = [part for part in _parts(prefix, fused) if self.is_sparse(part)]
        kinds = {self.coded.get(part) for part in parts}
        if len(kinds) > 1:
            got = ", ".join(f"{part} {self.coded.get(part, 'not quantised')}" for part in parts)
            expected = f"the 2:4 parts of {prefix} to have values of one type"
            raise ValueError(message(OP, expected, got, "Quantise all of them or none."))
        return kinds.pop() if kinds else None


@dataclass(frozen=True)
class Run:
    """Rows of a fused layer that follow each other and are one product."""

    sparse: bool
    begin: int
    end: int


def runs(sparse: Sequence[bool], rows: Sequence[int]) -> list[Run]:
    """The products of a layer, from which of its parts are 2:4 and the rows of each.

    One flag stands for all parts, as for a layer that is fused on disk.
    """
    flags = list(sparse) * (len(rows) if len(sparse) == 1 else 1)
    found: list[Run] = []
    end = 0
    for flag, count in zip(flags, rows, strict=True):
        begin = found.pop().begin if found and found[-1].sparse == flag else end
        end += count
        found.append(Run(flag, begin, end))
    return found


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


def coded_layers(folder: str) -> dict[str, Coding]:
    """{name: Coding} of the quantised 2:4 layers in a local folder, by its headers.

    Raises:
        NotImplementedError: a form whose tensors cannot be split between ranks.
    """
    if sparse_layers(folder) is None:
        return {}
    files = TensorFiles(Path(folder))
    found = {}
    for layer in compressed_layers(files):
        form = form_of(files, layer)
        expected = f"{layer} in the form plain, levels or words"
        remedy = "Load it with sparsekern.from_pretrained and save it again."
        read = form in (PLAIN, LEVELS, WORDS)
        check(read, OP, expected, form.name, remedy, NotImplementedError)
        storage = storage_of(files, layer)
        if storage is None:
            continue
        group = 0
        if form is WORDS:
            columns = layer_shape(files, layer)[1]
            group = scale_group(files, layer, columns, files.info[join(layer, SCALE)].shape[1])
            group = group if group < columns else 0
        found[layer] = Coding(storage, group)
    return found


def check_columns(prefix: str, in_features: int, per_rank: int, coding: Coding | None) -> None:
    """Whether the columns of a rank end where a byte of the bitmask does, a word of int4 levels and
    a group of scales. Raises ValueError."""
    step = 8
    if coding is not None and dtypes.element(coding.storage).bits == 4:
        step = math.lcm(16, coding.group or 1)
    check(
        per_rank == in_features or per_rank % step == 0,
        OP,
        f"in_features of {prefix} on each rank to be a multiple of {step}",
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


def start_early(options: dict[str, Any], device: tuple[int, int] | None) -> None:
    """Choose Inductor's PDL in vLLM's `inductor_compile_config`, which the key of its cache has.

    Ours stream weights while the kernel before them runs, if that one says so: what Inductor
    generates does with PDL (inductor_pdl.py). What the user chose stays: an entry of `options`, or
    TORCHINDUCTOR_ENABLE_PDL, which the key would not see.

    Args:
        options: gets the entry, where this torch knows it.
        device: compute capability; None where there is no CUDA device.
    """
    known = device is not None and device >= (9, 0) and inductor_pdl.known()
    if not known or not inductor_pdl.at_once():
        return
    options.setdefault(inductor_pdl.PDL, os.environ.get(inductor_pdl.VARIABLE, "1") == "1")


def require_cuda_kernels(device: torch.device) -> None:
    """NotImplementedError with the reason where the weights could only run row-major on a GPU."""
    from sparsekern.backends.cuda.linear import refusal

    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    why = refusal(index)
    check(not why, OP, "the CUDA kernels", why, "See: sparsekern doctor", NotImplementedError)
