"""Reconstruction over windows of several blocks, once a model is pruned, and the rows that it is
trained on. oneshot/reconstruct.py says what is fitted to what."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.replace import dense_weight, is_linear
from sparsekern.oneshot.calibration import Batch
from sparsekern.oneshot.devices import on_device
from sparsekern.oneshot.fit import Loss, fit, held_out, kept_weights, repeatable, training
from sparsekern.oneshot.levels import Levels
from sparsekern.oneshot.rounds import OP, Fit, Reconstruction
from sparsekern.oneshot.sequential import Call, Walk, call_block, first_tensor

CACHED_SHARE = 0.3  # of the free memory that targets may take, else they are computed each time
# Per weight that is trained: value, gradient, AdamW's two, mask and two copies in float32, and the
# dense model's. Per token and channel of a block: what its backward pass needs, with an MLP three
# times as wide.
STATE_BYTES, ACTIVATION_BYTES = 30, 96
Quantized = dict[nn.Module, Sparse24]
PIECES = 4  # that a row is cut into by recut


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
        masks: linear layer -> bool mask [out, in]; changed with reselect.
        final: the norm behind the last block.
        batches: what the walk was made of; rows of token ids for recut.
        recapture: batches -> a Walk of them, captured; for recut.
    """

    def __init__(
        self,
        walk: Walk,
        teachers: Sequence[nn.Module],
        masks: dict[nn.Module, Tensor],
        options: Reconstruction,
        final: nn.Module | None,
        recapture: Callable[[list[Batch]], Walk] | None = None,
    ) -> None:
        self.walk, self.teachers, self.masks = walk, list(teachers), masks
        self.options, self.final, self.recapture = options, final, recapture
        self.windows = windows(len(walk.blocks), options.span)
        self._dense = list(walk.hidden)
        self._at = 0  # the block whose inputs `hidden` are
        self._left = options.seconds

    def fit(
        self,
        number: int,
        quantize: Callable[[], tuple[Quantized, dict[nn.Module, Tensor]]] | None = None,
    ) -> Fit:
        """Train window `number`; windows before it hold their final weights.

        quantize: called on the device, with the inputs of the window at hand; its layers hold what
            it returns then: their weights quantised, and what they were before. They are trained
            through the levels, and the quantised weights are changed to what has come of it.
        """
        begin = time.perf_counter()
        first, end = self.windows[number]
        seconds = None if self._left is None else self._left / (len(self.windows) - number)
        self._advance(first)
        blocks = self.walk.blocks[first:end]
        teachers = self.teachers[first:end]
        final = [self.final] if self.final is not None else []
        with all_on([*blocks, *teachers, *final], self.walk.device):
            if seconds is not None:
                seconds = max(0.0, seconds - (time.perf_counter() - begin))
            found = None if quantize is None else quantize()
            done = self._train(first, end, blocks, teachers, seconds, found)
        if self._left is not None:
            self._left = max(0.0, self._left - (time.perf_counter() - begin))
        return done

    def _train(
        self,
        first: int,
        end: int,
        blocks: list[nn.Module],
        teachers: list[nn.Module],
        seconds: float | None,
        found: tuple[Quantized, dict[nn.Module, Tensor]] | None = None,
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
        loss = Loss(options, used, given, wanted, walk)
        inside = {id(m) for block in blocks for m in block.modules()}
        modules = [m for m in self.masks if id(m) in inside]
        weights_of = kept_weights(modules, self.masks)
        check(weights_of, OP, f"2:4 layers in the blocks {first} to {end - 1}", "none")
        numbers = list(range(first, end))
        with training(weights_of, options, walk.device, blocks, teachers) as trained:
            count = len(walk.calls)
            levels = None
            if found is not None:
                weights24, starts = found
                levels = Levels(
                    trained, [weights24[m] for m in modules], [starts[m] for m in modules]
                )
            knobs: dict[str, Any] = {"new_epoch": data.new_epoch, "seconds": seconds}
            done = fit(trained, count, loss, options, numbers, "span", levels=levels, **knobs)
        if found is not None and levels is not None and done.kept:
            found[0].update(zip(modules, levels.weights()))
        if options.reselect and done.kept:
            for module in self.masks:
                if id(module) in inside:
                    self.masks[module] = dense_weight(module) != 0
        return done

    @torch.no_grad()
    def _advance(self, block: int) -> None:
        """Bring both models' hidden states to the inputs of `block`."""
        walk = self.walk
        while self._at < block:
            teacher = self.teachers[self._at]
            with all_on([teacher, walk.blocks[self._at]], walk.device):
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
        with torch.compiler.set_stance("force_eager"):  # its hooks are not to be compiled
            self._new = repeatable(lambda: recapture(batches))

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
        shift = int(torch.randint(stream.numel(), (1,), generator=generator, device="cpu"))
        piece = max(1, length // PIECES)
        piece = piece if length % piece == 0 else length
        pieces = stream.roll(shift).view(-1, piece)
        order = torch.randperm(pieces.shape[0], generator=generator, device="cpu")
        rows = pieces[order].reshape(-1, length)
        if noise:
            others = stream[
                torch.randint(stream.numel(), rows.shape, generator=generator, device="cpu")
            ]
            rows = torch.where(
                torch.rand(rows.shape, generator=generator, dtype=torch.float32, device="cpu")
                < noise,
                others,
                rows,
            )
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
        leaf = not any(True for _ in module.children()) and not is_linear(module)
        if leaf and id(module) not in inside and any(True for _ in module.parameters()):
            handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad():
            batch.run(model, home)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@contextlib.contextmanager
def all_on(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """The modules on the device, and back."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(on_device(module, device))
        yield
