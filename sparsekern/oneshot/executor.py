"""The stages of a calibration, and the public iterator over them.

A run is a list of stages, each calibrated at once and on the accelerator alone:

    stem     linear layers before the first block, and the capture of the blocks' inputs
    block i  forward all batches (Hessians by hooks); what the caller replaces is written; forward
             again: inputs of block i + 1
    head     linear layers after the last block (lm_head, unless skipped)
    whole    everything, for a model without a chain of blocks: forwards of the whole model

Within a stage weights are first replaced in place, dense; the forward that makes the next inputs
runs on those. Then each layer that was replaced by a Sparse24 becomes a SparseLinear and its dense
weight is gone.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Container, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.replace import replace_module, write_weight
from sparsekern.nn.sparse_experts import unfuse_experts
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot.calibration import Batch, make_batches
from sparsekern.oneshot.collector import HessianCollector, SharingChanged
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.experts import merge_passes, put_together, split_passes
from sparsekern.oneshot.selection import Selection, select
from sparsekern.oneshot.sequential import Walk, call_block, probe
from sparsekern.oneshot.skip import DEFAULT_RULE
from sparsekern.prune import Hessian
from sparsekern.utils.arguments import checked

logger = logging.getLogger("sparsekern")
F = TypeVar("F", bound=Callable[..., Any])
Forwards = Callable[[], Iterator[None]]
NEVER_CALLED = "never called on the calibration data"


def _quiet(function: F) -> F:
    """Run without autograd, and outside inference mode: its tensors could not be trained later."""
    return torch.inference_mode(False)(torch.no_grad()(function))


@checked("sparsekern.calibrate")
def calibrate(
    model: nn.Module,
    data: Any = None,
    *,
    skip: Any = (DEFAULT_RULE,),
    targets: Any = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    true_sequential: bool = False,
    beside_dense: bool = False,
    offload_activations: bool | str = "auto",
    hessians: Mapping[str, Hessian | Tensor] | None = None,
    tokenizer: Callable[..., Any] | None = None,
) -> Calibration:
    """Walk a model block by block on calibration data: an iterator over groups of linear layers
    that read one input, each with the Hessian of that input, in order of execution.

        for group in sk.calibrate(model, ids):
            for layer in group.layers:
                weight, mask, _ = sk.prune.sparsegpt(layer.weight, group.hessian)
                group.replace(layer.name, sk.compress(weight))

    A block's groups are calibrated together. What a loop puts in their place is what the blocks
    after it are calibrated on; a loop that replaces nothing sees the Hessians of the model as it
    is. prune_model is such a loop.

    Args:
        model, data (calibration), skip, targets, device, batch_size, true_sequential,
        offload_activations, tokenizer: as in prune_model. Without data every layer is a group of
            its own without a Hessian.
        beside_dense: Hessians also compare with the dense model's inputs (Hessian.drift), as
            prune.retarget needs; for a model that is a chain of blocks. One more forward a block.
        hessians: layer name -> Hessian or its matrix, of an earlier calibration, for every layer:
            nothing is run then, and `data` is not needed.
    Returns:
        Calibration: iterate over it for the groups, or over its `stages()` where the boundaries of
        the blocks matter. It can be iterated once.
    Raises:
        ValueError, TypeError: arguments that do not fit, as in prune_model; at once, before
            anything runs.
    Notes:
        Training flags and config.use_cache are changed while an iteration is open, and put back
        when it ends, is closed or fails, and so are modules with experts in 3-D parameters, which
        are taken apart from the call on. Weights that were replaced stay replaced. What only a
        caller with several processes needs: give each its own part of the data, add its Hessians up
        (Hessian.merge) before each solve, and replace by the same weights everywhere.
    """
    op = "sparsekern.calibrate"
    fits = offload_activations in (True, False, "auto")
    expected = 'offload_activations True, False or "auto"'
    check(fits, op, expected, repr(offload_activations))
    check(
        not (beside_dense and true_sequential),
        op,
        "beside_dense or true_sequential",
        "both of them",
    )
    model = models.unwrapped(model)
    apart = unfuse_experts(model)
    try:
        selection = select(model, skip, (2, 4), True, targets=targets, op=op)
        calibration = Calibration(
            model,
            selection,
            op=op,
            device=device,
            true_sequential=true_sequential,
            beside_dense=beside_dense,
            offload=None if offload_activations == "auto" else bool(offload_activations),
            hessians=hessians,
        )
        if data is not None:
            calibration.batches = make_batches(
                data, model, batch_size, calibration.device, tokenizer, op
            )
    except BaseException:
        put_together(model, apart)
        raise
    calibration.apart = apart
    return calibration


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
            ValueError: no layer of that name in the group, or another shape.
        """
        names = [layer.name for layer in self.layers]
        check(name in names, "sparsekern.calibrate", f"one of {names}", repr(name))
        self.stage.replace(name, weight)

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
    _run: Calibration = field(repr=False, default=cast("Calibration", None))
    _forwards: Forwards | None = field(default=None, repr=False)  # all batches; None without data
    _advance: Forwards | None = field(default=None, repr=False)  # the same, making the next inputs
    _dense: Forwards | None = field(default=None, repr=False)  # the same of the dense model
    _dense_done: bool = field(default=False, repr=False)
    _new: dict[str, Tensor | Sparse24] = field(default_factory=dict, repr=False)

    def groups(self) -> Generator[Group, None, None]:
        """The groups of this stage. Layers that no batch reaches are in none; they then have a
        reason."""
        by_name = {layer.name: layer for layer in self.layers}
        visited = set()
        for layers in self._passes():
            names, hessians = self._collect(layers)
            for group in names:
                members = [by_name[name] for name in group]
                with contextlib.ExitStack() as stack:
                    for layer in members:
                        stack.enter_context(on_device(layer.module, self._run.device))
                    yield Group(members, hessians.get(group[0]), self)
                visited |= set(group)
                for name in group:
                    hessians.pop(name, None)
        for layer in self.layers:
            if layer.name not in visited:
                layer.reason = NEVER_CALLED

    @_quiet
    def replace(self, name: str, weight: Tensor | Sparse24) -> None:
        """Group.replace for any layer of the stage."""
        layer = next((layer for layer in self.layers if layer.name == name), None)
        op = "sparsekern.calibrate"
        if layer is None:
            check(False, op, f"a layer of {self.key}", repr(name))
            return
        shape = tuple(weight.shape)
        check(shape == layer.shape, op, f"a weight {list(layer.shape)} for {name}", list(shape))
        self._walk_dense()
        self._run.remember(layer)
        write_weight(layer.module, weight.to_dense() if isinstance(weight, Sparse24) else weight)
        self._new[name] = weight

    def inputs(self) -> Iterator[Tensor]:
        """The hidden states that enter this block, batch by batch, on the device. Of a block only:
        ValueError elsewhere."""
        return self._walk().inputs()

    @_quiet
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

    @_quiet
    def outputs(self) -> Iterator[Tensor]:
        """What the block makes of its inputs with the weights that it has now, batch by batch."""
        for index, hidden in enumerate(self.inputs()):
            yield self.forward(index, hidden)

    @_quiet
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

    @_quiet
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
        with HessianCollector(layers, self._run.device, share) as collector:
            self._run.collector = collector
            try:
                batches = cast(Forwards, self._forwards)()
                # Later passes find changed weights, and no dense model.
                beside = self._dense is not None and not self._dense_done
                walked = self._beside_dense(collector, batches) if beside else batches
                for done, _ in enumerate(walked, 1):
                    collector.end_batch()
                    if first_batch_only:
                        break
                    self._tick("hessian", done)
                if not first_batch_only:
                    collector.fill()
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

    @_quiet
    def _walk_dense(self) -> None:
        """Run the dense model's inputs through the block before anything in it changes."""
        if self._dense is not None and not self._dense_done and self._run.goes_on:
            self._dense_done = True
            with self._run.phase("forward"):
                for done, _ in enumerate(self._dense(), 1):
                    self._tick("dense", done)

    @_quiet
    def _finish(self) -> None:
        """Make the next stage's inputs, then put a SparseLinear where a weight is compressed."""
        self._walk_dense()
        if self._advance is not None and self._run.goes_on:
            with self._run.phase("capture" if self.key == "stem" else "forward"):
                for done, _ in enumerate(self._advance(), 1):
                    self._tick("forward", done)
        for layer in self.layers:
            weight = self._new.pop(layer.name, None)
            if isinstance(weight, Sparse24):
                self._run.compress(layer, weight)


class Calibration:
    """One walk over a model; what `calibrate` returns.

    Attributes:
        model, selection: what is walked.      batches: the calibration, [] for none.
        device: where blocks run.      home: where the rest of the model is.
        chained: whether the blocks run one by one; known after `plan`.
        beside_dense: as asked; with optional_dense it becomes False where the model is no chain.
        undo: what `rollback` takes back: the "run", the last "stage", or None: nothing.
        phases: seconds by phase: capture, hessian, forward and what the caller adds.
        on_tick: called with (stage, phase, batches done, of how many) after each batch; or None.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        batches: list[Batch] | None = None,
        *,
        op: str = "sparsekern.calibrate",
        device: torch.device | str | None = None,
        true_sequential: bool = False,
        beside_dense: bool = False,
        offload: bool | None = None,
        hessians: Mapping[str, Hessian | Tensor] | None = None,
        optional_dense: bool = False,
        undo: str | None = None,
    ) -> None:
        self.model, self.selection, self.op = model, selection, op
        self.batches = batches or []
        self.home = home_of(model)
        default = torch.device("cuda") if torch.cuda.is_available() else self.home
        self.device = torch.device(device) if device is not None else default
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.true_sequential, self.beside_dense, self.offload = (
            true_sequential,
            beside_dense,
            offload,
        )
        self.hessians = None if hessians is None else self._checked(hessians)
        self.phases: dict[str, float] = {}
        self.on_tick: Callable[[str, str, int, int], None] | None = None
        self.walk: Walk | None = None
        self.collector: HessianCollector | None = None
        self.goes_on = True  # whether a stage after the present one needs its outputs
        self.chained = False
        self.optional_dense, self.undo = optional_dense, undo
        self._undo: list[tuple[nn.Module, Tensor, torch.device]] | None = [] if undo else None
        # (above, old, new) since the last forget
        self._replaced: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        self.apart: dict[str, Any] = {}  # modules with experts that the end puts together again
        self._training: dict[int, tuple[nn.Module, bool]] = {}
        self._planned: list[Stage] | None = None
        self._homes = {id(a.module): a.weight.device for a in selection.active}

    def __iter__(self) -> Iterator[Group]:
        for stage in self.stages():
            yield from stage.groups()

    def stages(self, done: Container[str] = ()) -> Generator[Stage, None, None]:
        """The stages in order. After each the next one's inputs are made, on what was replaced.

        done: keys of stages that are not calibrated, because the caller replaces their layers from
            what it stored.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(put_together, self.model, self.apart)
            stack.enter_context(self.evaluating())
            stages = self.plan()
            pending = [i for i, s in enumerate(stages) if s.layers and s.key not in done]
            last_needed = max(pending, default=-1)
            for i, stage in enumerate(stages):
                self.goes_on = i < last_needed
                with on_device(stage.module, self.device):
                    yield stage
                    stage._finish()
                if self.undo == "stage":
                    self._forget()
                logger.info("%s: %s done, %d layers", self.op, stage.key, len(stage.layers))

    @_quiet
    def plan(self) -> list[Stage]:
        """The stages of this run; made once."""
        if self._planned is not None:
            return self._planned
        active, blocks, model = self.selection.active, self.selection.blocks, self.model
        by_block = [[layer for layer in active if layer.block == i] for i in range(len(blocks))]
        outside = [layer for layer in active if layer.block is None]
        keys = [f"block-{i:05d}" for i in range(len(blocks))]

        def block_stage(i: int, **forwards: Forwards) -> Stage:
            return Stage(keys[i], blocks[i], by_block[i], i, self, **forwards)  # type: ignore[arg-type]

        if not self.batches or self.hessians is not None:
            stages = [block_stage(i) for i in range(len(blocks))]
            self._planned = [*stages, Stage("outside", None, outside, None, self)]
            return self._planned
        shown = None
        if blocks:
            with self.evaluating():
                shown = probe(model, blocks, outside, self.batches[0].probe(), self.home)
        if shown is None or not shown.chained:
            self._check_whole(bool(blocks))
            self._planned = [Stage("whole", model, active, None, self, self._whole)]
            return self._planned
        self.chained = True
        walk = Walk(model, blocks, self.batches, shown, self.device, self.home, self.offload)
        walk.sets = 2 if self.beside_dense else 1
        walk.begin = self._begin
        self.walk = walk
        before = [layer for layer in outside if layer.name in shown.before]
        after = [layer for layer in outside if layer.name in shown.after]
        for layer in outside:
            if layer not in before and layer not in after:
                layer.reason = NEVER_CALLED
        stages = [Stage("stem", None, before, None, self, walk.stem, walk.capture)]
        for i in range(len(blocks)):
            forwards: dict[str, Forwards] = {
                "_forwards": lambda i=i: walk.block(i, False),  # type: ignore[misc]
                "_advance": lambda i=i: walk.block(i, True),  # type: ignore[misc]
            }
            if self.beside_dense:
                forwards["_dense"] = lambda i=i: walk.dense_block(i)  # type: ignore[misc]
            stages.append(block_stage(i, **forwards))
        self._planned = [*stages, Stage("head", None, after, None, self, walk.head)]
        return self._planned

    @_quiet
    def captured(self, batches: list[Batch] | None = None) -> Walk:
        """Another walk over the chain, at the inputs of its first block; of other batches where
        they are given. To be called inside `evaluating`."""
        known = cast(Walk, self.walk)
        batches = self.batches if batches is None else batches
        where = (self.device, self.home, known.offload)
        walk = Walk(self.model, self.selection.blocks, batches, known.shown, *where)
        for _ in walk.capture():
            pass
        return walk

    def _check_whole(self, has_blocks: bool) -> None:
        """The blocks are no chain: say so, or refuse what needs one."""
        kind = type(self.model).__name__
        expected = "a model that is a chain of decoder blocks, for match_dense"
        remedy = "Leave match_dense out."
        if self.op == "sparsekern.calibrate":
            expected, remedy = expected.replace("match_dense", "beside_dense"), "Leave it out."
        got = f"{kind}, which is calibrated as a whole"
        if self.optional_dense:
            self.beside_dense = False
        check(not self.beside_dense, self.op, expected, got, remedy)
        if has_blocks and models.is_transformers(self.model):
            text = (
                "the blocks are no chain that can be walked; every layer is calibrated in one pass"
            )
            warnings.warn(f"{self.op}: {text}, on the unpruned model.", stacklevel=5)

    def _begin(self, batch: Batch) -> None:
        if self.collector is not None:
            self.collector.keep = batch.keep

    def _whole(self) -> Iterator[None]:
        for batch in self.batches:
            self._begin(batch)
            batch.run(self.model, self.device)
            yield

    def _checked(self, hessians: Mapping[str, Hessian | Tensor]) -> dict[str, Hessian]:
        """Hessians by layer; equal objects stay one object."""
        made: dict[int, Hessian] = {}
        found: dict[str, Hessian] = {}
        for layer in self.selection.active:
            given = hessians.get(layer.name)
            remedy = "Take them from a calibration of the same model with keep_hessians=True."
            kinds = isinstance(given, (Hessian, Tensor))
            check(kinds, self.op, f"a Hessian for {layer.name}", type(given).__name__, remedy)
            width = layer.shape[1]
            if isinstance(given, Hessian):
                fits, got = given.in_features == width, str(given.in_features)
                made.setdefault(id(given), given)
            else:
                matrix = cast(Tensor, given)
                fits = tuple(matrix.shape) == (width, width) and matrix.is_floating_point()
                got = f"{list(matrix.shape)} {matrix.dtype}"
                if fits and id(matrix) not in made:
                    made[id(matrix)] = Hessian.from_matrix(matrix)
            check(fits, self.op, f"a Hessian of {width} in_features for {layer.name}", got, remedy)
            found[layer.name] = made[id(given)]
        return found

    # ------------------------------------------------------------------------------ small changes

    def remember(self, layer: Layer) -> None:
        """Before the first change of a layer: keep its dense weight on the host, with undo."""
        if self._undo is None or any(old is layer.module for old, _, _ in self._undo):
            return
        parameter = cast(nn.Parameter, layer.module.weight)
        where = self._homes.get(id(layer.module), parameter.device)
        self._undo.append((layer.module, parameter.detach().to("cpu", copy=True), where))

    def compress(self, layer: Layer, weight: Sparse24) -> None:
        """Replace a layer by a SparseLinear."""
        old = layer.module
        parameter = cast(Tensor, old.weight)
        bias = cast("Tensor | None", getattr(old, "bias", None))
        new: SparseLinear = SparseLinear.from_sparse24(weight.to(parameter.device), bias)
        root = layer.home or self.model
        replace_module(root, old, new)
        if id(old) in self._training:
            self._training[id(new)] = (new, self._training.pop(id(old))[1])
        if self._undo is not None:
            self._replaced.append((root, old, new))
            parameter.data = parameter.data.new_empty(0)
        # Nothing may hold on to the dense layer: its memory is freed here.
        layer.module = new

    @_quiet
    def rollback(self) -> None:
        """Put back every layer as it was before the run, with undo."""
        for root, old, new in reversed(self._replaced):
            replace_module(root, new, old)
            if id(new) in self._training:
                self._training[id(old)] = (old, self._training.pop(id(new))[1])
        for module, kept, where in self._undo or []:
            parameter = cast(nn.Parameter, module.weight)
            if parameter.numel() == kept.numel():
                parameter.copy_(kept)
            else:
                parameter.data = kept.to(where)
        self._replaced.clear()
        if self._undo is not None:
            self._undo.clear()

    def _forget(self) -> None:
        """The changes so far are final: a later rollback ends here."""
        self._replaced.clear()
        if self._undo is not None:
            self._undo.clear()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """model.eval() and use_cache = False in every config of the model for the duration; every
        module's own flag is restored."""
        before = self._training
        self._training = {id(module): (module, module.training) for module in self.model.modules()}
        found = (getattr(module, "config", None) for module in self.model.modules())
        configs: dict[int, Any] = {id(config): config for config in found if config is not None}
        caches = [
            (config, config.use_cache)
            for config in configs.values()
            if getattr(config, "use_cache", None) is not None
        ]
        try:
            self.model.eval()
            for config, _ in caches:
                config.use_cache = False
            with _eager(self.model):
                yield
        finally:
            for module, flag in self._training.values():
                module.training = flag
            for config, cache in caches:
                config.use_cache = cache
            self._training = before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; on a GPU it ends when its kernels have, once per phase and block."""
        start = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start


@contextlib.contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run torch.compile'd parts eagerly, so that hooks see their layers. Only models that have any
    pay for the import of the compiler."""
    compiled = any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def home_of(model: nn.Module) -> torch.device:
    """Where the inputs of the model have to be: with its embedding, or with its first parameter."""
    holder = models.input_embedding(model) or model
    tensor: Tensor | None = next(holder.parameters(), None)
    if tensor is None:
        tensor = next(model.buffers(), None)
    return tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")


@contextlib.contextmanager
def on_device(module: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Move a module to `device` and back to where its first parameter was."""
    home = home_of(module) if module is not None else device
    moves = module is not None and home != device
    try:
        if moves:
            cast(nn.Module, module).to(device)
        yield
    finally:
        if moves:
            cast(nn.Module, module).to(home)
