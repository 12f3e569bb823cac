"""Dense linear layers inside a model: which modules they are, their weight, and putting another
module in their place.

Transformers' Conv1D (GPT-2) is a Linear whose weight is stored transposed, as [in_features,
out_features]; every weight that enters or leaves these functions is [out_features, in_features].
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import check

_HOOK_NAMES = r"_(forward|backward)_(pre_)?hooks\w*|_is_full_backward_hook"
_HOOKS = frozenset(name for name in nn.Module().__dict__ if re.fullmatch(_HOOK_NAMES, name))
_OWN = frozenset({*nn.Module().__dict__, "forward", "nf", "nx"})


def is_conv1d(module: nn.Module) -> bool:
    """Transformers' Conv1D, recognised without importing transformers."""
    if type(module).__name__ != "Conv1D" or not hasattr(module, "nf"):
        return False
    return cast(Tensor, module.weight).dim() == 2


def is_linear(module: nn.Module) -> bool:
    """nn.Linear (any subclass) or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight as [out_features, in_features]; for Conv1D a transposed view."""
    weight = cast(Tensor, module.weight).detach()
    return weight.t() if is_conv1d(module) else weight


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Overwrite the dense weight in place with `weight` [out_features, in_features]; the Parameter
    stays the same object."""
    cast(Tensor, module.weight).copy_(weight.t() if is_conv1d(module) else weight)


def _forward_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module computes, without its hooks."""
    return module.forward(*args, **kwargs)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` at every place of the tree where `old` stands (a module may be registered under
    several names). It gets the forward and backward hooks of `old`, whose handles still remove
    them, and, as a layer, the attributes that somebody has set on `old`. Who holds `old` elsewhere
    (in a closure, say) and calls it calls `new`.

    Raises:
        ValueError: `old` stands nowhere below `model`.
    """
    above = [
        (parent, key)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is old
    ]
    got, remedy = "the layer itself", "Put it into a model: torch.nn.Sequential(layer)."
    check(above, "sparsekern", "a model with layers to replace", got, remedy)
    replace_at(above, old, new)


def replace_at(places: Iterable[tuple[nn.Module, str]], old: nn.Module, new: nn.Module) -> None:
    """`replace_module` where the places (parent, its attribute) are known."""
    new.train(old.training)
    for name in _HOOKS & old.__dict__.keys():
        new.__dict__[name] = old.__dict__[name]
    if "in_features" in new.__dict__:
        for key, value in old.__dict__.items():
            if not key.startswith("_") and key not in _OWN and not hasattr(new, key):
                new.__dict__[key] = value
        new.__dict__.pop("forward", None)
        old.__dict__["forward"] = functools.partial(_forward_of, new)
    for parent, key in places:
        setattr(parent, key, new)
        if key == "_orig_mod" and hasattr(parent, "dynamo_ctx"):
            # What torch.compile made of the layer holds it: bind it anew.
            parent.__setstate__(parent.__getstate__())
