"""A stage of a calibration: layers that are calibrated together, and their groups by input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.replace import write_weight
from sparsekern.oneshot.calibration import Batch
from sparsekern.oneshot.collector import HessianCollector, SharingChanged
from sparsekern.oneshot.devices import on_device, quiet
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.experts import merge_passes, split_passes
from sparsekern.oneshot.sequential import Walk, call_block
from sparsekern.prune import Hessian
from sparsekern.utils.arguments import shown

Forwards = Callable[[], Iterator[None]]
NEVER_CALLED = "never called on the calibration data"


class Course(Protocol):
    """What a stage knows of the calibration that it is part of (executor.Calibration)."""

    device: torch.device
    batches: list[Batch]
    walk: Walk | None
    collector: HessianCollector | None
    hessians: dict[str, Hessian] | None
    true_sequential: bool
    goes_on: bool
    on_tick: Callable[[str, str, int, int], None] | None

    def collecting(self, layers: list[Layer], share: bool, beside: bool) -> HessianCollector: ...

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]: ...

    def remember(self, layer: Layer) -> None: ...

    def compress(self, layer: Layer, weight: Sparse24) -> None: ...


class Group:
    """Linear layers that read one input.

    Attributes:
        layers: each with name, module, block, weight [out_features, in_features] and shape. While
            the group is current they are on the calibration's device.
        hessian: of their input, float32; None without data. The group's own: it may be changed.
        stage: the Stage that it belongs to.
    """

    def __init__(self, layers: list[Layer], hessian: Hessian | None, stage: Stage) -> None:
        self.layers, self.hessian, self.stage = layers, hessian, stage

    @property
    def block(self) -> int | None:
        """Index of the decoder block, None outside the blocks."""
        return self.stage.index

    def replace(self, name: str, weight: Tensor | Sparse24) -> None:
        """Put `weight` [out_features, in_features] in the place of a layer's.

        A tensor is written into the layer, and can be replaced again. A Sparse24 is too, and turns
        the layer into a SparseLinear when the block is done.

        Raises:
            ValueError: no layer of that name in the group, another shape, or a block that is done.
        """
        names = [layer.name for layer in self.layers]
        check(name in names, "sparsekern.calibrate", f"one of {names}", repr(name))
        self.stage.replace(name, weight)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """The layers on the calibration's device."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(on_device(layer.module, self.stage.device))
            yield

    def inputs(self) -> Iterator[Tensor]:
        """The inputs of the first layer, call by call, as it gets them now: [..., in_features] on
        the calibration's device, padding included. Runs the stage once more."""
        return self.stage.layer_inputs(self.layers[0])

    def __repr__(self) -> str:
        return f"Group({[layer.name for layer in self.layers]}, hessian={self.hessian})"


@dataclass(eq=False)
class Stage:
    """Layers that are calibrated together: a block, or what lies before or after the blocks.

    Attributes:
        key: "stem", "block-00003", "head", "outside" or "whole".
        module: what has to be on the device: the block, or the model.
        layers: the layers to visit.      index: of the block, None elsewhere.
    """

    key: str
    module: nn.Module | None
    layers: list[Layer]
    index: int | None = None
    _run: Course = field(repr=False, default=cast(Course, None))
    _forwards: Forwards | None = field(default=None, repr=False)  # all batches; None without data
    _advance: Forwards | None = field(default=None, repr=False)  # the same, making the next inputs
    _dense: Forwards | None = field(default=None, repr=False)  # the same of the dense model
    _dense_done: bool = field(default=False, repr=False)
    _new: dict[str, Tensor | Sparse24] = field(default_factory=dict, repr=False)
    _done: bool = field(default=False, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the calibration runs."""
        return self._run.device

    def groups(self) -> Generator[Group, None, None]:
        """The groups of this stage. Layers that no batch reaches are in none; they then have a
        reason."""
        for found in self.passes():
            while found:
                group = found.pop(0)
                with group.on_device():
                    yield group

    def passes(self) -> Generator[list[Group], None, None]:
        """The same, those together whose Hessians come from one pass over the data; where their
        layers are. What is replaced changes the passes that follow."""
        by_name = {layer.name: layer for layer in self.layers}
        visited = set()
        for layers in self._passes():
            names, hessians = self._collect(layers)
            visited |= {name for group in names for name in group}
            found = []
            for group in names:
                own = [hessians.pop(name, None) for name in group]
                found.append(Group([by_name[name] for name in group], own[0], self))
            yield found
        for layer in self.layers:
            if layer.name not in visited:
                layer.reason = NEVER_CALLED

    @quiet
    def replace(self, name: str, weight: Tensor | Sparse24) -> None:
        """Group.replace for any layer of the stage."""
        layer = next((layer for layer in self.layers if layer.name == name), None)
        op = "sparsekern.calibrate"
        got = f"one of {self.key}, which is done"
        remedy = "Call it in the loop over sparsekern.calibrate, not over a list of its groups."
        check(not self._done, op, "a group of the block that the loop is at", got, remedy)
        if layer is None:
            check(False, op, f"a layer of {self.key}", repr(name))
            return
        fits = isinstance(weight, (Tensor, Sparse24)) and tuple(weight.shape) == layer.shape
        fits = fits and not (isinstance(weight, Tensor) and weight.is_meta)
        expected = f"a weight {list(layer.shape)} for {name}"
        check(fits, op, expected, shown(weight), "Pass a tensor [out_features, in_features].")
        self._walk_dense()
        self._run.remember(layer)
        write_weight(layer.module, weight.to_dense() if isinstance(weight, Sparse24) else weight)
        self._new[name] = weight

    def inputs(self) -> Iterator[Tensor]:
        """The hidden states that enter this block, batch by batch, on the device. Of a block only:
        ValueError elsewhere."""
        return self._walk().inputs()

    @quiet
    def dense_inputs(self) -> Iterator[Tensor]:
        """The same of the dense model; with beside_dense only, else ValueError."""
        check(self._dense is not None, "sparsekern.calibrate", "beside_dense=True", "False")
        self._walk_dense()
        yield from self._walk().dense_inputs()

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """The block, with the weights that it has now, on hidden states of batch `index`: the call
        is as the model made it. Differentiable where torch's mode says so."""
        walk = self._walk()
        calls = walk.calls[index][cast(int, self.index)]
        return call_block(cast(nn.Module, self.module), calls, hidden)

    @quiet
    def outputs(self) -> Iterator[Tensor]:
        """What the block makes of its inputs with the weights that it has now, batch by batch."""
        for index, hidden in enumerate(self.inputs()):
            yield self.forward(index, hidden)

    @quiet
    def layer_inputs(self, layer: Layer) -> Iterator[Tensor]:
        """Group.inputs for any layer of the stage."""
        check(self._forwards is not None, "sparsekern.calibrate", "calibration data", "none")
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            seen.append(x.to(self._run.device))

        handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            for _ in cast(Forwards, self._forwards)():
                yield from seen
                seen.clear()
        finally:
            handle.remove()

    # ---------------------------------------------------------------------------------- the run's

    def _tick(self, what: str, done: int) -> None:
        if self._run.on_tick is not None:
            self._run.on_tick(self.key, what, done, len(self._run.batches))

    def _walk(self) -> Walk:
        walk = self._run.walk
        if walk is None or self.index is None:
            expected = "a block of a chain, with calibration data"
            check(False, "sparsekern.calibrate", expected, f"stage {self.key}")
        return cast(Walk, walk)

    def _passes(self) -> list[list[Layer]]:
        """Which layers are calibrated together: all of the stage, or with true_sequential one group
        of them per pass."""
        if self._forwards is None or not self._run.true_sequential:
            return split_passes(self.layers) if self._forwards is not None else self._at_once()
        groups, _ = self._collect(self.layers, first_batch_only=True)
        called = {name for group in groups for name in group}
        rest = [layer for layer in self.layers if layer.name not in called]
        passes = [[layer for layer in self.layers if layer.name in group] for group in groups]
        passes = merge_passes([*passes, rest] if rest else passes)
        return [part for layers in passes for part in split_passes(layers)]

    def _at_once(self) -> list[list[Layer]]:
        return [self.layers] if self.layers else []

    @quiet
    def _collect(
        self, layers: list[Layer], first_batch_only: bool = False
    ) -> tuple[list[list[str]], dict[str, Hessian]]:
        """Forward the batches and collect Hessians: (names grouped by input, name -> Hessian)."""
        given = self._run.hessians
        if given is not None:
            shared: dict[int, list[str]] = {}
            for layer in layers:
                shared.setdefault(id(given[layer.name]), []).append(layer.name)
            own = {layer.name: given[layer.name] for layer in layers}
            return list(shared.values()), {k: h.to(self._run.device) for k, h in own.items()}
        if self._forwards is None:
            return [[layer.name] for layer in layers], {}
        with self._run.phase("hessian"):
            try:
                return self._forward_with_hooks(layers, True, first_batch_only)
            except SharingChanged:
                return self._forward_with_hooks(layers, False, first_batch_only)

    def _forward_with_hooks(
        self, layers: list[Layer], share: bool, first_batch_only: bool
    ) -> tuple[list[list[str]], dict[str, Hessian]]:
        # Later passes find changed weights, and no dense model.
        beside = self._dense is not None and not self._dense_done
        with self._run.collecting(layers, share, beside) as collector:
            self._run.collector = collector
            try:
                batches = cast(Forwards, self._forwards)()
                walked = self._beside_dense(collector, batches) if beside else batches
                for done in collector.walked(walked, first_batch_only):
                    if not first_batch_only:
                        self._tick("hessian", done)
                if not first_batch_only:
                    collector.finish()
                    for layer in layers:
                        layer.tokens = collector.experts.tokens.get(layer.name)
            finally:
                self._run.collector = None
        return collector.groups(), collector.hessians

    def _beside_dense(self, collector: HessianCollector, batches: Iterator[None]) -> Iterator[None]:
        """Each batch of the dense model's inputs, then the same of the pruned model's."""
        collector.watches_dense = True
        for _ in cast(Forwards, self._dense)():
            collector.watches_dense = False
            next(batches)
            yield
            collector.watches_dense = True
        self._dense_done = True

    @quiet
    def _walk_dense(self) -> None:
        """Run the dense model's inputs through the block before anything in it changes."""
        if self._dense is not None and not self._dense_done and self._run.goes_on:
            self._dense_done = True
            with self._run.phase("forward"):
                for done, _ in enumerate(self._dense(), 1):
                    self._tick("dense", done)

    @quiet
    def _finish(self) -> None:
        """Make the next stage's inputs, then put a SparseLinear where a weight is compressed."""
        self._done = True
        self._walk_dense()
        if self._advance is not None and self._run.goes_on:
            with self._run.phase("capture" if self.key == "stem" else "forward"):
                for done, _ in enumerate(self._advance(), 1):
                    self._tick("forward", done)
        if not self._new:
            return
        with self._run.phase("store"):
            for layer in self.layers:
                weight = self._new.pop(layer.name, None)
                if isinstance(weight, Sparse24):
                    self._run.compress(layer, weight)
