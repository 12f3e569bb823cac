"""What code for dense weights may ask of a Sparse24, and what it is told where it needs numbers.

A module may use the weight of a layer below it: torch.nn.functional.linear is the sparse product,
shape, dtype, device and the like answer as those of a tensor do, and everything else is refused in
words that name the dense weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsekern.errors import check, message
from sparsekern.formats.layouts import WeightSpec

OP = "sparsekern.Sparse24"
T = TypeVar("T", bound="WeightLike")

# What torch functions on a Sparse24 are; the ops enter theirs.
products: dict[Any, Callable[..., Any]] = {}
_NO_DENSE = "calls of the layer, sparsekern.linear or torch.nn.functional.linear"
_KEEP_DENSE = "Use weight.to_dense(), or name the layer in skip= so that it stays dense."


class WeightLike:
    """The part of Sparse24 that stands in for a dense weight; the class itself has the data."""

    spec: WeightSpec
    tensors: dict[str, Tensor]
    ndim = 2

    @property
    def shape(self) -> torch.Size:
        return self.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers, and so of x, bias and y; a coded type stores them as something else."""
        return self.spec.dtype

    @property
    def device(self) -> torch.device:
        return self.tensors["values"].device

    def dim(self) -> int:
        """`ndim`, as of a tensor."""
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """`shape`, or its number `dim`."""
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        """Whether the numbers are: always."""
        return True

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    @property
    def requires_grad(self) -> bool:
        """False, and can be set to that alone: a 2:4 weight is frozen."""
        return self.tensors["values"].requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self: T, requires_grad: bool = True) -> T:
        """As of a tensor, for False. Raises ValueError for True."""
        remedy = "Train the dense weight under its mask first: sparsekern.finetune.Masked."
        op = f"{OP}.requires_grad_"
        check(not requires_grad, op, "requires_grad=False: a frozen weight", "True", remedy)
        self.tensors["values"].requires_grad_(False)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """For modules that use the weight of a layer below them: F.linear is sparsekern.linear;
        everything else wants a dense weight, and says so."""
        known = products.get(func)
        if known is not None:
            return known(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.HigherOrderOperator):  # of our own transforms
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        raise TypeError(message(OP, _NO_DENSE, f"{name} of a 2:4 weight", _KEEP_DENSE))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise AttributeError(message(OP, _NO_DENSE, f".{name} of a 2:4 weight", _KEEP_DENSE))

    def __eq__(self, other: object) -> bool:
        """Identity. Numbers, arrays and tensors, which a dense weight compares element by element,
        want that one."""
        if isinstance(other, (Tensor, np.ndarray, int, float)):
            raise TypeError(message(OP, _NO_DENSE, "== of a 2:4 weight", _KEEP_DENSE))
        return self is other

    __hash__ = object.__hash__

    def _set_data(self, data: Any) -> None:
        remedy = "Give the layer another one: layer.weight = sparsekern.compress(w, mask)."
        raise AttributeError(
            message(OP, "a weight that stays as it is", "a value for .data", remedy)
        )

    data = property(None, _set_data)  # reading it ends in __getattr__
    __array_ufunc__ = None  # numpy's operators leave the answer to those below


def _without(name: str) -> Callable[..., NoReturn]:
    def refused(self: WeightLike, *_: Any) -> NoReturn:
        got = f"{name.strip('_')} of a 2:4 weight"
        raise TypeError(message(OP, _NO_DENSE, got, _KEEP_DENSE))

    return refused


# Operators of a dense weight, which Python looks up in the class; `+`, `+=` and `1 + w` alike.
_BINARY = "add and floordiv matmul lshift mod mul or pow rshift sub truediv xor".split()
_OTHER = "array getitem setitem abs neg invert float int ge gt le lt".split()
for _name in (*_OTHER, *(f"{kind}{name}" for kind in ("", "r", "i") for name in _BINARY)):
    setattr(WeightLike, f"__{_name}__", _without(_name))
