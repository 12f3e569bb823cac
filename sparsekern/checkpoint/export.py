"""export_dense: a compressed folder as ordinary dense weights with zeros in them, for programs
that know no 2:4 format.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekern.backends.compress import decompress
from sparsekern.checkpoint.arguments import folder_path, parse_size
from sparsekern.checkpoint.experts import fused_dense, read_entries
from sparsekern.errors import check
from sparsekern.formats import dtypes
from sparsekern.formats.config_json import (
    FILE_KEYS,
    FORMAT_VERSION,
    METHODS,
    numbers_dtype,
    quantization_groups,
    read_compression_config,
)
from sparsekern.formats.disk import check_headers, dense_levels, read_sparse24
from sparsekern.formats.forms import LEVEL_DTYPES, join, parts_of, storage_of, values_name
from sparsekern.formats.layouts import WeightSpec
from sparsekern.utils.safetensors_io import (
    CONFIG_FILE,
    INDEX_FILE,
    OP,
    TensorFiles,
    listed,
    require,
    require_inside,
)
from sparsekern.utils.staging import Group, StagedFolder, check_writable, write_shards, writing

EXPORT_OP = "sparsekern.export_dense"

# Small files that belong to a model besides its weights: tokenizer, chat template, licence.
COMPANIONS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "README.md",
)


def export_dense(
    dir_in: str | os.PathLike[str],
    dir_out: str | os.PathLike[str],
    *,
    keep_quantized: bool = False,
    max_shard_size: int | str = 5 * 2**30,
) -> None:
    """Write the checkpoint in dir_in to dir_out with every compressed layer decompressed,
    exactly; one shard in memory at a time. Quantised layers become numbers of the model's dtype.

    The new config.json has no quantization_config at all: current vLLM refuses any
    sparsity_config with targets, even for dense weights. Layers that were Conv1D get their
    [in_features, out_features] order back.

    Args:
        dir_in: folder written by save_pretrained or compressed-tensors 0.14.0. dir_out: another
            folder, created if needed.
        keep_quantized: leave quantised layers as dense levels with their scales, in compressed-
            tensors' float-quantized, int-quantized and pack-quantized formats, which engines read.
        max_shard_size: bytes per safetensors file, or text such as "2GB".
    Raises:
        FormatError: damaged or unsupported input, or a link in it to a file outside of it.
        ValueError: dir_out is dir_in; keep_quantized for a Conv1D, or without quantised layers.
        OSError: dir_out cannot be written.
    """
    source = folder_path(EXPORT_OP, "dir_in", dir_in)
    target = folder_path(EXPORT_OP, "dir_out", dir_out)
    limit = parse_size(EXPORT_OP, max_shard_size)
    check(
        source.resolve() != target.resolve(),
        EXPORT_OP,
        "another folder for the output",
        target,
    )
    files = TensorFiles(source)
    config, _ = read_compression_config(source)
    layers = check_headers(files)
    _refuse_dense_levels(files, config)
    transposed = _transposed(config, layers)
    entries = read_entries(config, layers, files.info)
    fused = {name: entry for entry in entries for name in entry["layers"]}
    numbers = numbers_dtype(config)
    kept = [name for name in layers if keep_quantized and storage_of(files, name) is not None]
    expected, got = "quantised layers with keep_quantized", f"none in {source}"
    check(bool(kept) or not keep_quantized, EXPORT_OP, expected, got, "Export it without.")
    turned = sorted(transposed & set(kept))
    remedy = "Export it without keep_quantized."
    check(not turned, EXPORT_OP, "quantised layers that were Linear", turned[:4], remedy)
    grouped = sorted(fused.keys() & set(kept))
    check(not grouped, EXPORT_OP, "quantised layers that are no experts", grouped[:4], remedy)
    specs: dict[str, WeightSpec] = {}

    companions = sorted(
        str(path.relative_to(source))
        for pattern in COMPANIONS
        for path in source.glob(pattern)
        if path.is_file() and path.name not in (CONFIG_FILE, INDEX_FILE)
    )
    require_inside(source, [*files.files, CONFIG_FILE, *companions])
    check_writable(target, EXPORT_OP)

    def dense_layer(name: str) -> dict[str, Tensor]:
        w24 = read_sparse24(files, name, dtype=None, numbers=numbers)
        if name in kept:
            specs[name] = w24.spec
            return {join(name, part): tensor for part, tensor in dense_levels(w24).items()}
        weight = decompress(w24)
        return {join(name, "weight"): weight.t().contiguous() if name in transposed else weight}

    def stored(name: str) -> dict[str, Tensor]:
        return {name: files.read(name)[0]}

    def dense_weight(name: str) -> Tensor:
        if name in layers:
            return decompress(read_sparse24(files, name, numbers=numbers))
        return files.read(join(name, "weight"))[0]

    parts = parts_of(files, layers)
    parts |= {join(name, "weight"): name for name in fused if name not in layers}
    groups: list[Group] = []
    for entry in entries:
        size = sum(
            math.prod(layers[n]) * _bits(files, n, numbers, False) // 8
            if n in layers
            else files.info[join(n, "weight")].nbytes
            for n in entry["layers"]
        )
        groups.append((size, lambda entry=entry: fused_dense(entry, dense_weight)))  # type: ignore[misc]
    for name, info in files.info.items():
        layer = parts.get(name)
        if layer in fused:
            continue
        if layer is None:
            groups.append((info.nbytes, lambda name=name: stored(name)))  # type: ignore[misc]
        elif name == values_name(files, layer):
            size = math.prod(layers[layer]) * _bits(files, layer, numbers, layer in kept) // 8
            groups.append((size, lambda layer=layer: dense_layer(layer)))  # type: ignore[misc]

    with writing(EXPORT_OP, target), StagedFolder(target) as stage:
        for name in companions:
            (stage.path / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, stage.path / name)
        write_shards(stage, groups, limit)
        for key in FILE_KEYS:
            config.pop(key, None)
        if kept:
            config["quantization_config"] = _dense_quantization(files, layers, specs)
        stage.write_json(CONFIG_FILE, config)
        stage.commit()


def _refuse_dense_levels(files: TensorFiles, config: Mapping[str, Any]) -> None:
    """FormatError for layers that are quantised and dense: without quantization_config their
    levels would pass for numbers."""
    entry = config.get("quantization_config") or {}
    levels = [name for name, info in files.info.items() if info.dtype in LEVEL_DTYPES]
    dense = [name for name in levels if f"{name}_scale" in files.info and name.endswith("weight")]
    require(
        not dense or not entry.get("config_groups"),
        f"{OP}: {files.folder}",
        "weights that are numbers or 2:4",
        f"dense levels with scales ({listed(dense, 4)})",
        "Export the folder that this one was made of.",
    )


def _bits(files: TensorFiles, layer: str, numbers: torch.dtype | None, kept: bool) -> int:
    """Bits of an element of a layer that is written dense."""
    storage = storage_of(files, layer)
    if kept and storage is not None:
        return dtypes.element(storage).bits
    stored = files.info[values_name(files, layer)].dtype if storage is None else numbers
    return 8 * (stored or torch.float32).itemsize


def _dense_quantization(
    files: TensorFiles, layers: Collection[str], specs: Mapping[str, WeightSpec]
) -> dict[str, Any]:
    """quantization_config of dense levels, for compressed-tensors. The other two-dimensional
    weights, which may be linear layers, are the ones to ignore."""
    weights = {
        name.removesuffix(".weight")
        for name, info in files.info.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    linears = dict.fromkeys(weights | set(layers), "Linear")
    entry = quantization_groups(linears, specs)
    return {"quant_method": METHODS[1], "version": FORMAT_VERSION, **entry}


def _transposed(config: Mapping[str, Any], layers: Collection[str]) -> set[str]:
    """Names of the layers whose dense weight is [in_features, out_features]."""
    entry = config.get("sparsekern", {})
    names = entry.get("transposed", []) if isinstance(entry, dict) else None
    require(
        isinstance(names, list) and all(isinstance(n, str) and n in layers for n in names),
        f"{OP}: {CONFIG_FILE}",
        "sparsekern.transposed to list compressed layers",
        str(entry)[:80],
    )
    return set(names or ())
