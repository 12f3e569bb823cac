"""export_dense: a compressed folder as ordinary dense weights with zeros in them, for programs
that know no 2:4 format.
"""

import shutil
from pathlib import Path

from sparsekern.errors import check
from sparsekern.formats.disk import (
    PARTS,
    check_headers,
    join,
    read_compression_config,
    read_sparse24,
)
from sparsekern.utils.safetensors_io import CONFIG_FILE, INDEX_FILE, OP, TensorFiles, require
from sparsekern.utils.staging import StagedFolder, write_shards

# Small files that belong to a model besides its weights: tokenizer, chat template, licence.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README.md")


def export_dense(dir_in, dir_out, *, max_shard_size=5 * 2**30):
    """Write the checkpoint in dir_in to dir_out with every compressed layer decompressed,
    exactly; one shard in memory at a time.

    The new config.json has no quantization_config at all: current vLLM refuses any
    sparsity_config with targets, even for dense weights. Layers that were Conv1D get their
    [in_features, out_features] order back.

    Args:
        dir_in: folder written by save_pretrained or compressed-tensors 0.14.0. dir_out: another
            folder, created if needed.
    Raises:
        FormatError: damaged or unsupported input. ValueError: dir_out is dir_in.
    """
    from sparsekern.formats.sparse24 import decompress

    source, target = Path(dir_in), Path(dir_out)
    check(
        source.resolve() != target.resolve(),
        "sparsekern.export_dense",
        "another folder for the output",
        target,
    )
    files = TensorFiles(source)
    config, _ = read_compression_config(source)
    layers = check_headers(files)
    transposed = _transposed(config, layers)

    def dense_layer(name):
        weight = decompress(read_sparse24(files, name))
        return {join(name, "weight"): weight.t().contiguous() if name in transposed else weight}

    def stored(name):
        return {name: files.read(name)[0]}

    parts = {join(layer, part): layer for layer in layers for part in PARTS}
    groups = []
    for name, info in files.info.items():
        layer = parts.get(name)
        if layer is None:
            groups.append((info.nbytes, lambda name=name: stored(name)))
        elif name == join(layer, "compressed"):
            groups.append((2 * info.nbytes, lambda layer=layer: dense_layer(layer)))

    with StagedFolder(target) as stage:
        for pattern in COMPANIONS:
            for path in source.glob(pattern):
                if path.is_file() and path.name not in (CONFIG_FILE, INDEX_FILE):
                    shutil.copyfile(path, stage.path / path.name)
        write_shards(stage, groups, max_shard_size)
        for key in ("quantization_config", "compression_config", "sparsekern"):
            config.pop(key, None)
        stage.write_json(CONFIG_FILE, config)
        stage.commit()


def _transposed(config, layers):
    """Names of the layers whose dense weight is [in_features, out_features]."""
    entry = config.get("sparsekern", {})
    names = entry.get("transposed", []) if isinstance(entry, dict) else None
    require(
        isinstance(names, list) and all(isinstance(n, str) and n in layers for n in names),
        f"{OP}: {CONFIG_FILE}",
        "sparsekern.transposed to list compressed layers",
        str(entry)[:80],
    )
    return set(names)
