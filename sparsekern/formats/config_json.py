"""What config.json says of 2:4 layers: the entry that we write, what is read of it and of other
writers' entries, and the groups of int4 weights, which nothing else tells.

Source: compressed-tensors 0.14.0: quantization_config with a sparsity_config and config_groups.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsekern.errors import FormatError
from sparsekern.formats import dtypes, scaled
from sparsekern.formats.forms import MARLIN, form_of, join
from sparsekern.formats.layouts import WeightSpec
from sparsekern.utils.safetensors_io import CONFIG_FILE, OP, TensorFiles, read_json, require

FORMAT = "sparse-24-bitmask"
FORMAT_VERSION = "0.14.0"  # release of compressed-tensors whose byte layout this is
# quant_method of our folders: registered with Transformers and vLLM, which have none of this name.
METHOD = "sparsekern"
METHODS = (METHOD, "compressed-tensors")
# Transformers skips a quant_method that it does not know and would compute with random weights.
# It does open the weights under the name that config.json gives, so this name is the message that
# a program without this package ends with.
UNREADABLE_WITHOUT_US = (
    "sparsekern: the weights are 2:4-compressed (pip install sparsekern, then import sparsekern "
    "before from_pretrained, or use sparsekern.from_pretrained)"
)
# Keys of config.json that are about the files and not about the model in memory.
FILE_KEYS = ("quantization_config", "compression_config", "sparsekern", "transformers_weights")


def compression_config(
    linears: Mapping[str, str],
    sparse: Collection[str],
    sparsity: float,
    quantized: Mapping[str, WeightSpec] | None = None,
) -> dict[str, Any]:
    """The quantization_config entry: our method, with compressed-tensors' sparsity_config in it,
    and its config_groups where layers are quantised.

    Args:
        linears: {module name: class name} of every Linear-like module of the model, compressed or
            not.
        sparse: names of the compressed ones. sparsity: share of all weights that is pruned, 0..1.
        quantized: {name: spec} of the quantised ones.
    """
    return {
        "quant_method": METHOD,
        "version": FORMAT_VERSION,
        "transform_config": {},
        **(quantization_groups(linears, quantized) if quantized else {}),
        "sparsity_config": {
            "format": FORMAT,
            "sparsity_structure": "2:4",
            "global_sparsity": round(sparsity, 6),
            "targets": sorted({kind for name, kind in linears.items() if name in sparse}),
            "ignore": sorted(name for name in linears if name not in sparse),
            "registry_requires_subclass": False,
        },
    }


def quantization_groups(
    linears: Mapping[str, str], quantized: Mapping[str, WeightSpec]
) -> dict[str, Any]:
    """What compressed-tensors says of quantised layers: config_groups, format, ignore, ...

    8-bit layers have the scheme of its float-quantized and int-quantized: inputs of the same type,
    quantised token by token as they come.
    """
    kinds: dict[tuple[str, int | None], list[str]] = {}
    for name, spec in quantized.items():
        shared = spec.group < spec.shape[1]
        group = spec.group if spec.scale == "group" and shared else None
        kinds.setdefault((spec.storage, group), []).append(name)
    groups: dict[str, Any] = {}
    for (storage, group), names in sorted(kinds.items(), key=str):
        only = len(kinds) == 1
        kind = dtypes.element(storage)
        number = "float" if kind.storage.is_floating_point else "int"
        strategy = "channel" if group is None else "group"
        weights = _arguments(kind.bits, number, strategy, group, dynamic=False)
        tokens = _arguments(kind.bits, number, "token", None, dynamic=True)
        groups[f"group_{len(groups)}"] = {
            "format": _FORMATS[storage],
            "targets": sorted({linears[n] for n in names} if only else names),
            "weights": weights,
            "input_activations": tokens if kind.bits == 8 else None,
            "output_activations": None,
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(name for name in linears if name not in quantized),
    }


_FORMATS = {
    dtypes.element("fp8").name: "float-quantized",
    "int8": "int-quantized",
    "int4": "pack-quantized",
}


def _arguments(
    bits: int, number: str, strategy: str, group: int | None, *, dynamic: bool
) -> dict[str, Any]:
    """QuantizationArgs of compressed-tensors."""
    return {
        "num_bits": bits,
        "type": number,
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None if dynamic else "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": None,
    }


def numbers_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of the numbers of quantised layers, as config.json has it: what save_pretrained
    noted, else the model's; None where it says nothing usable."""
    own = config.get("sparsekern")
    noted = own.get("dtype") if isinstance(own, dict) else None
    name = noted or config.get("dtype") or config.get("torch_dtype")
    found = [d for d, kind in dtypes.PLAIN.items() if isinstance(name, str) and kind.name == name]
    return found[0] if found else None


def sparsity_entry(config: Any) -> Mapping[str, Any] | None:
    """The entry of a quantization_config that describes 2:4 weights; None for other formats."""
    if not isinstance(config, dict):
        return None
    entry = config.get("sparsity_config") or {}
    known = isinstance(entry, dict) and entry.get("format") == FORMAT
    return entry if known else None


def read_compression_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, sparsity_config): config.json of a folder and its sparsity entry, {} where it has
    none.

    Raises:
        FormatError: the config announces a compression that this package does not read.
    """
    config = read_json(folder / CONFIG_FILE)
    where = f"{OP}: {CONFIG_FILE}"
    entry = config.get("quantization_config", config.get("compression_config")) or {}
    require(isinstance(entry, dict), where, "an object 'quantization_config'", type(entry).__name__)
    method = entry.get("quant_method", METHOD)
    require(
        method in METHODS,
        where,
        f"quant_method {' or '.join(METHODS)}",
        repr(method),
        "Other quantization formats are not read.",
    )
    _check_groups(where, entry)
    running, remedy = running_transforms(entry), "Make the folder without them."
    require(not running, where, "transform_config of weights alone", f"some of {running}", remedy)
    sparsity = entry.get("sparsity_config") or {}
    require(
        isinstance(sparsity, dict) and sparsity.get("format", FORMAT) in (FORMAT, "dense"),
        where,
        f"sparsity_config of format {FORMAT}",
        str(sparsity)[:80],
    )
    ignored = sparsity.get("ignore") or []
    require(
        isinstance(ignored, list) and all(isinstance(name, str) for name in ignored),
        where,
        "sparsity_config.ignore to list names",
        str(ignored)[:80],
    )
    return config, sparsity


def running_transforms(entry: Mapping[str, Any]) -> str:
    """Where the transforms of a transform_config work that a model would compute as it runs; those
    of weights alone (weight_input, weight_output) are in the weights."""
    text = json.dumps(entry.get("transform_config") or {})
    places = set(re.findall(r'"location": "(\w+)"', text)) - {"weight_input", "weight_output"}
    return ", ".join(sorted(places))


def _check_groups(where: str, entry: Mapping[str, Any]) -> None:
    """The config_groups are schemes that the forms of forms.py have."""
    groups = entry.get("config_groups") or {}
    require(isinstance(groups, dict), where, "an object 'config_groups'", type(groups).__name__)
    known = (*_FORMATS.values(), MARLIN.name)
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        require(
            isinstance(weights, dict), where, f"weights in config_groups.{name}", str(group)[:80]
        )
        assert isinstance(weights, dict)
        written = group.get("format") or entry.get("format")
        require(
            written in known,
            where,
            f"a format in {', '.join(known)}",
            f"{written!r} in config_groups.{name}",
            "Other formats of quantized weights are not read.",
        )
        scheme = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
        per_row = scheme[:2] in (("float", 8), ("int", 8)) and scheme[2] in ("channel", "tensor")
        per_group = scheme[:2] == ("int", 4) and scheme[2] in ("channel", "group")
        require(
            (per_row or per_group) and weights.get("symmetric", True) is True,
            where,
            "8-bit weights with a scale for each output channel, or int4 with groups, symmetric",
            f"{weights.get('num_bits')}-bit {weights.get('type')} by {weights.get('strategy')}, "
            f"symmetric {weights.get('symmetric')}, in config_groups.{name}",
            "Weights quantized otherwise are not supported.",
        )


def scale_group(files: TensorFiles, layer: str, columns: int, count: int) -> int:
    """Columns of an int4 layer that share a scale, of which a row has `count`: config.json says it
    (group_size), because the count does not: rows of 192 have two scales by groups of 128 and of
    96. Where it says nothing, 128 or the power of two that fits.

    Raises:
        FormatError: the two do not fit together; no multiple of 4.
    """
    scales = join(layer, form_of(files, layer).scale)
    where = f"{files.where(scales)} of groups of columns"
    sizes = _stated_groups(files.config, layer)
    if not sizes:
        try:
            return scaled.group_of(columns, count)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error
    found = {min(size, columns) for size in (each or columns for each in sizes)}
    found = {size for size in found if scaled.groups(columns, size) == count}
    stated = " or ".join("one a row" if size is None else f"group_size {size}" for size in sizes)
    expected = f"as many scales for rows of {columns} columns as {CONFIG_FILE} says ({stated})"
    remedy = "config.json is of another checkpoint, or says too little of which layer is in groups."
    require(len(found) == 1, where, expected, f"{count} a row", remedy)
    (group,) = found
    expected, remedy = "groups of a multiple of 4 columns", "Quantise the model by others."
    require(group % 4 == 0 or count == 1, where, expected, group, remedy)
    return group


def _stated_groups(config: Mapping[str, Any], layer: str) -> list[int | None]:
    """The group sizes of int4 weights in config.json, without repeats, None for one scale a row: of
    the config_groups that name this layer, where any does, else of all."""
    entry = config.get("quantization_config", config.get("compression_config"))
    groups = entry.get("config_groups") if isinstance(entry, dict) else None
    found = [
        (group.get("targets") or (), group["weights"])
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
        if group["weights"].get("num_bits") == 4
    ]
    own = [weights for targets, weights in found if any(_names(t, layer) for t in targets)]
    sizes: list[int | None] = []
    for weights in own or [weights for _, weights in found]:
        size = weights.get("group_size") if weights.get("strategy") == "group" else None
        size = None if size == -1 else size
        good = size is None or (type(size) is int and size > 0)
        require(good, f"{OP}: {CONFIG_FILE}", "group_size > 0, a whole number", repr(size))
        sizes += [] if size in sizes else [size]
    return sizes


def _names(target: Any, layer: str) -> bool:
    """Whether a target of compressed-tensors names this layer, and not a class."""
    if not isinstance(target, str):
        return False
    if not target.startswith("re:"):
        return target == layer
    try:
        return re.match(target[3:], layer) is not None
    except re.error:
        return False
