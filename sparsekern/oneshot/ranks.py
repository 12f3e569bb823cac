"""Several processes of torch.distributed that prune one model together, with the masks and weights
of one process, bit for bit; with reconstruction up to rounding.

Every rank has the model and all of the calibration data. What is split:

    forwards     batch b runs on rank b mod N, and its hidden states stay there
    Hessians     each rank gets every layer's input, batch by batch in order, and computes its own
                 blocks of columns of H (and rows of G) by the products that one process computes;
                 zeros elsewhere, so that the sum over ranks is exact (shared_collector.py)
    solving      a group of layers that read one input is solved on one rank, which gives weights
                 and masks to the others; a large one on all, some rows and some of the inverses on
                 each (prune/team.py)
    fits         of one block: each rank has some rows of every batch, and gradients are added up
                 (portion.py)

But for the fits no float is added up in another order than in one process, so the number of ranks
changes nothing but the time. It takes ranks with one kind of device.

All ranks go through the same steps. Before each exchange they agree (one small reduction over gloo,
on the CPU) that nobody has failed and that all are at the same step. A rank that an exception ends
says so in the next agreement, and every other one raises a RankError with its number and message.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor

from sparsekern.errors import check, message
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.fingerprint import bits_of

logger = logging.getLogger("sparsekern")
TIMEOUT = "SPARSEKERN_RANK_TIMEOUT"
SECONDS = 1800
UNEVEN = 1.05  # times the mean: the most work of one rank, where some of it can be divided


class RankError(RuntimeError):
    """Another rank failed, is gone, or does something else."""


def _world(ranks: Any, op: str) -> Any:
    """The process group to work in; None for this process alone."""
    fits = ranks is False or ranks == "auto" or hasattr(ranks, "rank")
    expected = 'ranks "auto", False or a process group of torch.distributed'
    check(fits, op, expected, repr(ranks), exc=TypeError)
    if ranks is False:
        return None
    if ranks != "auto":
        return ranks if ranks.size() > 1 else None
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    return dist.group.WORLD


@contextlib.contextmanager
def joined(ranks: Any, op: str) -> Iterator[Ranks | None]:
    """The ranks that this call is one of, None for a process alone. An exception inside ends the
    others, too. All but rank 0 are silent.

    Args:
        ranks: "auto": all of an initialised torch.distributed; a process group; False.
    """
    group = _world(ranks, op)
    if group is None:
        yield None
        return
    crew = Ranks(group, op)
    level = logger.level
    try:
        with warnings.catch_warnings():
            if crew.rank:
                logger.setLevel(logging.CRITICAL)
                warnings.simplefilter("ignore", UserWarning)
            yield crew
            crew.agree()  # nobody leaves before all are done
    except BaseException as error:
        crew.fail(error)
        if hasattr(error, "add_note") and not isinstance(error, RankError):
            error.add_note(f"{op}: this was rank {crew.rank} of {crew.world}.")
        raise
    finally:
        logger.setLevel(level)
        crew.close()


class Ranks:
    """One rank's view of the others.

    Attributes:
        rank, world: of the group.      device: where its tensors are; set by the caller.
    """

    def __init__(self, group: Any, op: str) -> None:
        dist = torch.distributed
        self.op, self._data = op, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._members = dist.get_process_group_ranks(group)
        self.seconds = _seconds(op)
        alone = len(self._members) < dist.get_world_size()
        self.device = torch.device("cpu")
        self._broken = False
        self._step = 0
        try:
            self._control = dist.new_group(
                self._members,
                timeout=timedelta(seconds=self.seconds),
                backend="gloo",
                use_local_synchronization=alone,
            )
        except RuntimeError as problem:
            raise self._gone(problem) from problem

    def close(self) -> None:
        """Give the group of the agreements back."""
        if not self._broken:
            torch.distributed.destroy_process_group(self._control)
        self._broken = True

    # ------------------------------------------------------------------------------- agreements

    def agree(self) -> None:
        """Wait until every rank is here.

        Raises:
            RankError: one has failed (its number and message), is gone, has not come in time, or is
                at another step.
        """
        self._status(None)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends with an exception."""
        if not self._broken and not isinstance(error, RankError):
            with contextlib.suppress(RankError):
                self._status(error)
        self._broken = True

    def _status(self, error: BaseException | None) -> None:
        dist = torch.distributed
        self._step += 1
        state = torch.tensor([error is not None, self._step, -self._step], device="cpu")
        try:
            dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self._control)
            failed, last, first = state.tolist()
            if not failed and last == -first:
                return
            texts: list[str | None] = [None] * self.world
            own = None if error is None else _in_words(error)
            dist.all_gather_object(texts, own, group=self._control)
        except RuntimeError as problem:  # a closed connection, or the timeout
            raise self._gone(problem) from problem
        self._broken = True
        said = "; ".join(f"rank {i} failed: {text}" for i, text in enumerate(texts) if text)
        steps = f"ranks at steps {-first} to {last}: they were called with different arguments"
        raise RankError(f"{self.op}: {said or steps}")

    def _gone(self, problem: RuntimeError) -> RankError:
        self._broken = True
        got = " ".join(str(problem).split())[:200]
        remedy = (
            f"A rank is gone, was never started with this call, or took longer than "
            f"{self.seconds} s; give it more with {TIMEOUT}=SECONDS, or pass ranks=False where "
            "only one rank calls."
        )
        expected = f"all {self.world} ranks at step {self._step}"
        return RankError(message(self.op, expected, got, remedy))

    # -------------------------------------------------------------------------------- exchanges

    def share(self, value: Any, source: int) -> Any:
        """What rank `source` calls it with; tensors inside are where they were there, on this
        rank's device or the host."""
        return self._sent(value, source)()

    def in_turn(self, value: Any, count: int) -> Iterator[Any]:
        """What ranks 0, 1, ... of the first `count` call it with, as `share` gives it: the next one
        is under way while one is worked on."""
        waiting: list[Callable[[], Any]] = []
        for source in range(count):
            waiting.append(self._sent(value if source == self.rank else None, source))
            if source >= self.rank:
                value = None
            if source:
                yield waiting.pop(0)()
        if waiting:
            yield waiting.pop(0)()

    def _sent(self, value: Any, source: int) -> Callable[[], Any]:
        """Send rank `source`'s value; what is returned waits for it and has it."""
        dist, here = torch.distributed, self.rank == source
        sender = self._members[source]
        tensors: list[Tensor] = []
        box: list[Any] = [None]
        if here:
            box = [(*_packed(value, tensors), [_form(t) for t in tensors])]
        self.agree()
        dist.broadcast_object_list(box, src=sender, group=self._control)
        text, forms = box[0]
        wire = self._wire()
        buffers = [
            bits_of(tensors[i]).to(wire)
            if here
            else torch.empty(size, dtype=torch.uint8, device=wire)
            for i, (_, _, size, _) in enumerate(forms)
        ]
        if buffers:
            self.agree()
        group = self._data if wire.type == "cuda" else self._control
        under_way = [
            dist.broadcast(buffer, src=sender, group=group, async_op=True)
            for buffer in buffers
            if buffer.numel()
        ]

        def arrived() -> Any:
            for work in under_way:
                work.wait()  # on a GPU its stream waits, not this process
            if here:
                return value
            found = []
            for buffer, (dtype, shape, _, on_host) in zip(buffers, forms, strict=True):
                tensor = buffer.view(dtype).view(shape)
                found.append(tensor.to("cpu" if on_host else self.device))
            return _unpacked(text, found)

        return arrived

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks, in place."""
        self.agree()
        for tensor in tensors:
            sent = tensor.to(self._wire())
            group = self._data if sent.is_cuda else self._control
            torch.distributed.all_reduce(sent, group=group)
            if sent is not tensor:
                tensor.copy_(sent)

    def same(self, what: str, value: Any, remedy: str) -> None:
        """ValueError on every rank unless `value` (of plain values) is equal on all of them."""
        sums: list[str] = [""] * self.world
        own = hashlib.sha256(repr(value).encode()).hexdigest()
        self.agree()
        torch.distributed.all_gather_object(sums, own, group=self._control)
        others = [i for i, text in enumerate(sums) if text != sums[0]]
        if others:
            self._broken = True
            check(
                False,
                self.op,
                f"the same {what} on every rank",
                f"other on rank {others[0]}",
                remedy,
            )

    def same_weights(self, layers: Sequence[Layer], where: str) -> None:
        """ValueError on every rank unless the weights of these layers have equal bits on all."""
        sums = [_checksum(cast(Tensor, layer.module.weight)) for layer in layers]
        self.same(f"weights in {where}", sums, "Load the same model on each.")

    def _wire(self) -> torch.device:
        """Where tensors travel: on the GPU with NCCL, else on the host."""
        cuda = self.device.type == "cuda"
        backend = str(torch.distributed.get_backend_config(self._data)) if cuda else ""
        return self.device if "nccl" in backend else torch.device("cpu")


def _seconds(op: str) -> int:
    text = os.environ.get(TIMEOUT, str(SECONDS))
    check(text.isdecimal() and int(text) > 0, op, f"{TIMEOUT} as whole seconds", repr(text))
    return int(text)


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _checksum(tensor: Tensor) -> int:
    """The sum of the bits, as integers of the elements' size."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(kinds[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


Form = tuple[torch.dtype, torch.Size, int, bool]


def _form(tensor: Tensor) -> Form:
    return tensor.dtype, tensor.shape, tensor.numel() * tensor.element_size(), tensor.is_cpu


def _packed(value: Any, tensors: list[Tensor]) -> tuple[bytes]:
    """A value as text, its tensors apart."""
    file = io.BytesIO()
    _Pickler(file, tensors).dump(value)
    return (file.getvalue(),)


def _unpacked(text: bytes, tensors: Sequence[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(text), tensors).load()


# Classes of the module: one that is made in a call is a cycle of references, and holds all that the
# call knows, the tensors, until the garbage collector comes by.


class _Pickler(pickle.Pickler):
    """Puts tensors into a list, once each, and their numbers into the file."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors
        self.place: dict[int, int] = {}

    def persistent_id(self, item: Any) -> int | None:
        if not isinstance(item, Tensor):
            return None
        if id(item) not in self.place:
            self.place[id(item)] = len(self.tensors)
            self.tensors.append(item)
        return self.place[id(item)]


class _Unpickler(pickle.Unpickler):
    """Takes them from there."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: Any) -> Tensor:
        return self.tensors[int(number)]


def assigned(costs: Sequence[float], world: int) -> list[int]:
    """A rank for each of these parts of a work, the largest first, each to who has least."""
    loads, ranks = [0.0] * world, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        ranks[i] = loads.index(min(loads))
        loads[ranks[i]] += costs[i]
    return ranks


def divided(costs: Sequence[float], world: int, least: float) -> list[int | None]:
    """A rank for each of these parts of a work, None for those that all do together: of at least
    that cost, the largest first, until no rank has over a twentieth more than the mean."""
    owners: list[int | None] = [None] * len(costs)
    alone = sorted(range(len(costs)), key=lambda i: costs[i])
    total, shared = sum(costs), 0.0
    while alone:
        ranks, loads = assigned([costs[i] for i in alone], world), [shared / world] * world
        for i, rank in zip(alone, ranks):
            loads[rank] += costs[i]
        if max(loads) <= UNEVEN * total / world or costs[alone[-1]] < least:
            for i, rank in zip(alone, ranks):
                owners[i] = rank
            break
        shared += costs[alone.pop()]
    return owners
