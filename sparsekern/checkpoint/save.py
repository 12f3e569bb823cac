"""Pruned models on disk: save_pretrained, from_pretrained, load_into, verify_checkpoint,
export_dense.

    model ── save_pretrained ──► folder ── from_pretrained ──► model, same logits bit for bit
                                   │ ───── load_into ────────► a module of your own
                                   └────── export_dense ─────► folder with dense weights

The folder is what Transformers writes (config.json, safetensors shards, index, tokenizer,
generation config, its names for tensors), with pruned layers in compressed-tensors'
sparse-24-bitmask format (formats/forms.py) and a SHA256SUMS. This file writes; checkpoint/load.py
reads.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparsekern.checkpoint.arguments import folder_path, parse_size
from sparsekern.checkpoint.experts import Stored, apart, stored_experts
from sparsekern.checkpoint.names import SAVE_OP, Conversion, DiskNames, disk_names
from sparsekern.checkpoint.skeleton import linear_shape, own_tensors, skeleton_of
from sparsekern.errors import check, message
from sparsekern.formats.config_json import FILE_KEYS, UNREADABLE_WITHOUT_US, compression_config
from sparsekern.formats.disk import require_storable, stored_bytes, stored_tensors
from sparsekern.formats.forms import MARKS, join
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.parallel import SplitLinear
from sparsekern.nn.replace import is_conv1d
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.nn.wrappers import bare, whole
from sparsekern.utils.arguments import checked
from sparsekern.utils.safetensors_io import CONFIG_FILE, DTYPES, listed
from sparsekern.utils.staging import Group, StagedFolder, check_writable, write_shards, writing

# Other arguments of Transformers' save_pretrained, with the values that ask for what is written.
FIXED: dict[str, tuple[Any, ...]] = {
    "push_to_hub": (False, None),
    "safe_serialization": (True, None),
    "variant": (None,),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
    "save_peft_format": (True, False),
    "token": (None, True, False),
    "repo_id": (None,),
    "commit_message": (None,),
    "private": (None,),
    "create_pr": (None, False),
    "max_shard_size": (None,),
    "save_function": (None, torch.save),
}


@checked(SAVE_OP)
def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = 5 * 2**30,
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    fetch: Fetch | None = None,
    **kwargs: Any,
) -> None:
    """Write a model to a folder: compressed layers as sparse-24-bitmask, the rest as it is.

    All files are written under temporary names and renamed when the last one is complete. An error
    or interruption, also between two renames, leaves the folder as it was; a process that is killed
    there leaves a folder without config.json. Tied weights are stored once.
    Host memory: one shard.

    Args:
        model: Transformers model or any nn.Module, on any device, with SparseLinear modules where
            it was pruned. What torch.compile, DistributedDataParallel and activation checkpointing
            put around it, or around its blocks, is left out. Shards of FSDP are refused.
        directory: created if needed; the files of an earlier checkpoint in it are replaced.
        tokenizer: anything with save_pretrained(folder), or None.
        max_shard_size: bytes per safetensors file, or text such as "2GB".
        is_main_process: False: check the arguments and write nothing, as in Transformers.
        state_dict: None, or the model's own.
        fetch: where the weights are that the model has on meta (checkpoint/stream.py).
        kwargs: other arguments of Transformers' save_pretrained, with values that ask for what is
            written here.
    Raises:
        ValueError, TypeError: a parameter on the meta device, or an argument that is none of the
            above; it is named.
        OSError: the folder cannot be written; the model is unchanged.
    Notes:
        Buffers that Transformers keeps out of files (rotary frequencies) are recomputed at load.
        Where this model's differ, as after model.to(torch.bfloat16), a UserWarning names them:
        the loaded model then uses the exact ones. A model that its config does not build (blocks
        taken out, another head, adapters) is written as it is, with a UserWarning: from_pretrained
        cannot load it, load_into can.
    """
    check(
        isinstance(model, nn.Module), SAVE_OP, "an nn.Module", type(model).__name__, exc=TypeError
    )
    check(
        tokenizer is None or hasattr(tokenizer, "save_pretrained"),
        SAVE_OP,
        "a tokenizer with save_pretrained",
        type(tokenizer).__name__,
        exc=TypeError,
    )
    folder = folder_path(SAVE_OP, "directory", directory)
    limit = parse_size(SAVE_OP, max_shard_size)
    _check_fixed(model, state_dict, kwargs)
    if not is_main_process:
        return
    model = bare(whole(SAVE_OP, model))
    split = any(isinstance(module, SplitLinear) for module in model.modules())
    remedy = "Save the model before it."
    check(not split, SAVE_OP, "a whole model", "one split by tensor_parallel", remedy)
    head = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    skeleton = skeleton_of(model, untied=_compressed_head(model, head))
    sparse = {n: m for n, m in _places(model, skeleton) if isinstance(m, SparseLinear)}
    for name, module in sparse.items():
        require_storable(f"{SAVE_OP}: {name}", module.weight.spec)
    dense = _dense_tensors(model, skeleton, fetch is not None)
    _warn_lost_states(model)
    _warn_lost_buffers(model, skeleton)
    get = Fetch() if fetch is None else fetch
    inside = _inside_experts(model)
    plain = {name: tensor for name, tensor in dense.items() if name not in inside}
    alone = {name: module for name, module in sparse.items() if name not in inside}
    names = disk_names(model, plain, alone)
    experts, entries = stored_experts(model, names.rename, names.split)
    config = model_config(model, sparse, dense, names, skeleton, experts, entries)
    groups = [_sparse_group(names.layers[name], name, m, get) for name, m in alone.items()]
    for stored in experts:
        groups.append((stored.nbytes, functools.partial(_of_experts, stored, get)))
    groups += [_dense_group(stored, name, dense[name], get) for stored, name in names.plain.items()]
    for conversion in names.groups:
        groups += _converted_groups(model, conversion, dense, names, get)
    _warn_unlike_config(model, skeleton, sparse, dense)
    check_writable(folder, SAVE_OP)
    with writing(SAVE_OP, folder), StagedFolder(folder) as stage:
        if tokenizer is not None:  # what others write comes first: it may fail
            tokenizer.save_pretrained(str(stage.path))
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(str(stage.path))
        for own in (model, getattr(model, "config", None)):
            if getattr(own, "_auto_class", None) is not None:  # code that came with the model
                from transformers.dynamic_module_utils import custom_object_save

                custom_object_save(own, str(stage.path), config)
        write_shards(stage, groups, limit)
        stage.write_json(CONFIG_FILE, config)
        stage.commit()


def _check_fixed(
    model: nn.Module, state_dict: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> None:
    remedy = "Call sparsekern.save_pretrained(model, folder), then upload or convert the folder."
    for name, value in given.items():
        expected = f"arguments of save_pretrained: {', '.join(FIXED)}"
        check(name in FIXED, SAVE_OP, expected, repr(name), exc=TypeError)
        allowed = FIXED[name]
        fits = any(value is entry for entry in allowed)
        check(fits, SAVE_OP, f"{name}={allowed[0]!r}", repr(value)[:80], remedy)
    if state_dict is not None:
        own = model.state_dict()
        differ = sorted(own.keys() ^ state_dict.keys()) or [
            name
            for name, tensor in own.items()
            if isinstance(tensor, Tensor) and not _same(tensor, state_dict[name])
        ]
        got = f"one that differs in {listed(differ, 4)}"
        check(not differ, SAVE_OP, "the model's own state_dict", got, remedy)


def model_config(
    model: nn.Module,
    sparse: Mapping[str, SparseLinear],
    dense: Mapping[str, Tensor],
    names: DiskNames,
    skeleton: nn.Module | None,
    experts: Collection[Stored] = (),
    entries: Collection[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """config.json of a model with the entries that announce its compressed layers."""
    own: dict[str, Any] = {}
    config = _config(model, sparse, dense)
    inside = _inside_experts(model)
    linears = {
        names.module(n): kind
        for n, kind in _linears(model, sparse, skeleton).items()
        if n not in inside
    }
    linears |= {entry.layer: "Linear" for entry in experts if entry.stack is None}
    stored = {names.layers[name] for name in sparse if name not in inside}
    stored |= {entry.name for entry in experts if entry.compressed}
    if sparse:
        total = sum(m.out_features * m.in_features for m in sparse.values())
        share = total / 2 / (total + sum(tensor.numel() for tensor in dense.values()))
        specs = {
            names.layers[name]: m.weight.spec for name, m in sparse.items() if name not in inside
        }
        specs |= {entry.name: entry.spec for entry in experts if entry.compressed}
        quantized = {name: spec for name, spec in specs.items() if not spec.element.plain}
        entry = compression_config(linears, stored, share, quantized)
        config["quantization_config"] = entry
        if quantized:
            own["dtype"] = numbers_name(quantized.values())
        if "model_type" in config:
            config["transformers_weights"] = UNREADABLE_WITHOUT_US
    transposed = sorted(name for name in stored if linears[name] == "Conv1D")
    if transposed:
        own["transposed"] = transposed  # export_dense writes these as [in, out]
    if entries:
        own["experts"] = list(entries)  # and these as one tensor of all experts
    if own:
        config["sparsekern"] = own
    return config


def _inside_experts(model: nn.Module) -> set[str]:
    """Names of the linear layers of experts, and of their dense weights."""
    layers = {
        join(name, f"{i}.{key}")
        for name, experts in apart(model).items()
        for i in range(experts.recipe.experts)
        for key, _ in experts.recipe.matrices
    }
    return layers | {join(layer, "weight") for layer in layers}


def numbers_name(specs: Iterable[WeightSpec]) -> str:
    """The one dtype of the numbers of quantised weights, which no file holds.

    Raises:
        ValueError: they have several.
    """
    found = sorted({str(spec.dtype).removeprefix("torch.") for spec in specs})
    remedy = "Cast them to one, with module.weight = module.weight.to(dtype)."
    check(len(found) == 1, SAVE_OP, "quantised layers of one dtype", ", ".join(found), remedy)
    return found[0]


def _dense_tensors(
    model: nn.Module, skeleton: nn.Module | None, absent: bool = False
) -> dict[str, Tensor]:
    """{name: tensor} of everything that is stored as it is, biases of compressed layers included.

    Tied weights go under one name: the one that Transformers ties the others to, else the first;
    under all names where the model that the config builds would not tie them. absent: some may be
    on meta.
    """
    dependent = set(getattr(model, "all_tied_weights_keys", None) or ())
    built = {} if skeleton is None else {n: id(t) for n, t in _tensors(skeleton)}
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) & built.keys()
    found: dict[str, Tensor] = {}
    first: dict[object, str] = {}
    for name, module in _places(model, skeleton):
        for key, tensor, _ in own_tensors(module):
            full = join(name, key)
            if full in computed:  # position tables that Transformers keeps out of files
                continue
            _check_storable(full, tensor, absent)
            known = first.get(_identity(tensor))
            if known is not None and built.get(known) == built.get(full):
                if known not in dependent or full in dependent:
                    continue
                del found[known]
            first[_identity(tensor)] = full
            found[full] = tensor
    return found


def _check_storable(name: str, tensor: Tensor, absent: bool) -> None:
    """ValueError for a tensor that safetensors has no form for, or that a reader would take for a
    part of a compressed layer."""
    where, has_data = f"{SAVE_OP}: {name}", absent or not tensor.is_meta
    check(has_data, where, "a tensor with data", "one on meta", "Load the weights first.")
    wrapped = is_traceable_wrapper_subclass(tensor)  # of torchao, or torch's own 2:4 tensors
    fits = tensor.layout is torch.strided and not tensor.is_nested and not wrapped
    kind = type(tensor).__name__ if wrapped else "nested" if tensor.is_nested else tensor.layout
    got = f"{tensor.dtype}, {kind}"
    remedy = "Cast it, or make it a buffer that is not persistent."
    expected = f"a strided tensor of {', '.join(DTYPES)}"
    check(fits and tensor.dtype in DTYPES.values(), where, expected, got, remedy)
    expected = f"no {', '.join(MARKS)}, which are tensors of compressed layers"
    remedy = "Rename it; layers that another program has quantised are decompressed first."
    reserved = name.rpartition(".")[2] in MARKS or name == "__metadata__"
    check(not reserved, where, expected, "a tensor of this name", remedy)


def _places(model: nn.Module, skeleton: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of a model. A module in several places comes once, or under each name that
    is a module of its own in the model that the config builds."""
    built = {} if skeleton is None else dict(skeleton.named_modules(remove_duplicate=False))
    seen: dict[nn.Module, set[nn.Module | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        known, own = seen.setdefault(module, set()), built.get(name)
        if not known or (own is not None and own not in known):
            known.add(own)
            yield name, module


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _compressed_head(model: nn.Module, sparse: Mapping[str, SparseLinear]) -> bool:
    """Whether the output layer is compressed: it then has weights of its own."""
    ask: Any = getattr(model, "get_output_embeddings", None)
    head = None if ask is None else ask()
    return any(head is module for module in sparse.values())


def _linears(
    model: nn.Module, sparse: Mapping[str, nn.Module], skeleton: nn.Module | None
) -> dict[str, str]:
    """{name: "Linear" | "Conv1D"} of all linear layers; the skeleton knows what a SparseLinear
    was before.
    """
    originals = dict(skeleton.named_modules()) if skeleton is not None else {}
    linears = {}
    for name, module in _places(model, skeleton):
        if is_conv1d(originals.get(name, module)):
            linears[name] = "Conv1D"
        elif name in sparse or linear_shape(module) is not None:
            linears[name] = "Linear"
    return linears


def _identity(tensor: Tensor) -> object:
    """Equal for two names of the same elements (tied weights)."""
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.numel() == 0:
        return id(tensor)
    view = tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return tensor.data_ptr(), tensor.device, tensor.dtype, view


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


class Fetch:
    """Where the data of tensors is when they are written: in the model."""

    def dense(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor `name` of the model."""
        return tensor

    def sparse(self, name: str, module: SparseLinear) -> Sparse24:
        """The weight of the layer `name`."""
        return module.weight

    def present(self, layers: Collection[nn.Module]) -> contextlib.AbstractContextManager[None]:
        """Within: these linear layers of experts have their weights."""
        return contextlib.nullcontext()


def _of_experts(stored: Stored, get: Fetch) -> dict[str, Tensor]:
    """The tensors of what is written for experts."""
    with get.present([module for module, _, _ in stored.parts]):
        if stored.whole is None:
            return stored.tensors()
        return _sparse_group(stored.name, stored.name, stored.whole, Fetch())[1]()


def _dense_group(stored: str, name: str, tensor: Tensor, get: Fetch) -> Group:
    size = tensor.numel() * tensor.element_size()
    return size, lambda: {stored: _on_cpu(get.dense(name, tensor))}


def _converted_groups(
    model: nn.Module,
    conversion: Conversion,
    dense: Mapping[str, Tensor],
    names: DiskNames,
    get: Fetch,
) -> list[Group]:
    """One group for each tensor of the files that a conversion makes; the conversion runs when the
    first of them is written, and its results are dropped with the last."""
    made: dict[str, Tensor] = {}

    def one(name: str) -> dict[str, Tensor]:
        if name not in made:
            result = conversion.run(model, lambda key: get.dense(key, dense[key]).detach())
            made.update((names.rename(key), tensor) for key, tensor in result.items())
        return {name: _on_cpu(made.pop(name))}

    return [
        (tensor.numel() * tensor.element_size(), lambda name=name: one(name))  # type: ignore[misc]
        for name, tensor in conversion.targets.items()
    ]


def _sparse_group(stored: str, name: str, module: SparseLinear, get: Fetch) -> Group:
    """The tensors of the compressed layer `name`, under its name in the files."""

    def make() -> dict[str, Tensor]:
        tensors = stored_tensors(get.sparse(name, module))
        return {join(stored, part): _on_cpu(tensor) for part, tensor in tensors.items()}

    return stored_bytes(module.weight.spec), make


def _config(
    model: nn.Module, sparse: Mapping[str, SparseLinear], dense: Mapping[str, Tensor]
) -> dict[str, Any]:
    """config.json of the model as a dict; {} for a module that has no Transformers config."""
    source: Any = getattr(model, "config", None)
    if not hasattr(source, "to_json_string"):
        return {}
    # The whole config: Transformers may write only what differs from its defaults, and leaves out
    # what another release has another default for.
    try:
        config: dict[str, Any] = json.loads(source.to_json_string())
    except (TypeError, ValueError) as error:
        remedy = "Take what is no text, number, list or dict out of model.config."
        text = message(SAVE_OP, "a model.config that JSON can hold", str(error), remedy)
        raise type(error)(text) from error
    for key in FILE_KEYS:
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    dtypes = [m.weight.dtype for m in sparse.values()]
    dtypes += [tensor.dtype for tensor in dense.values() if tensor.is_floating_point()]
    if dtypes:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(max(dict.fromkeys(dtypes), key=dtypes.count)).removeprefix("torch.")
    if _compressed_head(model, sparse):
        config["tie_word_embeddings"] = False
    return config


def _warn_lost_states(model: nn.Module) -> None:
    own = nn.Module.get_extra_state
    lost = [name for name, m in model.named_modules() if type(m).get_extra_state is not own]
    if lost:
        warnings.warn(
            f"{SAVE_OP}: safetensors files hold tensors alone, not what get_extra_state returns: "
            f"of {listed(lost)}. Save that with torch.save.",
            stacklevel=3,
        )


def _warn_lost_buffers(model: nn.Module, skeleton: nn.Module | None) -> None:
    if skeleton is None:
        return
    rebuilt = dict(skeleton.named_buffers())
    stored: Collection[str] = {
        join(name, key)
        for name, module in model.named_modules()
        for key, _, _ in own_tensors(module)
    }
    lost = [
        name
        for name, buffer in model.named_buffers()
        if name not in stored
        and name in rebuilt
        and not rebuilt[name].is_meta
        and not _same(buffer, rebuilt[name])
    ]
    if lost:
        warnings.warn(
            "sparsekern.save_pretrained: buffers that no file holds differ from what the config "
            f"gives, and the loaded model will use the config's: {listed(lost)}. Casting a whole "
            "model with .to(dtype) does this; cast when loading it instead (dtype=).",
            stacklevel=3,
        )


def _warn_unlike_config(
    model: nn.Module,
    skeleton: nn.Module | None,
    sparse: Iterable[str],
    dense: Mapping[str, Tensor],
) -> None:
    """Says where the model that config.json describes is another one."""
    left_out = False
    if skeleton is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        differs = f"it is a {type(model).__name__} of its own with the config of {kind!r}"
        if not isinstance(kind, str):
            return
    else:
        inside = tuple(f"{name}." for name in apart(model))
        own = {**dict.fromkeys(join(name, "weight") for name in sparse), **dense}
        built: dict[int, list[tuple[str, Tensor]]] = {}
        for name, module in skeleton.named_modules(remove_duplicate=False):
            for key, tensor, _ in own_tensors(module):
                built.setdefault(id(tensor), []).append((join(name, key), tensor))
        known = {name: tensor for group in built.values() for name, tensor in group}
        computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        missing = [
            group[0][0]
            for group in built.values()
            if not any(n in own or n in computed or n.startswith(inside) for n, _ in group)
        ]
        more = [name for name in own if name not in known and not name.startswith(inside)]
        shapes = [n for n, t in dense.items() if n in known and known[n].shape != t.shape]
        left_out = not missing and not shapes and dense.keys() >= {*more}
        kinds = {"lacks": missing, "has besides": more, "has in other shapes": shapes}
        differs = "; ".join(
            f"it {word} {listed(names, 4)}" for word, names in kinds.items() if names
        )
    if differs:
        then = "leaves that out" if left_out else "cannot load the folder"
        warnings.warn(
            f"{SAVE_OP}: the model is not the one that its config builds: {differs}. "
            f"from_pretrained {then}: correct model.config or merge adapters and "
            "save again, or load it with sparsekern.load_into into a model built like this one.",
            stacklevel=4,
        )


def _same(a: Tensor, b: object) -> bool:
    """Whether two tensors are one, or have the same contents."""
    if not isinstance(b, Tensor) or _identity(a) == _identity(b):
        return isinstance(b, Tensor)
    fits = a.dtype == b.dtype and a.shape == b.shape and a.layout == b.layout == torch.strided
    return fits and not (a.is_meta or b.is_meta) and torch.equal(a.cpu(), b.cpu())
