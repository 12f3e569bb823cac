"""Loading model folders: headers against the module tree, then module by module to the device.

A dense copy of a compressed layer never exists, on any device: the tree is built without weights
(checkpoint/skeleton.py), and each of its Linears is replaced by a SparseLinear around tensors that
come straight from the file. Dense tensors come one at a time; where Transformers stores a parameter
in several tensors, those of one parameter (checkpoint/names.py).
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsekern.checkpoint import arguments
from sparsekern.checkpoint.configs import generation_config, set_dtype, with_config
from sparsekern.checkpoint.experts import ExpertReader, check_columns
from sparsekern.checkpoint.names import Conversion, Names, match_names
from sparsekern.checkpoint.skeleton import (
    build_from_dict,
    linear_shape,
    own_tensors,
    recompute_buffers,
)
from sparsekern.errors import FormatError, check, message
from sparsekern.formats import dtypes
from sparsekern.formats.config_json import numbers_dtype, read_compression_config
from sparsekern.formats.disk import check_headers, read_sparse24
from sparsekern.formats.forms import (
    LEVEL_DTYPES,
    PLAIN,
    VALUE_DTYPES,
    form_of,
    join,
    parts_of,
    values_name,
)
from sparsekern.nn.replace import replace_at
from sparsekern.nn.sparse_experts import fuse_experts, unfuse_experts
from sparsekern.nn.sparse_linear import SparseLinear, check_before_loading
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

LOAD_OP = "sparsekern.from_pretrained"
FLOATING = (*VALUE_DTYPES, torch.float64)
# Buffers that old files hold and that models now compute, as Transformers' own loader has it.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
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


@dataclass
class Plan:
    """Where every tensor of a model comes from.

    names: the files' names in the model. sources: {id(tensor on the tree): (name in the model,
    name in the files or the Conversion that makes it)}. untied: names that the model ties and the
    files do not. computed: names that Transformers computes when a file lacks them.  unexpected:
    names in the files that the model has no place for.
    """

    names: Names
    sources: dict[int, tuple[str, str | Conversion]] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


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
    _untie(model, found)
    reader = _Reader(model, files, dtype, finite, numbers_dtype(config))
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
                loaded[id(old)] = _filled(old, new) if is_parameter else new
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


def _untie(model: nn.Module, found: Plan) -> None:
    """Give names that the files do not tie a parameter of their own, as Transformers does."""
    for name in found.untied:
        module, _, key = name.rpartition(".")
        parent = model.get_submodule(module)
        old = parent._parameters[key]
        assert old is not None
        own = nn.Parameter(torch.empty_like(old, device="meta"), old.requires_grad)
        parent._parameters[key] = own
        found.sources[id(own)] = (name, _source(found.names, name) or name)
    if found.untied:
        if hasattr(getattr(model, "config", None), "tie_word_embeddings"):
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        warnings.warn(
            f"{LOAD_OP}: config.json ties {listed(found.untied)} to other weights, and the files "
            "hold different ones: they are loaded untied.",
            stacklevel=4,
        )


class _Reader:
    """Reads tensors of a folder for a model, one at a time, in the dtype that was asked for."""

    def __init__(
        self,
        model: nn.Module,
        files: TensorFiles,
        dtype: torch.dtype | None,
        finite: bool,
        numbers: torch.dtype | None,
    ) -> None:
        self.model, self.files, self.dtype, self.finite = model, files, dtype, finite
        self.numbers = numbers  # dtype of quantised layers where none is asked for
        self.waiting: dict[str, Tensor] = {}  # converted with others, and not yet in the model
        self.precise = _precise(model, dtype)
        finite_check = functools.partial(require_finite, files) if finite else None
        self.experts = ExpertReader(files, dtype, numbers, finite_check)

    def read(self, name: str, device: torch.device) -> Tensor:
        tensor = self.files.read(name, device=device)[0]
        if self.finite:
            require_finite(self.files, name, tensor)
        return tensor

    def dense(self, name: str, source: str | Conversion, device: torch.device) -> Tensor:
        """The tensor `name` of the model."""
        if isinstance(source, str):
            tensor = self.read(source, device)
        else:
            if name not in self.waiting:
                self.waiting.update(self._converted(source, device))
            tensor = self.waiting.pop(name).to(device)
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # a part of what was converted would keep all of it
        return self.as_asked(name, tensor)

    def as_asked(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model in the dtype that was asked for."""
        if self.dtype is None or tensor.dtype not in FLOATING:
            return tensor
        keep = self.precise is not None and self.precise.search(name)
        return tensor.to(torch.float32 if keep else self.dtype)

    def _converted(self, source: Conversion, device: torch.device) -> dict[str, Tensor]:
        try:
            return source.run(self.model, lambda name: self.read(name, device))
        except FormatError:
            raise
        except Exception as error:
            raise FormatError(
                message(
                    f"{OP}: tensors {listed(name for _, name in source.sources)}",
                    f"what Transformers makes {source.first} of",
                    f"{type(error).__name__}: {error}",
                )
            ) from error

    def layer(self, name: str, found: Plan, module: nn.Module, device: torch.device) -> nn.Module:
        """SparseLinear for one compressed layer, or the linear layer of an expert; `module` is what
        stands in its place on the tree."""
        parts = found.names.experts.matrices.get(name)
        if parts is not None:
            trained = all(p.requires_grad for p in module.parameters())
            return self.experts.module(parts, device, trained)
        stored = found.names.layers[name]
        weight = read_sparse24(self.files, stored, device, self.dtype, self.numbers)
        if self.finite:
            require_finite(self.files, values_name(self.files, stored), weight.numbers())
        bias = getattr(module, "bias", None)
        if bias is not None:
            source = found.sources[id(bias)]
            bias = _filled(bias, self.dense(*source, device).to(weight.dtype))
        return SparseLinear.from_sparse24(weight, bias)


def _filled(parameter: Tensor, data: Tensor) -> Tensor:
    """The Parameter itself, which optimizers and DistributedDataParallel know, with other data; for
    one on meta, or made in inference mode, another."""
    if parameter.is_meta or parameter.is_inference():
        return nn.Parameter(data, requires_grad=parameter.requires_grad)
    parameter.data, parameter.grad = data, None
    return parameter


def _precise(model: nn.Module, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """Names of tensors that Transformers keeps in float32 when it casts a model to `dtype`."""
    names: set[str] = set()
    if dtype in dtypes.NATIVE:
        names.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names.update(getattr(model, "_keep_in_fp32_modules", None) or ())
    parts = (re.escape(name).replace(r"\*", r"\d+") for name in sorted(names))
    return re.compile("|".join(rf"(^|\.){part}($|\.)" for part in parts)) if names else None


def require_finite(files: TensorFiles, name: str, tensor: Tensor) -> None:
    """FormatError for NaN or Inf in a tensor that was read as `name`."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        return
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        first = [] if tensor.dim() == 0 else (~finite).nonzero()[0].tolist()
        require(
            False,
            files.where(name),
            "finite values",
            f"{int((~finite).sum())} NaN or Inf, first at {first}",
            "The file is damaged, or so was the model that was saved.",
        )


def plan(
    model: nn.Module,
    files: TensorFiles,
    layers: Mapping[str, tuple[int, int]],
    key_mapping: Mapping[str, str] | None = None,
    *,
    whole: bool = False,
    cut: bool = False,
) -> Plan:
    """Where every tensor of a module tree comes from; layers = check_headers(files).

    Args:
        whole: the model was built for the folder, as Transformers builds it: tensors without a
            place in it are listed in the Plan, and ties that the files do not have are undone.
            Otherwise both are errors.
        cut: by the config of a caller, who may want fewer blocks: compressed layers without a
            place are listed, too. Otherwise they are an error.
    Raises:
        FormatError: it lists what is missing, unexpected or misshapen.
    """
    parts = list(parts_of(files, layers))
    names = match_names(model, files.info, layers, parts, key_mapping)
    check_columns(files, layers, names.experts, names.known)
    made = unfuse_experts(model, names.experts.modules) if names.experts.modules else {}
    try:
        return _plan(model, files, layers, names, whole, cut)
    except BaseException:
        for old, new in made.values():
            fuse_experts(model, new, old)
        raise


def _plan(
    model: nn.Module,
    files: TensorFiles,
    layers: Mapping[str, tuple[int, int]],
    names: Names,
    whole: bool,
    cut: bool,
) -> Plan:
    """`plan`, once the experts that have compressed matrices are apart."""
    found = Plan(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = [*names.layers, *names.experts.matrices]
    replaced = {id(modules[name]) for name in inside if name in modules}
    for name, layer in names.layers.items():
        if cut and name not in modules:
            found.unexpected.append(layer)
        else:
            _check_layer(files, layer, name, modules.get(name), layers[layer])

    owners: dict[int, tuple[Tensor, list[str]]] = {}
    wanted: set[str] = set()
    ignored: set[str] = set()
    missing: list[str] = []
    layer_of: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in replaced:
            ignored.update(join(name, key) for key in module._non_persistent_buffers_set)
            own = [(key, tensor) for key, tensor, _ in own_tensors(module)]
        else:
            bias = getattr(module, "bias", None)
            own = [] if bias is None else [("bias", bias)]
            if name in names.layers:
                layer_of[join(name, "bias")] = names.layers[name]
        for key, tensor in own:
            owners.setdefault(id(tensor), (tensor, []))[1].append(join(name, key))
            wanted.add(join(name, key))

    optional = _patterns(model, "_keys_to_ignore_on_load_missing")
    for tensor, tied in owners.values():
        present = [name for name in tied if _source(names, name) is not None]
        for name in present or tied[:1]:
            if present:
                _check_dense(files, names, name, tensor, layer_of.get(name))
            elif any(pattern.search(name) for pattern in optional):
                found.computed += tied
            else:
                missing.append(name)
        if present:
            source = _source(names, present[0])
            assert source is not None
            found.sources[id(tensor)] = (present[0], source)
            found.untied += _untied(files, names, present, allowed=whole)

    extra = [*names.unexpected]
    extra += [stored for name, stored in names.plain.items() if name not in wanted]
    known = [*_patterns(model, "_keys_to_ignore_on_load_unexpected")]
    known += [re.compile(pattern) for pattern in COMPUTED] if whole else []
    extra = [n for n in extra if n not in ignored and not any(p.search(n) for p in known)]
    if whole:
        found.unexpected, extra = found.unexpected + extra, []
    problems = [
        f"{len(entries)} {kind} ({listed(entries)})"
        for kind, entries in (("missing", missing), ("unexpected", extra + found.unexpected))
        if entries and (missing or extra)
    ]
    require(
        not problems,
        f"{OP}: {files.folder}",
        "the tensors of the model",
        ", ".join(problems),
        "The folder belongs to another model or is incomplete.",
    )
    return found


def _patterns(model: nn.Module, attribute: str) -> list[re.Pattern[str]]:
    patterns: Iterable[str] = getattr(model, attribute, None) or ()
    return [re.compile(pattern) for pattern in patterns]


def _source(names: Names, name: str) -> str | Conversion | None:
    return names.plain.get(name) or names.converted.get(name)


def _check_layer(
    files: TensorFiles, layer: str, name: str, module: nn.Module | None, shape: tuple[int, int]
) -> None:
    """A compressed layer against the module that it is for."""
    expected = None if module is None else linear_shape(module)
    where = files.where(values_name(files, layer))
    require(
        expected is not None,
        where,
        f"a linear layer named '{name}' in the model",
        "none" if module is None else type(module).__name__,
        "The folder belongs to another model.",
    )
    assert expected is not None
    require(
        expected == shape,
        where,
        f"a layer of shape {list(expected)} as in the model",
        list(shape),
        "The folder belongs to another model.",
    )


def _check_dense(
    files: TensorFiles, names: Names, name: str, tensor: Tensor, layer: str | None
) -> None:
    """What the files have for one dense tensor against the tensor it is for. The bias of a
    compressed layer `layer` has the dtype of its values, which is what SparseLinear computes in.
    """
    if name in names.plain:
        stored = names.plain[name]
        where, shape, dtype = (
            files.where(stored),
            files.info[stored].shape,
            files.info[stored].dtype,
        )
    else:
        made = names.converted[name].targets[name]
        where = files.where(names.converted[name].sources[0][1])
        shape, dtype = tuple(made.shape), made.dtype
    require(
        shape == tuple(tensor.shape),
        where,
        f"shape {list(tensor.shape)} as in the model",
        list(shape),
        "The folder belongs to another model.",
    )
    allowed = FLOATING if tensor.dtype in FLOATING else (tensor.dtype,)
    remedy = ""
    if dtype in LEVEL_DTYPES:
        remedy = "Quantised dense weights are not read: export without --keep-quantized."
    require(dtype in allowed, where, f"dtype {' | '.join(map(str, allowed))}", dtype, remedy)
    if layer is not None and form_of(files, layer) is PLAIN:
        expected = files.info[join(layer, "compressed")].dtype
        require(dtype == expected, where, f"dtype {expected} as {layer}.compressed", dtype)


def _untied(files: TensorFiles, names: Names, tied: Collection[str], *, allowed: bool) -> list[str]:
    """Names that the model ties may each be in the files, but then with the same contents; the
    ones with other contents are returned, or an error where that is not `allowed`.
    """
    stored = [names.plain[name] for name in tied if name in names.plain]
    if len(stored) < 2:
        return []
    first = files.read(stored[0])[0]
    other = {name for name in stored[1:] if not torch.equal(first, files.read(name)[0])}
    require(
        allowed or not other,
        files.where(stored[0]),
        f"the contents of {listed(stored[1:])}, which the model ties to it",
        "different contents",
        "Set tie_word_embeddings to false in config.json if the model does not tie them.",
    )
    return [name for name in tied if names.plain.get(name) in other]
