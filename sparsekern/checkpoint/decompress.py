"""decompress_model: a pruned model in memory as an ordinary dense one with zeros in its weights."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from sparsekern.checkpoint.skeleton import skeleton_of
from sparsekern.errors import check
from sparsekern.nn.replace import is_conv1d, replace_module
from sparsekern.nn.sparse_experts import SparseExperts, decompress_experts
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.nn.wrappers import named_modules, unwrapped

OP = "sparsekern.decompress_model"
# What Transformers sets on a model that its quantizers have loaded.
_OF_QUANTIZERS = ("hf_quantizer", "is_quantized", "quantization_method", "_is_quantized")
M = TypeVar("M", bound=nn.Module)


@torch.inference_mode(False)  # whose tensors could not be trained
@torch.no_grad()
def decompress_model(model: M) -> M:
    """Replace every SparseLinear and SparseExperts of a model by what is dense, in place; W' = W,
    zeros included.

    For what knows no 2:4 weights: ONNX (`torch.onnx.export`), other quantizers, other engines.

    Args:
        model: any nn.Module. Layers that were transformers' Conv1D become Conv1D again, and experts
            one parameter.
    Returns:
        model; all parameters are trainable that were, and the new weights are.
    Raises:
        TypeError: no nn.Module; a SparseLinear itself (use its `to_linear()`), or a SparseExperts.
    Notes:
        Memory: the dense weights, layer by layer. `export_dense` does the same to a folder.
    """
    remedy = "Use layer.to_linear()." if isinstance(model, SparseLinear) else ""
    remedy = "Pass the model that holds it." if isinstance(model, SparseExperts) else remedy
    fits = isinstance(model, nn.Module) and not isinstance(model, (SparseExperts, SparseLinear))
    check(fits, OP, "a model", type(model).__name__, remedy, TypeError)
    inner: Any = unwrapped(model)
    apart = decompress_experts(model)
    names = {name: m for name, m in named_modules(model) if isinstance(m, SparseLinear)}
    head = getattr(inner, "get_output_embeddings", lambda: None)() if names else None
    tree = skeleton_of(inner, untied=any(m is head for m in names.values())) if names else None
    built = {} if tree is None else dict(tree.named_modules())
    for name, module in names.items():
        before = built.get(name)
        dense: nn.Module = module.to_linear()
        if before is not None and is_conv1d(before):
            dense = _conv1d(type(before), module)
        replace_module(model, module, dense)
        if module is head and getattr(inner.config, "tie_word_embeddings", False):
            inner.config.tie_word_embeddings = False
    for attribute in _OF_QUANTIZERS:
        inner.__dict__.pop(attribute, None)
    config: Any = getattr(inner, "config", None)
    if (names or apart) and hasattr(config, "quantization_config"):
        del config.quantization_config
    return model


def _conv1d(kind: Any, module: SparseLinear) -> nn.Module:
    with torch.device("meta"):
        made: nn.Module = kind(module.out_features, module.in_features)
    made.weight = nn.Parameter(module.weight.to_dense().t().contiguous())
    bias = module.bias
    zeros = module.weight.values.new_zeros(module.out_features, dtype=module.weight.dtype)
    made.bias = nn.Parameter(zeros if bias is None else bias.detach().clone())
    return made.train(module.training)
