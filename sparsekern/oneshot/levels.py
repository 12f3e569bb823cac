"""Training through levels: kept weights that are level · scale in every forward pass.

Each weight w (a latent, float32) and each scale s is a parameter; the block runs with

    q = s · level(w / s)      level: the nearest one of the type, saturating (formats/scaled.py)

and the gradient g of q that its backward pass leaves goes to both, as if rounding were not there:

    w   g                     (w is kept between s · lowest and s · highest level)
    s   Σ over the group of g · (level − w / s), of g · level where w lies at either end

s moves by its logarithm, so that it stays above 0. Latents begin inside the cells of the levels
that a quantiser has chosen, on the way to the 16-bit weights: the start is the quantiser's result.

Source: straight-through gradients with learnt steps, Esser et al. 2020, "LSQ" (arXiv:1902.08153);
block by block, Chen et al. 2024, "EfficientQAT" (arXiv:2407.11062).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekern.formats import dtypes, scaled, sparse24
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.oneshot.rounds import RATE

FARTHEST = 2.0  # of the logarithm of a scale from where it began
RESIDUAL = 0.75  # of what rounding took from a weight, in its latent at the start


@dataclass
class Trained:
    """A parameter, in float32 while it is trained, and the mask of it (bool, same shape).
    transposed: it is stored as [in_features, out_features]."""

    parameter: nn.Parameter
    mask: Tensor
    dtype: torch.dtype
    transposed: bool = False


def own_rate(weight: Tensor, mask: Tensor) -> float:
    """What a matrix of masked weights has its rate multiplied by: RATE of the root mean square of
    those that are kept."""
    kept = mask.sum().clamp_min(1)
    return RATE * float((weight.detach().float().square().sum() / kept).sqrt())


class Levels:
    """The levels and scales of some weights while they are trained.

    Args:
        trained: parameters [out, in] (or transposed) that hold what `weights` stand for.
        weights: of them, quantised, row-major, under the same masks.
        starts: of them, [out, in]: the weights before they were quantised.
    """

    def __init__(
        self, trained: Sequence[Trained], weights: Sequence[Sparse24], starts: Sequence[Tensor]
    ) -> None:
        self.trained, self.specs = list(trained), [w.spec for w in weights]
        self.codecs = [dtypes.scaled_codec(spec.storage) for spec in self.specs]
        self.latent: list[nn.Parameter] = []
        self.drift: list[nn.Parameter] = []  # log(scale / start), [out, groups, 1]
        self._scales: list[Tensor] = []
        self._slopes: list[Tensor] = []
        self._shares: list[float] = []
        for number, (w24, start) in enumerate(zip(weights, starts, strict=True)):
            scale = w24.tensors[scaled.SCALE].to(start.device)[:, :, None]
            now = self.trained[number].parameter.detach().float()
            now = now.t() if self.trained[number].transposed else now
            level = self.codecs[number].round(self._grouped(number, now) / scale)
            wanted = self._grouped(number, start.float()) / scale
            latent = level + RESIDUAL * (wanted - level)
            other = self.codecs[number].round(latent) != level
            latent = torch.where(other, level, latent) * scale
            self._scales.append(scale)
            self._shares.append(own_rate(start, self.trained[number].mask))
            self.latent.append(nn.Parameter(latent, requires_grad=False))
            self.drift.append(nn.Parameter(torch.zeros_like(scale), requires_grad=False))
            self._slopes.append(latent)
            self._write(number)

    def parameters(self, rate: float) -> list[dict[str, object]]:
        """For the optimizer, with `share` of the rate for each."""
        return [
            *({"params": [p], "lr": rate, "share": s} for p, s in zip(self.latent, self._shares)),
            {"params": self.drift, "lr": rate, "share": 1.0},
        ]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> None:
        """One step of the optimizer, on the gradients of the parameters, and their new values."""
        for number, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if self.trained[number].transposed:
                gradient = gradient.t()
            by_group = self._grouped(number, gradient)
            slope = (by_group * self._slopes[number]).sum(2, keepdim=True)
            self.latent[number].grad = by_group
            self.drift[number].grad = slope * self._scale(number)
        optimizer.step()
        for number in range(len(self.latent)):
            self.latent[number].grad = self.drift[number].grad = None
            self._write(number)

    @torch.no_grad()
    def state(self) -> list[Tensor]:
        """A copy of latents and scales, for `restore`."""
        return [p.detach().clone() for p in (*self.latent, *self.drift)]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Back to `state`, the parameters as well."""
        for p, value in zip((*self.latent, *self.drift), state, strict=True):
            p.copy_(value)
        for number in range(len(self.latent)):
            self._write(number)

    @torch.no_grad()
    def weights(self) -> list[Sparse24]:
        """The weights as they are now, row-major."""
        made = []
        for number, (spec, t) in enumerate(zip(self.specs, self.trained)):
            scale = self._scale(number)
            level = self.codecs[number].round(self.latent[number] / scale)
            mask = (t.mask.t() if t.transposed else t.mask).contiguous()
            plain = sparse24.compress(self._flat(number, level).contiguous(), mask)
            parts = (plain.values, scale[:, :, 0].contiguous(), plain.metadata)
            made.append(sparse24.of_levels(spec, *parts))
        return made

    def _scale(self, number: int) -> Tensor:
        return self._scales[number] * self.drift[number].detach().exp()

    def _write(self, number: int) -> None:
        """The parameter of a weight from latents and scales, and the slope of its scales."""
        self.drift[number].data.clamp_(-FARTHEST, FARTHEST)
        latent, scale, codec = self.latent[number].data, self._scale(number), self.codecs[number]
        latent.clamp_(codec.low * scale, codec.top * scale)
        ratio = latent / scale
        level = codec.round(ratio)
        t = self.trained[number]
        dense = self._flat(number, level * scale)
        t.parameter.data.copy_(dense.t() if t.transposed else dense)
        inside = (ratio > codec.low * (1 - 1e-6)) & (ratio < codec.top * (1 - 1e-6))
        self._slopes[number] = level.sub_(ratio.mul_(inside))

    def _grouped(self, number: int, dense: Tensor) -> Tensor:
        """[out, in] -> [out, groups, columns of a group]; zeros fill the last, shorter group."""
        width, group = self.specs[number].shape[1], self.specs[number].group
        count = scaled.groups(width, group)
        size = group if count > 1 else width
        missing = count * size - width
        padded = nn.functional.pad(dense, (0, missing)) if missing else dense
        return padded.reshape(len(dense), count, size).contiguous()

    def _flat(self, number: int, by_group: Tensor) -> Tensor:
        """The inverse of `_grouped`."""
        return by_group.flatten(1)[:, : self.specs[number].shape[1]]
