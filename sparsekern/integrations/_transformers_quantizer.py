"""The classes behind transformers.py, where pickle and copy.deepcopy of a loaded model find them;
importing this file imports Transformers."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsekern.checkpoint.decompress import decompress_model
from sparsekern.checkpoint.experts import ExpertReader, Part, check_columns
from sparsekern.checkpoint.names import match_names
from sparsekern.checkpoint.skeleton import linear_shape
from sparsekern.errors import check
from sparsekern.formats.config_json import METHOD, numbers_dtype, read_compression_config
from sparsekern.formats.disk import check_headers, read_sparse24
from sparsekern.formats.dtypes import ElementType, element
from sparsekern.formats.forms import ALL_PARTS, join, parts_of, storage_of, values_name
from sparsekern.nn.sparse_experts import unfuse_experts
from sparsekern.nn.sparse_linear import SparseLinear, check_before_loading
from sparsekern.utils.safetensors_io import TensorFiles, listed, require, variant_of

OP = "sparsekern.integrations.transformers"
PART_NAMES = rf"(^|\.)({'|'.join(ALL_PARTS)})$"


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
        weight = torch.empty(self.size, device="meta", dtype=torch.get_default_dtype())
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight


class SparsekernConfig(QuantizationConfigMixin):  # type: ignore[misc]
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


class SparsekernQuantizer(HfQuantizer):  # type: ignore[misc]
    """What Transformers asks a quantizer while it loads a folder with compressed layers."""

    requires_calibration = True  # in Transformers' words: only folders that are compressed already
    requires_parameters_quantization = False
    required_packages: list[str] = []
    is_trainable = True  # what is dense
    is_qat_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        remedy = "Load it without quantization_config=, then call sparsekern.prune_model(model)."
        expected, got = "quantization_config of a folder with 2:4 weights", "one for dense weights"
        check(kwargs.get("pre_quantized", True), OP, expected, got, remedy)
        super().__init__(quantization_config, **kwargs)

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
        self.files = TensorFiles(folder, variant_of(checkpoint_files))
        config, _ = read_compression_config(self.files.folder)
        self.numbers = numbers_dtype(config)
        layers = check_headers(self.files)
        parts = list(parts_of(self.files, layers))
        names = match_names(model, self.files.info, layers, parts)
        modules = dict(model.named_modules())
        self.waiting: dict[str, str | list[Part]] = {}
        lost = [layer for name, layer in names.layers.items() if name not in modules]
        require(
            not lost or len(lost) < len(layers),
            f"{OP}: {folder}",
            f"compressed layers under the names of {type(model).__name__}",
            listed(lost, 4),
            "The folder belongs to another model, or use sparsekern.from_pretrained(key_mapping=).",
        )
        if lost:  # of a head, or of blocks; Transformers lists dense tensors alone
            warnings.warn(
                f"{OP}: {len(lost)} compressed layers of {folder} have no place in "
                f"{type(model).__name__} and are left out: {listed(lost)}",
                stacklevel=2,
            )
        for name, layer in names.layers.items():
            if name not in modules:
                continue
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
        self._untie_head(model, names.layers)
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

    def _untie_head(self, model: Any, compressed: Collection[str]) -> None:
        """A compressed layer has a weight of its own, whatever a config says of ties."""
        ties = getattr(model, "all_tied_weights_keys", None) or {}
        untied = [name for name in compressed if ties.pop(join(name, "weight"), None) is not None]
        if untied:
            model.config.tie_word_embeddings = False
            warnings.warn(
                f"{OP}: the config ties {listed(untied)} to other weights, and "
                f"{self.files.folder} holds 2:4 ones: they are loaded untied.",
                stacklevel=2,
            )

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
        del self.files, self.waiting  # of files that stay open; the model keeps its quantizer
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
