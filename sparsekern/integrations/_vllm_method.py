"""The classes behind vllm.py; importing this file imports vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
)
from vllm.model_executor.utils import set_weight_attrs

from sparsekern.backends.quantize_rows import quantize_torch
from sparsekern.errors import FormatError, message
from sparsekern.formats import dtypes
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.sparse24 import Sparse24, metadata_of_bitmask
from sparsekern.integrations import vllm_rules as plugin
from sparsekern.nn.sparse_linear import SparseLinear

_OP = "sparsekern.vllm"


def register() -> None:
    """Idempotent: vLLM may load its plugins more than once."""
    register_quantization_config(plugin.NAME)(SparseKernConfig)


class SparseKernConfig(QuantizationConfig):
    """What is known of the 2:4 layers of a folder: first by their names on disk, then, after
    apply_vllm_mapper, by those of vLLM's model."""

    def __init__(self, layers: plugin.Layers) -> None:
        super().__init__()
        self.layers = layers

    def get_name(self) -> str:
        return plugin.NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(dtypes.NATIVE)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseKernConfig:
        entry = plugin.sparsity_entry(config)
        why = str(config)[:120] if entry is None else plugin.unreadable(config)
        if entry is None or why is not None:
            expected = f"a quantization_config of format {plugin.FORMAT}"
            expected += ", weights of 16 bits or of 8 with a scale per channel"
            raise FormatError(message(_OP, expected, str(why)))
        return cls(plugin.Layers(dense=list(entry.get("ignore") or [])))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Folders in compressed-tensors' sparse-24-bitmask, which vLLM no longer reads."""
        ours = plugin.sparsity_entry(hf_quant_cfg) is not None
        return plugin.NAME if ours and plugin.unreadable(hf_quant_cfg) is None else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """The files of a local folder know better than its config.json."""
        self.layers.sparse = plugin.sparse_layers(model_name)
        self.layers.coded = plugin.coded_layers(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        layers = self.layers
        layers.dense = hf_to_vllm_mapper.apply_list(layers.dense)
        if layers.sparse is not None:
            layers.sparse = hf_to_vllm_mapper.apply_list(layers.sparse)
            layers.coded = hf_to_vllm_mapper.apply_dict(layers.coded)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            if self.layers.runs_sparse(prefix, self.packed_modules_mapping):
                storage = self.layers.storage(prefix, self.packed_modules_mapping)
                return SparseKernLinearMethod(prefix, storage)
            return UnquantizedLinearMethod()
        if any("FusedMoE" in kind.__name__ for kind in type(layer).__mro__):
            plugin.refuse_experts(prefix, plugin.has_sparse_experts(self.layers, prefix))
        if isinstance(layer, ParallelLMHead) and prefix in (self.layers.sparse or ()):
            raise NotImplementedError(
                message(
                    _OP,
                    f"a dense {prefix}",
                    "a 2:4 one, whose rows vLLM pads and splits in its own way",
                    'Prune with skip=("lm_head",), the default.',
                )
            )
        return None


class _Shape(BasevLLMParameter):
    """Takes the `shape` tensors of a layer and checks them; holds nothing."""

    prefix: str
    in_features: int

    def _look(self, loaded_weight: Tensor, **_: Any) -> None:
        plugin.check_shape(self.prefix, loaded_weight, self.in_features)

    load_column_parallel_weight = _look
    load_row_parallel_weight = _look
    load_merged_column_weight = _look
    load_qkv_weight = _look


@register_weight_loader_v2_supported_method
class SparseKernLinearMethod(LinearMethodBase):
    """A linear layer of vLLM with a 2:4 weight; q/k/v and gate/up are one weight.

    storage: name of the element type of quantised values; None for those of the model's dtype.
    """

    def __init__(self, prefix: str, storage: str | None = None) -> None:
        self.prefix, self.storage = prefix, storage

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        loader = extra_weight_attrs.pop("weight_loader")
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        plugin.check_columns(self.prefix, input_size, columns)
        stored = params_dtype if self.storage is None else dtypes.element(self.storage).storage
        values = torch.empty(rows, columns // 2, dtype=stored)
        bitmask = torch.empty(rows, -(-columns // 8), dtype=torch.uint8)
        for name, data in (("compressed", values), ("bitmask", bitmask)):
            parameter = ModelWeightParameter(
                data=data, input_dim=1, output_dim=0, weight_loader=loader
            )
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, extra_weight_attrs)
        if self.storage is not None:
            scale = ChannelQuantScaleParameter(
                data=torch.empty(rows, 1, dtype=torch.float32), output_dim=0, weight_loader=loader
            )
            layer.register_parameter("weight_scale", scale)
            set_weight_attrs(scale, extra_weight_attrs)
        shape = _Shape(data=torch.empty(2, 1, dtype=torch.int64), weight_loader=loader)
        shape.prefix, shape.in_features = self.prefix, input_size
        layer.register_parameter("shape", shape)
        layer.sparse_shape, layer.sparse_dtype = (rows, columns), params_dtype

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack what was loaded; the row-major tensors are gone afterwards."""
        values, bitmask = layer.compressed.data, layer.bitmask.data
        plugin.require_cuda_kernels(values.device)
        if values.dtype.is_floating_point:  # -0.0, which others may write
            bits = values.view(torch.int16 if values.itemsize == 2 else torch.int8)
            bits.masked_fill_(bits == torch.iinfo(bits.dtype).min, 0)
        shape, coded = layer.sparse_shape, self.storage is not None
        spec = WeightSpec.of(shape, self.storage or values.dtype, ROWMAJOR, layer.sparse_dtype)
        try:
            metadata = metadata_of_bitmask(bitmask, shape, _OP)
            tensors = {"values": values, "metadata": metadata}
            if coded:
                tensors["weight_scale"] = layer.weight_scale.data
            w24 = Sparse24.from_tensors(spec, tensors)
        except FormatError as error:
            raise FormatError(f"{_OP}: {self.prefix}: {error}") from error
        for name in ("compressed", "bitmask", "shape", *(["weight_scale"] if coded else [])):
            delattr(layer, name)
        packed = SparseLinear.from_sparse24(w24).weight
        # vLLM's LoRA looks for the device of a layer at weight_packed.
        names = {"values": "weight_packed", "metadata": "weight_metadata"}
        layer.sparse_names = [names.get(name, name) for name in packed.spec.tensors]
        for name, own in zip(packed.spec.tensors, layer.sparse_names):
            parameter = nn.Parameter(packed.tensors[name], requires_grad=False)
            layer.register_parameter(own, parameter)
        layer.weight_spec = packed.spec.text
        layer.quantizes = coded and plugin.has_8bit_kernels(values.device)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The registered op itself: vLLM compiles the model, and its tracer reads no Sparse24.

        Activations are quantised by torch, which the compiler fuses with what comes before: a norm,
        or silu(gate) * up.
        """
        tensors = [getattr(layer, name) for name in layer.sparse_names]
        if layer.quantizes:
            q, scale = quantize_torch(x.reshape(-1, x.shape[-1]), self.storage)
            y8: Tensor = torch.ops.sparsekern.linear_quantized(
                q, scale, tensors, layer.weight_spec, bias, None, None
            )
            return y8.view(*x.shape[:-1], y8.shape[-1])
        y: Tensor = torch.ops.sparsekern.linear(x, tensors, layer.weight_spec, bias, None, None)
        return y
