"""The block-by-block walk: the decoder blocks of a model run one at a time, each on the outputs of
the pruned block before it.

One pass runs everything except the blocks: each block is replaced by a stub that records the call
(masks, position embeddings, every keyword) and hands its input on. What the stubs recorded is
enough to call block i alone on any hidden states, so afterwards only one block at a time has to be
on the accelerator:

    embeddings ─► [stub 0] ─► [stub 1] ─► ...      once: calls recorded, inputs of block 0 kept
    hidden ─► block 0 (Hessians) ─► prune ─► block 0 again ─► hidden of block 1 ─► block 1 ...
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsekern.errors import message
from sparsekern.oneshot.calibration import Batch, move
from sparsekern.oneshot.devices import quiet
from sparsekern.oneshot.discovery import Layer

OP = "sparsekern.oneshot.Walk"
# Share of the free accelerator memory that the hidden states may take before they are kept on the
# host.
RESIDENT_SHARE = 0.4
# Distinct tensors of one shape that a recorded one is compared with (cos, sin, global and local
# masks, ...).
SHARED_CANDIDATES = 8


class StopForward(Exception):
    """Raised inside a forward once everything needed has been seen."""


class Hidden:
    """Stands for the hidden states in a recorded call."""

    def __reduce__(self) -> str:
        return "HIDDEN"  # of which there is one in each process


HIDDEN = Hidden()
logger = logging.getLogger("sparsekern")


Call = tuple[tuple[Any, ...], dict[str, Any]]


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states of a block's call, and the call with HIDDEN in their place: the first
    positional argument, or the keyword `hidden_states`."""
    if args and isinstance(args[0], Tensor):
        return args[0], (HIDDEN, *args[1:]), kwargs
    hidden = kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        expected = "decoder blocks that take the hidden states first or as hidden_states="
        got = f"positional {[type(a).__name__ for a in args]}, keywords {sorted(kwargs)}"
        remedy = "Prune the blocks one by one as plain modules."
        raise ValueError(message(OP, expected, got, remedy))
    return hidden, args, {**kwargs, "hidden_states": HIDDEN}


def first_tensor(output: Any) -> Any:
    """The hidden states in a block's output: the output itself or the first element of a tuple or
    list."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _plain(tensor: Tensor) -> Tensor:
    """The tensor, copied where it was made in inference mode: autograd could not save it."""
    return tensor.clone() if tensor.is_inference() else tensor


def _own_cache(value: Any) -> Any:
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value


def call_block(block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    """Run one block alone on `hidden`, with the rest of the call as recorded. A cache of keys and
    values in the call is copied: the block appends to it."""
    args, kwargs = move(call, hidden.device)
    args = tuple(_own_cache(a) for a in args)
    kwargs = {k: _own_cache(v) for k, v in kwargs.items()}
    args = tuple(hidden if a is HIDDEN else a for a in args)
    kwargs = {k: hidden if v is HIDDEN else v for k, v in kwargs.items()}
    return cast(Tensor, first_tensor(block(*args, **kwargs)))


@contextlib.contextmanager
def stubbed(blocks: list[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of block i by make(i) for the duration; attributes and hooks of the
    blocks stay."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for i, block in enumerate(blocks):
            block.forward = make(i)
        yield
    finally:
        for block, own in zip(blocks, before):
            block.__dict__.pop("forward", None)
            if own is not None:
                block.forward = own


@dataclass
class Probe:
    """What one short forward of the untouched model shows.

    chained: block i+1 receives exactly what block i returned, for all i, each called once, in
        order.
    returns_tuple: per block, whether it returns a tuple.
    last: what the last block returned.
    before, after: names of the Linear layers outside the blocks that run before the first and after
    the last block.
    """

    chained: bool  # also False when a Linear outside the blocks runs between two of them
    returns_tuple: list[bool]
    before: list[str]
    after: list[str]
    last: Any = None


def probe(
    model: nn.Module,
    blocks: list[nn.Module],
    outside: list[Layer],
    batch: Batch,
    device: torch.device,
) -> Probe:
    """Run `batch` once and watch the blocks and the Linear layers outside them."""
    order: list[int] = []
    inputs: dict[int, Any] = {}
    outputs: dict[int, Any] = {}
    seen = Probe(True, [], [], [])
    between: list[str] = []
    handles: list[RemovableHandle] = []

    def watch_block(index: int) -> None:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            order.append(index)
            inputs[index] = args[0] if args else kwargs.get("hidden_states")
            outputs[index] = output

        handles.append(blocks[index].register_forward_hook(hook, with_kwargs=True))

    def watch_layer(layer: Layer) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            place = (
                seen.before if not order else seen.after if len(order) == len(blocks) else between
            )
            place.append(layer.name)

        handles.append(layer.module.register_forward_pre_hook(hook))

    try:
        for index in range(len(blocks)):
            watch_block(index)
        for layer in outside:
            watch_layer(layer)
        batch.run(model, device)
    finally:
        for handle in handles:
            handle.remove()
    seen.chained = order == list(range(len(blocks))) and not between
    if seen.chained:
        pairs = zip(range(len(blocks) - 1), range(1, len(blocks)))
        seen.chained = all(inputs[j] is first_tensor(outputs[i]) for i, j in pairs)
        seen.chained &= all(isinstance(first_tensor(out), Tensor) for out in outputs.values())
        seen.returns_tuple = [isinstance(outputs[i], tuple) for i in range(len(blocks))]
        seen.last = first_tensor(outputs[len(blocks) - 1])
        try:
            seen.chained &= _walks(model, blocks, batch, seen, device)
        except Exception as error:  # whatever these blocks need: the model is calibrated as a whole
            logger.info("the blocks cannot be run one by one: %s: %s", type(error).__name__, error)
            seen.chained = False
    return seen


def _walks(
    model: nn.Module, blocks: list[nn.Module], batch: Batch, shown: Probe, device: torch.device
) -> bool:
    """Whether the blocks, run one by one on recorded calls, give what the model gave, and what
    follows runs on that: a block may return more than its hidden states (a position bias for the
    next one, the states of another input), or read what a block before it left behind."""
    walk = Walk(model, blocks, [batch], shown, device, device, None)
    for _ in walk.capture():
        pass
    for index in range(len(blocks)):
        for _ in walk.block(index, keep=True):
            pass
    for _ in walk.head():
        pass
    got, expected = walk.hidden[0], shown.last.to(walk.hidden[0].device)
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    slack = 1e-3 * float(expected.abs().amax().nan_to_num(0, 0, 0)) if expected.numel() else 0.0
    return torch.allclose(got, expected, rtol=1e-2, atol=slack, equal_nan=True)


class Walk:
    """The hidden states of all batches on their way through the blocks.

    Args:
        model, blocks: blocks as found by models.find_blocks.
        batches: calibration.      shown: result of `probe`.
        device: where blocks run.  home: where the rest of the model is.
        offload: True keeps the hidden states on the host, False on `device`, a folder in files of
            it that go with the process; None decides by free memory.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        batches: list[Batch],
        shown: Probe,
        device: torch.device,
        home: torch.device,
        offload: bool | str | os.PathLike[str] | None,
    ) -> None:
        self.model, self.blocks, self.batches, self.shown = model, blocks, batches, shown
        self.device, self.home = device, home
        self.offload = offload
        self.calls: list[list[Call]] = []
        self.begin: Callable[[Batch], None] = lambda batch: None  # called before each forward
        self.hidden: list[Tensor] = []
        self.sets = 1  # of hidden states that will be kept
        # The dense model's, when somebody walks them: inputs of block `_dense_block`, its outputs.
        self._dense: list[Tensor] = []
        self.dense_outputs: list[Tensor] = []
        self._dense_block = -1

    def capture(self) -> Iterator[None]:
        """Record the call of every block for every batch, and the inputs of block 0; yields after
        each batch."""
        shared = _SharedTensors(self.device)
        for batch in self.batches:
            inputs: list[Tensor] = []
            calls: list[Call] = []

            def record(
                index: int,
                hidden: Tensor,
                call: Call,
                inputs: list[Tensor] = inputs,
                calls: list[Call] = calls,
            ) -> Tensor:
                inputs.append(hidden)
                calls.append(shared(call))
                return hidden

            self._run_stubbed(batch, record)
            shared.by_id.clear()
            if self.offload is None:
                self.offload = self._too_large(inputs[0])
            self.calls.append(calls)
            self.hidden.append(self.keep(inputs[0]))
            yield

    def block(self, index: int, keep: bool) -> Iterator[None]:
        """Run block `index` batch by batch, yielding after each; keep=True: the outputs become the
        hidden states."""
        for i, calls in enumerate(self.calls):
            self.begin(self.batches[i])
            output = call_block(self.blocks[index], calls[index], self.hidden[i].to(self.device))
            if keep:
                self.hidden[i] = self.keep(output)
            yield

    def dense_block(self, index: int) -> Iterator[None]:
        """Run block `index`, not pruned yet, on the dense model's hidden states, batch by batch,
        yielding after each. To be called for every block, once or more, in order."""
        if index != self._dense_block:
            self._dense = list(self.hidden) if index == 0 else self.dense_outputs
            self.dense_outputs = list(self._dense)
            self._dense_block = index
        for i, calls in enumerate(self.calls):
            self.begin(self.batches[i])
            output = call_block(self.blocks[index], calls[index], self._dense[i].to(self.device))
            self.dense_outputs[i] = self.keep(output)
            yield

    def stem(self) -> Iterator[None]:
        """Run what comes before the blocks, batch by batch."""
        for batch in self.batches:
            self._run_stubbed(batch, lambda index, hidden, call: hidden, stop_at=0)
            yield

    def head(self) -> Iterator[None]:
        """Run what comes after the blocks on the hidden states, which have to be the outputs of the
        last block."""
        for batch, last in zip(self.batches, self.hidden):

            def take(index: int, hidden: Tensor, call: Call, last: Tensor = last) -> Tensor:
                return last.to(hidden.device)

            self._run_stubbed(batch, take, stop_at=None)
            yield

    def _run_stubbed(
        self, batch: Batch, visit: Callable[[int, Tensor, Call], Tensor], stop_at: int | None = -1
    ) -> None:
        """Run the model with stubs for blocks. Stub i calls visit(i, hidden, call) and returns what
        that returns; the forward ends in stub `stop_at` (-1: the last), or with the model for
        None."""
        stop = len(self.blocks) - 1 if stop_at == -1 else stop_at

        def make(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = split_hidden(args, kwargs)
                hidden = visit(index, hidden, (args, kwargs))
                if index == stop:
                    raise StopForward
                return (hidden,) if self.shown.returns_tuple[index] else hidden

            return forward

        self.begin(batch)
        with stubbed(self.blocks, make), contextlib.suppress(StopForward):
            batch.run(self.model, self.home)

    def keep(self, hidden: Tensor) -> Tensor:
        """Hidden states where this walk keeps them: on the device, on the host, or in a file."""
        if isinstance(self.offload, (str, os.PathLike)):
            return _in_file(hidden, self.offload)
        return _plain(hidden).to("cpu" if self.offload else self.device)

    def inputs(self) -> Iterator[Tensor]:
        """The present hidden states, batch by batch, on the device."""
        for hidden in self.hidden:
            yield hidden.to(self.device)

    def dense_inputs(self) -> Iterator[Tensor]:
        """The same of the dense model, once `dense_block` has run for this block."""
        for hidden in self._dense:
            yield hidden.to(self.device)

    def dense_input(self, index: int) -> Tensor:
        """Batch `index` of them, on the device."""
        return self._dense[index].to(self.device)

    def free_dense_inputs(self) -> None:
        """Free the dense model's inputs of this block, once its outputs are known."""
        self._dense = []

    def dense_output(self, index: int) -> Tensor:
        """What the dense block made of that."""
        return self.dense_outputs[index].to(self.device)

    def _too_large(self, hidden: Tensor) -> bool:
        if self.device.type != "cuda":
            return False
        tokens = sum(batch.tokens for batch in self.batches)
        free = torch.cuda.mem_get_info(self.device)[0]
        size = self.sets * tokens * hidden.element_size() * hidden.shape[-1]
        return size > RESIDENT_SHARE * free


def _in_file(tensor: Tensor, folder: str | os.PathLike[str]) -> Tensor:
    """The tensor in the memory of a file without a name, which ends with it. What is not in use can
    leave the host's memory."""
    descriptor, name = tempfile.mkstemp(prefix="sparsekern-", dir=folder)
    try:
        os.close(descriptor)
        kept = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return kept.view(tensor.shape).copy_(tensor)
    finally:
        os.unlink(name)


class _SharedTensors:
    """Maps a recorded call to the same call with equal tensors replaced by one object, on `device`.

    Every block of every batch receives the same masks and position embeddings; one copy of each is
    kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_id: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # holds the source, so that no id is reused
        self.by_shape: dict[tuple[Any, ...], list[Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._one(value)
        if type(value) in (tuple, list):
            return type(value)(self(v) for v in value)
        return {k: self(v) for k, v in value.items()} if type(value) is dict else value

    @quiet
    def _one(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self.by_id:
            return self.by_id[id(tensor)][1]
        moved = _plain(tensor).to(self.device)
        known = self.by_shape.setdefault((moved.shape, moved.dtype), [])
        kept = next((k for k in known if torch.equal(k, moved)), None)
        if kept is None:
            kept = moved
            if len(known) < SHARED_CANDIDATES:
                known.append(moved)
        self.by_id[id(tensor)] = (tensor, kept)
        return kept
