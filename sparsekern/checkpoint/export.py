"""export_dense: a compressed folder as ordinary dense weights with zeros in them, for programs
that know no 2:4 format.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from sparsekern.backends.compress import decompress
from sparsekern.checkpoint.arguments import folder_path, parse_size
from sparsekern.checkpoint.experts import fused_dense, read_entries
from sparsekern.errors import check
from sparsekern.formats.disk import (
    FILE_KEYS,
    PARTS,
    check_headers,
    join,
    read_compression_config,
    read_sparse24,
)
from sparsekern.utils.safetensors_io import (
    CONFIG_FILE,
    INDEX_FILE,
    OP,
    TensorFiles,
    require,
    require_inside,
)
from sparsekern.utils.staging import Group, StagedFolder, check_writable, write_shards, writing

EXPORT_OP = "sparsekern.export_dense"

# Small files that belong to a model besides its weights: tokenizer, chat template, licence.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README.md")


def export_dense(
    dir_in: str | os.PathLike[str],
    dir_out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = 5 * 2**30,
) -> None:
    """Write the checkpoint in dir_in to dir_out with every compressed layer decompressed,
    exactly; one shard in memory at a time.

    The new config.json has no quantization_config at all: current vLLM refuses any
    sparsity_config with targets, even for dense weights. Layers that were Conv1D get their
    [in_features, out_features] order back.

    Args:
        dir_in: folder written by save_pretrained or compressed-tensors 0.14.0. dir_out: another
            folder, created if needed.
        max_shard_size: bytes per safetensors file, or text such as "2GB".
    Raises:
        FormatError: damaged or unsupported input, or a link in it to a file outside of it.
        ValueError: dir_out is dir_in. OSError: dir_out cannot be written.
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
    transposed = _transposed(config, layers)
    entries = read_entries(config, layers, files.info)
    fused = {name: entry for entry in entries for name in entry["layers"]}

    companions = sorted(
        path.name
        for pattern in COMPANIONS
        for path in source.glob(pattern)
        if path.is_file() and path.name not in (CONFIG_FILE, INDEX_FILE)
    )
    require_inside(source, [*files.files, CONFIG_FILE, *companions])
    check_writable(target, EXPORT_OP)

    def dense_layer(name: str) -> dict[str, Tensor]:
        weight = decompress(read_sparse24(files, name))
        return {join(name, "weight"): weight.t().contiguous() if name in transposed else weight}

    def stored(name: str) -> dict[str, Tensor]:
        return {name: files.read(name)[0]}

    def dense_weight(name: str) -> Tensor:
        if name in layers:
            return decompress(read_sparse24(files, name))
        return files.read(join(name, "weight"))[0]

    parts = {join(layer, part): layer for layer in layers for part in PARTS}
    parts |= {join(name, "weight"): name for name in fused if name not in layers}
    groups: list[Group] = []
    for entry in entries:
        named = [join(n, "compressed" if n in layers else "weight") for n in entry["layers"]]
        size = sum(files.info[n].nbytes * (2 if n.endswith("compressed") else 1) for n in named)
        groups.append((size, lambda entry=entry: fused_dense(entry, dense_weight)))  # type: ignore[misc]
    for name, info in files.info.items():
        layer = parts.get(name)
        if layer in fused:
            continue
        if layer is None:
            groups.append((info.nbytes, lambda name=name: stored(name)))  # type: ignore[misc]
        elif name == join(layer, "compressed"):
            groups.append((2 * info.nbytes, lambda layer=layer: dense_layer(layer)))  # type: ignore[misc]

    with writing(EXPORT_OP, target), StagedFolder(target) as stage:
        for name in companions:
            shutil.copyfile(source / name, stage.path / name)
        write_shards(stage, groups, limit)
        for key in FILE_KEYS:
            config.pop(key, None)
        stage.write_json(CONFIG_FILE, config)
        stage.commit()


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
