"""Models without weights: built from a config.json with every parameter on the meta device and
every buffer real.

A checkpoint loader needs the module tree before it has a single weight. Parameters cost nothing
on the meta device, but buffers that are not in any file (rotary frequencies, position tables,
embedding scales) must come out of the constructors with their true values; building everything on
meta would leave them empty and every model family would need its own repair.

Nothing here changes the process: what redirects parameters is a registration hook that acts only
in a thread that is building, and a TorchFunctionMode, which torch keeps per thread. Both also
count what the constructor asks for, so that a config.json from elsewhere cannot make it allocate or
build more than the files could fill. Transformers is imported when a model is asked for, not
before; nothing of the folder is executed and nothing is fetched.

By hand: accelerate's init_empty_weights puts buffers on meta or real parameters in memory, and
bounds nothing.
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sparsekern.errors import FormatError, check, message
from sparsekern.formats.config_json import FILE_KEYS
from sparsekern.nn.replace import is_conv1d
from sparsekern.utils.safetensors_io import CONFIG_FILE, OP, TensorInfo, read_json, require

ANY_FOLDER = 2**24  # no integer of a config is refused below this, whatever the files hold
SPARE_BYTES = 2**28  # of real memory that a constructor may always take
SPARE_MODULES = 2_000
# Keys that name code or files outside the folder; the model is built without them.
FOREIGN_KEYS = ("auto_map", "custom_pipelines", "kernel_config", "fusion_config")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's prefixes for names that it fetches


class UnknownWord(TypeError):
    """An argument that is neither ours nor an attribute of the config."""


class _Building(threading.local):
    """What the current thread is building, None outside `meta_parameters`."""

    budget: _Budget | None = None


class _Budget:
    """Counts modules and bytes of real tensors; FormatError when a limit is passed."""

    def __init__(self, nbytes: float, modules: float) -> None:
        self.nbytes, self.modules = nbytes, modules
        self.used_bytes = self.used_modules = 0

    def module(self) -> None:
        self.used_modules += 1
        if self.used_modules > self.modules:
            self._refuse(f"modules to fit the tensors in the folder (<= {self.modules:.0f})")

    def tensor(self, nbytes: int) -> None:
        self.used_bytes += nbytes
        if self.used_bytes > self.nbytes:
            self._refuse(f"buffers to fit the files (<= {self.nbytes:.0f} bytes)")

    def _refuse(self, expected: str) -> None:
        remedy = "The config is damaged or belongs to another model."
        raise FormatError(message(f"{OP}: {CONFIG_FILE}", expected, "more", remedy))


_building = _Building()
_building_lock = threading.RLock()  # constructors of Transformers patch torch.nn.init meanwhile


def _on_parameter(module: nn.Module, name: str, param: Any) -> Any:
    if _building.budget is None:
        return None
    if param is None or param.is_meta:
        return None
    with torch._C.DisableTorchFunction():  # this one is no allocation
        return nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)


def _on_module(module: nn.Module, name: str, submodule: Any) -> Any:
    if _building.budget is not None:
        _building.budget.module()
    return None


# For good, once: torch iterates over these hooks in every thread.
torch_module.register_module_parameter_registration_hook(_on_parameter)
torch_module.register_module_module_registration_hook(_on_module)


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty without a device allocates on meta: what layers use for weights, and what
    nothing uses for real data. What other functions are about to allocate is counted first.
    """

    def __init__(self, budget: _Budget) -> None:
        super().__init__()
        self.budget = budget

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
            return func(*args, **kwargs)
        counted = self.budget.nbytes != float("inf")
        if counted and getattr(func, "__name__", "") not in (
            "__get__",
            "__set__",
            "detach",
            "requires_grad_",
        ):
            self.budget.tensor(_new_bytes(func, args, kwargs))
        return func(*args, **kwargs)


_FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "arange eye full linspace logspace ones rand randint randn randperm range tril_indices "
        "triu_indices zeros"
    ).split()
)


def _new_bytes(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """Bytes of real memory that a call would allocate, found by calling it on meta; 0 where that
    does not say."""
    leaves = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    if func not in _FACTORIES and (not leaves or all(leaf.is_meta for leaf in leaves)):
        return 0
    meta_args, meta_kwargs = tree_map(
        lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, dict(kwargs))
    )
    if func in _FACTORIES:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            return 0
        meta_kwargs["device"] = "meta"
    try:
        with torch._C.DisableTorchFunction():
            made = func(*meta_args, **meta_kwargs)
    except Exception:  # an op without a meta form, or wrong arguments, which the call will report
        return 0
    inputs = {id(leaf) for leaf in tree_leaves((meta_args, meta_kwargs))}
    made = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.is_meta]
    return sum(
        t.numel() * t.element_size() for t in made if id(t) not in inputs and not t._is_view()
    )


@contextlib.contextmanager
def meta_parameters(nbytes: float = float("inf"), modules: float = float("inf")) -> Iterator[None]:
    """Context in which this thread builds modules with parameters on meta and real buffers; other
    threads are not affected.

    Args:
        nbytes: of real tensors that may be made inside. modules: that may be registered inside.
    Raises:
        FormatError: from inside, as soon as one of the limits is passed.
    """
    with _building_lock:
        before, _building.budget = _building.budget, _Budget(nbytes, modules)
        try:
            with _EmptyOnMeta(_building.budget):
                yield
        finally:
            _building.budget = before


def import_transformers(why: str) -> ModuleType:
    """The transformers module, or ImportError that says what needs it and how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            message(
                OP,
                f"the package transformers {why}",
                "an environment without it",
                "pip install 'sparsekern[hf]', or use load_into for a model of your own.",
            )
        ) from error
    module: ModuleType = transformers
    return module


def skeleton_of(model: nn.Module, untied: bool = False) -> nn.Module | None:
    """A copy of a Transformers model's tree as its config builds it, without weights; None for
    other modules.

    Args:
        untied: with tie_word_embeddings set to false.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string") or not hasattr(type(model), "config_class"):
        return None
    config = copy.deepcopy(config)
    if untied:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    with torch.device("cpu"), meta_parameters():  # whatever torch's default device is
        return type(model)(config)


def build_skeleton(
    folder: Path,
    info: Mapping[str, TensorInfo],
    attn_implementation: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model that folder/config.json describes, without weights (parameters on meta, buffers
    on the CPU), in eval mode.

    Args:
        folder: of the checkpoint.
        info: {tensor name: TensorInfo}; bounds what the config may ask for.
        attn_implementation: passed to Transformers; None takes its default.
        overrides: attributes of the config to replace, as from_pretrained of Transformers does.
    Raises:
        FormatError: no usable config.json. ImportError: no transformers.
    """
    raw = read_json(folder / CONFIG_FILE)
    return build_from_dict(raw, info, attn_implementation, overrides)


def build_from_dict(
    raw: dict[str, Any],
    info: Mapping[str, TensorInfo],
    attn_implementation: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> nn.Module:
    """build_skeleton for a config that has been read."""
    transformers = import_transformers("to build the model from its config.json")
    where = f"{OP}: {CONFIG_FILE}"
    require(
        isinstance(raw.get("model_type"), str),
        where,
        "a Transformers config with 'model_type'",
        repr(raw.get("model_type")),
        "Use load_into(model, folder) for a plain module.",
    )
    nbytes = sum(entry.nbytes for entry in info.values())
    raw = checked_config(raw, nbytes)
    if attn_implementation is not None:
        _check_attention("attn_implementation", attn_implementation)
    require(
        raw["model_type"] in transformers.CONFIG_MAPPING,
        where,
        "a model_type that Transformers knows",
        repr(raw["model_type"]),
        f"Transformers {transformers.__version__} is installed; code of the folder is never run.",
    )
    try:
        with meta_parameters(4 * nbytes + SPARE_BYTES, 16 * len(info) + SPARE_MODULES):
            config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
            for key, value in (overrides or {}).items():
                check(
                    hasattr(config, key),
                    "sparsekern.from_pretrained",
                    f"arguments of from_pretrained or attributes of {type(config).__name__}",
                    repr(key),
                    exc=UnknownWord,
                )
                setattr(config, key, value)
            if attn_implementation is not None:
                config._attn_implementation = attn_implementation
            model = _model_class(transformers, config)(config)
        recompute_buffers(model)
    except (ImportError, FormatError, UnknownWord):
        raise
    except Exception as error:  # whatever a constructor makes of nonsense becomes one error
        raise FormatError(
            message(
                where,
                "a config that Transformers can build",
                f"{type(error).__name__}: {error}",
                "",
            )
        ) from error
    return model.eval()  # type: ignore[no-any-return]


def checked_config(raw: dict[str, Any], nbytes: int) -> dict[str, Any]:
    """A copy of a config without what is about the files or leads out of the folder.

    Raises:
        FormatError: an integer, under any key and at any depth, that no model in `nbytes` bytes of
            files can mean; an attention implementation or backbone that would be fetched.
    """
    config = json.loads(json.dumps(raw))
    limit = max(nbytes, ANY_FOLDER)

    def walk(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name in (*FOREIGN_KEYS, *(FILE_KEYS if value is config else FILE_KEYS[:2])):
                value.pop(name, None)
            if value.get("use_pretrained_backbone"):
                value["use_pretrained_backbone"] = False  # its weights are in the files
            for name in [name for name in value if name.lstrip("_").startswith(_IMPLEMENTATIONS)]:
                _check_attention(name, value.pop(name))  # a choice of the caller, not of the files
            for name, item in value.items():
                walk(name, item)
        elif isinstance(value, list):
            for item in value:
                walk(key, item)
        elif isinstance(value, int):
            require(
                value <= limit or "theta" in key,
                f"{OP}: {CONFIG_FILE}",
                f"{key} to fit the tensors in the folder (<= {limit})",
                value if value < 10**30 else "a larger number",
                "The config belongs to another model.",
            )
        elif isinstance(value, str):
            require(
                not value.lower().startswith(_REMOTE),
                f"{OP}: {CONFIG_FILE}",
                f"{key} to name something in Transformers",
                repr(value[:80]),
                "Nothing is fetched for a model.",
            )

    walk("config", config)
    return _special_floats(config)  # type: ignore[no-any-return]


def _special_floats(value: Any) -> Any:
    """The value with what Transformers writes for inf and nan, {"__float__": "Infinity"}, as a
    float."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("NaN", "Infinity", "-Infinity"):
            return float(value["__float__"])
        return {key: _special_floats(item) for key, item in value.items()}
    return [_special_floats(item) for item in value] if isinstance(value, list) else value


def _check_attention(key: str, value: Any) -> None:
    for name in tree_leaves(value):
        require(
            not isinstance(name, str) or not any(c in name for c in "/\\:@"),
            f"{OP}: {key}",
            "an implementation that Transformers brings, such as 'sdpa' or 'eager'",
            repr(name)[:80],
            "Kernels of a repository are code from elsewhere and are never fetched.",
        )


@torch.no_grad()
def recompute_buffers(model: nn.Module, names: frozenset[str] = frozenset()) -> None:
    """Fill tensors of a Transformers model that no file holds and that its constructor leaves
    empty, the way its own loader does: `_init_weights` of the module that owns them.

    Args:
        names: parameters and buffers besides the non-persistent buffers that are on meta.
    """
    owners: dict[int, nn.Module] = {}
    for prefix, module in model.named_modules():
        if hasattr(module, "_init_weights"):
            owners.update((id(m), module) for m in module.modules())
        empty = [
            key
            for key in module._non_persistent_buffers_set
            if (buffer := module._buffers.get(key)) is not None and buffer.is_meta
        ]
        for key in empty:
            module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")
        for key, parameter in list(module._parameters.items()):
            name = f"{prefix}.{key}" if prefix else key
            if name in names and parameter is not None and parameter.is_meta:
                real = torch.empty_like(parameter, device="cpu")
                module._parameters[key] = nn.Parameter(real, parameter.requires_grad)
                empty.append(key)
        if empty and id(module) in owners:
            owners[id(module)]._init_weights(module)  # type: ignore[operator]


def _model_class(transformers: ModuleType, config: Any) -> Any:
    """The class named by config 'architectures' where it is a Transformers model, else what the
    first of Transformers' auto classes that knows the config gives.
    """
    for name in config.architectures or ():
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    for auto in ("CausalLM", "Seq2SeqLM", "ImageTextToText", "SpeechSeq2Seq", "MaskedLM", ""):
        kind = getattr(transformers, f"AutoModelFor{auto}" if auto else "AutoModel", None)
        if kind is not None and type(config) in kind._model_mapping:
            found = kind._model_mapping[type(config)]
            return found[0] if isinstance(found, (list, tuple)) else found
    raise FormatError(
        message(
            f"{OP}: {CONFIG_FILE}",
            "'architectures' to name a model of Transformers",
            repr(config.architectures),
        )
    )


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a module that a compressed layer can stand for, else None."""
    from sparsekern.nn.sparse_linear import SparseLinear

    if is_conv1d(module):
        weight: Any = module.weight
        return weight.shape[1], weight.shape[0]
    if isinstance(module, (nn.Linear, SparseLinear)):
        return module.out_features, module.in_features
    return None


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, is_parameter) of a module's parameters and persistent buffers, children
    excluded.
    """
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, True
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer, False
