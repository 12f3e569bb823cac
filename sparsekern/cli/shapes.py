"""Which layer shapes `sparsekern bench MODEL` and `sparsekern tune MODEL` measure."""

from __future__ import annotations

from torch import nn

from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot import skip as skip_rules
from sparsekern.oneshot.experts import with_experts_apart


@with_experts_apart
def count_shapes(model: nn.Module) -> dict[tuple[int, int], int]:
    """{(out_features, in_features): layers}, in model order, of the layers that `sparsekern prune`
    would convert without options, and of those that are SparseLinear already.

    Left out are the output embedding, tied weights, in_features that 2:4 does not fit, and the
    rest of what prune_model reports as skipped.
    """
    layers = models.find_layers(model, (2, 4), True)
    names = [layer.name for layer in layers]
    outputs = models.output_layer_names(model)
    skipped = skip_rules.resolve((skip_rules.DEFAULT_RULE,), names, model, {}, 0, outputs)
    found = {
        id(layer.module): layer.shape
        for layer in layers
        if layer.reason is None and layer.name not in skipped
    }
    counts: dict[tuple[int, int], int] = {}
    for module in model.modules():
        shape = found.get(id(module))
        if isinstance(module, SparseLinear):
            shape = module.out_features, module.in_features
        if shape is not None:
            out_features, in_features = shape
            counts[out_features, in_features] = counts.get((out_features, in_features), 0) + 1
    return counts
