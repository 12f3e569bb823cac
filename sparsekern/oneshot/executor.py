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
import os
import time
import warnings
from collections.abc import Callable, Container, Generator, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.replace import replace_module
from sparsekern.nn.sparse_experts import unfuse_experts
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.nn.wrappers import whole
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot.calibration import Batch, make_batches
from sparsekern.oneshot.collector import HessianCollector
from sparsekern.oneshot.devices import (
    eager,
    home_of,
    looked,
    on_device,
    quiet,
    working_device,
)
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.experts import put_together
from sparsekern.oneshot.ranks import Ranks
from sparsekern.oneshot.selection import Selection, check_offload, select
from sparsekern.oneshot.sequential import Walk, probe
from sparsekern.oneshot.shared_collector import SharedCollector
from sparsekern.oneshot.skip import DEFAULT_RULE
from sparsekern.oneshot.source import Source
from sparsekern.oneshot.stages import NEVER_CALLED, Forwards, Group, Stage
from sparsekern.oneshot.timed import Timed
from sparsekern.oneshot.uses import CALIBRATE
from sparsekern.prune import Hessian
from sparsekern.utils.arguments import checked

logger = logging.getLogger("sparsekern")
T = TypeVar("T")


@checked("sparsekern.calibrate", uses=CALIBRATE)
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
    offload_activations: bool | str | os.PathLike[str] = "auto",
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
            nothing is run then, and `data` is refused.
    Returns:
        Calibration: iterate over it for the groups, or over its `stages()` where the boundaries of
        the blocks matter. It can be iterated once.
    Raises:
        ValueError, TypeError: arguments that do not fit, as in prune_model; at once, before
            anything runs.
    Notes:
        Training flags and config.use_cache are changed while an iteration is open, and put back
        when it ends, is closed or fails, and so are modules with experts in 3-D parameters, which
        are taken apart from the call on. Weights that were replaced stay replaced. A caller
        with several processes gives each its own part of the data, adds its Hessians up
        (Hessian.merge) before each solve, and replaces by the same weights everywhere; prune_model
        does more than that (oneshot/ranks.py).
    """
    op = "sparsekern.calibrate"
    check_offload(offload_activations, op)
    check(
        not (beside_dense and true_sequential),
        op,
        "beside_dense or true_sequential",
        "both of them",
    )
    model = whole(op, model)
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
            offload=None if offload_activations == "auto" else offload_activations,
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


class Calibration(Timed):
    """One walk over a model; what `calibrate` returns.

    Attributes:
        model, selection: what is walked.      batches: the calibration, [] for none.
        device: where blocks run.      home: where the rest of the model is.
        chained: whether the blocks run one by one; known after `plan`.
        beside_dense: as asked; with optional_dense it becomes False where the model is no chain.
        ranks: the processes that share this walk, or None.
        source: of blocks whose weights are in memory only while they run, or None.
        undo: what `rollback` takes back: the "run", the last "stage", or None: nothing.
        phases, parts, peak: of Timed. load, store: a block comes to the device and goes home.
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
        offload: bool | str | os.PathLike[str] | None = None,
        hessians: Mapping[str, Hessian | Tensor] | None = None,
        optional_dense: bool = False,
        undo: str | None = None,
        ranks: Ranks | None = None,
        source: Source | None = None,
    ) -> None:
        super().__init__()
        self.model, self.selection, self.op = model, selection, op
        self.batches = batches or []
        self.home = home_of(model)
        self.device = working_device(op, model, device)
        self.true_sequential, self.beside_dense, self.offload = (
            true_sequential,
            beside_dense,
            offload,
        )
        self.hessians = None if hessians is None else self._checked(hessians)
        self.on_tick: Callable[[str, str, int, int], None] | None = None
        self.walk: Walk | None = None
        self.collector: HessianCollector | None = None
        self.goes_on = True  # whether a stage after the present one needs its outputs
        self.chained = False
        self.optional_dense, self.undo = optional_dense, undo
        self.ranks, self.source = ranks, source
        self._undo: list[tuple[nn.Module, Tensor, torch.device]] | None = [] if undo else None
        # (above, old, new) since the last forget
        self._replaced: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        self.apart: dict[str, Any] = {}  # modules with experts that the end puts together again
        self._training: dict[int, tuple[nn.Module, bool]] = {}
        self._planned: list[Stage] | None = None
        self.begun = False  # whether the stages were asked for
        self._homes = {id(a.module): a.weight.device for a in selection.active}

    def __iter__(self) -> Iterator[Group]:
        for stage in self.stages():
            yield from stage.groups()

    def stages(self, done: Container[str] = ()) -> Generator[Stage, None, None]:
        """The stages in order. After each the next one's inputs are made, on what was replaced.

        done: keys of stages that are not calibrated, because the caller replaces their layers from
            what it stored.

        Raises:
            ValueError: they were gone through before; the hidden states are those of the end.
        """
        remedy = "Call it again for another pass."
        check(not self.begun, self.op, "a calibration that is new", "one that was used", remedy)
        self.begun = True
        with contextlib.ExitStack() as stack:
            stack.callback(put_together, self.model, self.apart)
            stack.enter_context(self.evaluating())
            stages = self.plan()
            pending = [i for i, s in enumerate(stages) if s.layers and s.key not in done]
            last_needed = max(pending, default=-1)
            for i, stage in enumerate(stages):
                self.goes_on = i < last_needed
                begin, before = time.perf_counter(), self.times()
                with self.present(stage):
                    yield stage
                    stage._finish()
                if self.undo == "stage":
                    self._forget()
                took = time.perf_counter() - begin
                text = f", {took:.3f} s{self.spent(before, took)}"
                logger.info("%s: %s done, %d layers%s", self.op, stage.key, len(stage.layers), text)

    @quiet
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
            short = self.batches[0].probe()
            with self.evaluating(), self.lazily():
                shown = self.looked(lambda: probe(model, blocks, outside, short, self.home))
        if shown is None or not shown.chained:
            self._check_whole(bool(blocks))
            self._planned = [Stage("whole", model, active, None, self, self._whole)]
            return self._planned
        self.chained = True
        walk = Walk(model, blocks, self.mine, shown, self.device, self.home, self.offload)
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

    @contextlib.contextmanager
    def present(self, stage: Stage) -> Iterator[None]:
        """Within: the weights of the stage's module are on the device."""
        if stage.module is None:
            yield
            return
        streamed = self.source is not None and stage.index is not None
        bring = cast(Source, self.source).present if streamed else on_device
        with contextlib.ExitStack() as stack:
            with self.phase("load"):
                stack.enter_context(bring(stage.module, self.device))
            yield
            with self.phase("store"):
                stack.close()

    def looked(self, look: Callable[[], T]) -> T:
        """look(), which runs the whole model on a few tokens, where that is fast."""
        blocks = [] if self.source is not None else self.selection.blocks
        return looked(blocks, self.device, look)

    def lazily(self) -> contextlib.AbstractContextManager[None]:
        """Within: the whole model can be run, where it is."""
        return contextlib.nullcontext() if self.source is None else self.source.lazily()

    @quiet
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
        """The blocks are no chain: say so, or refuse what needs one (match_dense, a source)."""
        kind = type(self.model).__name__
        expected = "a model that is a chain of decoder blocks, for match_dense"
        remedy = "Leave match_dense out."
        if self.op == "sparsekern.calibrate":
            expected, remedy = expected.replace("match_dense", "beside_dense"), "Leave it out."
        got = f"{kind}, which is calibrated as a whole"
        if self.optional_dense:
            self.beside_dense = False
        check(not self.beside_dense, self.op, expected, got, remedy)
        expected = "a model that is a chain of decoder blocks, to stream it"
        remedy = "Prune it in memory (--no-stream)."
        check(self.source is None, self.op, expected, got, remedy)
        if has_blocks and models.is_transformers(self.model):
            text = (
                "the blocks are no chain that can be walked; every layer is calibrated in one pass"
            )
            warnings.warn(f"{self.op}: {text}, on the unpruned model.", stacklevel=5)

    @property
    def mine(self) -> list[Batch]:
        """The batches that this process runs."""
        ranks = self.ranks
        return self.batches if ranks is None else self.batches[ranks.rank :: ranks.world]

    def collecting(self, layers: list[Layer], share: bool, beside: bool) -> HessianCollector:
        """What collects the Hessians of these layers."""
        if self.ranks is None:
            return HessianCollector(layers, self.device, share)
        knobs = (self.ranks, self.batches, beside)
        return SharedCollector(layers, self.device, share, *knobs)

    def _begin(self, batch: Batch) -> None:
        if self.collector is not None:
            self.collector.keep = batch.keep

    def _whole(self) -> Iterator[None]:
        for batch in self.mine:
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
        """Before the first change of a layer: keep its dense weight, with undo; on the host where
        that is for the whole run."""
        if self._undo is None or any(old is layer.module for old, _, _ in self._undo):
            return
        parameter = cast(nn.Parameter, layer.module.weight)
        where = self._homes.get(id(layer.module), parameter.device)
        kept_at = parameter.device if self.undo == "stage" else torch.device("cpu")
        self._undo.append((layer.module, parameter.detach().to(kept_at, copy=True), where))

    def compress(self, layer: Layer, weight: Sparse24) -> None:
        """Replace a layer by a SparseLinear, where the model has the layer: its layout there is not
        that of a GPU."""
        old = layer.module
        parameter = cast(Tensor, old.weight)
        bias = cast("Tensor | None", getattr(old, "bias", None))
        home = self._homes.get(id(old), parameter.device)
        home = parameter.device if home.type == "meta" else home
        if bias is not None:
            bias.data = bias.data.to(home)
        new: SparseLinear = SparseLinear.from_sparse24(weight.to(home), bias)
        root = layer.home or self.model
        replace_module(root, old, new)
        if id(old) in self._training:
            self._training[id(new)] = (new, self._training.pop(id(old))[1])
        if self._undo is not None:
            self._replaced.append((root, old, new))
            parameter.data = parameter.data.new_empty(0)
        # Nothing may hold on to the dense layer: its memory is freed here.
        layer.module = new

    @quiet
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
            with eager(self.model):
                yield
        finally:
            for module, flag in self._training.values():
                module.training = flag
            for config, cache in caches:
                config.use_cache = cache
            self._training = before
