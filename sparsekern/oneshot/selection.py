"""Which layers `prune_model` prunes, and every check of its arguments: all of it before anything is
changed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from sparsekern.errors import check
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot import skip as skip_rules
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.layerwise import METHODS, Options

OP = "sparsekern.prune_model"


@dataclass
class Selection:
    """The layers of a model. A layer with a `reason` stays dense.

    layers: every Linear in tree order.      blocks: the decoder blocks, [] if there are none.
    """

    layers: list[Layer]
    blocks: list[nn.Module]

    @property
    def active(self) -> list[Layer]:
        """The layers to prune."""
        return [layer for layer in self.layers if layer.reason is None]


def check_options(
    options: Options, true_sequential: bool, compress: bool, calibration, offload
) -> None:
    """Check the arguments that do not depend on the model. Raises ValueError."""
    method, pattern = options.method, options.pattern
    known = callable(method) or method in METHODS
    _expect(known, f"method in {METHODS} or a function (w, hessian) -> scores", repr(method))
    remedy = "Pass token ids [samples, tokens] as calibration=."
    enough = calibration is not None or callable(method) or method == "magnitude"
    _expect(enough, f"calibration for {method}", None, remedy)
    integers = len(pattern) == 2 and all(isinstance(v, int) for v in pattern)
    right = integers and 0 < pattern[0] < pattern[1]
    _expect(right, "pattern (n, m) with 0 < n < m", pattern, "2:4 is (2, 4).")
    remedy = "Pass compress=False for other patterns."
    _expect(not compress or pattern == (2, 4), "pattern (2, 4) with compress=True", pattern, remedy)
    steps = options.refine
    _expect(isinstance(steps, int) and steps >= 0, "refine >= 0, a number of steps", repr(steps))
    remedy = "Pass token ids [samples, tokens] as calibration=, or refine=0."
    _expect(not steps or calibration is not None, "calibration for refine", None, remedy)
    share = options.match_dense
    good = isinstance(share, (int, float)) and 0 <= share <= 1
    _expect(good, "match_dense, a share from 0 to 1", repr(share))
    remedy = "Leave match_dense out."
    _expect(not share or method == "sparsegpt", "sparsegpt with match_dense", method, remedy)
    _expect(not (share and true_sequential), "match_dense or true_sequential", "both", remedy)
    on_error = options.on_error
    _expect(on_error in ("raise", "skip"), 'on_error "raise" or "skip"', repr(on_error))
    _expect(
        offload in (True, False, "auto"), 'offload_activations True, False or "auto"', repr(offload)
    )


def select(model: nn.Module, skip, options: Options, compress: bool) -> Selection:
    """Find the layers, apply the skip rules, and check masks and weights.

    Args:
        model, skip, compress: as in prune_model.
    Raises:
        ValueError: no Linear layers; a skip rule or mask name that matches nothing; a mask that
            does not fit; a weight with NaN or Inf and on_error="raise".
        TypeError: a mask is not bool.
    """
    _, blocks = models.find_blocks(model)
    selection = Selection(models.find_layers(model, options.pattern, compress), blocks)
    names = [layer.name for layer in selection.layers]
    remedy = "It may be pruned already: then its layers are SparseLinear."
    got = f"{type(model).__name__} without any"
    _expect(names, "a model with Linear layers", got, remedy)
    block_of = {layer.name: layer.block for layer in selection.layers if layer.block is not None}
    outputs = models.output_layer_names(model)
    rules = skip_rules.resolve(skip, names, model, block_of, len(blocks), outputs)
    for layer in selection.layers:
        if layer.name in rules:
            layer.reason = f"skip rule {rules[layer.name]!r}"
    _check_masks(selection.layers, options.masks or {}, compress)
    for layer in selection.active:
        if not bool(layer.module.weight.detach().isfinite().all()):
            remedy = 'Repair the checkpoint, or pass on_error="skip".'
            may_skip = options.on_error == "skip"
            _expect(may_skip, f"finite weights in {layer.name}", "NaN or Inf", remedy)
            layer.reason = "NaN or Inf in the weight"
    return selection


def _check_masks(layers: list[Layer], masks: dict[str, torch.Tensor], compress: bool) -> None:
    by_name = {layer.name: layer for layer in layers}
    for name, mask in masks.items():
        remedy = skip_rules.near(name, list(by_name))
        _expect(name in by_name, f"mask {name!r} to name a Linear layer", "no match", remedy)
        shape, reason = by_name[name].shape, by_name[name].reason
        what = f"mask of {name} bool {list(shape)}"
        dtype = getattr(mask, "dtype", type(mask).__name__)
        _expect(dtype == torch.bool, what, dtype, "True = kept.", TypeError)
        remedy = "Masks are [out_features, in_features]."
        _expect(tuple(mask.shape) == shape, what, list(mask.shape), remedy)
        what = f"{name}, which has a mask, to be prunable"
        _expect(reason is None, what, reason, "Drop the mask.")
        if compress:
            kept = int(mask.reshape(-1, 4).sum(1).max())
            what = f"at most 2 kept per group of 4 in the mask of {name}"
            _expect(kept <= 2, what, kept, "Pass compress=False.")


def describe(skip, options: Options, compress: bool, true_sequential: bool) -> dict:
    """The options as JSON-able values: what the report shows and a resumed run has to match."""
    rules = skip_rules.as_rules(skip)
    described = {
        "pattern": list(options.pattern),
        "compress": compress,
        "skip": [rule if isinstance(rule, int) else str(rule) for rule in rules],
        "true_sequential": true_sequential,
        "masks": _mask_digest(options.masks),
    }
    if options.method == "sparsegpt":
        described |= {"damp": options.damp, "blocksize": options.blocksize}
    if options.match_dense:
        described["match_dense"] = options.match_dense
    if options.refine:
        described |= {"refine": options.refine, "damp": options.damp}
    return described


def _mask_digest(masks: dict[str, torch.Tensor] | None) -> str | None:
    if not masks:
        return None
    sha = hashlib.sha256()
    for name in sorted(masks):
        sha.update(name.encode())
        sha.update(masks[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _expect(condition, expected: str, got, remedy: str = "", exc=ValueError) -> None:
    check(condition, OP, expected, got, remedy, exc)
