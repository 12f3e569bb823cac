"""Pruning one group of linear layers: from weights and their shared Hessian to pruned weights,
masks and reports.

The layers of a group read the same input (q, k and v). A method whose rows are independent gets the
rows of the whole group in one call, with one factorisation; the result is that of separate calls at
a fraction of their number.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsekern import prune
from sparsekern.errors import check
from sparsekern.formats import sparse24
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.report import LayerReport
from sparsekern.prune.methods import Method, apply_mask
from sparsekern.prune.pattern import TWO_OF_FOUR, Pattern
from sparsekern.prune.refine import fit_kept
from sparsekern.prune.retarget import retargeted
from sparsekern.prune.team import Team

DAMP = 0.01
ONLY_ZEROS = "its inputs were all zero on the calibration data"


def _untimed(name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass
class Options:
    """How to prune a layer; as in prune_model.

    masks: layer name -> bool [out_features, in_features], True = kept.
    values: of the method's own options.      damp: of refine and match_dense.
    quantize: None or "fp8" | "int8" | "int4", of weights that are 2:4.
    quantize_method: "gptq", "rtn", or None: gptq where there is a Hessian.
    quantize_group: of int4.
    op: who asks, for messages.      part: times a part of the work by its name.
    team: of processes that prune the same layers together, or None.
    errors: whether rows get errors; not where the caller has others in the end.
    """

    method: Method
    pattern: Pattern = TWO_OF_FOUR
    masks: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    damp: float = DAMP
    refine: int = 0
    match_dense: float = 0.0
    on_error: str = "raise"
    quantize: str | None = None
    quantize_method: str | None = None
    quantize_group: int | None = None
    op: str = "sparsekern.oneshot.prune_group"
    part: Callable[[str], contextlib.AbstractContextManager[None]] = _untimed
    team: Team | None = None
    errors: bool = True


@dataclass
class Pruned:
    """One layer after pruning. weight [out_features, in_features] is zero where mask (bool, same
    shape) is False; both are None when the layer was skipped on error, and report.reason says
    why. quantized: the weight as levels and scales, row-major, where that was asked for."""

    layer: Layer
    report: LayerReport
    weight: Tensor | None = None
    mask: Tensor | None = None
    quantized: Sparse24 | None = None


def new_report(layer: Layer, options: Options | None = None) -> LayerReport:
    """A LayerReport with everything known before pruning; without options that of a layer that
    stays as it is."""
    row = LayerReport(layer.name, layer.shape, layer.dtype, layer.block)
    row.bytes_dense, row.bytes_sparse = layer.bytes_dense, layer.bytes_now
    row.is_24, row.tokens = layer.is_24, layer.tokens
    if isinstance(layer.module, SparseLinear):
        row.quantized = layer.module.weight.spec.levels or None
    if options is None:
        row.skipped, row.reason = True, layer.reason
    else:
        row.method = options.method.name
    return row


def prune_group(
    layers: list[Layer], hessian: prune.Hessian | None, options: Options
) -> list[Pruned]:
    """Prune layers that read the same input. Those whose inputs were all zero stay dense where the
    method goes by inputs: nothing is known of them, as of layers that were never called.

    Args:
        layers: on the device of the Hessian; their modules are not changed.
        hessian: of their input, None for methods that need none.
    Returns:
        one Pruned per layer, in order.
    Raises:
        ValueError: NaN or Inf in the calibration inputs; a score function that returns the wrong
            thing.
        PruneError: the method failed. Both only with on_error="raise".
    """
    if hessian is not None and not bool(hessian.matrix.diagonal().isfinite().all()):
        reason = "NaN or Inf in the inputs of this layer"
        names = ", ".join(layer.name for layer in layers)
        remedy = 'Check the model, or pass on_error="skip".'
        skips = options.on_error == "skip"
        check(skips, options.op, f"finite inputs of {names}", "NaN or Inf", remedy)
        return [_failed(layer, options, reason) for layer in layers]
    reads = options.method.needs != "weights"
    if hessian is not None and reads and not bool(hessian.matrix.diagonal().any()):
        return [_failed(layer, options, ONLY_ZEROS) for layer in layers]
    if not options.method.stacked:
        parts = [[layer] for layer in layers]
    else:
        given = [layer.name in options.masks for layer in layers]
        parts = [[a for a, b in zip(layers, given) if b == value] for value in (True, False)]
    pruned = {p.layer.name: p for part in parts if part for p in _prune(part, hessian, options)}
    return [pruned[layer.name] for layer in layers]


def _failed(layer: Layer, options: Options, reason: str) -> Pruned:
    report = new_report(layer, options)
    report.skipped, report.reason, report.method = True, reason, None
    return Pruned(layer, report)


def _prune(layers: list[Layer], hessian: prune.Hessian | None, options: Options) -> list[Pruned]:
    """One call of the method on the rows of all layers; either every layer has a given mask or none
    has."""
    start = time.perf_counter()
    method, matched = options.method, 0.0
    weights = [layer.weight for layer in layers]
    stacked = torch.cat(weights)  # a copy: a method that fails may have changed it
    given = [
        options.masks[layer.name].to(stacked.device) for layer in layers if _given(layer, options)
    ]
    mask = torch.cat(given) if given else None
    knobs: dict[str, Any] = {"damp": options.damp, "team": options.team}
    try:
        if options.match_dense and hessian is not None and hessian.drift is not None:
            matched = options.match_dense
            with options.part("prune: match"):
                stacked = retargeted(stacked, hessian, share=matched, **knobs)
        if mask is not None and not method.updates:
            pruned, kept, details = apply_mask(stacked, mask)
        else:
            with options.part("prune: solve"):
                pruned, kept, details = _call(method, layers, stacked, hessian, mask, options)
        if options.refine and hessian is not None:
            with options.part("prune: refine"):
                pruned = fit_kept(stacked, pruned, kept, hessian, steps=options.refine, **knobs)
        quantized = None
        if options.quantize and method.finish is None:
            quantized, _ = quantize(stacked, pruned, kept, hessian, options)
    except prune.PruneError as error:
        if options.on_error == "raise":
            raise
        if len(layers) > 1:
            return [p for layer in layers for p in _prune([layer], hessian, options)]
        return [_failed(layers[0], options, str(error))]
    details = details or prune.Details()
    notes = ["mask given"] if given and method.updates else []
    if hessian is not None and hessian.unmatched:
        notes.append("not matched to the dense model: it gets only some of the tokens")
    note = "; ".join([*notes, *details.notes]) or None
    known = details.relative_error if len(layers) == 1 else None
    if options.refine or matched or options.match_dense:
        known = None
    rows = [w.shape[0] for w in weights]
    outcome = []
    split = [None] * len(rows) if quantized is None else sparse24.split_rows(quantized, rows)
    parts = zip(layers, weights, torch.split(pruned, rows), torch.split(kept, rows), split)
    for layer, weight, new, keep, levels in parts:
        report = new_report(layer, options)
        if hessian is not None and options.errors:
            with options.part("prune: errors"):
                computes = known is None
                report.relative_error = (
                    prune.relative_error(weight, new, hessian) if computes else known
                )
        if given and not method.updates:
            report.method = "mask"
        few = None
        if report.few_tokens:
            few = f"saw {layer.tokens} tokens, fewer than in_features"
        report.damp = details.damp
        report.note = "; ".join(text for text in (few, note) if text) or None
        _describe_mask(report, keep, options.pattern, bool(given))
        if levels is not None:
            describe_quantized(report, weight, levels, hessian, options)
        outcome.append(Pruned(layer, report, new, keep, levels))
    seconds = time.perf_counter() - start
    for p, count in zip(outcome, rows):
        p.report.seconds = seconds * count / max(1, sum(rows))
    return outcome


def quantize(
    dense: Tensor,
    pruned: Tensor,
    mask: Tensor,
    hessian: prune.Hessian | None,
    options: Options,
) -> tuple[Sparse24, prune.QuantizeReport]:
    """A pruned weight as levels and scales: prune.gptq towards `dense`, or prune.rtn."""
    name, group = str(options.quantize), options.quantize_group
    if hessian is None or options.quantize_method == "rtn":
        return prune.rtn(pruned, name, mask=mask, hessian=hessian, group=group)
    return prune.gptq(
        pruned, hessian, name, mask=mask, target=dense, group=group, damp=options.damp
    )


def describe_quantized(
    report: LayerReport,
    dense: Tensor,
    quantized: Sparse24,
    hessian: prune.Hessian | None,
    options: Options,
    trained: bool = False,
) -> None:
    """Enter into a row, which has the error of pruning, what quantisation adds to it. trained: its
    block has been trained through the levels."""
    method = "rtn" if hessian is None else options.quantize_method or "gptq"
    more = " + blocks" if trained else ""
    report.quantized = f"{quantized.spec.levels} {method}{more}"
    if hessian is not None and report.relative_error is not None:
        total = prune.relative_error(dense, quantized.to_dense(), hessian)
        report.quantize_error = total - report.relative_error
        report.relative_error = total


def _given(layer: Layer, options: Options) -> bool:
    return layer.name in options.masks


def _call(
    method: Method,
    layers: list[Layer],
    weight: Tensor,
    hessian: prune.Hessian | None,
    mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, prune.Details | None]:
    """The method's function, and a check of what it returns: a registered one is not ours."""
    pattern = options.pattern
    names = ", ".join(layer.name for layer in layers)
    version = None if weight.is_inference() else weight._version
    try:
        call = method.function
        knobs: dict[str, Any] = {"pattern": pattern, "mask": mask}
        if method.together:
            knobs["team"] = options.team
        result = method.call(call, weight, hessian, **knobs, values=options.values)
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{options.op}: {names}: {error}") from error
    right = isinstance(result, tuple) and len(result) == 3
    expected = f"method {method.name} to return (weight, mask, details) for {names}"
    check(right, options.op, expected, type(result).__name__, exc=TypeError)
    pruned, kept, details = result
    same = version is None or weight._version == version
    expected, remedy = (
        f"method {method.name} to leave its weight as it is",
        "Work on a clone of it.",
    )
    check(same, options.op, expected, f"changes in place of {names}", remedy)
    told = details is None or isinstance(details, prune.Details)
    expected = f"details of {names} from method {method.name}: prune.Details or None"
    check(told, options.op, expected, type(details).__name__, exc=TypeError)
    for what, tensor, dtype in (("weight", pruned, weight.dtype), ("mask", kept, torch.bool)):
        good = isinstance(tensor, Tensor) and tensor.shape == weight.shape and tensor.dtype == dtype
        got = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else tensor
        expected = f"a {what} {list(weight.shape)} {dtype} of {names} from method {method.name}"
        check(good, options.op, expected, got)
    check(
        not bool((pruned.masked_fill(kept, 0) != 0).any()),
        options.op,
        f"zeros where the mask of {names} is False, from method {method.name}",
        "others",
    )
    n, m = pattern
    if mask is None and weight.shape[1] % m == 0:
        most = pattern.most(kept)
        whole = ", pairs whole" if pattern.unit > 1 else ""
        expected = f"at most {n} of {m} kept in {names} by method {method.name}{whole}"
        check(most <= n, options.op, expected, most)
    return pruned, kept, details


def _describe_mask(report: LayerReport, kept: Tensor, pattern: Pattern, given: bool) -> None:
    """Enter into a row what the weight is now; masks that were given may be of any form."""

    def has(one: Pattern) -> bool:
        return kept.shape[1] % one[1] == 0 and not bool(one.broken(kept).any())

    report.is_24 = has(TWO_OF_FOUR) if given else pattern == TWO_OF_FOUR
    if pattern != TWO_OF_FOUR and (not given or has(pattern)):
        report.pattern = str(pattern)
