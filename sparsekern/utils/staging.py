"""Writing model folders of which a reader never sees half: shards, index, renames at the end.

By hand: safetensors writes one file and huggingface_hub splits a state_dict; neither makes several
files appear together.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from sparsekern.errors import check
from sparsekern.utils.safetensors_io import CONFIG_FILE, INDEX_FILE, OP, SINGLE_FILE

SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


class StagedFolder:
    """Write files into a folder all or nothing: `path` is a temporary folder inside it,
    `commit()` renames its files out.

    Leaving the `with` block without commit() (an exception, too) removes what was staged and
    leaves the folder as it was. During commit the old config.json goes first and the new one
    comes last, so an interruption between two renames leaves a folder that no reader takes for a
    model, never a mixture of two models. A config.json must be among the files.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=".sparsekern-", dir=self.folder))
        return self

    def __exit__(self, *exc_info):
        shutil.rmtree(self.path, ignore_errors=True)

    def write_json(self, name, value):
        (self.path / name).write_text(
            json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )

    def commit(self):
        staged = [str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file()]
        staged.sort(key=lambda name: ((name == INDEX_FILE) + 2 * (name == CONFIG_FILE), name))
        mode = (self.path / CONFIG_FILE).stat().st_mode & 0o777  # safetensors alone makes 0o600
        for name in staged:
            os.chmod(self.path / name, mode)
            with open(self.path / name, "rb+") as handle:
                os.fsync(handle.fileno())
        for name in (CONFIG_FILE, INDEX_FILE):
            (self.folder / name).unlink(missing_ok=True)
        for old in self.folder.glob("model*.safetensors"):  # shards of an earlier checkpoint
            if SHARD_NAME.fullmatch(old.name) and old.name not in staged:
                old.unlink()
        for name in staged:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path / name, self.folder / name)
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(self.folder, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_shards(stage, groups, max_shard_size):
    """Write groups of tensors as safetensors shards plus index into a StagedFolder; holds one
    shard in memory at a time.

    Args:
        groups: list of (nbytes, make) with make() -> {name: CPU tensor}; a group never straddles
            two shards.
        max_shard_size: bytes; a larger group gets a shard of its own.
    """
    check(max_shard_size > 0, OP, "max_shard_size > 0", max_shard_size)
    shards, used = [[]], 0
    for nbytes, make in groups:
        if shards[-1] and used + nbytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(make)
        used += nbytes

    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = (
            SINGLE_FILE
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        check(
            SHARD_NAME.fullmatch(file) is not None,
            OP,
            "at most 99999 shards",
            len(shards),
            "Raise max_shard_size.",
        )
        tensors, storages = {}, set()
        for name, tensor in (item for make in shard for item in make().items()):
            storage = tensor.untyped_storage()
            if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
                tensor = tensor.clone()  # safetensors refuses tensors that share memory
            storages.add(tensor.untyped_storage().data_ptr())
            tensors[name] = tensor
        save_file(tensors, stage.path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) > 1:
        stage.write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
