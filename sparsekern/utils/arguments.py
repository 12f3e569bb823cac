"""Arguments of public functions against their annotations and ranges, before anything is done.

    @checked("sparsekern.rotate", steps=(0, 10**6))
    def rotate(model: nn.Module, calibration: object, *, steps: int = 200) -> RotationReport: ...

    rotate(model, ids, steps="x")
    TypeError: sparsekern.rotate: expected steps: a whole number, got 'x'. The default is 200.

An argument that nothing reads in this call is refused as well, where the function has a table of
what reads which (`Uses`):

    rotate(model, ids, method="none", rate=0.1)
    ValueError: sparsekern.rotate: expected method="descent" with rate, got rate=0.1, which nothing
    reads. Leave rate at 0.02.

One at its default counts as not given, and one that forbids what does not happen anyway
(progress=False) has been obeyed: it is in no table.

What an annotation means here: int and float are numbers of Python or numpy, and no bool; bool is
True, False, 1 or 0; a path is not empty; a module has no lazy layer without weights; a
device is one that this torch can put tensors on; of containers the kind counts, not what is in
them; Any and object are not looked at.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.lazy import LazyModuleMixin

from sparsekern.errors import check, message

P = ParamSpec("P")
R = TypeVar("R")
Range = tuple[float, float]
Given = Mapping[str, Any]
# Argument -> (what reads it, in words; whether that is there, from all arguments by name).
Uses = Mapping[str, tuple[str, Callable[[Given], object]]]
# torch.manual_seed takes these.
SEEDS: Range = (-(2**63), 2**64 - 1)
_NAMES = {
    Tensor: "a tensor",
    nn.Module: "an nn.Module",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    type(None): "None",
    torch.dtype: "a torch.dtype",
    torch.device: "a device such as 'cpu' or 'cuda:0'",
    os.PathLike: "a path",
    collections.abc.Mapping: "a dict",
    collections.abc.Sequence: "a list",
    tuple: "a tuple",
    collections.abc.Iterable: "a list",
    collections.abc.Callable: "a function",
}


class _Argument:
    """What one parameter of a function takes."""

    def __init__(
        self, name: str, kind: Any, default: Any, span: Range | None, meta: bool = False
    ) -> None:
        self.name, self.kinds, self.span, self.meta = name, _members(kind), span, meta
        self.default = default
        self.any = Any in self.kinds or object in self.kinds
        self.path = os.PathLike in map(_plain, self.kinds)
        self.device = torch.device in self.kinds

    def check(self, op: str, value: Any) -> None:
        remedy = (
            "" if self.default is inspect.Parameter.empty else f"The default is {self.default!r}."
        )
        if not self.any and not any(_fits(kind, value) for kind in self.kinds):
            names = dict.fromkeys(_name(kind) for kind in self.kinds)
            expected = f"{self.name}: {' or '.join(names)}"
            raise TypeError(message(op, expected, shown(value), remedy))
        if self.path and isinstance(value, str):
            good = bool(value or value == self.default) and "\0" not in value
            check(good, op, f"{self.name}: a path", shown(value), remedy)
        if isinstance(value, nn.Module):
            check_initialised(op, value)
        if self.device and value is not None:
            usable_device(op, value, self.name, meta=self.meta)
        if self.span is not None and value is not None and _fits(float, value):
            low, high = self.span
            expected = f"{self.name} from {low} to {high}"
            check(low <= value <= high, op, expected, shown(value), remedy)


def checked(
    op: str,
    *,
    leave: tuple[str, ...] = (),
    uses: Uses | None = None,
    meta: bool = False,
    **spans: Range,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check every call of a function: the arguments against its annotations, and numbers against
    spans, name=(lowest, highest), both included. `leave`: those that it checks itself. `uses`: what
    reads some of them. `meta`: its devices may be "meta", which holds no data.

    Raises, from the function: TypeError, another kind; ValueError, out of its span, no device, or
    an argument that nothing reads.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known: dict[str, _Argument] = {}
        order = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.compiler.is_compiling():
                if not known:
                    known.update(_arguments(function, spans, meta))
                given = {**dict(zip(order, args, strict=False)), **kwargs}
                for name, value in given.items():
                    argument = known.get(name)
                    if argument is not None and name not in leave:
                        argument.check(op, value)
                if uses is not None:
                    check_used(op, uses, given, _defaults(known))
            return function(*args, **kwargs)

        return wrapper

    return decorate


def check_fields(op: str, instance: Any, uses: Uses | None = None, **spans: Range) -> None:
    """The same for the fields of a dataclass, to be called in its __post_init__."""
    kind = type(instance)
    known = _arguments(kind.__init__, spans)
    given = {name: getattr(instance, name) for name in known}
    for name, argument in known.items():
        argument.check(op, given[name])
    check_used(op, uses or {}, given, _defaults(known))


def check_used(op: str, uses: Uses, given: Given, defaults: Given) -> None:
    """ValueError for an argument that is given, other than by default, and that nothing reads.

    given, defaults: by name; an argument without a default is in `given`.
    """
    everything = {**defaults, **given}
    for name, (what, reads) in uses.items():
        value, default = map(_unlisted, (everything.get(name), defaults.get(name)))
        plain = value is None or isinstance(value, (bool, int, float, str, tuple))
        if (plain and value == default) or value is default or reads(everything):
            continue
        got = f"{name}={shown(value)}, which nothing reads"
        raise ValueError(message(op, f"{what} with {name}", got, f"Leave {name} at {default!r}."))


def _unlisted(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _defaults(known: Mapping[str, _Argument]) -> dict[str, Any]:
    empty = inspect.Parameter.empty
    return {name: a.default for name, a in known.items() if a.default is not empty}


def check_initialised(op: str, model: nn.Module) -> None:
    """ValueError where a lazy layer has no weights yet."""
    lazy = [
        f"{type(m).__name__} at {name!r}"
        for name, m in model.named_modules()
        if isinstance(m, LazyModuleMixin) and m.has_uninitialized_params()  # type: ignore[misc]
    ]
    remedy = "Call the model once on a batch."
    check(not lazy, op, "initialised weights", ", ".join(lazy[:3]), remedy)


def usable_device(op: str, value: Any, name: str = "", meta: bool = False) -> torch.device:
    """What torch.device makes of a value, where this torch can put tensors there, and their data
    unless `meta`.

    Raises:
        TypeError: neither text, number nor device.   ValueError: none that is here.
    """
    what = f"{name}: " if name else ""
    try:
        device = value if isinstance(value, torch.device) else torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        expected = f"{what}a device such as 'cpu' or 'cuda:0'"
        raise (TypeError if not isinstance(value, (str, int)) else ValueError)(
            message(op, expected, shown(value))
        ) from error
    holds = meta or device.type != "meta"
    check(holds, op, f"{what}a device that holds data", device.type, "Pass device='cpu'.")
    if device.type == "cuda":
        there = torch.cuda.is_available()
        expected, got = (
            f"{what}a device that this torch has",
            f"{str(device)!r}, without a usable CUDA GPU",
        )
        check(there, op, expected, got, "Pass device='cpu'.")
        count = torch.cuda.device_count()
        fits = (device.index or 0) < count
        check(fits, op, f"{what}a GPU among the {count} here", str(device))
        return device
    try:
        torch.empty(0, device=device, dtype=torch.uint8)
    except (RuntimeError, AssertionError, ImportError) as error:
        expected, remedy = f"{what}a device that this torch has", "Pass device='cpu'."
        raise ValueError(message(op, expected, repr(str(device)), remedy)) from error
    return device


def check_strided(op: str, name: str, tensor: Tensor) -> None:
    """NotImplementedError for a nested tensor, or one of a sparse or other layout of torch's."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        got = f"a {'nested ' if tensor.is_nested else ''}tensor of layout {tensor.layout}"
        nested, sparse = "Pass its values(), or part by part.", f"Call {name}.to_dense()."
        remedy = nested if tensor.is_nested else sparse
        raise NotImplementedError(message(op, f"a dense {name}", got, remedy))


def check_tensor(op: str, name: str, tensor: Tensor) -> None:
    """TypeError for what is no tensor, and the two others for one that functions cannot read."""
    got = type(tensor).__name__
    check(isinstance(tensor, Tensor), op, f"{name} as a Tensor", got, exc=TypeError)
    check_strided(op, name, tensor)
    check_data(op, name, tensor)


def check_data(op: str, name: str, tensor: Tensor) -> None:
    """ValueError for a tensor whose numbers cannot be read: on device meta, or fake."""
    fake = isinstance(tensor, FakeTensor)
    got = "a fake tensor" if fake else "a meta tensor"
    remedy = "Call it outside of FakeTensorMode." if fake else "Load the weights first."
    check(not (fake or tensor.is_meta), op, f"{name} with data", got, remedy)


def folded(seed: int) -> int:
    """A seed that torch takes, itself where it does."""
    return seed if SEEDS[0] <= seed <= SEEDS[1] else seed % 2**64


def shown(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"a tensor {list(value.shape)} of {value.dtype}{where}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    text = repr(value)
    if len(text) > 60:
        return f"{text[:57]}..."
    return text if type(value).__module__ == "builtins" else f"{text} ({type(value).__name__})"


def _arguments(
    function: Callable[..., Any], spans: dict[str, Range], meta: bool = False
) -> dict[str, _Argument]:
    hints = typing.get_type_hints(function)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: _Argument(name, hints[name], parameter.default, spans.get(name), meta)
        for name, parameter in inspect.signature(function).parameters.items()
        if name in hints and parameter.kind not in variable
    }


def _members(kind: Any) -> tuple[Any, ...]:
    """The kinds of a union; a type variable counts as its bound."""
    if isinstance(kind, TypeVar):
        return _members(kind.__bound__ or Any)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(kind) for member in _members(part))
    return (kind,)


def _plain(kind: Any) -> Any:
    """A kind without what it holds."""
    return typing.get_origin(kind) or kind


def _name(kind: Any) -> str:
    plain = _plain(kind)
    if plain is tuple and Ellipsis not in typing.get_args(kind):
        return f"{len(typing.get_args(kind))} values"
    return _NAMES.get(plain) or f"a {getattr(plain, '__name__', plain)}"


def _fits(kind: Any, value: Any) -> bool:
    plain = _plain(kind)
    if plain is bool:
        return value is True or value is False or (type(value) is int and value in (0, 1))
    if plain in (int, float):
        wanted = numbers.Integral if plain is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, bool)
    if plain is torch.device:
        return isinstance(value, torch.device)
    if plain is tuple:
        wanted_parts = typing.get_args(kind)
        if not isinstance(value, (tuple, list)) or Ellipsis in wanted_parts:
            return isinstance(value, (tuple, list))
        return len(value) == len(wanted_parts) and all(map(_fits, wanted_parts, value))
    if plain is collections.abc.Callable:
        return callable(value)
    if plain in (collections.abc.Sequence, collections.abc.Iterable):
        return isinstance(value, plain) and not isinstance(value, (str, bytes))
    return not isinstance(plain, type) or isinstance(value, plain)
