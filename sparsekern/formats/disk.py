"""The sparse-24-bitmask format as rules over tensors and config.json: one list that loading,
export and verify share.

A pruned linear layer P of shape [out_features, in_features] is three tensors in place of
P.weight:

    P.compressed  [out, in/2]        fp32 | fp16 | bf16: the two kept values of each group of 4
                                     in ascending column order
    P.bitmask     [out, ceil(in/8)]  uint8: bit b of byte j = column 8j+b is kept; two bits in each
                                     nibble, padding bits 0
    P.shape       [2, 1]             int64: [[out], [in]]

P.bias and everything else is stored as usual. 16-bit weights take 0.5 + 0.0625 = 0.5625 of their
dense bytes. Source: compressed-tensors 0.14.0, Sparse24BitMaskCompressor, the last release that
has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsekern.errors import FormatError
from sparsekern.formats import dtypes
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.utils.safetensors_io import CONFIG_FILE, OP, TensorFiles, read_json, require

FORMAT = "sparse-24-bitmask"
FORMAT_VERSION = "0.14.0"  # release of compressed-tensors whose byte layout this is
PARTS = ("compressed", "bitmask", "shape")
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
VALUE_DTYPES = tuple(dtypes.PLAIN)
# Keys of config.json that are about the files and not about the model in memory.
FILE_KEYS = ("quantization_config", "compression_config", "sparsekern", "transformers_weights")


def join(module: str, tensor: str) -> str:
    """Tensor name of a module's tensor; the root module has an empty name."""
    return f"{module}.{tensor}" if module else tensor


def _rule_tensors(files: TensorFiles, layer: str) -> None:
    for part in PARTS:
        require(
            join(layer, part) in files.info,
            files.where(join(layer, part)),
            "a tensor of a compressed layer",
            "none in the folder",
            "A shard is damaged or of another checkpoint.",
        )
    require(
        join(layer, "weight") not in files.info,
        files.where(join(layer, "weight")),
        "no dense weight beside the compressed one",
        "both",
    )


def _rule_dtypes(files: TensorFiles, layer: str) -> None:
    for part, allowed in zip(PARTS, (VALUE_DTYPES, (torch.uint8,), (torch.int64,))):
        dtype = files.info[join(layer, part)].dtype
        require(
            dtype in allowed,
            files.where(join(layer, part)),
            f"dtype {' | '.join(map(str, allowed))}",
            dtype,
            "8-bit weights are not supported."
            if part == "compressed" and dtype.itemsize == 1
            else "",
        )


def _rule_shapes(files: TensorFiles, layer: str) -> None:
    values, bitmask, shape = (files.info[join(layer, part)].shape for part in PARTS)
    require(
        len(values) == 2 and values[1] % 2 == 0,
        files.where(join(layer, "compressed")),
        "[out_features, in_features/2] with in_features a multiple of 4",
        list(values),
        "One-dimensional values belong to the unstructured sparse-bitmask format.",
    )
    expected = (values[0], (2 * values[1] + 7) // 8)
    require(
        bitmask == expected,
        files.where(join(layer, "bitmask")),
        f"{list(expected)} to match {join(layer, 'compressed')}",
        list(bitmask),
    )
    require(shape == (2, 1), files.where(join(layer, "shape")), "[2, 1]", list(shape))


def _rule_shape_values(files: TensorFiles, layer: str) -> None:
    stored = files.read(join(layer, "shape"))[0].flatten().tolist()
    expected = list(layer_shape(files, layer))
    require(
        stored == expected,
        files.where(join(layer, "shape")),
        f"{expected} to match {join(layer, 'compressed')}",
        stored,
    )


# (name, rule(files, layer) that raises FormatError). They read headers and 16 bytes, nothing that
# grows with the layer.
HEADER_RULES: tuple[tuple[str, Callable[[TensorFiles, str], None]], ...] = (
    ("tensors", _rule_tensors),
    ("dtypes", _rule_dtypes),
    ("shapes", _rule_shapes),
    ("shape", _rule_shape_values),
)


def layer_shape(files: TensorFiles, layer: str) -> tuple[int, int]:
    """(out_features, in_features) of a compressed layer, from the header of its values."""
    out_features, half = files.info[join(layer, "compressed")].shape
    return out_features, 2 * half


def compressed_layers(files: TensorFiles) -> list[str]:
    """Names of the modules that are stored compressed, sorted."""
    parts = (name.rpartition(".") for name in files.info)
    return sorted({module for module, _, part in parts if part in ("compressed", "bitmask")})


def check_headers(files: TensorFiles) -> dict[str, tuple[int, int]]:
    """Every header rule on every compressed layer; returns {layer: (out_features, in_features)}
    or raises FormatError.
    """
    layers = {}
    for layer in compressed_layers(files):
        for _, rule in HEADER_RULES:
            rule(files, layer)
        layers[layer] = layer_shape(files, layer)
    return layers


def read_sparse24(
    files: TensorFiles,
    layer: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Sparse24:
    """One compressed layer as Sparse24 on `device`; its header rules hold. Exactly two bits per
    nibble is checked here.

    Kept values of -0.0, which other writers may leave, come back as +0.0.
    """
    values, bitmask = files.read(join(layer, "compressed"), join(layer, "bitmask"), device=device)
    bits = values.view(torch.int16 if values.itemsize == 2 else torch.int32)
    bits.masked_fill_(bits == torch.iinfo(bits.dtype).min, 0)
    try:
        w24 = Sparse24.from_bitmask(values, bitmask, layer_shape(files, layer))
    except ValueError as error:  # FormatError is one
        raise FormatError(f"{files.where(join(layer, 'bitmask'))}: {error}") from error
    return w24 if dtype is None else w24.to(dtype)


def compression_config(
    linears: Mapping[str, str], sparse: Collection[str], sparsity: float
) -> dict[str, Any]:
    """The quantization_config entry: our method, with compressed-tensors' sparsity_config in it.

    Args:
        linears: {module name: class name} of every Linear-like module of the model, compressed or
            not.
        sparse: names of the compressed ones. sparsity: share of all weights that is pruned, 0..1.
    """
    return {
        "quant_method": METHOD,
        "version": FORMAT_VERSION,
        "transform_config": {},
        "sparsity_config": {
            "format": FORMAT,
            "sparsity_structure": "2:4",
            "global_sparsity": round(sparsity, 6),
            "targets": sorted({kind for name, kind in linears.items() if name in sparse}),
            "ignore": sorted(name for name in linears if name not in sparse),
            "registry_requires_subclass": False,
        },
    }


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
    require(
        not entry.get("config_groups"),
        where,
        "no quantized weights (config_groups)",
        f"format {entry.get('format')!r}",
        "Weights quantized besides being 2:4 are not supported.",
    )
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
