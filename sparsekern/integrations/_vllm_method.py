"""The classes behind vllm.py; importing this file imports vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
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
from sparsekern.formats import dtypes, packed, scaled
from sparsekern.formats.config_json import sparsity_entry
from sparsekern.formats.forms import ALL_PARTS
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24, metadata_of_bitmask, of_levels
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
        entry = sparsity_entry(config)
        why = str(config)[:120] if entry is None else plugin.unreadable(config)
        if entry is None or why is not None:
            expected = f"a quantization_config of format {plugin.FORMAT}"
            expected += ", weights of 16 bits, of 8 with a scale per channel, or int4"
            raise FormatError(message(_OP, expected, str(why)))
        return cls(plugin.Layers(dense=list(entry.get("ignore") or [])))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Folders in compressed-tensors' sparse-24-bitmask, which vLLM no longer reads."""
        ours = sparsity_entry(hf_quant_cfg) is not None
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
        layers, fused = self.layers, self.packed_modules_mapping
        if isinstance(layer, LinearBase):
            sparse = layers.sparse_parts(prefix, fused)
            if any(sparse):
                _start_early()
                return SparseKernLinearMethod(prefix, layers.coding(prefix, fused), sparse)
            return UnquantizedLinearMethod()
        if any("FusedMoE" in kind.__name__ for kind in type(layer).__mro__):
            plugin.refuse_experts(prefix, plugin.has_sparse_experts(layers, prefix))
        if isinstance(layer, ParallelLMHead) and prefix in (layers.sparse or ()):
            return SparseKernLinearMethod(prefix, layers.coding(prefix, {}))
        return None


def _start_early() -> None:
    """Before the model that is being built is compiled: its layers are, when all of them exist."""
    engine = get_current_vllm_config_or_none()
    if engine is not None:
        device = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        plugin.start_early(engine.compilation_config.inductor_compile_config, device)


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

    coding: how its values are quantised; None for those of the model's dtype.
    sparse: which of the layers that it is made of are 2:4; the others are dense products of their
        own. An lm_head is one layer, whose rows vLLM pads.
    """

    def __init__(
        self,
        prefix: str,
        coding: plugin.Coding | None = None,
        sparse: Sequence[bool] = (True,),
    ) -> None:
        self.prefix, self.coding, self.sparse = prefix, coding, list(sparse)

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
        plugin.check_columns(self.prefix, input_size, columns, self.coding)
        layer.sparse_rows = plugin.runs(self.sparse, output_partition_sizes)
        layer.sparse_columns, layer.sparse_dtype = columns, params_dtype

        def add(name: str, data: Tensor, *, split_columns: bool = True) -> None:
            words: dict[str, Any] = {"data": data, "output_dim": 0, "weight_loader": loader}
            if split_columns:
                parameter: Any = ModelWeightParameter(input_dim=1, **words)
            else:
                parameter = ChannelQuantScaleParameter(**words)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, extra_weight_attrs)

        coding = self.coding
        kind = None if coding is None else dtypes.element(coding.storage)
        sizes = torch.empty(2, 1, dtype=torch.int64)
        if kind is not None and kind.bits == 4:
            add("weight_packed", torch.empty(rows, -(-columns // 16), dtype=torch.int32))
            sizes = sizes.flatten()
        else:
            stored = params_dtype if kind is None else kind.storage
            add("compressed", torch.empty(rows, columns // 2, dtype=stored))
        add("bitmask", torch.empty(rows, -(-columns // 8), dtype=torch.uint8))
        if coding is not None:
            count = scaled.groups(columns, coding.group)
            scale = torch.empty(rows, count, dtype=torch.float32)
            add(SCALE, scale, split_columns=coding.group > 0)
        if not all(self.sparse):
            add("weight", torch.empty(rows, columns, dtype=params_dtype))
        shape = _Shape(data=sizes, weight_loader=loader)
        shape.prefix, shape.in_features = self.prefix, input_size
        layer.register_parameter("weight_shape" if sizes.dim() == 1 else "shape", shape)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack what was loaded; the row-major tensors are gone afterwards."""
        stored = {
            name: getattr(layer, name).data
            for name in (*ALL_PARTS, "weight")
            if isinstance(getattr(layer, name, None), BasevLLMParameter)
        }
        device = stored["bitmask"].device
        plugin.require_cuda_kernels(device)
        if isinstance(layer, ParallelLMHead):
            self._fill_padding(layer, stored)
        for name in stored:
            delattr(layer, name)
        products = []
        for number, run in enumerate(layer.sparse_rows):
            rows = {name: t[run.begin : run.end] for name, t in stored.items()}
            spec = None
            if run.sparse:
                packed = SparseLinear.from_sparse24(self._weight(layer, rows)).weight
                spec, tensors = packed.spec.text, packed.tensors
            else:
                tensors = {"dense": rows["weight"].clone()}
            # vLLM's LoRA looks for the device of a layer at weight_packed.
            own = {
                "values": "weight_packed",
                "dense": "weight_packed",
                "metadata": "weight_metadata",
            }
            names = [own.get(n, n) + (f"_{number}" if number else "") for n in tensors]
            for name, tensor in zip(names, tensors.values()):
                layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            products.append((names, spec, run.begin, run.end))
        layer.sparse_products = products
        bits = 0 if self.coding is None else dtypes.element(self.coding.storage).bits
        layer.quantizes = bits == 8 and plugin.has_8bit_kernels(device)

    def _weight(self, layer: nn.Module, stored: dict[str, Tensor]) -> Sparse24:
        """The row-major weight of some rows."""
        bitmask, coding = stored["bitmask"], self.coding
        shape = (bitmask.shape[0], layer.sparse_columns)
        try:
            metadata = metadata_of_bitmask(bitmask, shape, _OP)
            group = 0
            if coding is not None and dtypes.element(coding.storage).bits == 4:
                group = coding.group or shape[1]
            storage = layer.sparse_dtype if coding is None else coding.storage
            spec = WeightSpec.of(shape, storage, ROWMAJOR, layer.sparse_dtype, None, group)
            if "weight_packed" in stored:
                levels = packed.unpack_words(stored["weight_packed"], shape[1] // 2)
                return of_levels(spec, levels, stored[SCALE].contiguous(), metadata)
            values = stored["compressed"]
            if values.dtype.is_floating_point:  # -0.0, which others may write
                bits = values.view(torch.int16 if values.itemsize == 2 else torch.int8)
                bits.masked_fill_(bits == torch.iinfo(bits.dtype).min, 0)
            tensors = {"values": values, "metadata": metadata}
            tensors |= {SCALE: stored[SCALE]} if coding is not None else {}
            return Sparse24.from_tensors(spec, {n: t.contiguous() for n, t in tensors.items()})
        except FormatError as error:
            raise FormatError(f"{_OP}: {self.prefix}: {error}") from error

    def _fill_padding(self, layer: Any, stored: dict[str, Tensor]) -> None:
        """Rows of the head that no token has: vLLM leaves zeros in all of their tensors."""
        sizes = stored.get("shape", stored.get("weight_shape"))
        assert sizes is not None
        plugin.check_shape(self.prefix, sizes, layer.embedding_dim)
        first = layer.shard_indices.num_org_elements
        byte = torch.full((stored["bitmask"].shape[1],), 0x33, dtype=torch.uint8)
        if layer.sparse_columns % 8:
            byte[-1] = 0x03
        stored["bitmask"][first:] = byte.to(stored["bitmask"].device)
        if SCALE in stored:
            stored[SCALE][first:] = 1
        if "weight_packed" in stored:
            zero = packed.pack_words(torch.zeros(1, 8, dtype=torch.float32))
            stored["weight_packed"][first:] = zero.to(stored["weight_packed"].device)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The registered op itself: vLLM compiles the model, and its tracer reads no Sparse24.

        Activations are quantised by torch, which the compiler fuses with what comes before: a norm,
        or silu(gate) * up.
        """
        rows = x.reshape(-1, x.shape[-1])
        eight = quantize_torch(rows, self.coding.storage) if layer.quantizes else None
        parts = []
        for names, spec, begin, end in layer.sparse_products:
            tensors = [getattr(layer, name) for name in names]
            b = bias if bias is None or len(layer.sparse_products) == 1 else bias[begin:end]
            if spec is None:
                parts.append(torch.nn.functional.linear(rows, tensors[0], b))
            elif eight is not None:
                parts.append(
                    torch.ops.sparsekern.linear_quantized(*eight, tensors, spec, b, None, None)
                )
            else:
                parts.append(torch.ops.sparsekern.linear(rows, tensors, spec, b, None, None))
        y: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y.view(*x.shape[:-1], y.shape[-1])
