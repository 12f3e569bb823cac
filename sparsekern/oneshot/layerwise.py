"""Pruning one group of Linear layers: from weights and their shared Hessian to pruned weights,
masks and reports.

The layers of a group read the same input (q, k and v). SparseGPT treats every row of a weight
alone, so the rows of the whole group go through one sweep with one factorisation; the result is
that of separate sweeps at a fraction of their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsekern import prune
from sparsekern.errors import check
from sparsekern.oneshot.discovery import Layer, dense_weight
from sparsekern.oneshot.report import LayerReport

OP = "sparsekern.prune_model"
METHODS = ("sparsegpt", "wanda", "magnitude")
# Steps of prune.refine after SparseGPT. Most of the gain comes early: on SmolLM2-135M 0, 8, 32 and
# 128 steps gave WikiText-2 perplexities of 96.3, 82.8, 79.1 and 82.2.
REFINE_STEPS = 16
# Share of prune.retarget before it. On SmolLM2-135M 0, 0.25 and 0.5 gave WikiText-2 perplexities of
# 83.5, 68.9 and 88.4.
MATCH_DENSE = 0.25


@dataclass
class Options:
    """How to prune a layer; as in prune_model. masks: layer name -> bool [out_features,
    in_features], True = kept."""

    method: str | Callable = "sparsegpt"
    pattern: tuple[int, int] = (2, 4)
    masks: dict[str, torch.Tensor] | None = None
    damp: float = 0.01
    blocksize: int = 128
    refine: int | None = None
    match_dense: float = 0.0
    on_error: str = "raise"

    def __post_init__(self):
        if self.refine is None:
            self.refine = REFINE_STEPS if self.method == "sparsegpt" else 0

    @property
    def name(self) -> str:
        """The method for people: the name of a score function, or the method itself."""
        return (
            self.method
            if isinstance(self.method, str)
            else getattr(self.method, "__qualname__", "score")
        )


@dataclass
class Pruned:
    """One layer after pruning. weight [out_features, in_features] is zero where mask (bool, same
    shape) is False; both are None when the layer was skipped on error, and report.reason says
    why."""

    layer: Layer
    report: LayerReport
    weight: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def new_report(layer: Layer, options: Options | None = None) -> LayerReport:
    """A LayerReport with everything known before pruning; without options that of a layer that
    stays dense."""
    weight = dense_weight(layer.module)
    size = weight.numel() * weight.element_size()
    dtype = str(weight.dtype).removeprefix("torch.")
    report = LayerReport(
        layer.name, layer.shape, dtype, layer.block, bytes_dense=size, bytes_sparse=size
    )
    if options is None:
        report.skipped, report.reason = True, layer.reason
    else:
        report.method = options.name
    return report


def prune_group(
    layers: list[Layer], hessian: prune.Hessian | None, options: Options
) -> list[Pruned]:
    """Prune layers that read the same input.

    Args:
        layers: on the device of the Hessian; their modules are not changed.
        hessian: of their input, None for methods that need none.
    Returns:
        one Pruned per layer, in order.
    Raises:
        ValueError: NaN or Inf in the calibration inputs; a score function that returns the wrong
            thing.
        RuntimeError: SparseGPT failed at every damping. Both only with on_error="raise".
    """
    if hessian is not None and not bool(hessian.matrix.diagonal().isfinite().all()):
        reason = "NaN or Inf in the inputs of this layer"
        names = ", ".join(layer.name for layer in layers)
        remedy = 'Check the model, or pass on_error="skip".'
        check(options.on_error == "skip", OP, f"finite inputs of {names}", "NaN or Inf", remedy)
        return [_failed(layer, options, reason) for layer in layers]
    if options.method != "sparsegpt":
        return [_prune_by_mask(layer, hessian, options) for layer in layers]
    masks = options.masks or {}
    with_mask = [layer for layer in layers if layer.name in masks]
    without = [layer for layer in layers if layer.name not in masks]
    pruned = {
        p.layer.name: p
        for part in (with_mask, without)
        if part
        for p in _sparsegpt(part, hessian, options)
    }
    return [pruned[layer.name] for layer in layers]


def _failed(layer: Layer, options: Options, reason: str) -> Pruned:
    report = new_report(layer, options)
    report.skipped, report.reason, report.method = True, reason, None
    return Pruned(layer, report)


def _prune_by_mask(layer: Layer, hessian: prune.Hessian | None, options: Options) -> Pruned:
    """Magnitude, Wanda, a score function or a given mask: kept weights stay as they are."""
    start = time.perf_counter()
    n, m = options.pattern
    weight = dense_weight(layer.module).contiguous()
    report = new_report(layer, options)
    if options.masks and layer.name in options.masks:
        mask = options.masks[layer.name].to(weight.device)
        report.method = "mask"
    elif options.method == "magnitude":
        mask = prune.magnitude_mask(weight, n, m)
    elif options.method == "wanda":
        mask = prune.wanda_mask(weight, hessian.act_norm, n, m)
    else:
        scores = options.method(weight, hessian)
        fits = isinstance(scores, torch.Tensor) and scores.shape == weight.shape
        shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        remedy = "Return one score per weight, higher = kept."
        check(
            fits,
            OP,
            f"scores [out_features, in_features] = {list(weight.shape)} for {layer.name}",
            shape,
            remedy,
        )
        mask = prune.nm_mask(scores.to(weight.device), n, m)
    pruned = weight.masked_fill(~mask, 0)
    if hessian is not None:
        pruned = _refined(weight, pruned, mask, hessian, options)
        report.relative_error = prune.relative_error(weight, pruned, hessian)
    report.seconds = time.perf_counter() - start
    return Pruned(layer, report, pruned, mask)


def _sparsegpt(layers: list[Layer], hessian: prune.Hessian, options: Options) -> list[Pruned]:
    """One sweep over the rows of all layers; either every layer has a given mask or none has."""
    start = time.perf_counter()
    weights = [dense_weight(layer.module) for layer in layers]
    stacked = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()
    masks = options.masks or {}
    given = [masks[layer.name].to(stacked.device) for layer in layers if layer.name in masks]
    mask = torch.cat(given) if given else None
    knobs = {"pattern": options.pattern, "blocksize": options.blocksize, "damp": options.damp}
    try:
        if options.match_dense and hessian.drift is not None:
            share = {"share": options.match_dense, "damp": options.damp}
            stacked = prune.retarget(stacked, hessian, **share)
        pruned, kept, result = prune.sparsegpt(stacked, hessian, mask=mask, **knobs)
    except RuntimeError as error:
        # The pruner's own failures only: running out of memory or a lost device is not a property
        # of the layer.
        if options.on_error == "raise" or not str(error).startswith("sparsekern.prune"):
            raise
        if len(layers) > 1:
            return [p for layer in layers for p in _sparsegpt([layer], hessian, options)]
        return [_failed(layers[0], options, str(error))]
    pruned = _refined(stacked, pruned, kept, hessian, options)
    rows = [w.shape[0] for w in weights]
    outcome = []
    for layer, weight, new, keep in zip(layers, weights, pruned.split(rows), kept.split(rows)):
        report = new_report(layer, options)
        alone = len(layers) == 1 and not options.refine and not options.match_dense
        report.relative_error = (
            result.relative_error if alone else prune.relative_error(weight, new, hessian)
        )
        report.damp, report.note = result.damp, _note(result, given, hessian.unmatched)
        outcome.append(Pruned(layer, report, new, keep))
    seconds = time.perf_counter() - start
    for p, count in zip(outcome, rows):
        p.report.seconds = seconds * count / sum(rows)
    return outcome


def _refined(weight, pruned, mask, hessian: prune.Hessian, options: Options) -> torch.Tensor:
    """`pruned` after options.refine steps towards the best weights under its mask."""
    if not options.refine:
        return pruned
    knobs = {"steps": options.refine, "damp": options.damp}
    return prune.refine(weight, pruned, mask, hessian, **knobs)


def _note(result: prune.SparseGPTReport, given: list, unmatched: bool) -> str | None:
    notes = ["mask given"] if given else []
    if unmatched:
        notes.append("not matched to the dense model: it gets only some of the tokens")
    failed = len(result.attempts) - 1
    if failed:
        notes.append(f"{failed} failed factorisations, then damp {result.damp:g} in {result.dtype}")
    if result.dead_columns:
        notes.append(f"{result.dead_columns} inputs always zero")
    return "; ".join(notes) or None
