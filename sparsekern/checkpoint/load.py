"""Loading model folders: headers against the module tree, then module by module to the device.

    TensorFiles ──► plan.py: which tensor is whose ──► reader.py: one after the other ──► model

A dense copy of a compressed layer never exists, on any device: the tree is built without weights
(checkpoint/skeleton.py), and each of its Linears is replaced by a SparseLinear around tensors that
come straight from the file. Dense tensors come one at a time; where Transformers stores a parameter
in several tensors, those of one parameter (checkpoint/names.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsekern.checkpoint import arguments
from sparsekern.checkpoint.configs import generation_config, set_dtype, with_config
from sparsekern.checkpoint.plan import LOAD_OP, plan, untie
from sparsekern.checkpoint.reader import Reader, filled
from sparsekern.checkpoint.skeleton import build_from_dict, own_tensors, recompute_buffers
from sparsekern.errors import check
from sparsekern.formats.config_json import numbers_dtype, read_compression_config
from sparsekern.formats.disk import check_headers
from sparsekern.formats.forms import FLOATING, join
from sparsekern.nn.replace import replace_at
from sparsekern.nn.sparse_linear import check_before_loading
from sparsekern.nn.wrappers import named_modules, taken_off, whole
from sparsekern.utils.arguments import Given, Uses, checked, usable_device
from sparsekern.utils.safetensors_io import (
    CONFIG_FILE,
    OP,
    TensorFiles,
    listed,
    require,
    require_sums,
)

# Arguments of Transformers' from_pretrained that change nothing here: the values that say so.
FIXED: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (None, False),
    "use_safetensors": (None, True),
    "weights_only": (None, True),
    "quantization_config": (None,),
    "ignore_mismatched_sizes": (None, False),
    "output_loading_info": (None, False),
    "use_kernels": (None, False),
    "gguf_file": (None,),
    "tp_plan": (None,),
    "offload_folder": (None,),
    "low_cpu_mem_usage": (None, True, False),
    "state_dict": (None,),
    "from_tf": (None, False),
    "from_flax": (None, False),
    "load_in_8bit": (None, False),
    "load_in_4bit": (None, False),
    "generation_config": (None,),
    "adapter_kwargs": (None,),
    "proxies": (None,),
    "mirror": (None,),
    "resume_download": (None, True, False),
    "use_auth_token": (None,),
    "offload_state_dict": (None, True, False),
    "offload_buffers": (None, False),
    "tp_size": (None,),
    "device_mesh": (None,),
    "distributed_config": (None,),
    "_from_auto": (None, True, False),
    "_fast_init": (None, True, False),
}
M = TypeVar("M", bound=nn.Module)


def _from_hub(given: Given) -> bool:
    return not os.path.lexists(given.get("directory", ""))


def _infers(given: Given) -> bool:
    return isinstance(given["device_map"], str) and given["device_map"] in arguments.STRATEGIES


USES: Uses = {
    "device": ("device_map=None", lambda given: given["device_map"] is None),
    "max_memory": (f"device_map in {arguments.STRATEGIES}", _infers),
    "revision": ("the id of a model on the Hub, no folder,", _from_hub),
    "force_download": ("the id of a model on the Hub, no folder,", _from_hub),
}


@checked(LOAD_OP, uses=USES)
def from_pretrained(
    directory: str | os.PathLike[str],
    device: Any = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    attn_implementation: str | None = None,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | os.PathLike[str] = "",
    variant: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    verify: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a model, compressed (sparse-24-bitmask) or dense, as a Transformers model.

    Args:
        directory: folder with config.json and safetensors files, written by save_pretrained,
            compressed-tensors 0.14.0 or Transformers; or the id of a model on the Hub, from the
            local cache or else downloaded. No pickle is read and no code of the folder is run.
        device: where the weights go, tensor by tensor.
        dtype: cast floating-point weights to it; "auto" means config.json's; None keeps the dtype
            of each tensor in the file.
        attn_implementation: handed to Transformers ("sdpa", "eager", ...); None takes its
            default.
        device_map, max_memory: as in Transformers, instead of `device`; several devices need the
            package accelerate.
        revision, force_download: of a Hub id. cache_dir, token, local_files_only: likewise; for a
            folder there is nothing to fetch.
        subfolder, variant: of the model's files, as in Transformers.
        key_mapping: {regular expression: replacement} for names in the files.
        verify: check SHA256SUMS (where the folder has it) before anything is read, and refuse
            NaN and Inf in any tensor.
        config: a Transformers config, its dict or a path to it, in place of config.json's values.
        kwargs: attributes of the config to replace, as in Transformers; its other arguments only
            with the values that ask for nothing more.
    Returns:
        The Transformers model in eval mode; layers with compressed tensors are SparseLinear.
    Raises:
        FormatError: damaged or unsupported files (file and tensor named), missing tensors
            (listed), no such model.
        ImportError: no transformers; use load_into for a module of your own.
        TypeError, ValueError: an argument that is not supported; it is named.
    Warns:
        UserWarning: tensors in the files that the model has no place for.
    """
    if "torch_dtype" in kwargs:
        old = kwargs.pop("torch_dtype")
        got = f"dtype={dtype!r} and torch_dtype={old!r}"
        one = dtype is None or old is None or old == dtype
        check(one, LOAD_OP, "dtype or torch_dtype", got, "Leave torch_dtype, its old name, out.")
        dtype = old if dtype is None else dtype
    for name, allowed in FIXED.items():
        value = kwargs.pop(name, allowed[0])
        check(
            any(value is entry for entry in allowed),
            LOAD_OP,
            f"{name} {' or '.join(map(repr, allowed))}",
            repr(value)[:80],
            "Nothing else is supported.",
        )
    arguments.check_mapping(LOAD_OP, key_mapping)
    folder = arguments.find_folder(
        LOAD_OP,
        directory,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        force_download=force_download,
        subfolder=subfolder,
        variant=variant,
    )
    if verify:
        require_sums(folder)
    files = TensorFiles(folder, variant)
    raw, _ = read_compression_config(folder)
    cut = config is not None or bool(kwargs)
    raw = with_config(LOAD_OP, raw, config)
    wanted = arguments.parse_dtype(LOAD_OP, dtype, raw)
    if device_map is None:
        usable_device(LOAD_OP, device, "device")  # before anything is built
    with torch.device("cpu"):  # whatever torch's default device is
        model = build_from_dict(raw, files.info, attn_implementation, kwargs)
        device_of, spread = arguments.place(
            LOAD_OP, model, device, device_map, max_memory, files.nbytes
        )
        _load(model, files, device_of, wanted, key_mapping, raw, finite=verify, whole=True, cut=cut)
    config = model.config
    if wanted is not None:
        set_dtype(config, wanted)
    for known in (model, config):
        known.name_or_path = os.fspath(directory)  # type: ignore[union-attr, assignment]
    if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        model.generation_config = generation_config(folder)
    if spread is None:
        return model
    dispatched: nn.Module = arguments.accelerate(LOAD_OP).dispatch_model(model, device_map=spread)
    return dispatched


@checked("sparsekern.load_into")
@torch.inference_mode(False)  # whose tensors could not be trained
def load_into(
    model: M,
    directory: str | os.PathLike[str],
    *,
    device: Any = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = False,
) -> M:
    """Load a folder into an existing module in place; SparseLinear replaces compressed Linears.

    Args:
        model: module with the tree that was saved, around or inside of which torch.compile, data
            parallel or activation checkpointing may have wrappers. Parameters may be on the meta
            device; others stay the same objects, with other data and no gradient.
        directory: as in from_pretrained, a folder.
        device: None takes the model's (CPU for a model on meta). dtype, verify: as in
            from_pretrained.
    Returns:
        model.
    Raises:
        FormatError: as from_pretrained, and for tensors that the model has no place for; header
            errors leave the model untouched.
    """
    op = "sparsekern.load_into"
    check(isinstance(model, nn.Module), op, "an nn.Module", type(model).__name__, exc=TypeError)
    tree = whole(op, model)
    folder = arguments.folder_path(op, "the model", directory)
    if verify:
        require_sums(folder)
    files = TensorFiles(folder)
    config: Mapping[str, Any] = {}
    if os.path.lexists(folder / CONFIG_FILE):
        config, _ = read_compression_config(folder)
    if device is None:
        device = next((p.device for p in tree.parameters() if not p.is_meta), torch.device("cpu"))
    place = usable_device(op, device, "device")
    wanted = arguments.parse_dtype(op, dtype, config)
    empty = [
        join(name, key)
        for name, module in named_modules(tree)
        for key in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(key)) is not None and buffer.is_meta
    ]
    expected, got = "data in buffers that no file holds", f"{listed(empty)} on meta"
    check(not empty, op, expected, got, "Build the model outside of torch.device('meta').")
    with taken_off(tree):
        _load(tree, files, lambda name: place, wanted, None, config, finite=verify, whole=False)
    return model


def _load(
    model: nn.Module,
    files: TensorFiles,
    device_of: Callable[[str], torch.device],
    dtype: torch.dtype | None,
    key_mapping: Mapping[str, str] | None,
    config: Mapping[str, Any],
    *,
    finite: bool,
    whole: bool,
    cut: bool = False,
) -> None:
    """Check every name, shape and dtype against the module tree, then stream module by module."""
    layers = check_headers(files)
    require(
        "" not in layers,
        OP,
        "compressed layers inside a module",
        "the module itself is one",
        "Use SparseLinear.load_state_dict.",
    )
    found = plan(model, files, layers, key_mapping, whole=whole, cut=cut)
    if found.unexpected:
        warnings.warn(
            f"{LOAD_OP}: {len(found.unexpected)} tensors of {files.folder} have no place in "
            f"{type(model).__name__} and are left out: {listed(found.unexpected)}",
            stacklevel=3,
        )
    untie(model, found)
    reader = Reader(model, files, dtype, finite, numbers_dtype(config))
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            parents.setdefault(id(child), []).append((parent, attribute))

    # id(tensor on the tree) -> what replaced it, so that tied weights stay tied. The id of a tied
    # tensor cannot be reused meanwhile: its other names on the tree keep it alive.
    loaded: dict[int, Tensor] = {}
    for name in [name for name, _ in model.named_modules()]:  # replaced modules are freed at once
        module = model.get_submodule(name)
        device = device_of(name)
        if name in found.names.layers or name in found.names.experts.matrices:
            sparse = reader.layer(name, found, module, device)
            replace_at(parents[id(module)], module, sparse)
            continue
        for key, old, is_parameter in list(own_tensors(module)):
            if id(old) not in loaded:
                source = found.sources.get(id(old))
                if source is not None:
                    new = reader.dense(*source, device)
                else:
                    new = old if old.is_meta else old.to(device)
                loaded[id(old)] = filled(old, new) if is_parameter else new
            home: dict[str, Any] = module._parameters if is_parameter else module._buffers
            home[key] = loaded[id(old)]
        for key in module._non_persistent_buffers_set:
            buffer = module._buffers.get(key)
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    if found.computed:
        recompute_buffers(model, frozenset(found.computed))
        _finish_computed(model, found.computed, device_of, dtype or _usual_dtype(files))
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    require(
        not left,
        OP,
        "every tensor loaded",
        f"no data for {listed(left)}",
        "This model cannot be rebuilt from its config.",
    )
    if layers:
        check_before_loading(model)
    if found.names.used is not None:
        model._weight_conversions = found.names.used  # type: ignore[assignment]


def _finish_computed(
    model: nn.Module,
    names: Iterable[str],
    device_of: Callable[[str], torch.device],
    dtype: torch.dtype | None,
) -> None:
    """Device and dtype of tensors that were computed, on the CPU and in float32."""
    for name in names:
        module, _, key = name.rpartition(".")
        parent = model.get_submodule(module)
        parameter = parent._parameters.get(key)
        if parameter is not None:
            parameter.data = parameter.data.to(device_of(module), dtype)
        elif parent._buffers.get(key) is not None:
            buffer = parent._buffers[key]
            assert buffer is not None
            parent._buffers[key] = buffer.to(device_of(module))


def _usual_dtype(files: TensorFiles) -> torch.dtype | None:
    """The floating-point dtype of most tensors."""
    found = [info.dtype for info in files.info.values() if info.dtype in FLOATING]
    return max(dict.fromkeys(found), key=found.count) if found else None
