"""Which layers `prune_model` prunes, and every check of its arguments: all of it before anything is
changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import prune
from sparsekern.errors import check
from sparsekern.formats.dtypes import quantized
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot import skip as skip_rules
from sparsekern.oneshot.devices import check_changeable
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.layerwise import Options
from sparsekern.oneshot.source import Source
from sparsekern.ops.quantize import checked_group
from sparsekern.prune.quantize import METHODS
from sparsekern.utils.arguments import shown

OP = "sparsekern.oneshot.select"


@dataclass
class Selection:
    """The weights of a model that take part in matrix products. A layer with a `reason` stays as it
    is.

    layers: in tree order.      blocks: the decoder blocks, [] if there are none.
    """

    layers: list[Layer]
    blocks: list[nn.Module]

    @property
    def active(self) -> list[Layer]:
        """The layers to prune."""
        return [layer for layer in self.layers if layer.reason is None]


def check_options(
    options: Options,
    true_sequential: bool,
    compress: bool,
    calibrated: bool,
    offload: Any,
    op: str,
) -> None:
    """Check the arguments that do not depend on the model. `calibrated`: there is calibration data,
    or Hessians. Raises ValueError."""
    method, pattern = options.method, options.pattern
    remedy = "Pass token ids [samples, tokens] as calibration=."
    enough = calibrated or method.needs == "weights"
    check(enough, op, f"calibration for {method.name}", None, remedy)
    remedy = "Pass compress=False: dense weights with zeros."
    if pattern.unit > 1:
        remedy = f"No kernel here runs it, and it is in general not 2:4. {remedy}"
    whole = not compress or pattern == (2, 4)
    check(whole, op, "pattern (2, 4) with compress=True", repr(pattern), remedy)
    steps = options.refine
    good = type(steps) is int and steps >= 0
    check(good, op, "refine >= 0, a number of steps", repr(steps))
    remedy = "Pass token ids [samples, tokens] as calibration=, or refine=0."
    check(not steps or calibrated, op, "calibration for refine", None, remedy)
    share = options.match_dense
    good = type(share) in (int, float) and 0 <= share <= 1
    check(good, op, "match_dense, a share from 0 to 1", repr(share))
    remedy = "Leave match_dense out."
    able = [name for name, m in prune.methods().items() if m.match_dense is not None]
    fits = not share or method.match_dense is not None
    check(fits, op, f"{' or '.join(able)} with match_dense", method.name, remedy)
    both = bool(share) and true_sequential
    check(not both, op, "match_dense or true_sequential", "both", remedy)
    on_error = options.on_error
    check(on_error in ("raise", "skip"), op, 'on_error "raise" or "skip"', repr(on_error))
    _check_quantize(options, calibrated, op)
    check_offload(offload, op)


def check_offload(offload: Any, op: str) -> None:
    """Check offload_activations. Raises ValueError."""
    expected, remedy = 'offload_activations True, False, "auto" or a folder', "Make the folder."
    known = offload in (True, False, "auto")
    fits = known or (isinstance(offload, (str, os.PathLike)) and os.path.isdir(offload))
    check(fits, op, expected, repr(offload), remedy)


def _check_quantize(options: Options, calibrated: bool, op: str) -> None:
    name, method, group = options.quantize, options.quantize_method, options.quantize_group
    if name is None:
        return
    quantized(op, name, "quantize")
    right = options.pattern == (2, 4)
    got = repr(options.pattern)
    check(right, op, "pattern (2, 4) with quantize=", got, "Leave quantize out.")
    known = (None, *METHODS)
    check(method in known, op, f"quantize_method in {known}", repr(method))
    enough = calibrated or method != "gptq"
    remedy = 'Pass token ids [samples, tokens] as calibration=, or quantize_method="rtn".'
    check(enough, op, 'calibration for quantize_method="gptq"', None, remedy)
    checked_group(op, name, group, None, "quantize_group")


def select(
    model: nn.Module,
    skip: Any,
    pattern: tuple[int, int],
    compress: bool,
    *,
    targets: Any = None,
    op: str = OP,
    source: Source | None = None,
) -> Selection:
    """Find the layers and apply the rules.

    Args:
        model, skip, pattern, compress, targets: as in prune_model.
        op: who asks, for messages.
        source: of blocks whose weights are not in memory.
    Raises:
        ValueError: nothing that takes part in matrix products; a rule that matches nothing.
    """
    check(isinstance(model, nn.Module), op, "an nn.Module", type(model).__name__, exc=TypeError)
    _, blocks = models.find_blocks(model)
    absent = {} if source is None else {"absent": source.holds}
    selection = Selection(models.find_layers(model, pattern, compress, op, **absent), blocks)
    names = [layer.name for layer in selection.layers]
    got = f"{type(model).__name__} without any"
    check(bool(names), op, "a model with Linear layers", got)
    block_of = {layer.name: layer.block for layer in selection.layers if layer.block is not None}
    outputs = models.output_layer_names(model)
    rules = (names, model, block_of, len(blocks), outputs)
    skipped = skip_rules.resolve(skip, *rules, op=op)
    wanted = None if targets is None else skip_rules.resolve(targets, *rules, kind="target", op=op)
    for layer in selection.layers:
        if layer.is_24:
            layer.asked = layer.name not in skipped and (wanted is None or layer.name in wanted)
        elif layer.name in skipped:
            layer.reason = f"skip rule {skipped[layer.name]!r}"
            # The default rule is ours: what it leaves dense counts as left dense.
            layer.asked = skipped[layer.name] == skip_rules.DEFAULT_RULE
        elif wanted is not None and layer.name not in wanted:
            layer.reason, layer.asked = "no target", False
    return selection


def check_weights(selection: Selection, options: Options, compress: bool) -> None:
    """Check the given masks and that the weights to prune are finite; with on_error="skip" others
    get a reason.

    Raises:
        ValueError: a mask name that matches nothing; a mask that does not fit; a weight with NaN or
            Inf and on_error="raise".
        TypeError: a mask is not bool.
    """
    pairs = compress or options.quantize is not None
    _check_masks(selection.layers, options.masks, pairs, options.op)
    check_finite([layer for layer in selection.active if not layer.weight.is_meta], options)


def check_finite(layers: Iterable[Layer], options: Options) -> None:
    """check_weights of layers whose weights are in memory, without masks."""
    for layer in layers:
        check_changeable(options.op, layer.module, layer.name)
        if not _finite(layer.weight):
            remedy = 'Repair the checkpoint, or pass on_error="skip".'
            may_skip = options.on_error == "skip"
            check(may_skip, options.op, f"finite weights in {layer.name}", "NaN or Inf", remedy)
            layer.reason = "NaN or Inf in the weight"


def _finite(weight: Tensor) -> bool:
    """Whether no number is NaN or infinite: then the least and the largest are not. On a CPU ten
    times as fast as a look at each."""
    if not weight.numel():
        return True
    return all(bool(bound.isfinite()) for bound in torch.aminmax(weight))


def _check_masks(layers: list[Layer], masks: Mapping[str, Tensor], compress: bool, op: str) -> None:
    by_name = {layer.name: layer for layer in layers}
    for name, mask in masks.items():
        remedy = skip_rules.near(name, list(by_name))
        check(name in by_name, op, f"mask {name!r} to name a Linear layer", "no match", remedy)
        shape, reason = by_name[name].shape, by_name[name].reason
        what = f"mask of {name} bool {list(shape)}"
        good = isinstance(mask, Tensor) and mask.dtype == torch.bool
        remedy = "True = kept: torch.as_tensor(mask, dtype=torch.bool)."
        check(good, op, what, shown(mask), remedy, TypeError)
        remedy = "Masks are [out_features, in_features]."
        check(tuple(mask.shape) == shape, op, what, list(mask.shape), remedy)
        what = f"{name}, which has a mask, to be prunable"
        check(reason is None, op, what, reason, "Drop the mask.")
        if compress:
            kept = int(mask.reshape(-1, 4).sum(1).max())
            what = f"at most 2 kept per group of 4 in the mask of {name}"
            check(kept <= 2, op, what, kept, "Pass compress=False.")


def describe(
    skip: Any, options: Options, compress: bool, true_sequential: bool, targets: Any = None
) -> dict[str, Any]:
    """The options as JSON-able values: what the report shows and a resumed run has to match."""

    def texts(given: Any) -> list[Any]:
        rules = skip_rules.as_rules(given)
        return [rule if isinstance(rule, int) else str(rule) for rule in rules]

    described: dict[str, Any] = {
        "pattern": options.pattern.described(),
        "compress": compress,
        "skip": texts(skip),
        "true_sequential": true_sequential,
        "masks": _mask_digest(options.masks),
    }
    if targets is not None:
        described["targets"] = texts(targets)
    described |= options.values
    if options.match_dense:
        described["match_dense"] = options.match_dense
    if options.quantize:
        described["quantize"] = options.quantize
        described["quantize_method"] = options.quantize_method
        described["quantize_group"] = options.quantize_group
    if options.refine:
        described |= {"refine": options.refine, "damp": options.damp}
    return described


def _mask_digest(masks: Mapping[str, Tensor]) -> str | None:
    if not masks:
        return None
    sha = hashlib.sha256()
    for name in sorted(masks):
        sha.update(name.encode())
        sha.update(masks[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
