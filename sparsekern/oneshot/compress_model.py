"""compress_model: a model whose weights are 2:4 already, from elsewhere or trained under a mask,
becomes one with SparseLinear layers. No weight changes, unless they are to be quantised."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import nn

from sparsekern.backends.compress import compress
from sparsekern.formats.dtypes import quantized as quantized_type
from sparsekern.formats.layouts import ROWMAJOR
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.count import num_parameters
from sparsekern.nn.replace import replace_module
from sparsekern.nn.sparse_linear import SparseLinear, check_before_loading
from sparsekern.nn.wrappers import whole
from sparsekern.oneshot.experts import with_experts_apart
from sparsekern.oneshot.layerwise import new_report
from sparsekern.oneshot.report import PruneReport
from sparsekern.oneshot.selection import select
from sparsekern.oneshot.skip import as_rules
from sparsekern.ops.quantize import checked_group
from sparsekern.ops.quantize import quantize as quantized
from sparsekern.utils.arguments import checked

OP = "sparsekern.compress_model"


@checked(OP, uses={"quantize_group": ("quantize=", lambda given: given["quantize"] is not None)})
@with_experts_apart
def compress_model(
    model: nn.Module,
    skip: Any = (),
    *,
    targets: Any = None,
    quantize: str | None = None,
    quantize_group: int | None = None,
) -> PruneReport:
    """Replace every linear layer whose weight is 2:4 by a SparseLinear, in place; W' = W.

    With quantize, the SparseLinear layers that hold plain numbers are quantised, too.

    Args:
        model: any nn.Module; experts in 3-D parameters count one by one.
        skip, targets: as in prune_model; nothing is skipped by default.
        quantize: None, or "fp8" | "int8" | "int4": the weights become levels with scales, each
            weight its nearest one (prune.rtn). prune_model has the quantiser that reads inputs.
        quantize_group: columns that share a scale, of int4: 64, 128 or None (128).
    Returns:
        PruneReport: one row per weight that takes part in matrix products, method "as it was";
        others stay dense with the reason, "not 2:4" among them.
    Raises:
        ValueError: a rule that matches nothing; a model without linear layers.
    Warns:
        UserWarning: nothing, or less than half of the weights that no rule leaves out, is 2:4.
    """
    start = time.perf_counter()
    if quantize is not None:
        quantized_type(OP, quantize, "quantize")
        checked_group(OP, quantize, quantize_group, None, "quantize_group")
    model = whole(OP, model)
    selection = select(model, skip, (2, 4), True, targets=targets, op=OP)
    options: dict[str, Any] = {"skip": [str(rule) for rule in as_rules(skip)]}
    if quantize is not None:
        options |= {"quantize": quantize, "quantize_group": quantize_group}
    report = PruneReport(type(model).__name__, "as it was", options)
    with torch.inference_mode(False), torch.no_grad():
        for layer in selection.layers:
            row = new_report(layer)
            row.asked = layer.asked
            old = layer.module
            w24: Sparse24 | None = None
            if layer.reason is None:
                weight = layer.weight
                most = int((weight != 0).reshape(-1, 4).sum(1).max())
                finite = bool(weight.isfinite().all())
                if most <= 2 and finite:
                    w24 = compress(weight.contiguous())
                else:
                    row.reason = f"not 2:4 ({most} of 4 kept)" if finite else "NaN or Inf"
            elif isinstance(old, SparseLinear) and layer.asked and quantize is not None:
                w24 = old.weight if old.weight.spec.element.plain else None
            if w24 is not None:
                if quantize is not None:
                    group = quantize_group
                    w24 = quantized(w24, quantize, group=group, scale="mse", layout=ROWMAJOR)
                    row.quantized = f"{w24.spec.levels} rtn"
                bias: Any = getattr(old, "bias", None)
                new: SparseLinear = SparseLinear.from_sparse24(w24, bias)
                replace_module(layer.home or model, old, new)
                layer.module = new
                row.skipped, row.method, row.is_24 = False, "as it was", True
                row.reason, row.bytes_sparse = None, w24.nbytes
            report.layers.append(row)
    check_before_loading(model)
    counted = num_parameters(model)
    report.parameters = {"dense": counted.dense, "stored": counted.stored}
    report.seconds = time.perf_counter() - start
    if report.partial:
        why = "; ".join(f"{share:.0%} {text} ({n})" for text, n, share in report.why_dense()[:4])
        kept = len(report.unquantized)
        levels = quantize if quantize_group is None else f"{quantize} g{quantize_group}"
        held = f"{kept} layers keep the numbers that they had: no {levels}. " if kept else ""
        remedy = " Call sparsekern.decompress_model(model) first." if kept else ""
        text = f"{held}{report.share:.1%} of the linear weights of {report.model} are 2:4"
        warnings.warn(f"{OP}: {text}. Dense: {why or 'none'}.{remedy}", stacklevel=4)
    return report
