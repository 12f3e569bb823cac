"""compress_model: a model whose weights are 2:4 already, from elsewhere or trained under a mask,
becomes one with SparseLinear layers. No weight changes."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import nn

from sparsekern.backends.compress import compress
from sparsekern.nn.replace import replace_module
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot.experts import with_experts_apart
from sparsekern.oneshot.layerwise import new_report
from sparsekern.oneshot.report import PruneReport
from sparsekern.oneshot.selection import select

OP = "sparsekern.compress_model"


@with_experts_apart
def compress_model(model: nn.Module, skip: Any = (), *, targets: Any = None) -> PruneReport:
    """Replace every linear layer whose weight is 2:4 by a SparseLinear, in place; W' = W.

    Args:
        model: any nn.Module; experts in 3-D parameters count one by one.
        skip, targets: as in prune_model; nothing is skipped by default.
    Returns:
        PruneReport: one row per weight that takes part in matrix products, method "as it was";
        others stay dense with the reason, "not 2:4" among them.
    Raises:
        ValueError: a rule that matches nothing; a model without linear layers.
    Warns:
        UserWarning: nothing, or less than half of the weights that no rule leaves out, is 2:4.
    """
    start = time.perf_counter()
    model = models.unwrapped(model)
    selection = select(model, skip, (2, 4), True, targets=targets, op=OP)
    report = PruneReport(type(model).__name__, "as it was", {"skip": [str(s) for s in skip]})
    with torch.inference_mode(False), torch.no_grad():
        for layer in selection.layers:
            row = new_report(layer)
            row.asked = layer.asked
            if layer.reason is None:
                weight = layer.weight
                most = int((weight != 0).reshape(-1, 4).sum(1).max())
                finite = bool(weight.isfinite().all())
                if most <= 2 and finite:
                    old, w24 = layer.module, compress(weight.contiguous())
                    bias: Any = getattr(old, "bias", None)
                    new: SparseLinear = SparseLinear.from_sparse24(w24, bias)
                    replace_module(layer.home or model, old, new)
                    layer.module = new
                    row.skipped, row.method, row.is_24 = False, "as it was", True
                    row.bytes_sparse = w24.nbytes
                else:
                    row.reason = f"not 2:4 ({most} of 4 kept)" if finite else "NaN or Inf"
            report.layers.append(row)
    report.seconds = time.perf_counter() - start
    if report.partial:
        why = "; ".join(f"{share:.0%} {text} ({n})" for text, n, share in report.why_dense()[:4])
        text = f"{report.share:.1%} of the linear weights of {report.model} are 2:4"
        warnings.warn(f"{OP}: {text}. Dense: {why or 'none'}.", stacklevel=2)
    return report
