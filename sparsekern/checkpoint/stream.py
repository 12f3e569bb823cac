"""Pruning a folder whose model is larger than memory: one block at a time.

    Streamed        a model whose blocks are on meta, and are read from the folder when they run;
                    what lies outside of them (embedding, last norm, head) is in memory
    save_streamed   the folder that save_pretrained would write: compressed layers from a resume
                    folder, everything else from the folder that was read

Host memory: what lies outside the blocks + one block, dense and compressed + what the walk keeps
(oneshot/estimate.py) + one shard while saving.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.checkpoint import arguments
from sparsekern.checkpoint.configs import generation_config
from sparsekern.checkpoint.names import Conversion
from sparsekern.checkpoint.plan import LOAD_OP, plan, untie
from sparsekern.checkpoint.reader import Reader
from sparsekern.checkpoint.save import Fetch, save_pretrained
from sparsekern.checkpoint.skeleton import build_from_dict, own_tensors
from sparsekern.errors import check
from sparsekern.formats.config_json import numbers_dtype, read_compression_config
from sparsekern.formats.disk import check_headers
from sparsekern.formats.forms import join
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.sparse_experts import fuse_experts, unfuse_experts
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot.discovery import find_blocks
from sparsekern.oneshot.resume import ResumeDir
from sparsekern.utils.safetensors_io import CONFIG_FILE, SUMS_FILE, TensorFiles

OP = "sparsekern.checkpoint.Streamed"
REMEDY = "Leave --stream out, on a machine that holds the model."


class Streamed:
    """A dense model of a folder without the weights of its blocks (an oneshot.source.Source).

    Args:
        folder: config.json and safetensors files, dense.
        dtype: cast floating-point weights to it; None keeps those of the files.
    Attributes:
        model: in eval mode; parameters of the blocks are on meta, with the dtype and shape that
            they have when they are read.
    Raises:
        ValueError: compressed layers, no decoder blocks, a weight that blocks share, or one that no
            file holds.
        FormatError: as sparsekern.from_pretrained.
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        self.folder = Path(folder)
        self.files = TensorFiles(self.folder)
        raw, _ = read_compression_config(self.folder)
        wanted = arguments.parse_dtype(LOAD_OP, dtype, raw)
        with torch.device("cpu"):
            self.model: Any = build_from_dict(raw, self.files.info)
        layers = check_headers(self.files)
        name = type(self.model).__name__
        check(not layers, OP, "a dense model", f"{len(layers)} compressed layers", REMEDY)
        self.prefix, self.blocks = find_blocks(self.model)
        check(self.blocks, OP, "a model with decoder blocks", name, REMEDY)
        found = plan(self.model, self.files, layers, whole=True)
        check(not found.computed, OP, "every weight in the files", found.computed[:3], REMEDY)
        untie(self.model, found)
        self._reader = Reader(self.model, self.files, wanted, False, numbers_dtype(raw))
        if found.names.used is not None:
            conversions: Any = found.names.used
            self.model._weight_conversions = conversions
        self._note_inside()
        # By name, of tensors inside blocks: where they come from, and what stands for them.
        self._sources: dict[str, tuple[str, str | Conversion]] = {}
        self._empty: dict[str, Tensor] = {}
        self._index = {id(block): i for i, block in enumerate(self.blocks)}
        loaded: dict[int, Tensor] = {}
        owners: dict[int, str] = {}
        for path, module in self.model.named_modules():
            inside = id(module) in self._inside
            for key, old, is_parameter in list(own_tensors(module)):
                home = module._parameters if is_parameter else module._buffers
                full, source = join(path, key), found.sources.get(id(old))
                shared = owners.get(id(old))
                alone = shared is None or not (inside or shared in self._empty)
                check(alone, OP, f"a {full} of its own", f"one shared with {shared}", REMEDY)
                owners[id(old)] = full
                if not inside:
                    if id(old) not in loaded:
                        new = old if source is None else self._reader.dense(*source, _CPU)
                        loaded[id(old)] = _like(old, new, is_parameter)
                    home[key] = loaded[id(old)]  # type: ignore[assignment]
                elif source is not None:
                    self._sources[full] = source
                    self._empty[full] = home[key] = _like(old, self._on_meta(source), is_parameter)  # type: ignore[assignment]
        self._take_experts_apart()
        if (self.folder / "generation_config.json").is_file():
            self.model.generation_config = generation_config(self.folder)

    def _note_inside(self) -> None:
        self._inside = {id(m) for block in self.blocks for m in block.modules()}

    def _take_experts_apart(self) -> None:
        """Give each matrix of an expert a layer of its own, as prune_model does."""
        # Of each layer: the parameter that holds it, which of its matrices it is, and whether
        # that is transposed. Of each block: its parameters, with their layers.
        self._matrix_of: dict[int, tuple[str, int, bool]] = {}
        self._stacks: dict[int, dict[str, list[nn.Linear]]] = {}
        self._apart = unfuse_experts(self.model)
        self._note_inside()
        for path, (_, experts) in self._apart.items():
            index = next((i for i, b in enumerate(self.blocks) if experts in b.modules()), None)
            check(index is not None, OP, "experts inside blocks", path, REMEDY)
            for key, turned in experts.recipe.matrices:
                full = join(path, key)
                layers = experts.layers(key)
                self._stacks.setdefault(cast(int, index), {})[full] = layers
                for i, layer in enumerate(layers):
                    self._matrix_of[id(layer)] = full, i, turned
                    self._empty[f"{path}.{i}.{key}.weight"] = layer.weight
                del self._empty[full]

    def put_together(self) -> None:
        """After pruning: experts of which no matrix is compressed in one parameter again."""
        for old, new in self._apart.values():
            if not new.is_sparse:
                fuse_experts(self.model, new, old)

    def matrices(self, full: str, layers: list[nn.Linear], device: torch.device) -> list[Tensor]:
        """The weights of all experts, views of one tensor as in a model that is in memory."""
        stack = self._reader.dense(*self._sources[full], device)
        stack = stack.to(self._empty[self._weight_name(full, 0)].dtype)
        turned = [self._matrix_of[id(layer)][2] for layer in layers]
        return [stack[i].t() if turn else stack[i] for i, turn in enumerate(turned)]

    def stack(self, full: str) -> list[Tensor]:
        """`matrices` of a parameter, on the host."""
        layers = next(stacks[full] for stacks in self._stacks.values() if full in stacks)
        return self.matrices(full, layers, _CPU)

    def place_of(self, layer: nn.Module) -> tuple[str, int, bool]:
        """Of a layer of an expert: the parameter that holds it, its index, whether transposed."""
        return self._matrix_of[id(layer)]

    @staticmethod
    def _weight_name(full: str, index: int) -> str:
        path, _, key = full.rpartition(".")
        return f"{path}.{index}.{key}.weight"

    def _on_meta(self, source: tuple[str, str | Conversion]) -> Tensor:
        """A tensor as it will be read, without data."""
        name, origin = source
        if isinstance(origin, str):
            info = self.files.info[origin]
            made = torch.empty(info.shape, dtype=info.dtype, device="meta")
        else:
            target = origin.targets[name]
            made = torch.empty(target.shape, dtype=target.dtype, device="meta")
        return self._reader.as_asked(name, made)

    def read(self, name: str, device: torch.device) -> Tensor:
        """The tensor of this name in a block, in the dtype of what stands for it."""
        tensor = self._reader.dense(*self._sources[name], device)
        return tensor.to(self._empty[name].dtype) if name in self._empty else tensor

    # ------------------------------------------------------------------------------- as a Source

    def holds(self, module: nn.Module) -> bool:
        """Whether this module lies in a block."""
        return id(module) in self._inside

    @contextlib.contextmanager
    def present(self, block: nn.Module, device: torch.device) -> Iterator[None]:
        """Within: the block's weights are in memory, on `device`."""
        prefix = f"{self.prefix}.{self._index[id(block)]}"
        try:
            for full, layers in self._stacks.get(self._index[id(block)], {}).items():
                for layer, weight in zip(layers, self.matrices(full, layers, device)):
                    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
            for full, module, key, old, is_parameter in _tensors_of(block, prefix):
                if full in self._sources:
                    place = module._parameters if is_parameter else module._buffers
                    place[key] = _like(old, self.read(full, device), is_parameter)  # type: ignore[assignment]
            for module in block.modules():  # buffers that no file holds
                for key, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[key] = buffer.to(device)
            yield
        finally:
            for module in block.modules():
                if isinstance(module, SparseLinear):
                    module.weight = _emptied(module.weight)
            for full, module, key, _, is_parameter in _tensors_of(block, prefix):
                place = module._parameters if is_parameter else module._buffers
                if full in self._empty:
                    place[key] = self._empty[full]  # type: ignore[assignment]
            for module in block.modules():
                for key in module._non_persistent_buffers_set:
                    buffer = module._buffers.get(key)
                    if buffer is not None and not buffer.is_meta:
                        module._buffers[key] = buffer.to(_CPU)

    @contextlib.contextmanager
    def lazily(self) -> Iterator[None]:
        """Within: each block has its weights while it is called, on the host."""
        open_now: dict[int, contextlib.ExitStack] = {}

        def before(block: nn.Module, args: Any) -> None:
            if "forward" not in block.__dict__:  # else it stands aside for a stub
                stack = open_now[id(block)] = contextlib.ExitStack()
                stack.enter_context(self.present(block, _CPU))

        def after(block: nn.Module, args: Any, output: Any) -> None:
            if id(block) in open_now:
                open_now.pop(id(block)).close()

        def close_all() -> None:
            for left in open_now.values():
                left.close()

        with contextlib.ExitStack() as stack:
            stack.callback(close_all)
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(before).remove)
                # Outside of every other hook on the block, and after an exception, too.
                stack.callback(block.register_forward_hook(after, always_call=True).remove)
            yield

    def fingerprint(self) -> str:
        """Of config.json, the headers, and size and time of every file; with SHA256SUMS of that."""
        sha = hashlib.sha256()
        names = [*self.files.files, CONFIG_FILE, SUMS_FILE]
        for name in names:
            path = self.folder / name
            if path.is_file():
                status = path.stat()
                sha.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for name in (CONFIG_FILE, SUMS_FILE):
            if (self.folder / name).is_file():
                sha.update((self.folder / name).read_bytes())
        for name, info in self.files.info.items():
            sha.update(f"{name} {info}\n".encode())
        kinds = sorted(f"{name} {tensor.dtype}" for name, tensor in self._empty.items())
        sha.update("\n".join(kinds).encode())
        return sha.hexdigest()


_CPU = torch.device("cpu")


def _like(old: Tensor, new: Tensor, is_parameter: bool) -> Tensor:
    return nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new


def _emptied(weight: Sparse24) -> Sparse24:
    """The same weight on meta, row-major."""
    plain = weight.rowmajor()
    tensors = {name: tensor.to("meta") for name, tensor in plain.tensors.items()}
    return Sparse24.unchecked(plain.spec, tensors)


def _tensors_of(
    block: nn.Module, prefix: str
) -> Iterator[tuple[str, nn.Module, str, Tensor, bool]]:
    """(name in the model, module, key, tensor, whether it is a parameter) of what a block's modules
    own."""
    for path, module in block.named_modules():
        for key, tensor, is_parameter in list(own_tensors(module)):
            yield join(join(prefix, path), key), module, key, tensor, is_parameter


class _Parts(Fetch):
    """What a streamed model is saved from: the source, and the stages of a resume folder."""

    def __init__(self, streamed: Streamed, parts: ResumeDir) -> None:
        self.streamed, self.parts = streamed, parts
        self._held: tuple[str, dict[str, Any]] = ("", {})
        self._stack: tuple[str, list[Tensor]] = ("", [])
        self._names = {id(module): name for name, module in streamed.model.named_modules()}

    @contextlib.contextmanager
    def present(self, layers: Collection[nn.Module]) -> Iterator[None]:
        changed: list[tuple[Any, Any]] = []
        try:
            for layer in layers:
                weight: Any = layer.weight
                if isinstance(layer, SparseLinear) and weight.values.is_meta:
                    changed.append((layer, weight))
                    layer.weight = self.sparse(self._names[id(layer)], layer)
                elif isinstance(weight, Tensor) and weight.is_meta:
                    changed.append((layer, weight))
                    new = self._dense_matrix(cast(nn.Linear, layer)).to(weight.dtype)
                    layer.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
            yield
        finally:
            for layer, weight in changed:
                layer.weight = weight

    def _dense_matrix(self, layer: nn.Linear) -> Tensor:
        """The weight of an expert that stayed dense."""
        full, index, _ = self.streamed.place_of(layer)
        if self._stack[0] != full:
            self._stack = "", []
            self._stack = full, self.streamed.stack(full)
        return self._stack[1][index]

    def dense(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        return self.streamed.read(name, _CPU).to(tensor.dtype)

    def sparse(self, name: str, module: SparseLinear) -> Sparse24:
        weight = module.weight
        if not weight.values.is_meta:
            return weight
        index = int(name.removeprefix(self.streamed.prefix + ".").split(".")[0])
        key = f"block-{index:05d}"
        if self._held[0] != key:
            self._held = "", {}  # its memory is free before the next one is read
            self._held = key, self.parts.tensors_of(key)
        found: Sparse24 = self._held[1][name]
        return found.to(weight.dtype)


def save_streamed(
    streamed: Streamed,
    parts: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = 5 * 2**30,
) -> None:
    """Write what prune_model(streamed.model, resume=parts, source=streamed) has made of a model,
    as save_pretrained writes it, byte for byte.

    Raises:
        FormatError: a stage of `parts` is missing or damaged.   OSError: as save_pretrained.
    """
    streamed.put_together()
    with contextlib.closing(ResumeDir.opened(parts)) as folder:
        fetch = _Parts(streamed, folder)
        save_pretrained(
            streamed.model,
            directory,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            fetch=fetch,
        )
