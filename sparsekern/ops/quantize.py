"""quantize, dequantize: 2:4 weights as fp8, int8 or int4 levels with scales, and back.

A number is a level times a scale (formats/scaled.py). The order is prune, then quantise: a scale
serves the weights that are kept, and the mask is chosen among the numbers themselves. Quantised
first, a group of four holds ties and zeros among which the mask is chosen by rounding errors, and
the scale was spent on weights that are then thrown away.

The rule that rounds each weight by itself is here; prune/quantize.py has the one that lets the
later weights of a row make up for the error of the earlier ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import registry
from sparsekern.errors import check, message
from sparsekern.formats import dtypes, scaled, sparse24
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.layouts import layout as layout_named
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.utils.arguments import check_strided

_OP = "sparsekern.quantize"
SCALES = ("absmax", "mse")
GROUPS = (64, 128)


def quantize(
    w24: Sparse24,
    dtype: str,
    *,
    group: int | None = None,
    scale: str | Tensor = "absmax",
    importance: Tensor | None = None,
    layout: str | None = None,
) -> Sparse24:
    """Every kept number rounded to the nearest level: number' = scale · level(number / scale).

    Specification: reference.quantize. Pruned weights stay pruned and zeros stay zeros.

    Args:
        w24: Sparse24 float32 | float16 | bfloat16 [out_features, in_features], any layout.
        dtype: "fp8" (e4m3) or "int8", with one scale for each output channel, or "int4".
        group: int4 alone: 64 or 128 columns of in_features, counted dense, that share a scale, or
            in_features for one scale for each output channel; None: 128.
        scale: "absmax" (the largest magnitude gets the top level 448, 127 or 7), "mse" (of 31
            smaller scales, down to 0.4 times that one, the one with the least squared error), or a
            tensor float32 [out_features, 1] or [out_features, groups].
        importance: [in_features], >= 0: weights of the columns' errors for "mse"; the diagonal of
            the layer's Hessian makes that the error of its outputs.
        layout: None for what the kernels of the device read best, or a registered layout's name.
    Returns:
        Sparse24 of the same `dtype` (that of x, bias and y), new.
    Raises:
        TypeError: w24 is no Sparse24, or is quantised already.   ValueError: an unknown dtype,
        group or scale; an importance that does not fit.   FormatError (a ValueError): scales that
        are not finite and above 0.
    """
    check_prunable_first(_OP, w24)
    kind = dtypes.quantized(_OP, dtype)
    if layout is not None:
        layout_named(layout, _OP)
    group = checked_group(_OP, dtype, group, w24.in_features)
    rows = w24.rowmajor()
    spec = WeightSpec.of(w24.shape, kind.name, ROWMAJOR, w24.dtype, None, group)
    codec, numbers = dtypes.scaled_codec(kind.name), rows.numbers()
    if isinstance(scale, Tensor):
        fitted = _given_scale(scale, spec, w24)
    else:
        known = isinstance(scale, str) and scale in SCALES
        check(known, _OP, f"scale in {SCALES} or a tensor", repr(scale), "Leave it 'absmax'.")
        weights = _kept_importance(importance, rows)
        if scale == "absmax":
            fitted = codec.absmax(numbers, spec.group)
        else:
            fitted = codec.least_squares(numbers, spec.group, weights)
    if importance is not None and scale != "mse":
        remedy = "Leave importance out, or pass scale='mse'."
        got = "a tensor" if isinstance(scale, Tensor) else f"scale={scale!r}"
        raise ValueError(message(_OP, "scale='mse' with importance=", got, remedy))
    quantized = sparse24.of_levels(
        spec, codec.levels(numbers, fitted, spec.group), fitted, rows.metadata
    )
    if layout is None:
        layout = registry.best_layout(spec, w24.device)
    return quantized.to_layout(layout)


def dequantize(w24: Sparse24, *, layout: str | None = None) -> Sparse24:
    """The weight with its numbers stored as they are, in w24.dtype: the inverse of `quantize`.

    Specification: reference.dequantize. level · scale is rounded to float32, then to the dtype.

    Args:
        w24: Sparse24; one of a plain dtype is returned as it is, in the layout that is asked for.
        layout: as for `quantize`.
    Raises:
        TypeError: w24 is no Sparse24.   FormatError: a number is not finite in w24.dtype.
    """
    op = "sparsekern.dequantize"
    sparse24.check_is_sparse24(op, w24, "w24")
    plain = w24
    if not w24.spec.element.plain:
        rows = w24.rowmajor()
        plain = Sparse24(rows.numbers(), rows.metadata, rows.shape)
        sparse24.check_finite(op, plain)
    if layout is None:
        layout = registry.best_layout(plain.spec, plain.device)
    return plain.to_layout(layout)


def check_prunable_first(op: str, w24: Sparse24) -> None:
    """TypeError unless w24 is a Sparse24 of a plain dtype: it has to be pruned, and not yet
    quantised."""
    remedy = (
        "Prune first: a mask chosen among rounded weights is worse, and scales have to fit the "
        "kept weights alone. Pass sparsekern.compress(w, mask) or sparsekern.prune_compress(w)."
    )
    sparse24.check_is_sparse24(op, w24, "w24", remedy)
    if not w24.spec.element.plain:
        expected = f"a weight of dtype {dtypes.names(' | ')}"
        remedy = "Quantise the weight that it was made of; dequantize() gives its numbers."
        raise TypeError(message(op, expected, w24.spec.storage, remedy))


def checked_group(
    op: str, dtype: str, group: int | None, in_features: int | None, name: str = "group"
) -> int:
    """The spec's group for `group=` of a quantised type: 0 for one scale a row. in_features: of the
    weight; None for many weights, which are to have groups. name: of the argument."""
    if dtypes.quantized(op, dtype).scale != "group":
        expected = f"{name}=None for {dtype}, which has one scale for each output channel"
        check(group is None, op, expected, group, "Leave it out, or choose int4.")
        return 0
    if group is None:
        return scaled.DEFAULT_GROUP
    whole = "" if in_features is None else f", or in_features ({in_features}) for one scale a row"
    expected, remedy = f"{name} in {GROUPS}{whole}", f"Leave it None: {scaled.DEFAULT_GROUP}."
    check(type(group) is int and group in (*GROUPS, in_features), op, expected, repr(group), remedy)
    return group


def _given_scale(scale: Tensor, spec: WeightSpec, w24: Sparse24) -> Tensor:
    expected = [spec.shape[0], scaled.groups(spec.shape[1], spec.group)]
    check_strided(_OP, "scale", scale)
    fits = list(scale.shape) == expected and scale.is_floating_point()
    got = f"shape {list(scale.shape)}, dtype {scale.dtype}"
    check(fits, _OP, f"a floating-point scale of shape {expected}", got)
    place = scale.device
    check(place == w24.device, _OP, f"scale on the weight's device ({w24.device})", place)
    scale = scale.detach().to(torch.float32, copy=True).contiguous()
    scaled.check_scales(_OP, scale, "scale")
    return scale


def _kept_importance(importance: Tensor | None, w24: Sparse24) -> Tensor | None:
    """importance [in_features] at the column of every kept number."""
    if importance is None:
        return None
    expected = f"importance of shape [in_features] ([{w24.in_features}])"
    is_tensor = isinstance(importance, Tensor)
    got = list(importance.shape) if is_tensor else type(importance).__name__
    check(is_tensor and list(importance.shape) == [w24.in_features], _OP, expected, got)
    place = importance.device
    check(place == w24.device, _OP, f"importance on the weight's device ({w24.device})", place)
    kind, remedy = importance.dtype, "Pass the diagonal of the Hessian."
    check(not kind.is_complex, _OP, "importance of real numbers", kind, remedy, TypeError)
    check_strided(_OP, "importance", importance)
    values = importance.detach().double()
    bad = ~(values.isfinite() & (values >= 0))
    if bool(bad.any()):
        column = int(bad.nonzero()[0])
        where = f"{values[column].item()} at column {column}"
        raise ValueError(message(_OP, "importance finite and >= 0", where))
    most = values.max() if values.numel() else values.new_ones(())
    return (values / most.clamp(min=1e-300)).float()[w24.columns()]
