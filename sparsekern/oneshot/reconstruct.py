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

Masks are fixed: gradients of pruned weights are zeroed. The gains of norms stay: a gain is a factor
on the columns of the weights that read it, and those are free.

Source: for single blocks Guo et al. 2024, "EBFT" (arXiv:2402.12419), and "3BASiL"
(arXiv:2603.01376).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sparsekern.backends.compress import compress
from sparsekern.errors import check
from sparsekern.nn.replace import dense_weight, is_conv1d, replace_module, write_weight
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot.calibration import Batch, make_batches
from sparsekern.oneshot.executor import Calibration, on_device
from sparsekern.oneshot.selection import select
from sparsekern.oneshot.sequential import Call, Walk, call_block, first_tensor

OP = "sparsekern.reconstruct"
logger = logging.getLogger("sparsekern")
T = TypeVar("T")
TARGETS, PARTS, LOSSES = ("dense", "pruned"), ("block", "sublayers"), ("token", "channel", "mse")
CACHED_SHARE = 0.3  # of the free memory that targets may take, else they are computed each time
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# Per weight that is trained: value, gradient, AdamW's two, mask and two copies in float32, and the
# dense model's. Per token and channel of a block: what its backward pass needs, with an MLP three
# times as wide.
STATE_BYTES, ACTIVATION_BYTES = 30, 96
PIECES = 4  # that a row is cut into by recut


@dataclass(frozen=True)
class Reconstruction:
    """One round of reconstruction.

    Attributes:
        span: blocks that are trained together; 1: each block right after it is pruned; None: all of
            them, after the walk. Windows of more than one block move on by half of their span.
        epochs: passes over the calibration rows that are not held out.
        lr: of AdamW (betas 0.9 and 0.95, no decay), after `warmup` of the steps; then a cosine to
            0. One step is one forward batch (prune_model's batch_size).
        target: "dense": what the dense model has there; "pruned": the dense blocks on the inputs
            that the pruned model gives them.
        between: weight of the blocks inside the span.
        parts: "block", or "sublayers": attention on the hidden states between it and the MLP
            first, then the MLP (span 1 only).
        loss: "token": each token's error relative to its size, as the next norm sees it; "channel":
            of that each channel relative to its variance; "mse": the sum of squares.
        recut: rows are cut and joined anew for each epoch, in other places and another order, so
            that tokens are seen in other contexts (all blocks, rows of token ids only).
        noise: with recut, the share of the tokens that are exchanged for random tokens of the text.
            Nothing has to be predicted: the dense model's hidden states are known for any input.
        batch: rows per step, for rounds after the walk on rows of token ids; None: as they are
            batched for the walk. More and smaller steps go further with the same tokens.
        warmup: share of the steps.      held_out: share of the batches, at least one where there
            are two; they decide when to stop and which weights are kept.
        patience: epochs without a lower held-out error before it stops; None: all epochs run, and
            the best weights count. While the rate is high the error may be, too.
        checkpoint: keep only the inputs of blocks for the backward pass (less memory, more time).
        compile: torch.compile the blocks; worth its start on long runs.
        seed: of the order of batches, and of recut.
    """

    span: int | None = 1
    epochs: int = 6
    lr: float = 6e-4
    target: str = "dense"
    between: float = 0.0
    parts: str = "block"
    loss: str = "token"
    recut: bool = False
    noise: float = 0.0
    batch: int | None = None
    warmup: float = 0.05
    held_out: float = 0.1
    patience: int | None = None
    checkpoint: bool = False
    compile: bool = False
    seed: int = 0

    def check(self, op: str = OP) -> None:
        """Raises ValueError for a value that does not fit."""

        def number(value: Any, low: float, high: float = math.inf) -> bool:
            return type(value) in (int, float) and low <= value <= high and math.isfinite(value)

        whole = type(self.span) is int and self.span >= 1
        check(self.span is None or whole, op, "span >= 1 or None", repr(self.span))
        for name, low in (("epochs", 1), ("patience", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            check(type(value) is int and value >= low, op, f"{name} >= {low}", repr(value))
        check(number(self.lr, 0) and self.lr > 0, op, "lr > 0", repr(self.lr))
        check(number(self.between, 0), op, "between >= 0", repr(self.between))
        for name in ("warmup", "held_out", "noise"):
            value = getattr(self, name)
            check(number(value, 0, 0.5), op, f"{name} from 0 to 0.5", repr(value))
        for name, known in (("target", TARGETS), ("parts", PARTS), ("loss", LOSSES)):
            value = getattr(self, name)
            check(value in known, op, f"{name} in {known}", repr(value))
        whole_block = self.parts == "block" or self.span == 1
        check(whole_block, op, 'parts="block" with a span of several blocks', repr(self.parts))
        check(not self.recut or self.span is None, op, "span=None with recut", repr(self.span))
        rows = self.batch is None or (type(self.batch) is int and self.batch >= 1)
        check(rows, op, "batch >= 1 or None", repr(self.batch))
        later = self.batch is None or self.span != 1
        check(later, op, "batch=None with span=1", self.batch, "prune_model(batch_size=) is it.")
        check(self.recut or not self.noise, op, "noise=0 without recut", repr(self.noise))


Given = Reconstruction | Mapping[str, Any] | Sequence[Any] | bool | None


def as_rounds(given: Given, op: str = OP) -> tuple[Reconstruction, ...]:
    """The rounds that a caller means: True is one with the defaults, a dict its keywords.

    Raises:
        ValueError: values that do not fit; a round inside the walk after one behind it.
        TypeError: something else.
    """
    if given is None or given is False:
        return ()
    items = given if isinstance(given, Sequence) else [given]
    rounds = []
    for item in items:
        if item is True:
            item = Reconstruction()
        elif isinstance(item, Mapping):
            known = [f.name for f in fields(Reconstruction)]
            unknown = sorted(set(item) - set(known))
            check(not unknown, op, f"keywords of Reconstruction: {known}", unknown)
            item = Reconstruction(**item)
        remedy = "Pass sparsekern.Reconstruction(...), or a list of them."
        kind = type(item).__name__
        check(isinstance(item, Reconstruction), op, "a Reconstruction", kind, remedy, TypeError)
        item.check(op)
        rounds.append(item)
    late = [r.span != 1 for r in rounds]
    check(late == sorted(late), op, "rounds with span=1 before the others", "another order")
    check(late.count(False) <= 1, op, "at most one round with span=1", late.count(False))
    return tuple(rounds)


def described(rounds: Sequence[Reconstruction]) -> list[dict[str, Any]]:
    """The rounds as JSON-able values."""
    return [asdict(r) for r in rounds]


@dataclass
class Fit:
    """What one fit did. before, after: the held-out error E (of the training batches where nothing
    is held out). train: mean of E over the last epoch's steps; far below `after` it is over-fitted.
    epochs: that ran. kept: whether the new weights were better, and are in place."""

    blocks: list[int]
    before: float
    after: float
    epochs: int
    steps: int
    kept: bool
    seconds: float
    train: float
    part: str = "block"

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


# ------------------------------------------------------------------------------------- one block


def reconstruct_block(
    block: nn.Module,
    index: int,
    walk: Walk,
    masks: Mapping[nn.Module, Tensor],
    dense: Mapping[nn.Module, Tensor],
    options: Reconstruction,
    final: nn.Module | None = None,
) -> list[Fit]:
    """Move the kept weights of one pruned block towards the dense block's outputs, in place.

    Args:
        block: on the walk's device.      index: of it.
        walk: its `hidden` are the block's inputs in the pruned model. With target="dense" the dense
            model has been walked through this block (Walk.dense_block).
        masks, dense: of each pruned linear layer, bool and dense weight [out, in].
        final: the norm behind the block, for the last one.
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

        loss = _Loss(
            options,
            [1.0],
            lambda i, run=run, seen=seen: seen(run(block, i, inputs(i))),
            lambda i, wanted=wanted, seen=seen: seen(wanted(i)),
            walk,
        )
        with _training(_weights(modules, masks), options, device, [block]) as trained:
            fits.append(_fit(trained, len(calls), loss, options, [index], part))
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
    linear = [i for i, m in enumerate(order) if any(_has_weight(c) for c in m.modules())]
    if len(linear) < 2 or linear[-1] == 0:
        return None
    return order[linear[-1] - 1], order[linear[-1]]


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


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


# ------------------------------------------------------------------------------- several blocks


def windows(blocks: int, span: int | None) -> list[tuple[int, int]]:
    """(first, end) of the windows of `span` blocks that overlap by half; the last one ends with the
    model."""
    if span is None or span >= blocks:
        return [(0, blocks)]
    step = max(1, span // 2)
    starts = list(range(0, blocks - span, step))
    return [(a, a + span) for a in [*starts, blocks - span]]


def fitting(
    options: Reconstruction, blocks: Sequence[nn.Module], batches: Sequence[Batch], memory: int
) -> Reconstruction:
    """The round as it fits half of the memory of a device (bytes): as it is, with checkpoint, or
    over windows of fewer blocks and without recut. An estimate from sizes, so that two runs on one
    kind of device agree."""
    if options.span is not None:
        return options
    weights = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    width = max((p.shape[-1] for p in blocks[0].parameters() if p.dim() == 1), default=weights // 8)
    tokens = max(batch.tokens for batch in batches)
    training = STATE_BYTES * weights
    inside, between = tokens * width * ACTIVATION_BYTES, tokens * width * 8
    half = memory // 2
    if len(blocks) * (training + inside) <= half:
        return options
    span = int((half - inside) // (training + between))
    if span >= len(blocks):
        return replace(options, checkpoint=True)
    return replace(options, checkpoint=True, span=max(1, span), recut=False, noise=0.0)


class SpanRound:
    """One round over windows of several blocks, after the walk.

    Args:
        walk: freshly captured: `hidden` are the inputs of block 0.
        teachers: the dense blocks, anywhere; moved to the device while they are needed.
        masks: linear layer -> bool mask [out, in].      final: the norm behind the last block.
        batches: what the walk was made of; rows of token ids for recut.
        recapture: batches -> a Walk of them, captured; for recut.
    """

    def __init__(
        self,
        walk: Walk,
        teachers: Sequence[nn.Module],
        masks: Mapping[nn.Module, Tensor],
        options: Reconstruction,
        final: nn.Module | None,
        recapture: Callable[[list[Batch]], Walk] | None = None,
    ) -> None:
        self.walk, self.teachers, self.masks = walk, list(teachers), masks
        self.options, self.final, self.recapture = options, final, recapture
        self.windows = windows(len(walk.blocks), options.span)
        self._dense = list(walk.hidden)
        self._at = 0  # the block whose inputs `hidden` are

    def fit(self, number: int) -> Fit:
        """Train window `number`; windows before it hold their final weights."""
        first, end = self.windows[number]
        self._advance(first)
        blocks = self.walk.blocks[first:end]
        teachers = self.teachers[first:end]
        final = [self.final] if self.final is not None else []
        with _all_on([*blocks, *teachers, *final], self.walk.device):
            return self._train(first, end, blocks, teachers)

    def _train(
        self, first: int, end: int, blocks: list[nn.Module], teachers: list[nn.Module]
    ) -> Fit:
        walk, options = self.walk, self.options
        final = self.final if end == len(walk.blocks) else None
        inner = options.between / max(1, len(blocks) - 1)
        weights = [inner] * (len(blocks) - 1) + [1.0]
        cached = not options.recut and self._fits(sum(w > 0 for w in weights))
        made: dict[int, list[Tensor]] = {}
        data = _Rows(walk, self._dense, first, options, self.recapture)

        def run(nets: list[nn.Module], i: int, hidden: Tensor, grad: bool) -> list[Tensor]:
            outputs = []
            for j, net in enumerate(nets):
                call = data.call(i, first + j)
                if grad and options.checkpoint:
                    from torch.utils.checkpoint import checkpoint

                    hidden = checkpoint(call_block, net, call, hidden, use_reentrant=False)
                else:
                    hidden = call_block(net, call, hidden)
                last = j == len(nets) - 1
                if weights[j]:
                    outputs.append(final(hidden) if last and final is not None else hidden)
            return outputs

        @torch.no_grad()
        def wanted(i: int) -> list[Tensor]:
            if i in made:
                return made[i]
            start = data.dense(i) if options.target == "dense" else data.hidden(i)
            targets = [t.to(walk.hidden[0].dtype) for t in run(teachers, i, start, False)]
            if cached or i >= data.held_from:
                made[i] = targets
            return targets

        used = [w for w in weights if w]
        given = lambda i: run(blocks, i, data.hidden(i), torch.is_grad_enabled())  # noqa: E731
        loss = _Loss(options, used, given, wanted, walk)
        inside = {id(m) for block in blocks for m in block.modules()}
        weights_of = _weights([m for m in self.masks if id(m) in inside], self.masks)
        check(weights_of, OP, f"2:4 layers in the blocks {first} to {end - 1}", "none")
        numbers = list(range(first, end))
        with _training(weights_of, options, walk.device, blocks) as trained:
            count = len(walk.calls)
            return _fit(trained, count, loss, options, numbers, "span", data.new_epoch)

    @torch.no_grad()
    def _advance(self, block: int) -> None:
        """Bring both models' hidden states to the inputs of `block`."""
        walk = self.walk
        while self._at < block:
            teacher = self.teachers[self._at]
            with _all_on([teacher, walk.blocks[self._at]], walk.device):
                for i, calls in enumerate(walk.calls):
                    hidden = self._dense[i].to(walk.device)
                    self._dense[i] = walk.keep(call_block(teacher, calls[self._at], hidden))
                for _ in walk.block(self._at, True):
                    pass
            self._at += 1

    def _fits(self, outputs: int) -> bool:
        """Whether the targets of all batches can stay on the device."""
        size = outputs * sum(h.numel() * h.element_size() for h in self.walk.hidden)
        if self.walk.device.type != "cuda":
            return size < 2**31
        return size < CACHED_SHARE * torch.cuda.mem_get_info(self.walk.device)[0]


class _Rows:
    """The inputs of a window batch by batch, and with recut other ones in each epoch; the batches
    that are held out stay as they are."""

    def __init__(
        self,
        walk: Walk,
        dense: list[Tensor],
        first: int,
        options: Reconstruction,
        recapture: Callable[[list[Batch]], Walk] | None,
    ) -> None:
        self.walk, self._dense, self.options = walk, dense, options
        self.held_from = len(walk.calls) - held_out(len(walk.calls), options)
        self.recapture = recapture if options.recut and first == 0 else None
        self._new: Walk | None = None
        if options.recut:
            _check_plain(walk.batches, "recut")

    def new_epoch(self, epoch: int) -> None:
        """Other rows for the batches that are trained on; epoch 0 sees the given ones."""
        if self.recapture is None or not epoch:
            return
        options = self.options
        trained = self.walk.batches[: self.held_from]
        batches = recut(trained, options.seed + epoch, options.noise)
        self._new = None  # its memory is free before the next one is made
        recapture = self.recapture
        self._new = _repeatable(lambda: recapture(batches))

    def _of(self, i: int) -> Walk:
        return self._new if self._new is not None and i < self.held_from else self.walk

    def call(self, i: int, block: int) -> Call:
        return self._of(i).calls[i][block]

    def hidden(self, i: int) -> Tensor:
        return self._of(i).hidden[i].to(self.walk.device)

    def dense(self, i: int) -> Tensor:
        walk = self._of(i)
        source = self._dense if walk is self.walk else walk.hidden
        return source[i].to(self.walk.device)


def recut(batches: Sequence[Batch], seed: int, noise: float = 0.0) -> list[Batch]:
    """The same tokens in rows of the same lengths: the rows of each length one after the other,
    turned by a random number of tokens, in pieces of a quarter row in random order. `noise` is the
    share of them that is exchanged for others of them."""
    generator = torch.Generator().manual_seed(seed)
    by_length: dict[int, list[Tensor]] = {}
    for batch in batches:
        ids = batch.kwargs["input_ids"]
        by_length.setdefault(ids.shape[1], []).append(ids.reshape(-1))
    made: dict[int, Tensor] = {}
    for length, parts in by_length.items():
        stream = torch.cat(parts)
        shift = int(torch.randint(stream.numel(), (1,), generator=generator))
        piece = max(1, length // PIECES)
        piece = piece if length % piece == 0 else length
        pieces = stream.roll(shift).view(-1, piece)
        order = torch.randperm(pieces.shape[0], generator=generator)
        rows = pieces[order].reshape(-1, length)
        if noise:
            others = stream[torch.randint(stream.numel(), rows.shape, generator=generator)]
            rows = torch.where(torch.rand(rows.shape, generator=generator) < noise, others, rows)
        made[length] = rows
    result, used = [], dict.fromkeys(made, 0)
    for batch in batches:
        samples, length = batch.kwargs["input_ids"].shape
        rows = made[length][used[length] : used[length] + samples]
        used[length] += samples
        result.append(Batch((), {**batch.kwargs, "input_ids": rows}, samples, batch.tokens))
    return result


def rebatch(batches: Sequence[Batch], rows: int | None) -> list[Batch]:
    """The rows of token ids in batches of `rows`; as they are with None.

    Raises:
        ValueError: calls that hold more than token ids.
    """
    if rows is None:
        return list(batches)
    _check_plain(batches, "batch")
    made = []
    for batch in batches:
        for ids in torch.split(batch.kwargs["input_ids"], rows):
            made.append(Batch((), {**batch.kwargs, "input_ids": ids}, ids.shape[0], ids.numel()))
    return made


def _check_plain(batches: Sequence[Batch], name: str) -> None:
    plain = all(
        not batch.args
        and not batch.keep
        and isinstance(batch.kwargs.get("input_ids"), Tensor)
        and set(batch.kwargs) <= {"input_ids", "use_cache"}
        for batch in batches
    )
    check(plain, OP, f"rows of token ids with {name}", "calls with more", f"Leave {name} out.")


def final_norm(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Batch, home: torch.device
) -> nn.Module | None:
    """The module that is given what the last block returns and returns the same shape: the final
    norm. None where there is none."""
    inside = {id(m) for block in blocks for m in block.modules()}
    last: list[Tensor] = []
    found: list[nn.Module] = []

    def after_block(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        last.append(first_tensor(output))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not last or not args or args[0] is not last[-1] or found:
            return
        if isinstance(output, Tensor) and output.shape == last[-1].shape:
            found.append(module)

    handles = [blocks[-1].register_forward_hook(after_block)]
    for module in model.modules():
        leaf = not any(True for _ in module.children()) and not _has_weight(module)
        if leaf and id(module) not in inside and any(True for _ in module.parameters()):
            handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad():
            batch.run(model, home)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


# ------------------------------------------------------------------------------- a pruned model


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
        ValueError: no chain; models that do not fit each other; no 2:4 layer; values that do not
            fit.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    chosen = as_rounds({"span": None} if rounds is True else rounds, OP)
    apart = any(r.parts != "block" for r in chosen)
    check(not apart, OP, 'parts="block" on a model that is pruned', "sublayers")
    model, dense = models.unwrapped(model), models.unwrapped(dense)
    _, blocks = models.find_blocks(model)
    _, teachers = models.find_blocks(dense)
    check(bool(blocks), OP, "a model with decoder blocks", type(model).__name__)
    check(len(blocks) == len(teachers), OP, f"{len(blocks)} blocks in dense", len(teachers))
    fits: list[Fit] = []
    with torch.inference_mode(False), torch.no_grad(), _decompressed(model, blocks):
        selection = select(model, (), (2, 4), True, op=OP)
        walk = Calibration(model, selection, op=OP, device=device)
        walk.batches = make_batches(calibration, model, batch_size, walk.device, tokenizer, OP)
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
    for module in (m for block in blocks for m in block.modules() if _has_weight(m)):
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
    changed: list[tuple[SparseLinear, nn.Module]] = []
    for old in [m for b in blocks for m in b.modules() if isinstance(m, SparseLinear)]:
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


# --------------------------------------------------------------------------------------- the fit


class _Loss:
    """E of one batch."""

    def __init__(
        self,
        options: Reconstruction,
        weights: list[float],
        given: Callable[[int], list[Tensor]],
        wanted: Callable[[int], list[Tensor]],
        walk: Walk,
    ) -> None:
        self.options, self.weights, self.given, self.wanted = options, weights, given, wanted
        self.walk = walk
        self.scales: list[Tensor | None] = [None] * len(weights)

    def __call__(self, index: int) -> Tensor:
        targets = self.wanted(index)
        outputs = self.given(index)
        parts = []
        for j, (weight, y, t) in enumerate(zip(self.weights, outputs, targets)):
            t = t.float()
            error = (y.float() - t).square()
            if self.options.loss == "channel":
                error = error * self._scale(j, t)
            counted = self._counted(index, t)
            size = t.square().sum(-1)
            if self.options.loss == "mse":
                total = (size * counted).sum()
                parts.append(weight * (error.sum(-1) * counted).sum() / total.clamp_min(1e-30))
            else:
                relative = error.sum(-1) / size.clamp_min(1e-30)
                parts.append(weight * (relative * counted).sum() / counted.sum().clamp_min(1))
        return torch.stack(parts).sum()

    def _counted(self, index: int, t: Tensor) -> Tensor:
        """1 for each token that counts, 0 for padding: [samples, tokens]."""
        if index < len(self.walk.batches):
            for keep in self.walk.batches[index].keep:
                if keep.shape == t.shape[:-1]:
                    return keep.to(t.device, torch.float32)
        return torch.ones(t.shape[:-1], device=t.device)

    def _scale(self, j: int, t: Tensor) -> Tensor:
        """1 / variance of each channel over the tokens of the first batch seen, each of unit size;
        its mean over channels is 1."""
        if self.scales[j] is None:
            unit = t / t.square().mean(-1, keepdim=True).clamp_min(1e-30).sqrt()
            variance = unit.reshape(-1, t.shape[-1]).var(0).clamp_min(1e-6)
            inverse = variance.reciprocal()
            self.scales[j] = inverse / inverse.mean()
        return cast(Tensor, self.scales[j])


@dataclass
class _Trained:
    """A parameter, in float32 while it is trained, and the mask of it (1 and 0, same shape)."""

    parameter: nn.Parameter
    mask: Tensor
    dtype: torch.dtype


def held_out(batches: int, options: Reconstruction) -> int:
    """How many of the last batches are held out."""
    if batches < 2 or options.held_out == 0:
        return 0
    return min(batches - 1, max(1, round(batches * options.held_out)))


def _fit(
    trained: list[_Trained],
    batches: int,
    loss: Callable[[int], Tensor],
    options: Reconstruction,
    blocks: list[int],
    part: str,
    new_epoch: Callable[[int], None] = lambda epoch: None,
) -> Fit:
    """AdamW on the kept weights; the weights in the end are the best of the held-out error, those
    before included."""
    start_time = time.perf_counter()
    count = held_out(batches, options)
    train, held = list(range(batches - count)), list(range(batches - count, batches))
    judged = held or train
    parameters = [t.parameter for t in trained]
    device = parameters[0].device

    @torch.no_grad()
    def error() -> float:
        return _repeatable(lambda: float(torch.stack([loss(i) for i in judged]).mean()))

    def round_to_stored() -> None:
        for t in trained:
            t.parameter.data.copy_(t.parameter.data.to(t.dtype))

    first = [p.detach().clone() for p in parameters]
    best, best_error = first, error()
    before = best_error
    optimizer = torch.optim.AdamW(
        parameters, options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
    )
    masks = [t.mask for t in trained]
    generator = torch.Generator().manual_seed(options.seed * 7919 + blocks[0])
    total, step, stale, epoch, last = options.epochs * len(train), 0, 0, 0, math.nan
    try:
        for epoch in range(options.epochs):
            new_epoch(epoch)
            losses = []
            for number in torch.randperm(len(train), generator=generator).tolist():
                rate = options.lr * _schedule(step, total, options.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                losses.append(_backward(loss, train[number], parameters))
                gradients = [cast(Tensor, p.grad) for p in parameters]
                torch._foreach_mul_(gradients, masks)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
            last = float(torch.stack(losses).mean())
            now = error()
            if now < best_error:
                best, best_error, stale = [p.detach().clone() for p in parameters], now, 0
            else:
                stale += 1
                if not math.isfinite(now) or (options.patience and stale >= options.patience):
                    break
        kept = best is not first
        if kept:
            with torch.no_grad():
                for p, value in zip(parameters, best):
                    p.copy_(value)
                round_to_stored()
            best_error = error()
            kept = best_error < before
        if not kept:
            best_error = before
            _put_back(parameters, first)
    except BaseException:
        _put_back(parameters, first)
        raise
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start_time
    return Fit(blocks, before, best_error, epoch + 1, step, kept, seconds, last, part)


def _repeatable(function: Callable[[], T]) -> T:
    """function(); where an operation has no deterministic form the other one is taken from then
    on, and it is called again."""
    try:
        return function()
    except RuntimeError as error:
        strict = torch.are_deterministic_algorithms_enabled()
        strict = strict and not torch.is_deterministic_algorithms_warn_only_enabled()
        if not strict or "deterministic" not in str(error):
            raise
        logger.info("%s: not bit for bit repeatable here: %s", OP, error)
        torch.use_deterministic_algorithms(True, warn_only=True)
        return function()


@torch.enable_grad()
def _backward(
    loss: Callable[[int], Tensor], index: int, parameters: Sequence[nn.Parameter]
) -> Tensor:
    """The gradients of one batch; returns its error."""

    def run() -> Tensor:
        for p in parameters:
            p.grad = None
        value = loss(index)
        value.backward()
        return value.detach()

    return _repeatable(run)


@torch.no_grad()
def _put_back(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values):
        p.copy_(value)


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear from 0, then a cosine to 0."""
    ramp = max(1, round(total * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


def _weights(
    modules: Sequence[nn.Module], masks: Mapping[nn.Module, Tensor]
) -> list[tuple[nn.Parameter, Tensor]]:
    """(weight as the module stores it, mask in the same form)."""
    return [
        (cast(nn.Parameter, m.weight), masks[m].t() if is_conv1d(m) else masks[m]) for m in modules
    ]


@contextlib.contextmanager
def _training(
    chosen: list[tuple[nn.Parameter, Tensor]],
    options: Reconstruction,
    device: torch.device,
    blocks: Sequence[nn.Module],
) -> Iterator[list[_Trained]]:
    """The chosen parameters of the blocks in float32 and with gradients, all others without, for
    the duration; products in bfloat16 on a GPU and where the model is stored in 16 bits."""
    every = list(dict.fromkeys(p for block in blocks for p in block.parameters()))
    before = [(p, p.dtype, p.requires_grad) for p in every]
    half = any(p.dtype.itemsize == 2 for p in every)
    calls = [(m, m._compiled_call_impl) for m in blocks]
    trained = [_Trained(p, mask.to(p.device, torch.float32), p.dtype) for p, mask in chosen]
    try:
        for p in every:
            p.requires_grad_(False)
        for t in trained:
            t.parameter.data = t.parameter.data.float()
            t.parameter.requires_grad_(True)
        if options.compile:
            for module, _ in calls:
                module.compile()
        lower = device.type == "cuda" or half
        products = torch.autocast(device.type, torch.bfloat16, enabled=lower, cache_enabled=False)
        with _deterministic(device), products:
            yield trained
    finally:
        for module, call in calls:
            module._compiled_call_impl = call
        for p, dtype, flag in before:
            p.grad = None
            p.requires_grad_(False)
            p.data = p.data.to(dtype)
            p.requires_grad_(flag)


@contextlib.contextmanager
def _all_on(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """The modules on the device, and back."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(on_device(module, device))
        yield


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Kernels that give the same bits each time where there are some: attention's backward pass
    adds up in a fixed order."""
    if device.type != "cuda":
        yield
        return
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    # torch asks for it before each product; on one stream the products are deterministic anyway.
    workspace = os.environ.get(WORKSPACE)
    try:
        os.environ.setdefault(WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Dd]eterminis.*")
            yield
    finally:
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = fills
