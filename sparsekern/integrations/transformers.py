"""Transformers' own load and save functions on pruned models.

    import sparsekern
    model = AutoModelForCausalLM.from_pretrained(DIR)   # the 2:4 model
    model.save_pretrained(OTHER)                        # the folder that sparsekern writes

Loading goes through Transformers' extension points for quantizers (`register_quantization_config`,
`register_quantizer`) under the quant_method "sparsekern": Transformers loads every dense tensor,
and compressed layers come from the files without ever being dense. Without this package the same
call ends with an error that names it (formats/disk.py, UNREADABLE_WITHOUT_US).

There is no extension point that sees a model which was pruned after loading, so
`PreTrainedModel.save_pretrained`, which Trainer calls too, is wrapped: models without a
SparseLinear pass through unchanged. `import sparsekern` imports nothing of Transformers; it
registers at once where Transformers is there already, and otherwise when
`transformers.modeling_utils` is imported.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import re
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sparsekern.checkpoint.decompress import decompress_model
from sparsekern.checkpoint.experts import ExpertReader, Part, check_columns
from sparsekern.checkpoint.names import match_names
from sparsekern.checkpoint.save import save_pretrained
from sparsekern.checkpoint.skeleton import linear_shape
from sparsekern.errors import check
from sparsekern.formats.disk import (
    ALL_PARTS,
    METHOD,
    check_headers,
    numbers_dtype,
    parts_of,
    read_compression_config,
    read_sparse24,
    storage_of,
    values_name,
)
from sparsekern.formats.dtypes import ElementType, element
from sparsekern.integrations import attention
from sparsekern.nn.sparse_experts import unfuse_experts
from sparsekern.nn.sparse_linear import SparseLinear, check_before_loading
from sparsekern.utils.safetensors_io import TensorFiles, require

OP = "sparsekern.integrations.transformers"
WATCHED = "transformers.modeling_utils"
PART_NAMES = rf"(^|\.)({'|'.join(ALL_PARTS)})$"

_lock = threading.RLock()
_registered = False


class WaitingLayer(nn.Module):
    """Stands for a compressed layer, or for a matrix of an expert beside compressed ones, while
    Transformers loads the dense tensors.

    It has the bias, which Transformers fills, and the sizes of what is to come, which device_map
    counts; both buffers are kept out of state dicts.
    """

    def __init__(self, module: nn.Module, kind: ElementType) -> None:
        super().__init__()
        shape = linear_shape(module)
        assert shape is not None
        self.size = shape
        rows, columns = shape
        # For code that initialises a model's own kind of layer by their sizes.
        self.out_features = self.nf = rows
        self.in_features = self.nx = columns
        values = torch.empty(rows, kind.columns(columns), dtype=kind.storage, device="meta")
        metadata = torch.empty(rows, (columns + 7) // 8, dtype=torch.uint8, device="meta")
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("metadata", metadata, persistent=False)
        self.bias = getattr(module, "bias", None)

    @property
    def weight(self) -> torch.Tensor:
        """For code that initialises weights: a tensor without data that counts as initialised."""
        weight = torch.empty(self.size, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight


def register() -> None:
    """Make Transformers read and write folders with compressed layers; once for a process.

    Raises:
        ImportError: no transformers, or one without `register_quantizer`.
    """
    global _registered
    with _lock:
        if _registered:
            return
        from transformers import PreTrainedModel
        from transformers.quantizers import (  # type: ignore[attr-defined]
            HfQuantizer,
            register_quantization_config,
            register_quantizer,
        )
        from transformers.utils.quantization_config import QuantizationConfigMixin

        class SparsekernConfig(QuantizationConfigMixin):
            """The quantization_config entry of a folder, as it is."""

            quant_method: Any

            def __init__(self, **entry: Any) -> None:
                self.quant_method = METHOD
                self.entry = {**entry, "quant_method": METHOD}

            @classmethod
            def from_dict(
                cls,
                config_dict: Mapping[str, Any],
                return_unused_kwargs: bool = False,
                **kwargs: Any,
            ) -> Any:
                config = cls(**config_dict)
                return (config, kwargs) if return_unused_kwargs else config

            def to_dict(self) -> dict[str, Any]:
                return dict(self.entry)

            def to_diff_dict(self) -> dict[str, Any]:
                return self.to_dict()

        class SparsekernQuantizer(_Quantizer, HfQuantizer):
            """_Quantizer with Transformers' defaults behind it."""

        register_quantization_config(METHOD)(SparsekernConfig)
        register_quantizer(METHOD)(SparsekernQuantizer)
        attention.register()
        _wrap_save(PreTrainedModel)
        _registered = True


class _Quantizer:
    """What Transformers asks a quantizer while it loads a folder with compressed layers."""

    requires_calibration = True  # in Transformers' words: only folders that are compressed already
    requires_parameters_quantization = False
    required_packages: list[str] = []
    is_trainable = True  # what is dense
    is_qat_trainable = True
    is_compileable = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        places = kwargs.get("device_map")
        on_disk = isinstance(places, Mapping) and "disk" in places.values()
        check(not on_disk, OP, "device_map without 'disk'", "disk", "Use the CPU.")

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def update_dtype(self, dtype: Any) -> Any:
        if isinstance(dtype, torch.dtype):
            self.dtype = dtype
        return dtype

    # Transformers' releases differ in which of these they call; each is called before the weights
    # are looked for, under the name that config.json gives.
    def update_attn_implementation(self, config: Any) -> Any:
        return _readable(config)

    def update_tp_plan(self, config: Any) -> Any:
        return _readable(config)

    def update_ep_plan(self, config: Any) -> Any:
        return _readable(config)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        require(
            checkpoint_files,
            OP,
            "a folder of safetensors files",
            "a state_dict",
            "Use load_state_dict on a model that has SparseLinear layers.",
        )
        assert checkpoint_files
        folder = os.path.dirname(checkpoint_files[0])
        self.files = TensorFiles(folder)
        config, _ = read_compression_config(self.files.folder)
        self.numbers = numbers_dtype(config)
        layers = check_headers(self.files)
        parts = list(parts_of(self.files, layers))
        names = match_names(model, self.files.info, layers, parts)
        modules = dict(model.named_modules())
        self.waiting: dict[str, str | list[Part]] = {}
        for name, layer in names.layers.items():
            if name not in modules:
                continue  # of a head that this class of model lacks; Transformers lists it
            values = values_name(self.files, layer)
            where = self.files.where(values)
            expected = linear_shape(modules[name])
            require(
                expected == layers[layer],
                where,
                f"a linear layer of shape {list(layers[layer])} as '{name}'",
                expected or type(modules[name]).__name__,
                "The folder belongs to another model.",
            )
            kind = element(storage_of(self.files, layer) or self.files.info[values].dtype)
            _replace(model, modules[name], WaitingLayer(modules[name], kind))
            self.waiting[name] = layer
        check_columns(self.files, layers, names.experts, names.known)
        unfuse_experts(model, names.experts.modules)
        for name, expert_parts in names.experts.matrices.items():
            first = expert_parts[0]
            coded = storage_of(self.files, first.name) if first.compressed else None
            stored = values_name(self.files, first.name) if first.compressed else first.name
            kind = element(coded or self.files.info[stored].dtype)
            above, _, key = name.rpartition(".")
            home = model.get_submodule(above)
            home._modules[key] = WaitingLayer(home.get_submodule(key), kind)
            self.waiting[name] = expert_parts
        dense = {part.name for found in names.experts.matrices.values() for part in found}
        fused = {re.escape(place.name) for place in names.known.values()}
        model._keys_to_ignore_on_load_unexpected = {  # type: ignore[assignment]
            *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
            PART_NAMES,
            *(rf"^{re.escape(name)}$" for name in dense if name in self.files.info),
            *(rf"^{name}$" for name in fused),
        }
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
        dtype = getattr(self, "dtype", None) or getattr(model, "dtype", None)
        experts = ExpertReader(self.files, dtype, self.numbers)
        for name, layer in self.waiting.items():
            waiting: Any = model.get_submodule(name)
            device = waiting.values.device
            device = torch.device("cpu") if device.type == "meta" else device
            if isinstance(layer, list):
                above, _, key = name.rpartition(".")
                model.get_submodule(above)._modules[key] = experts.module(layer, device).train(
                    waiting.training
                )
                continue
            weight = read_sparse24(self.files, layer, device, dtype, self.numbers)
            bias = (
                waiting.bias
                if waiting.bias is None
                else nn.Parameter(
                    waiting.bias.detach().to(device=device, dtype=weight.dtype),
                    waiting.bias.requires_grad,
                )
            )
            sparse = SparseLinear.from_sparse24(weight, bias)
            _replace(model, waiting, sparse.train(waiting.training))
        check_before_loading(model)
        return model

    def _dequantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """What model.dequantize() calls."""
        return decompress_model(model)


def _readable(config: Any) -> Any:
    if getattr(config, "transformers_weights", None) is not None:
        config.transformers_weights = None
    return config


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new


def _wrap_save(cls: Any) -> None:
    original = cls.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        if adapters_only or not any(isinstance(m, SparseLinear) for m in self.modules()):
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        asked = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
        return save_pretrained(asked.pop("self"), asked.pop("save_directory"), **asked)

    cls.save_pretrained = wrapped


# ---- when Transformers comes after sparsekern ---------------------------------------------------


class _Loader(importlib.abc.Loader):
    """Runs a module's own loader, then `register`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _try_register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds WATCHED through the other finders; knows nothing else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != WATCHED:
            return None
        for finder in sys.meta_path:
            found = None if finder is self else finder.find_spec(name, path, target)
            if found is not None and found.loader is not None:
                found.loader = _Loader(found.loader)
                return found
        return None


def _try_register() -> None:
    try:
        register()
    except Exception as error:  # a Transformers too old or too new must still be importable
        warnings.warn(
            f"{OP}: this Transformers cannot load or save pruned models by itself ({error}). "
            "Use sparsekern.from_pretrained and sparsekern.save_pretrained.",
            stacklevel=2,
        )


def register_when_imported() -> None:
    """`register` now where Transformers' models are imported already, else when they are."""
    module = sys.modules.get(WATCHED)
    if module is not None and hasattr(module, "PreTrainedModel"):
        _try_register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
