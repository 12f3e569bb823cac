"""The pruning methods, as a registry that prune_model, its report, its resume folder and the
command line read. Another method is one file with one `Method`, and one line that registers it.

A method is a function on the weights that read one input:

    function(weight, hessian, *, pattern, mask, **options) -> (weight', mask, details or None)

It walks no module and moves no tensor. What it needs is stated, so that nothing is computed which
nobody reads, and so that an argument that is missing is an error before anything is changed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.prune.hessian import Hessian
from sparsekern.prune.masks import nm_mask
from sparsekern.prune.pattern import Pattern
from sparsekern.utils.arguments import check_fields, checked

# What a method can need of the calibration, least first.
NEEDS = ("weights", "norms", "hessian", "outputs")


class PruneError(RuntimeError):
    """A method cannot prune this weight. prune_model(on_error="skip") leaves the layer dense with
    the text as reason; every other exception ends the run."""


@dataclass(frozen=True)
class Option:
    """One option of a method, a keyword of its function.

    name, default: of the keyword.      help: one line, for the command line.
    expected: what a value has to be, in words.      accepts: whether a value is that.
    """

    name: str
    default: Any
    help: str
    expected: str = "a value"
    accepts: Callable[[Any], bool] = field(default=lambda value: True, repr=False)

    def __post_init__(self) -> None:
        check_fields("sparsekern.prune.Option", self)


@dataclass(frozen=True)
class Details:
    """What a method has to say about one call. Everything may be left out.

    damp: that was used.      notes: what was out of the ordinary.
    relative_error: of the returned weight, where the method knows it; else it is computed.
    """

    damp: float | None = None
    notes: tuple[str, ...] = ()
    relative_error: float | None = None


class Block(Protocol):
    """A block of the model that a method with needs="outputs" may run (oneshot/stages.py)."""

    module: nn.Module

    def inputs(self) -> Iterator[Tensor]:
        """The hidden states that enter the block, batch by batch, in the model pruned so far."""

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """The block on the hidden states of batch `index`, with the weights that it has now; as
        differentiable as torch's mode says."""

    def outputs(self) -> Iterator[Tensor]:
        """What the block makes of its inputs with the weights that it has now, batch by batch."""


Pruned = tuple[Tensor, Tensor, "Details | None"]


@dataclass(frozen=True)
class Method:
    """One pruning method.

    Attributes:
        name: as in prune_model(model, name).      help: one line.
        function: (weight [out_features, in_features], hessian, *, pattern, mask, **options) ->
            (weight', mask, Details or None). weight' has zeros where the bool mask is False and is
            new; so is the mask, True = kept. weight is not changed in place. `hessian` is a
            Hessian, or None where there is no calibration. `mask`: None, or one that was given and
            has to be kept to. `pattern` is the tuple (n, m) and has a `unit`: a Pattern.
        needs: "weights" (nothing of the calibration), "norms" (Hessian.act_norm), "hessian", or
            "outputs" (the block: see finish).
        options: the keywords of the function and of finish; each gets those that it takes.
        updates: the function changes weights that are kept. Without it a given mask is applied
            without calling the function.
        stacked: rows are independent, and the rows of all layers with one input are pruned in one
            call.
        refine: default of prune_model(refine=), steps.
        match_dense: default of prune_model(match_dense=); None where it makes no sense.
        finish: with needs="outputs", called once a block has masks and weights everywhere:
            (block, {module: mask}, {module: dense weight}, **options). It may change kept weights
            in place, and returns nothing. Weights are [out_features, in_features].
        together: the function takes team=, None or several processes that each call it with the
            same arguments, and return the same (prune/team.py).
        work: (rows, width, **options) -> about the multiplications of a call, to divide layers
            between processes by; None: width² x (width + 2 x rows).
    """

    name: str
    help: str
    function: Callable[..., Pruned]
    needs: str = "weights"
    options: tuple[Option, ...] = ()
    updates: bool = False
    stacked: bool = False
    refine: int = 0
    match_dense: float | None = None
    finish: Callable[..., None] | None = None
    together: bool = False
    work: Callable[..., float] | None = None

    def __post_init__(self) -> None:
        op = "sparsekern.prune.Method"
        check_fields(op, self)
        kinds = [type(option).__name__ for option in self.options]
        ours = all(isinstance(option, Option) for option in self.options)
        check(ours, op, "options: a tuple of Option", kinds, exc=TypeError)

    def values(self, op: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """{option: value}: what was given, and the defaults.

        Raises:
            ValueError: an option that the method does not have, or a value that does not fit.
        """
        known = {option.name: option for option in self.options}
        for name in given:
            expected = f"options of {self.name}: {', '.join(known) or 'none'}"
            check(name in known, op, expected, repr(name), "Leave it out.")
        values = {name: given.get(name, option.default) for name, option in known.items()}
        for name, value in values.items():
            option = known[name]
            check(option.accepts(value), op, f"{name}, {option.expected}", repr(value))
        return values

    def call(
        self, function: Callable[..., Any], *args: Any, values: Mapping[str, Any], **more: Any
    ) -> Any:
        """function(*args, **more), with those of the options that it takes."""
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        taken = {p.name for p in parameters}
        return function(
            *args, **more, **{k: v for k, v in values.items() if takes_all or k in taken}
        )


_METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Make a method known by its name, to prune_model and the command line. Returns it.

    Raises:
        TypeError: not a Method.
        ValueError: a name that is taken or not a word; another value of needs; needs="outputs"
            without finish or the reverse; match_dense for a method that changes no weights; an
            option named as what every method is called with. One that prune_model has, other than
            damp and blocksize, is refused there.
    """
    op = "sparsekern.prune.register_method"
    check(isinstance(method, Method), op, "a Method", type(method).__name__, exc=TypeError)
    taken = method.name in _METHODS and _METHODS[method.name] is not method
    check(not taken, op, "a name that is free", repr(method.name), "Choose another.")
    word = method.name.replace("-", "_").isidentifier()
    check(word, op, "a name of letters, digits, - and _", repr(method.name))
    check(method.needs in NEEDS, op, f"needs in {NEEDS}", repr(method.needs))
    paired = (method.needs == "outputs") == (method.finish is not None)
    check(paired, op, 'finish with needs="outputs", and only then', method.needs)
    useful = method.match_dense is None or method.updates
    check(useful, op, "match_dense=None where updates is False", method.match_dense)
    reserved = {"pattern", "mask", "refine", "match_dense"} & {o.name for o in method.options}
    remedy = "prune_model has it already."
    check(not reserved, op, "options with names of their own", sorted(reserved), remedy)
    _METHODS[method.name] = method
    return method


@checked("sparsekern.prune.unregister_method")
def unregister_method(name: str) -> None:
    """Forget a method. Raises ValueError when there is none of that name."""
    check(name in _METHODS, "sparsekern.prune.unregister_method", f"one of {names()}", repr(name))
    del _METHODS[name]


def methods() -> dict[str, Method]:
    """Every known method by name, in order of registration."""
    return dict(_METHODS)


def names() -> tuple[str, ...]:
    """The names of the known methods."""
    return tuple(_METHODS)


def from_scores(score: Callable[..., Tensor], name: str | None = None, help: str = "") -> Method:
    """A method that keeps the weights of highest score as they are.

    Args:
        score: (weight [out_features, in_features], Hessian or None) -> scores of the same shape,
            higher = kept.
        name: None: the function's own.
    """

    def function(
        weight: Tensor,
        hessian: Hessian | None,
        *,
        pattern: tuple[int, int],
        mask: Tensor | None = None,
    ) -> Pruned:
        scores = score(weight.clone(), hessian)  # it may work in place
        is_tensor = isinstance(scores, Tensor)
        expected = f"scores [out_features, in_features] = {list(weight.shape)}"
        shape = tuple(scores.shape) if is_tensor else type(scores).__name__
        remedy = "Return one score per weight, higher = kept."
        shape = "a meta tensor" if is_tensor and scores.is_meta else shape
        fits = is_tensor and scores.shape == weight.shape and not scores.is_meta
        check(fits, f"sparsekern.prune method {label}", expected, shape, remedy)
        kept = Pattern.of(pattern)
        mask = nm_mask(scores.to(weight.device), *kept, kept.unit)
        return weight.masked_fill(~mask, 0), mask, None

    label = name or str(getattr(score, "__qualname__", "score"))
    return Method(label, help or "scores by a function", function)


def find_method(op: str, method: str | Method | Callable[..., Tensor]) -> Method:
    """The Method that a caller's name, Method or score function stands for.

    Raises:
        ValueError: nothing of that name.
    """
    if isinstance(method, Method):
        return method
    if callable(method):
        return from_scores(method)
    expected = f"method in {names()} or a function (w, hessian) -> scores"
    remedy = "Register a method of your own with sparsekern.prune.register_method."
    check(isinstance(method, str) and method in _METHODS, op, expected, repr(method), remedy)
    return _METHODS[method]


def is_number(value: Any, low: float = -math.inf) -> bool:
    """A finite int or float, not a bool, from `low` on: for Option.accepts."""
    return type(value) in (int, float) and math.isfinite(value) and value >= low


def is_count(value: Any, low: int = 0) -> bool:
    """An int, not a bool, from `low` on: for Option.accepts."""
    return type(value) is int and value >= low


def apply_mask(weight: Tensor, mask: Tensor) -> Pruned:
    """The weight with zeros where the mask is False, as a method returns it."""
    mask = mask.to(weight.device, torch.bool)
    return weight.masked_fill(~mask, 0), mask, None
