"""Reconstruction over several ranks: each has some rows of every batch, and all take every step
together.

A step of one process is the gradient of one batch. Here it is the sum over the ranks of the
gradients of their rows, each with the share of the batch's tokens that count. It is the same step
up to the order in which floats are added, and the sum has the same bits on all ranks. A batch that
cannot be cut (fewer rows than ranks, or a call with tensors that are neither of its rows nor of
all) is run as a whole by every rank, which then counts for one rank's share of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sparsekern.oneshot.calibration import Batch
from sparsekern.oneshot.ranks import Ranks
from sparsekern.oneshot.rounds import Reconstruction
from sparsekern.oneshot.sequential import Call, Walk


def splits(options: Reconstruction | None) -> bool:
    """Whether ranks can take a round together: each token counts by itself, targets are the walk's,
    and no clock decides."""
    if options is None:
        return True
    plain = options.target == "dense" and options.parts == "block" and options.loss == "token"
    return options.span == 1 and plain and options.seconds is None


def portion(
    walk: Walk, index: int, batches: Sequence[Batch], ranks: Ranks
) -> tuple[Walk, list[float]]:
    """This rank's rows of all batches at block `index`: a Walk with inputs, targets and calls of
    that block, and what share of each batch's tokens they are.

    Args:
        walk: this rank's own, of batches rank, rank + world, ...; the dense model is through it.
    """
    where = (walk.device, walk.home, walk.offload)
    found = Walk(walk.model, walk.blocks, [], walk.shown, *where)
    shares: list[float] = []
    for first in range(0, len(batches), ranks.world):
        some = batches[first : first + ranks.world]
        own, mine = first // ranks.world, cast(Any, None)
        if ranks.rank < len(some):
            mine = walk.hidden[own], walk.dense_outputs[own], walk.calls[own][index]
        for batch, sent in zip(some, ranks.in_turn(mine, len(some)), strict=True):
            shares.append(_take(found, batch, index, ranks, *sent))
    return found, shares


def _take(
    found: Walk, batch: Batch, index: int, ranks: Ranks, hidden: Tensor, target: Tensor, call: Call
) -> float:
    """Add this rank's rows of a batch to its walk; what share of the batch's tokens they are."""
    rows, share = slice(None), 1 / ranks.world
    if _divides(call, hidden, ranks.world):
        size = len(hidden)
        rows = slice(size * ranks.rank // ranks.world, size * (ranks.rank + 1) // ranks.world)
        counted, of = (_counted(batch, hidden, part) for part in (rows, slice(None)))
        share = counted / max(1, of)
    found.batches.append(_cut(batch, rows, len(hidden)))
    found.calls.append([_of(call, rows, len(hidden))] * (index + 1))
    found.hidden.append(found.keep(hidden[rows].clone()))
    found.dense_outputs.append(found.keep(target[rows].clone()))
    return share


def _divides(call: Call, hidden: Tensor, world: int) -> bool:
    """Whether the rows of a call can be told from everything else in it."""
    samples = len(hidden)
    if hidden.dim() < 3 or samples < world or samples == hidden.shape[1]:
        return False
    return all(len(t) in (1, samples) for t in _tensors(call) if t.dim() > 1)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [t for v in inner for t in _tensors(v)] if isinstance(value, (tuple, list, dict)) else []


def _of(value: Any, rows: slice, samples: int) -> Any:
    """A call with those rows of what has one for each sample."""
    if isinstance(value, Tensor):
        own = value.dim() > 1 and len(value) == samples
        return value[rows] if own else value
    if isinstance(value, (tuple, list)):
        return type(value)(_of(v, rows, samples) for v in value)
    if isinstance(value, dict):
        return {k: _of(v, rows, samples) for k, v in value.items()}
    return value


def _counted(batch: Batch, hidden: Tensor, rows: slice) -> int:
    """The tokens of those rows that are no padding."""
    for keep in batch.keep:
        if keep.shape == hidden.shape[:-1]:
            return int(keep[rows].sum())
    return hidden[rows].numel() // hidden.shape[-1]


def _cut(batch: Batch, rows: slice, samples: int) -> Batch:
    keep = tuple(k[rows] if len(k) == samples else k for k in batch.keep)
    return Batch((), {}, samples, batch.tokens, keep)


def add_up(ranks: Ranks, parameters: Sequence[torch.nn.Parameter], error: Tensor) -> None:
    """After this rank's backward pass: gradients and error of the whole batch, in place."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    ranks.add_up(*[p.grad for p in parameters if p.grad is not None], error)
