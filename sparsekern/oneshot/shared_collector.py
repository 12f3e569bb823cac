"""HessianCollector over several ranks: each runs some of the batches, and all of them see every
layer's input in the order of the batches, so that the Hessians are those of one process.

Hooks note what passes in a rank's own batch. After each round (one batch of every rank) the notes
of the batches are shared, one batch after the other, and every rank goes through them as hooks of
one process would: groups, experts' tokens and the pools of experts are the same everywhere. Of each
Hessian a rank computes its own blocks, which `add_up` puts together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern.errors import check
from sparsekern.oneshot.calibration import Batch
from sparsekern.oneshot.collector import HessianCollector, state_of
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.ranks import Ranks
from sparsekern.prune import Hessian


@dataclass
class Note:
    """What a hook saw. kind: "input", "dense" (the dense model's) or "pool" (tokens that reach a
    mixture of experts). name: of the layer, or the number of the mixture. tensor: into `tensors` of
    the batch. bare: without padding."""

    kind: str
    name: str
    tensor: int
    bare: bool


class SharedCollector(HessianCollector):
    """As HessianCollector, for one of several ranks.

    Args:
        ranks: all of them. batches: all of the calibration.
        beside: whether the dense model's inputs come, too; it doubles the work of a Hessian.
    """

    def __init__(
        self,
        layers: list[Layer],
        device: torch.device,
        share: bool,
        ranks: Ranks,
        batches: Sequence[Batch],
        beside: bool,
    ) -> None:
        super().__init__(layers, device, share)
        self.ranks, self.batches, self.beside = ranks, batches, beside
        self._loads = [0.0] * ranks.world
        self._notes: list[Note] = []
        self._tensors: list[Tensor] = []
        self._place: dict[tuple[int, int], int] = {}
        self._mixtures = list(self.experts.owners)
        self.experts.on_rows = self._rows

    def see(self, name: str, x: Tensor) -> None:
        """Note an input of this rank's batch."""
        self._note("dense" if self.watches_dense else "input", name, x)

    def _rows(self, owner: int, rows: Tensor) -> None:
        if self.experts.room(owner) > 0:
            self._note("pool", str(self._mixtures.index(owner)), rows)

    def _note(self, kind: str, name: str, x: Tensor) -> None:
        key = state_of(x)
        if key not in self._place:
            self._place[key] = len(self._tensors)
            self._tensors.append(x)
        self._notes.append(Note(kind, name, self._place[key], self.experts.bare))

    def walked(self, forwards: Iterator[None], first_only: bool) -> Iterator[int]:
        """Run this rank's batches; yields how many of all are behind."""
        world, rank = self.ranks.world, self.ranks.rank
        for first in range(0, len(self.batches), world):
            if first + rank < len(self.batches) and not (first_only and rank):
                next(forwards)
            self._check_unchanged()
            batches = self.batches[first : first + (1 if first_only else world)]
            coming = self.ranks.in_turn((self._notes, self._tensors), len(batches))
            self._notes, self._tensors = [], []
            self._place.clear()
            for number, batch in enumerate(batches, first + 1):
                self._replay(next(coming), batch)
                self.end_batch()
                yield number
            if first_only:
                return
        next(forwards, None)  # it ends

    def _replay(self, seen: tuple[list[Note], list[Tensor]], batch: Batch) -> None:
        """Go through one batch, as its hooks did on the rank that ran it."""
        notes, tensors = seen
        self.keep = batch.keep
        for note in notes:
            x = tensors[note.tensor]
            if note.kind == "pool":
                self.experts.pool(self._mixtures[int(note.name)], x)
                continue
            self.experts.bare = note.bare
            if note.kind == "dense":
                self.take_dense(note.name, x)
            else:
                self.take(note.name, x)
        self.experts.bare = False

    def _check_unchanged(self) -> None:
        seen = [(self._tensors[i], version) for (_, version), i in self._place.items()]
        changed = any(version >= 0 and x._version != version for x, version in seen)
        expected = "layers whose inputs stay as they are within a forward"
        remedy = "Prune this model in one process, with ranks=False."
        check(not changed, self.ranks.op, expected, "one that is changed in place", remedy)

    def new_hessian(self, width: int) -> Hessian:
        """A Hessian of which this rank computes its share of the blocks."""
        hessian = super().new_hessian(width)
        mine = []
        for first, count in hessian.blocks():
            rank = self._loads.index(min(self._loads))
            self._loads[rank] += count * (width - first + width * self.beside)
            if rank == self.ranks.rank:
                mine.append(first)
        hessian.parts = frozenset(mine)
        return hessian

    def finish(self) -> None:
        """Put the Hessians together, then as in one process."""
        for hessian in dict.fromkeys(self.hessians.values()):
            hessian.complete(self.ranks.add_up)
        super().finish()
