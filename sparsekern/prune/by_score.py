"""The methods that keep the weights of highest score as they are: magnitude and Wanda.

Source: Sun et al. 2024, "Wanda" (arXiv:2306.11695).
"""

from __future__ import annotations

from torch import Tensor

from sparsekern.prune.hessian import Hessian
from sparsekern.prune.masks import magnitude_mask, wanda_mask
from sparsekern.prune.methods import Method, Pruned, apply_mask
from sparsekern.prune.pattern import Pattern


def _magnitude(
    weight: Tensor, hessian: object, *, pattern: tuple[int, int], mask: Tensor | None = None
) -> Pruned:
    kept = Pattern.of(pattern)
    return apply_mask(weight, magnitude_mask(weight, *kept, kept.unit))


def _wanda(
    weight: Tensor, hessian: Hessian, *, pattern: tuple[int, int], mask: Tensor | None = None
) -> Pruned:
    kept = Pattern.of(pattern)
    return apply_mask(weight, wanda_mask(weight, hessian.act_norm, *kept, kept.unit))


MAGNITUDE = Method("magnitude", "|W|, without calibration", _magnitude)
WANDA = Method("wanda", "|W| times the norm of its input", _wanda, needs="norms")
