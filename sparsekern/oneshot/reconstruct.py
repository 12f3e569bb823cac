"""Reconstruction: the kept weights of pruned blocks by gradient descent on hidden states.

A layer's own solver sees one matrix. What a block does with it, and what the blocks after it make
of the error, it does not see. Here the kept weights of `span` blocks in a row move together until
the blocks return what the dense model has at that place:

    E = mean over tokens of  Σ_j  w_j · ‖y_j − t_j‖² / ‖t_j‖²

    y_j  hidden states after block j of the span, from the pruned model's inputs
    t_j  the same of the dense model, from the dense model's inputs (target="dense"), or of the
         span's dense blocks on the pruned model's inputs (target="pruned")
    w_j  1 at the end of the span, `between` / (span − 1) before it

Behind the last block both pass the model's final norm: what the head reads is compared. The head is
not run: there is no loss on logits, no label, and no token is predicted.

    span 1          inside prune_model's walk, after each block is pruned and before its outputs
                    become the next block's inputs; memory of one block
    span n, None    after the walk, windows of n blocks from front to back (None: the whole model)

Masks are fixed (unless with reselect): gradients of pruned weights are zeroed. The gains of norms
stay: a gain is a factor on the columns of the weights that read it, and those are free.

Source: for single blocks Guo et al. 2024, "EBFT" (arXiv:2402.12419), and "3BASiL"
(arXiv:2603.01376).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.backends.compress import compress
from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.replace import dense_weight, is_linear, replace_module, write_weight
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.nn.wrappers import whole
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot.calibration import make_batches
from sparsekern.oneshot.devices import check_changeable, check_data
from sparsekern.oneshot.executor import Calibration
from sparsekern.oneshot.fit import Loss, fit, kept_weights, training
from sparsekern.oneshot.levels import Levels
from sparsekern.oneshot.ranks import Ranks
from sparsekern.oneshot.rounds import OP, Fit, Given, Reconstruction, as_rounds, warn_unjudged
from sparsekern.oneshot.selection import select
from sparsekern.oneshot.sequential import Call, Walk, call_block
from sparsekern.oneshot.spans import SpanRound, final_norm, rebatch
from sparsekern.utils.arguments import checked


def reconstruct_block(
    block: nn.Module,
    index: int,
    walk: Walk,
    masks: Mapping[nn.Module, Tensor],
    dense: Mapping[nn.Module, Tensor],
    options: Reconstruction,
    final: nn.Module | None = None,
    seconds: float | None = None,
    ranks: Ranks | None = None,
    shares: Sequence[float] = (),
    levels: dict[nn.Module, Sparse24] | None = None,
    starts: Mapping[nn.Module, Tensor] | None = None,
) -> list[Fit]:
    """Move the kept weights of one pruned block towards the dense block's outputs, in place.

    Args:
        block: on the walk's device.      index: of it.
        walk: its `hidden` are the block's inputs in the pruned model. With target="dense" the dense
            model has been walked through this block (Walk.dense_block).
        masks, dense: of each pruned linear layer, bool and dense weight [out, in].
        final: the norm behind the block, for the last one.
        seconds: for this block, or None.
        ranks, shares: of which each has a part of every batch in its walk, and those parts
            (portion.py).
        levels, starts: of each layer in masks, its weight quantised, which the block has now, and
            from what, [out, in]. It is trained through its levels then (levels.py), and `levels`
            holds what has come of it.
    """
    device = walk.device
    calls = [batch_calls[index] for batch_calls in walk.calls]
    apart = options.parts == "sublayers"
    known = options.target == "dense" and not apart  # the walk has the targets
    teacher = None if known else _dense_copy(block, dense)

    def inputs(i: int) -> Tensor:
        return walk.hidden[i].to(device)

    parts: list[tuple[str, list[nn.Module]]] = [("block", list(masks))]
    middle = None
    if apart:
        middle = find_middle(block, calls[0], inputs(0)[:1] if _sliceable(calls[0]) else inputs(0))
        expected = f"{type(block).__name__} with an attention and an MLP part"
        check(middle is not None, OP, expected, "another form", 'Use parts="block".')
        inside = {id(m) for m in cast(nn.Module, middle[1] if middle else None).modules()}
        parts = [
            ("attention", [m for m in masks if id(m) not in inside]),
            ("mlp", [m for m in masks if id(m) in inside]),
        ]
    names = dict(block.named_modules())
    fits = []
    for part, modules in parts:
        if not modules:
            continue
        until = None
        if part == "attention" and middle is not None:
            until = next(name for name, module in names.items() if module is middle[0])

        def run(net: nn.Module, i: int, hidden: Tensor, until: str | None = until) -> Tensor:
            if until is None:
                return call_block(net, calls[i], hidden)
            return _input_of(net, net.get_submodule(until), calls[i], hidden)

        made: dict[int, Tensor] = {}

        def wanted(i: int, run: Any = run, made: dict[int, Tensor] = made) -> Tensor:
            if teacher is None:
                return walk.dense_output(i)
            if i not in made:
                start = walk.dense_input(i) if options.target == "dense" else inputs(i)
                with torch.no_grad():
                    made[i] = walk.keep(run(teacher, i, start))
            return made[i].to(device)

        def seen(hidden: Tensor, until: str | None = until) -> list[Tensor]:
            return [final(hidden) if final is not None and until is None else hidden]

        def given(i: int, run: Any = run, seen: Any = seen) -> list[Tensor]:
            return cast("list[Tensor]", seen(run(block, i, inputs(i))))

        def goal(i: int, wanted: Any = wanted, seen: Any = seen) -> list[Tensor]:
            return cast("list[Tensor]", seen(wanted(i)))

        whole = Loss(options, [1.0], given, goal, walk)

        def loss(i: int, whole: Loss = whole) -> Tensor:
            return whole(i) * shares[i] if ranks is not None else whole(i)

        with training(kept_weights(modules, masks), options, device, [block]) as trained:
            share = None if seconds is None else seconds / len(parts)
            knobs: dict[str, Any] = {"seconds": share, "ranks": ranks}
            through = None
            if levels is not None and starts is not None:
                own = [levels[m] for m in modules], [starts[m] for m in modules]
                through = Levels(trained, *own)
            knobs["levels"] = through
            fits.append(fit(trained, len(calls), loss, options, [index], part, **knobs))
        if levels is not None and through is not None and fits[-1].kept:
            levels.update(zip(modules, through.weights()))
    return fits


def find_middle(block: nn.Module, call: Call, hidden: Tensor) -> tuple[nn.Module, nn.Module] | None:
    """(what reads the hidden states between attention and MLP, the MLP) of a block whose last child
    with linear layers is its MLP, and whose child before that is the norm that feeds it."""
    order: list[nn.Module] = []
    children = list(block.children())
    handles = [
        child.register_forward_pre_hook(lambda module, args: order.append(module))
        for child in children
    ]
    try:
        with torch.no_grad():
            call_block(block, call, hidden)
    finally:
        for handle in handles:
            handle.remove()
    linear = [i for i, m in enumerate(order) if any(is_linear(c) for c in m.modules())]
    if len(linear) < 2 or linear[-1] == 0:
        return None
    return order[linear[-1] - 1], order[linear[-1]]


class _Seen(Exception):
    """Raised inside a block once the wanted hidden states are known."""


def _input_of(net: nn.Module, reader: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    """What `reader` inside `net` is given."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Seen

    handle = reader.register_forward_pre_hook(hook)
    try:
        with contextlib.suppress(_Seen):
            call_block(net, call, hidden)
    finally:
        handle.remove()
    return seen[0]


def _sliceable(call: Call) -> bool:
    """Whether a recorded call holds nothing per sample."""
    values = [*call[0], *call[1].values()]
    return not any(isinstance(v, Tensor) and v.dim() and v.shape[0] > 1 for v in values)


def _dense_copy(block: nn.Module, dense: Mapping[nn.Module, Tensor]) -> nn.Module:
    """The block with its dense weights."""
    made = copy.deepcopy(block).requires_grad_(False)
    ours = dict(block.named_modules())
    for name, module in made.named_modules():
        weight = dense.get(ours[name]) if name in ours else None
        if weight is not None:
            write_weight(module, weight)
    return made


@checked(OP)
def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    calibration: Any,
    rounds: Given = True,
    *,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    tokenizer: Callable[..., Any] | None = None,
    progress: bool = True,
) -> list[Fit]:
    """Move the kept weights of a model that is 2:4 already towards the hidden states of its dense
    original, in place: E of the module's text, under the masks that the weights have.

    Args:
        model: a chain of decoder blocks; SparseLinear layers, or dense ones with zeros. Layers
            that are not 2:4 stay as they are.
        dense: the model that it was pruned from (after its rotation, if it had one).
        calibration, device, batch_size, tokenizer: as in prune_model.
        rounds: a Reconstruction, its keywords, or a list of them; True: all blocks together with
            the other defaults. With span=1 each block is trained by itself, front to back.
    Returns:
        one Fit per window and round.
    Raises:
        ValueError: no chain; models that do not fit each other, such as a rotated one and the dense
            model before the rotation; no 2:4 layer, or quantised ones; values that do not fit.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    chosen = as_rounds({"span": None} if rounds is True else rounds, OP)
    apart = any(r.parts != "block" for r in chosen)
    check(not apart, OP, 'parts="block" on a model that is pruned', "sublayers")
    model, dense = whole(OP, model), whole(OP, dense)
    check_data(OP, model)
    check_changeable(OP, model)
    check_data(OP, dense, "dense")
    _, blocks = models.find_blocks(model)
    _, teachers = models.find_blocks(dense)
    check(bool(blocks), OP, "a model with decoder blocks", type(model).__name__)
    remedy = "Pass copy.deepcopy(model) from before the pruning."
    check(dense is not model, OP, "dense: a model of its own", "the model itself", remedy)
    expected, got = f"{len(blocks)} blocks in dense", len(teachers)
    check(len(blocks) == len(teachers), OP, expected, got, remedy)
    models.check_basis(OP, model, dense)
    fits: list[Fit] = []
    with torch.inference_mode(False), torch.no_grad(), _decompressed(model, blocks):
        selection = select(model, (), (2, 4), True, op=OP)
        walk = Calibration(model, selection, op=OP, device=device)
        walk.batches = make_batches(calibration, model, batch_size, walk.device, tokenizer, OP)
        warn_unjudged(chosen, len(walk.batches), OP, 4)
        walk.plan()
        check(walk.chained, OP, "a chain of decoder blocks", type(model).__name__)
        masks = _masks_of(blocks)
        check(bool(masks), OP, "2:4 layers in the blocks", "none", "Prune the model first.")
        with walk.evaluating():
            final = final_norm(model, blocks, walk.batches[0].probe(), walk.home)
            for number, options in enumerate(chosen):
                start = walk.captured(rebatch(walk.batches, options.batch))
                spans = SpanRound(start, teachers, masks, options, final, walk.captured)
                count, name = range(len(spans.windows)), f"reconstruct {number + 1}"
                for window in tqdm(count, name, unit="window", disable=not progress):
                    fits.append(spans.fit(window))
    return fits


def _masks_of(blocks: Sequence[nn.Module]) -> dict[nn.Module, Tensor]:
    """The linear layers of the blocks that are 2:4, with their non-zeros."""
    masks = {}
    for module in (m for block in blocks for m in block.modules() if is_linear(m)):
        weight = dense_weight(module)
        if weight.shape[1] % 4 == 0 and weight.numel():
            mask = weight != 0
            if int(mask.reshape(-1, 4).sum(1).max()) <= 2:
                masks[module] = mask
    return masks


@contextlib.contextmanager
def _decompressed(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """SparseLinear layers of the blocks as dense ones for the duration, and back with the values
    that these then have."""
    changed: list[tuple[SparseLinear, nn.Linear]] = []
    sparse = [m for b in blocks for m in b.modules() if isinstance(m, SparseLinear)]
    levels = [m.weight.spec.storage for m in sparse if not m.weight.spec.element.plain]
    remedy = "Call sparsekern.compress_model(model, quantize=...) afterwards, or "
    remedy += "prune_model(quantize=..., reconstruct=...), which trains through the levels."
    got = f"{len(levels)} that are stored as {', '.join(sorted(set(levels)))}"
    check(not levels, OP, "2:4 layers of plain numbers", got, remedy)
    for old in sparse:
        weight = old.weight.to_dense()
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.bias = old.bias  # type: ignore[assignment]
        replace_module(model, old, new)
        changed.append((old, new))
    try:
        yield
    finally:
        for old, new in changed:
            weight = dense_weight(new)
            old.weight = compress(weight, weight != 0).to(old.weight.device)
            replace_module(model, new, old)
