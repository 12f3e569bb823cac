"""Inputs of linear layers become Hessians, by hooks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsekern.oneshot.calibration import Batch
from sparsekern.oneshot.devices import quiet
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.experts import ExpertPools
from sparsekern.oneshot.sequential import Walk
from sparsekern.ops.transforms import within
from sparsekern.prune import Hessian

_unseen = itertools.count(1)


def state_of(x: Tensor) -> tuple[int, int]:
    """(id, version) of an input: equal for two calls on one unchanged tensor. The changes of an
    inference tensor cannot be seen: each call has a negative version of its own."""
    return id(x), -next(_unseen) if x.is_inference() else x._version


class SharingChanged(Exception):
    """Layers that shared their input in the first batch did not in a later one."""


class HessianCollector:
    """Hooks on Linear layers that add every input to a Hessian; layers that read one tensor share
    one Hessian.

    q, k and v (or gate and up) receive the same tensor object. They form a group: the first of
    them, the leader, adds the input, the others only check that it is the leader's. `walked`
    calls `end_batch` after each batch; when a group turns out not to hold, SharingChanged is raised
    and the caller starts again with share=False. Inputs that pass while `watches_dense` is set are
    the dense model's: each goes into the Hessian with the input of the same call that follows. A
    layer that gets only some of a batch's tokens (an expert) may get others in the dense model, so
    its Hessian is made without.

    Positions that `keep` calls padding stay out: an input [samples, tokens, ...], or its rows
    [samples * tokens, in_features], is cut to the tokens that are kept. Experts, which get some of
    the rows, are run without the others (experts.py); `finish` makes up for those that saw few.

    Args:
        layers: layers to watch.
        device: where the Hessians live.
        share: False gives every layer its own.
    Attributes:
        hessians: layer name -> Hessian, shared within a group. Layers that were never called are
            absent, after `finish` also those that no row reached.
    """

    def __init__(self, layers: list[Layer], device: torch.device, share: bool = True):
        self.layers, self.device, self.share = layers, device, share
        self.hessians: dict[str, Hessian] = {}
        self._leader: dict[str, str] = {}  # in order of first call
        self._calls: dict[str, int] = {}  # calls in this batch
        self._seen: dict[
            tuple[int, int], tuple[Tensor, str]
        ] = {}  # holds the tensors, so that no id is reused
        self._first_batch = True
        # Inputs of the dense model in this batch, by layer, in order of the calls.
        self._dense: dict[str, list[Tensor]] = {}
        self._dense_rows = 0  # of the first layer that was called there: the batch's tokens
        self.experts = ExpertPools(layers, device)
        self._handles: list[RemovableHandle] = []

    @property
    def watches_dense(self) -> bool:
        """Whether what runs now is the dense model."""
        return self.experts.watches_dense

    @watches_dense.setter
    def watches_dense(self, value: bool) -> None:
        self.experts.watches_dense = value

    @property
    def keep(self) -> tuple[Tensor, ...]:
        """bool [samples, tokens] each, of the batch that runs: False is padding."""
        return self.experts.keep

    @keep.setter
    def keep(self, value: tuple[Tensor, ...]) -> None:
        self.experts.keep = value

    def walked(self, forwards: Iterator[None], first_only: bool) -> Iterator[int]:
        """Run the batches (the first alone with first_only); yields how many are behind."""
        for done, _ in enumerate(forwards, 1):
            self.end_batch()
            yield done
            if first_only:
                return

    def finish(self) -> None:
        """After the last batch, within the context: the rule for experts that saw few tokens.
        Layers that were called without a row, as experts that no token chose, were not called."""
        self.experts.fill(self.hessians, self._leader)
        for name in [name for name, hessian in self.hessians.items() if not hessian.samples]:
            del self.hessians[name], self._leader[name]

    def new_hessian(self, width: int) -> Hessian:
        """For a layer's inputs."""
        return Hessian(width, self.device)

    def __enter__(self) -> HessianCollector:
        self._handles += self.experts.watch()
        for layer in self.layers:
            hook = self._make_hook(layer.name)
            self._handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def groups(self) -> list[list[str]]:
        """Names of the layers that were called, grouped by input, in order of execution."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    def end_batch(self) -> None:
        """Check that the groups held in this batch, and forget its inputs."""
        for name, leader in self._leader.items():
            if self._calls.get(name, 0) != self._calls.get(leader, 0):
                raise SharingChanged(name)
        self._seen.clear()
        self._calls.clear()
        self._dense.clear()
        self._dense_rows = 0
        self._first_batch = False

    def _make_hook(self, name: str) -> Callable[..., None]:
        @quiet
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            x = within(x)
            if not self.experts.listens(name):
                return
            if self.experts.filling is not None:
                hessian, rows = self.experts.filling.get(name) or (
                    Hessian(x.shape[-1], self.device),
                    0,
                )
                hessian.add(x.to(self.device))
                self.experts.filling[name] = hessian, rows + x.numel() // x.shape[-1]
                return
            self.see(name, x)

        return hook

    def see(self, name: str, x: Tensor) -> None:
        """A layer was called with x."""
        if self.watches_dense:
            self.take_dense(name, x)
        else:
            self.take(name, x)

    def take_dense(self, name: str, x: Tensor) -> None:
        """Keep what the dense model feeds a layer for the call that follows."""
        self._dense.setdefault(name, []).append(x)
        self._dense_rows = self._dense_rows or x.numel() // x.shape[-1]

    def take(self, name: str, x: Tensor) -> None:
        """Add x to the Hessian of a layer, or of the group that it is the first of."""
        key = state_of(x)
        self._calls[name] = self._calls.get(name, 0) + 1
        if name in self.experts.tokens:
            bare = self._without_padding(x)
            self.experts.tokens[name] += 0 if bare is None else bare.numel() // x.shape[-1]
        if self.share and name not in self._leader and self._first_batch and key in self._seen:
            leader = self._seen[key][1]
            if self._calls[leader] == 1:  # its Hessian holds this input and nothing else
                self._leader[name] = leader
                self.hessians[name] = self.hessians[leader]
                return
        leader = self._leader.setdefault(name, name)
        if leader != name:
            if key not in self._seen or self._seen[key][1] != leader:
                raise SharingChanged(name)
            return
        if name not in self.hessians:
            self.hessians[name] = self.new_hessian(x.shape[-1])
        dense = self._dense_of(name, x)
        kept, dense = self._without_padding(x), self._without_padding(dense)
        if kept is not None:
            self.hessians[name].add(kept.to(self.device), dense)
        self._seen.setdefault(key, (x, name))

    def _without_padding(self, x: Tensor | None) -> Tensor | None:
        """x, cut to the positions that count where it has one row or more for each of them."""
        if x is None or self.experts.bare:
            return x
        for keep in self.keep:
            samples, tokens = keep.shape
            if tuple(x.shape[:2]) == (samples, tokens) and x.dim() > 2:
                return x[keep.to(x.device)]
            if x.dim() == 2 and x.shape[0] == samples * tokens:
                return x[keep.reshape(-1).to(x.device)]
        return x

    def _dense_of(self, name: str, x: Tensor) -> Tensor | None:
        """What the dense model fed the layer in this call; None without it, and from the first call
        on that is not of all tokens of the batch."""
        hessian = self.hessians[name]
        if not self._dense_rows or hessian.unmatched:
            return None
        waiting = self._dense.get(name)
        dense = waiting.pop(0) if waiting else None
        rows = x.numel() // x.shape[-1]  # a multiple of the tokens where a layer works on heads
        if dense is None or dense.shape != x.shape or not rows or rows % self._dense_rows:
            hessian.drop_dense()
            return None
        return dense


def collected(walk: Walk, index: int, layers: list[Layer]) -> dict[str, Hessian]:
    """Hessians of layers of block `index`, whose inputs `walk` is at, from all batches. Layers that
    no token reaches are absent."""
    for share in (True, False):
        with HessianCollector(layers, walk.device, share) as collector:

            def begin(batch: Batch, collector: HessianCollector = collector) -> None:
                collector.keep = batch.keep

            walk.begin = begin
            try:
                for _ in collector.walked(walk.block(index, False), False):
                    pass
                collector.finish()
                return collector.hessians
            except SharingChanged:
                if not share:
                    raise
            finally:
                walk.begin = lambda batch: None
    return {}
