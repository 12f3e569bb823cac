"""Weights that several modules share: one Parameter under several names, or Parameters whose
memory overlaps (views of one tensor, a transposed one, a part of its rows).

What zeroes weights in place zeroes them for all who share them, and what puts a SparseLinear in
the place of one module leaves the others behind. So a shared weight is pruned where it is to be
pruned under each of its names, as one Parameter with one mask, and stays dense elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.nn.own_forward import is_plain
from sparsekern.nn.replace import is_conv1d

Key = tuple[int, str]  # id of a module, key of its Parameter or buffer


class Place(NamedTuple):
    """Where a tensor is: its name in the model, its module, its key there."""

    name: str
    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        """The Parameter or buffer."""
        found = self.module._parameters.get(self.key)
        return cast(Tensor, self.module._buffers[self.key] if found is None else found)


def tied_places(model: nn.Module) -> dict[Key, list[Place]]:
    """Of each Parameter or buffer that shares elements with others, the places of the others.

    Tensors without data, sparse ones and subclasses (quantised, distributed) share when they are
    one object.
    """
    apart: dict[Any, list[tuple[int, int, Place]]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            place = Place(f"{name}.{key}".lstrip("."), module, key)
            strided = tensor.layout == torch.strided and is_plain(tensor)
            if strided and tensor.numel() and not tensor.is_meta:
                first = tensor.data_ptr()
                end = first + _extent(tensor) * tensor.element_size()
                apart[tensor.device].append((first, end, place))
            else:
                apart[id(tensor)].append((0, 1, place))
    tied: dict[Key, list[Place]] = defaultdict(list)
    for found in apart.values():
        near: list[tuple[int, int, Place]] = []
        for first, end, place in sorted(found, key=lambda one: one[0]):
            near = [one for one in near if one[1] > first]
            for *_, other in near:
                if _share(place.tensor, other.tensor):
                    tied[id(place.module), place.key].append(other)
                    tied[id(other.module), other.key].append(place)
            near.append((first, end, place))
    return tied


def tied_outside(model: nn.Module, chosen: Iterable[tuple[nn.Module, str]]) -> dict[Key, str]:
    """Of the chosen weights (module, key) those that cannot be pruned as one Parameter -> name of a
    tensor that shares elements with it and is not chosen, or is read transposed, or is another view
    of them."""
    tied = tied_places(model)
    places = [Place("", module, key) for module, key in chosen]
    keys = {(id(place.module), place.key) for place in places}
    outside: dict[Key, str] = {}
    for place in places:
        own = id(place.module), place.key
        for other in tied.get(own, ()):
            one = other.tensor is place.tensor and (id(other.module), other.key) in keys
            if not one or is_conv1d(other.module) != is_conv1d(place.module):
                outside.setdefault(own, other.name)
    return outside


def check_untied(op: str, model: nn.Module, modules: Iterable[nn.Module], remedy: str) -> None:
    """ValueError where one of these modules shares a Parameter: what is written to one would be
    written to all who share it."""
    tied = tied_places(model)
    names = {id(module): name for name, module in model.named_modules()}
    for module in modules:
        for key in module._parameters:
            others = tied.get((id(module), key))
            got = others and f"{names[id(module)]}.{key} that is also {others[0].name}"
            check(not others, op, f"layers of {type(model).__name__} with own weights", got, remedy)


def _extent(tensor: Tensor) -> int:
    """Elements of memory from the first to the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * step for size, step in steps)


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, whose extents overlap, have an element in common."""
    if a is b or a.element_size() != b.element_size():
        return True
    if a.numel() == _extent(a) and b.numel() == _extent(b):
        return True  # no gaps
    size = a.element_size()
    begin = min(a.data_ptr(), b.data_ptr())
    starts = [(t.data_ptr() - begin) // size for t in (a, b)]
    ends = [start + _extent(t) for start, t in zip(starts, (a, b), strict=True)]
    taken = torch.zeros(max(ends), dtype=torch.bool, device="cpu")
    taken.as_strided(a.shape, a.stride(), starts[0]).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), starts[1]).any())
