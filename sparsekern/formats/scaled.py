"""Codecs of the quantised element types: a number is a stored level times a scale.

    type            levels                        stored                       weight_scale
    float8_e4m3fn   e4m3 numbers up to 448        float8_e4m3fn [out, in/2]    [out, 1]
    int8            -127..127                     int8 [out, in/2]             [out, 1]
    int4            -8..7, two's complement       uint8 [out, in/4]            [out, ceil(in/group)]

Scales are float32, finite and above 0; a row (or group) of zeros has 1. An int4 byte holds the
lower kept column in its low nibble. `group` counts dense columns, so that group/2 kept values share
a scale; the last group of a row may be shorter, and group = in_features is one scale a row.

Zero has the level 0 (never -0.0), whatever the scale. int8 weights of other writers may hold -128.

    absmax      scale = max |w| / top, top = 448, 127, 7
    mse         of 31 scales from 1.0 to 0.4 times that one the one with the least
                Σ importance · (w − scale · level(w / scale))²

Source: the symmetric schemes of compressed-tensors; Frantar et al. 2022 (arXiv:2210.17323) for the
search by squared error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from sparsekern.errors import FormatError, check, message

SCALE = "weight_scale"
DEFAULT_GROUP = 128  # of types whose scales belong to groups
_SMALLEST = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float32).max * (1 - 2**-23)  # top · (it / top) is finite, rounded up
SHRINKS, SHRINK = 31, 0.02  # of "mse": scales that are tried, and from one to the next
_BLOCK = 1 << 20  # values for which every scale is tried at a time


class Spec(Protocol):
    """What is read of a WeightSpec."""

    shape: torch.Size
    group: int


class ScaledCodec:
    """One quantised type; see the table above.

    Args:
        storage: torch dtype of the stored tensor.
        top: the level that the largest magnitude gets; low: the smallest level.
        bits: 8, or 4 for two levels a byte.
    """

    tensors = (SCALE,)

    def __init__(self, storage: torch.dtype, top: float, low: float, bits: int) -> None:
        self.storage, self.top, self.low, self.bits = storage, top, low, bits

    # ------------------------------------------------------------------ levels

    def levels(self, numbers: Tensor, scale: Tensor, group: int) -> Tensor:
        """The nearest levels of kept numbers [out, in/2], ties to even, as float32."""
        return self.round(numbers.float() / self.spread(scale, numbers.shape[1], group))

    def round(self, ratios: Tensor) -> Tensor:
        """The nearest levels of numbers over their scale, float32, any shape; saturating."""
        return self.round_(ratios.clone()) + 0.0  # -0.0 becomes +0.0

    def round_(self, ratios: Tensor) -> Tensor:
        """`round` in place, for loops: few and small operations. It may leave -0.0."""
        ratios.clamp_(self.low, self.top)
        if self.storage.is_floating_point:
            return ratios.copy_(ratios.to(self.storage))
        return ratios.round_()

    def pack(self, levels: Tensor) -> Tensor:
        """Levels float32 [out, in/2] -> the values tensor."""
        if self.bits == 8:
            return levels.to(self.storage)
        nibbles = levels.to(torch.int8).view(torch.uint8) & 0xF
        return nibbles[:, 0::2] | nibbles[:, 1::2] << 4

    def unpack(self, values: Tensor) -> Tensor:
        """The inverse of `pack`."""
        if self.bits == 8:
            return values.float()
        nibbles = torch.stack((values & 0xF, values >> 4), dim=2).flatten(1)
        return ((nibbles ^ 8).to(torch.int8) - 8).float()

    # ------------------------------------------------------------------ scales

    @staticmethod
    def spread(scale: Tensor, kept: int, group: int) -> Tensor:
        """The scales [out, groups] by kept value: [out, 1], or [out, kept] for several groups."""
        if scale.shape[1] == 1:
            return scale
        return scale.repeat_interleave(group // 2, dim=1)[:, :kept]

    def absmax(self, numbers: Tensor, group: int) -> Tensor:
        """max |w| / top of every row or group, float32 [out, groups]; 1 where all are 0."""
        most = _by_group(numbers.float().abs(), group).amax(dim=2).clamp_(max=_LARGEST)
        # By a tensor: torch multiplies by the reciprocal of a number on a GPU.
        scale = (most / most.new_full((), self.top)).clamp_(min=_SMALLEST)
        return scale.masked_fill_(most == 0, 1.0)

    def least_squares(self, numbers: Tensor, group: int, importance: Tensor | None) -> Tensor:
        """The scales of "mse"; importance [out, in/2] weighs each value's squared error."""
        scale = self.absmax(numbers, group)
        rows = max(1, _BLOCK // max(1, numbers.shape[1]))
        for start in range(0, numbers.shape[0], rows):
            part = slice(start, start + rows)
            weights = None if importance is None else importance[part]
            scale[part] = self._least_squares(numbers[part], scale[part], group, weights)
        return scale

    def _least_squares(
        self, numbers: Tensor, largest: Tensor, group: int, weights: Tensor | None
    ) -> Tensor:
        numbers = numbers.float()
        best = torch.full_like(largest, torch.inf)
        chosen = largest.clone()
        for step in range(SHRINKS):
            scale = (largest * (1 - SHRINK * step)).clamp_(min=_SMALLEST)
            spread = self.spread(scale, numbers.shape[1], group)
            error = (numbers - self.round(numbers / spread) * spread).square_()
            error = _by_group(error if weights is None else error.mul_(weights), group).sum(dim=2)
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, scale, chosen)
        nothing = _by_group(numbers, group).abs().amax(dim=2) == 0
        return chosen.masked_fill_(nothing, 1.0)

    # ------------------------------------------------------------------ dtypes.Codec

    def encode(self, values: Tensor, group: int) -> Mapping[str, Tensor]:
        scale = self.absmax(values, group)
        return {"values": self.pack(self.levels(values, scale, group)), SCALE: scale}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, group: int) -> Tensor:
        levels = self.unpack(tensors["values"])
        numbers = (levels * self.spread(tensors[SCALE], levels.shape[1], group)).to(dtype)
        return numbers + 0.0  # what the dtype rounds to -0.0 is +0.0

    def check(self, op: str, spec: Spec, tensors: Mapping[str, Tensor]) -> None:
        """FormatError for scales of another shape or dtype than the spec says."""
        scale, (out_features, in_features) = tensors[SCALE], spec.shape
        expected = [out_features, groups(in_features, spec.group)]
        got = f"{SCALE} of shape {list(scale.shape)} and dtype {scale.dtype}"
        fits = list(scale.shape) == expected and scale.dtype == torch.float32
        wanted = f"{SCALE} float32 of shape {expected} (group {spec.group})"
        check(fits, op, wanted, got, exc=FormatError)

    def verify(self, op: str, spec: Spec, tensors: Mapping[str, Tensor]) -> None:
        """FormatError for scales that are not finite and above 0: it names the first one."""
        check_scales(op, tensors[SCALE])


def check_scales(op: str, scale: Tensor, name: str = SCALE) -> None:
    """FormatError unless every scale [out, groups] is finite and above 0."""
    good = scale.isfinite() & (scale > 0)
    if not bool(good.all()):
        row, group = (~good).nonzero()[0].tolist()
        where = f"{scale[row, group].item()} at row {row}" + (
            f", group {group}" if scale.shape[1] > 1 else ""
        )
        got = f"{where} ({int((~good).sum())} of {good.numel()} scales)"
        raise FormatError(message(op, f"{name} finite and above 0", got))


def checked_group(name: str, scale: str | None, group: int, in_features: int) -> int:
    """The group of a spec: 0 for a type with one scale a row; where they are by group,
    DEFAULT_GROUP for 0, and at most in_features, which is one scale a row.

    Raises:
        FormatError: a group for a type that has one scale a row, or no positive multiple of 4.
    """
    op = "sparsekern.WeightSpec"
    if scale != "group":
        expected = f"group 0 for {name}, which has one scale a row"
        check(group == 0, op, expected, group, exc=FormatError)
        return 0
    expected = "a group of columns that is a positive multiple of 4"
    check(group >= 0 and group % 4 == 0, op, expected, group, exc=FormatError)
    return min(group or DEFAULT_GROUP, in_features or DEFAULT_GROUP)


def group_of(in_features: int, count: int) -> int:
    """The group of which rows of this length have `count` scales, where nothing says it: 128, else
    64, 32, 256 ..., or in_features for one.

    Raises:
        FormatError: there is none, or whole groups of another size have as many.
    """
    if count == 1:
        return in_features
    whole = in_features // count if count and in_features % (4 * count) == 0 else 0
    for group in (DEFAULT_GROUP, 64, 32, 16, 8, 256, 512, 1024):
        if groups(in_features, group) == count and whole in (0, group):
            return group
    expected = f"a number of scales for rows of {in_features} that only one size of groups has"
    remedy = "config.json says it: group_size in quantization_config.config_groups.*.weights."
    raise FormatError(message("sparsekern.WeightSpec", expected, str(count), remedy))


def groups(in_features: int, group: int) -> int:
    """Number of scales of a row."""
    return -(-in_features // group) if group else 1


def _by_group(kept: Tensor, group: int) -> Tensor:
    """[out, in/2] -> [out, groups, values of a group]; zeros fill the last, shorter group."""
    count = groups(2 * kept.shape[1], group)
    size = group // 2 if group and count > 1 else max(1, kept.shape[1])
    missing = count * size - kept.shape[1]
    if missing:
        kept = torch.nn.functional.pad(kept, (0, missing))
    return kept.view(kept.shape[0], count, size)
