"""prune_model: a whole model in, the same model with 2:4 layers out, block by block on the inputs
the pruned model produces.

A run is a list of stages, each pruned at once and on the accelerator alone:

    stem     Linear layers before the first block, and the capture of the blocks' inputs
    block i  forward all batches (Hessians by hooks), prune, forward again: inputs of block i + 1
    head     Linear layers after the last block (lm_head, unless skipped)
    whole    everything, for a model without a chain of blocks: forwards of the whole model

Within a stage weights are first pruned in place, dense; the forward that makes the next inputs runs
on those. Then each Linear is replaced by a SparseLinear and its dense weight is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.formats.sparse24 import compress as compress_weight
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot import keep_dense as dense_rule
from sparsekern.oneshot.calibration import HessianCollector, SharingChanged, digest, make_batches
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.layerwise import MATCH_DENSE, Options, Pruned, new_report, prune_group
from sparsekern.oneshot.report import LayerReport, PruneReport
from sparsekern.oneshot.resume import ResumeDir
from sparsekern.oneshot.selection import Selection, check_options, describe, select
from sparsekern.oneshot.sequential import Walk, probe
from sparsekern.oneshot.skip import DEFAULT_RULE

OP = "sparsekern.prune_model"


def prune_model(
    model: nn.Module,
    method: str | Callable = "sparsegpt",
    calibration=None,
    skip=(DEFAULT_RULE,),
    compress: bool = True,
    *,
    device=None,
    batch_size: int | None = None,
    pattern: tuple[int, int] = (2, 4),
    masks: dict[str, torch.Tensor] | None = None,
    true_sequential: bool = False,
    damp: float = 0.01,
    blocksize: int = 128,
    refine: int | None = None,
    match_dense: float | None = None,
    on_error: str = "raise",
    offload_activations: bool | str = "auto",
    keep_dense: str | None = None,
    keep_dense_tokens: tuple[int, ...] = dense_rule.TOKENS,
    resume=None,
    progress: bool = True,
) -> PruneReport:
    """Prune the Linear layers of `model` to 2:4, in place: W' minimises ‖(W − W')X‖² layer by layer
    (SparseGPT), or keeps the weights of highest score.

    Args:
        model: a Transformers decoder-only model, or any nn.Module (then calibrated as a whole).
        method: "sparsegpt" (mask and weight update), "wanda" (|W|·‖x‖₂), "magnitude" (|W|), or a
            function (w [out_features, in_features], Hessian or None) -> scores of the same shape,
            higher = kept.
        calibration: token ids, int64 [samples, tokens] or a list of such, without padding (padded
            positions would count); for plain modules a tensor [samples, ...] or an iterable of
            tensors, tuples or dicts, each one forward call. Needed by "sparsegpt" and "wanda"; the
            others then report errors too.
        skip: layers to leave dense: names, globs, "re:...", class names, block indices or ranges;
            see oneshot/skip.py.
        compress: replace each pruned Linear by a SparseLinear. False leaves dense weights with
            zeros.
        device: where blocks are run and pruned, one at a time; None: "cuda" if there is one, else
            where the model is.
        batch_size: samples per forward; None: by tokens, 16384 on a GPU and 4096 on a CPU.
        pattern: (n, m), n kept of each m; compress=True needs (2, 4).
        masks: layer name -> bool [out_features, in_features], True = kept; other layers get the
            method's mask. "sparsegpt" still updates the kept weights.
        true_sequential: prune the layers of a block in order of execution, each group on the
            outputs of the groups before. Slower: one more forward of the block per group.
        damp, blocksize: as in prune.sparsegpt.
        refine: steps of prune.refine after each layer's own method: the kept weights move towards
            the least-squares fit under the mask. None: 16 with "sparsegpt", else 0. With 0 the
            method is the published one.
        match_dense: with "sparsegpt", the share (0 to 1) of prune.retarget that is applied before
            it: layers then make up for what pruning has changed in their inputs. Costs one more
            forward per block and a second set of hidden states. 0 is the published method. None:
            0.25 with "sparsegpt" on a model that is a chain of decoder blocks, unless
            true_sequential; else 0. Layers that get only some of the tokens, as experts do, are
            left out.
        on_error: "raise" or "skip" (leave the layer dense, reason in the report): NaN or Inf in a
            weight or its inputs, or a Hessian that cannot be inverted. Layers that no method could
            prune (in_features, dtype, tied weights, never called) are always skipped with the
            reason.
        offload_activations: True keeps the hidden states of the calibration on the host, False on
            `device`, "auto" decides by free memory.
        keep_dense: "if-slower" measures every distinct layer shape on `device`, dense and 2:4, and
            leaves those dense whose time, summed over keep_dense_tokens, is longer with 2:4. They
            are in the report with the times. On a CPU that is every layer, with a warning.
        keep_dense_tokens: numbers of tokens per call that matter to you.
        resume: a directory. Each finished block is stored there; the same call on a freshly loaded
            model continues after the last of them, with the same result as an uninterrupted run.
        progress: show a progress bar with the time left.
    Returns:
        PruneReport with one row per Linear layer.
    Raises:
        ValueError: an argument that does not fit; a skip rule or mask name that matches nothing;
            non-finite weights; a resume directory of another run. Checked before anything is
            changed.
        TypeError: arguments of the wrong type.
        RuntimeError: SparseGPT failed on a layer. Blocks before it are already pruned; with
            `resume` nothing is lost.
    Notes:
        Training flags, hooks, config.use_cache, tied weights and the model's device are left as
        they were. The output is deterministic for one device and batch size.
    Source: Frantar and Alistarh 2023 (arXiv:2301.00774); Sun et al. 2024, "Wanda"
    (arXiv:2306.11695).
    """
    start = time.perf_counter()
    may_match = match_dense is None and method == "sparsegpt" and not true_sequential
    share = MATCH_DENSE if may_match else match_dense or 0.0
    options = Options(method, tuple(pattern), masks, damp, blocksize, refine, share, on_error)
    check_options(options, true_sequential, compress, calibration, offload_activations)
    timed_tokens = dense_rule.check_arguments(keep_dense, keep_dense_tokens, compress)
    selection = select(model, skip, options, compress)
    run = _Run(model, options, selection, compress, device, true_sequential, may_match)
    run.report.options = describe(skip, options, compress, true_sequential)
    if keep_dense:
        run.report.options |= {"keep_dense": keep_dense, "keep_dense_tokens": list(timed_tokens)}
    if calibration is not None:
        run.batches = make_batches(calibration, model, batch_size, run.device)
    offload = None if offload_activations == "auto" else bool(offload_activations)
    with run.evaluation_mode(), torch.inference_mode(False), torch.no_grad():
        run.open_resume(resume)
        if keep_dense:
            run.leave_slow_layers_dense(timed_tokens)
        run.execute(run.plan(offload), progress)
    run.report.seconds = time.perf_counter() - start
    return run.report


@dataclass
class _Stage:
    """Layers that are pruned together.

    key: file name for resume.      module: what has to be on the device.      layers: to prune.
    forwards: run all batches through the stage, yielding after each; None without calibration.
    advance: the same, producing the next stage's inputs; None if no stage follows from it.
    dense: the same for the dense model's inputs, which it walks on; None where nobody asks.
    """

    key: str
    module: nn.Module | None
    layers: list[Layer]
    forwards: Callable[[], Iterator[None]] | None = None
    advance: Callable[[], Iterator[None]] | None = None
    dense: Callable[[], Iterator[None]] | None = None


@dataclass
class _Run:
    """One call of prune_model."""

    model: nn.Module
    options: Options
    selection: Selection
    compress: bool
    device: torch.device | str | None
    true_sequential: bool
    may_match: bool  # match_dense is the default: left out where the model does not allow it
    batches: list = field(default_factory=list)
    resume: ResumeDir | None = None

    def __post_init__(self):
        self.home = _home(self.model)
        default = torch.device("cuda") if torch.cuda.is_available() else self.home
        self.device = torch.device(self.device) if self.device is not None else default
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.report = PruneReport(
            type(self.model).__name__, self.options.name, device=str(self.device)
        )
        self.rows: dict[str, LayerReport] = {}
        self.training: dict[int, tuple[nn.Module, bool]] = {}  # by id of the module

    # ----------------------------------------------------------------------------------- the stages

    def plan(self, offload: bool | None) -> list[_Stage]:
        """The stages of this run, in order."""
        active = self.selection.active
        blocks, model = self.selection.blocks, self.model
        by_block = [[layer for layer in active if layer.block == i] for i in range(len(blocks))]
        outside = [layer for layer in active if layer.block is None]
        keys = [f"block-{i:05d}" for i in range(len(blocks))]
        if not self.batches:
            stages = [_Stage(*parts) for parts in zip(keys, blocks, by_block)]
            return [*stages, _Stage("outside", None, outside)]
        shown = None
        if blocks:
            shown = probe(model, blocks, outside, self.batches[0].probe(), self.home)
        if shown is None or not shown.chained:
            expected = "a model that is a chain of decoder blocks, for match_dense"
            got = f"{type(model).__name__}, which is calibrated as a whole"
            asked = self.options.match_dense and not self.may_match
            check(not asked, OP, expected, got, "Leave match_dense out.")
            self.options = dataclasses.replace(self.options, match_dense=0.0)
            self.report.options.pop("match_dense", None)
            if blocks and models.is_transformers(model):
                text = "the decoder blocks are no chain; every layer is calibrated in one pass"
                warnings.warn(f"{OP}: {text}, on the unpruned model.", stacklevel=3)
            return [_Stage("whole", model, active, self._whole_forwards)]
        walk = Walk(model, blocks, self.batches, shown, self.device, self.home, offload)
        walk.sets = 2 if self.options.match_dense else 1
        before = [layer for layer in outside if layer.name in shown.before]
        after = [layer for layer in outside if layer.name in shown.after]
        for layer in outside:
            if layer not in before and layer not in after:
                layer.reason = "never called on the calibration data"
        stages = [_Stage("stem", None, before, walk.stem, walk.capture)]
        for i, key in enumerate(keys):
            forwards = {
                "forwards": lambda i=i: walk.block(i, False),
                "advance": lambda i=i: walk.block(i, True),
            }
            if self.options.match_dense:
                forwards["dense"] = lambda i=i: walk.dense_block(i)
            stages.append(_Stage(key, blocks[i], by_block[i], **forwards))
        return [*stages, _Stage("head", None, after, walk.head)]

    def _whole_forwards(self) -> Iterator[None]:
        for batch in self.batches:
            batch.run(self.model, self.device)
            yield

    def open_resume(self, path) -> None:
        """Describe the calibration in the report; with a path, open or check the directory of
        finished stages."""
        if self.batches:
            totals = {
                key: sum(getattr(b, key) for b in self.batches) for key in ("samples", "tokens")
            }
            self.report.calibration = {**totals, "sha256": digest(self.batches)}
        if path is not None:
            method = self.options.method
            module = "" if isinstance(method, str) else f"{getattr(method, '__module__', '')}."
            manifest = {
                "model": self.report.model,
                "weights": models.fingerprint(self.model),
                "method": module + self.options.name,
                "calibration": self.report.calibration,
                "batch_size": [b.samples for b in self.batches[:1]],
                "on_error": self.options.on_error,
                **self.report.options,
            }
            self.resume = ResumeDir(path, manifest)

    def leave_slow_layers_dense(self, tokens: tuple[int, ...]) -> None:
        """Give layers that 2:4 makes slower their reason; a resumed run takes the stored times."""
        layers = self.selection.active
        with self._phase("layer times"):
            measure = functools.partial(dense_rule.measure, layers, tokens, self.device)
            times = self.resume.remember("layer_times", measure) if self.resume else measure()
        dense_rule.decide(layers, times, tokens, self.device)

    # ------------------------------------------------------------------------------------ execution

    def execute(self, stages: list[_Stage], progress: bool) -> None:
        from tqdm import tqdm

        done = self._finished(stages)
        pending = [i for i, s in enumerate(stages) if s.layers and s.key not in done]
        last_needed = max(pending, default=-1)
        count = sum(bool(s.layers) for s in stages)
        with tqdm(total=count, desc=self.options.name, unit="block", disable=not progress) as bar:
            for i, stage in enumerate(stages):
                with _on_device(stage.module, self.device):
                    if stage.dense and (stage.key in done or not stage.layers) and i < last_needed:
                        with self._phase("forward"):
                            for _ in stage.dense():
                                pass
                    finish = self._load_stage if stage.key in done else self._prune_stage
                    results = finish(stage)
                    if stage.advance is not None and i < last_needed:
                        with self._phase("capture" if stage.key == "stem" else "forward"):
                            for _ in stage.advance():
                                pass
                    self._compress_stage(stage, results)
                if stage.layers:
                    bar.update()
        for layer in self.selection.layers:
            if layer.name not in self.rows:
                self.rows[layer.name] = new_report(layer)
        self.report.layers = [self.rows[layer.name] for layer in self.selection.layers]

    def _finished(self, stages: list[_Stage]) -> set[str]:
        """Keys of the leading stages that the resume directory holds."""
        done = set()
        for stage in stages:
            if stage.layers:
                if self.resume is None or not self.resume.has(stage.key):
                    break
                done.add(stage.key)
        return done

    def _load_stage(self, stage: _Stage) -> dict:
        device = self.device if stage.module is not None else self.home
        results, reports = self.resume.load(stage.key, stage.layers, device)
        self.report.resumed += 1
        self.rows.update({r.name: r for r in reports})
        for layer in stage.layers:
            if layer.name in results:
                weight = results[layer.name]
                dense = weight.to_dense() if isinstance(weight, Sparse24) else weight
                models.write_weight(layer.module, dense)
        return results

    def _prune_stage(self, stage: _Stage) -> dict:
        """Prune the layers of a stage in place, dense. Returns name -> Sparse24, or the masked
        weight without compress."""
        results: dict = {}
        if not stage.layers:
            return results
        by_name = {layer.name: layer for layer in stage.layers}
        for layers in self._passes(stage):
            groups, hessians = self._collect(stage, layers)
            for group in groups:
                members = [by_name[name] for name in group]
                with self._phase("prune"), contextlib.ExitStack() as stack:
                    for layer in members:
                        stack.enter_context(_on_device(layer.module, self.device))
                    for pruned in prune_group(members, hessians.get(group[0]), self.options):
                        self._write(pruned, results)
                for name in group:
                    hessians.pop(name, None)
        for layer in stage.layers:
            if layer.name not in self.rows:
                layer.reason = "never called on the calibration data"
                self.rows[layer.name] = new_report(layer)
        if self.resume is not None:
            self.resume.save(stage.key, results, [self.rows[layer.name] for layer in stage.layers])
        return results

    def _passes(self, stage: _Stage) -> list[list[Layer]]:
        """Which layers are calibrated together: all of the stage, or with true_sequential one group
        of them per pass."""
        if stage.forwards is None or not self.true_sequential:
            return [stage.layers]
        groups, _ = self._collect(stage, stage.layers, first_batch_only=True)
        called = {name for group in groups for name in group}
        rest = [layer for layer in stage.layers if layer.name not in called]
        return [
            *([layer for layer in stage.layers if layer.name in group] for group in groups),
            *([rest] if rest else []),
        ]

    def _collect(self, stage: _Stage, layers: list[Layer], first_batch_only: bool = False):
        """Forward the batches and collect Hessians. Returns (groups of names by shared input, name
        -> Hessian)."""
        if stage.forwards is None:
            return [[layer.name] for layer in layers], {}
        with self._phase("hessian"):
            try:
                return self._forward_with_hooks(stage, layers, True, first_batch_only)
            except SharingChanged:
                return self._forward_with_hooks(stage, layers, False, first_batch_only)

    def _forward_with_hooks(self, stage, layers, share: bool, first_batch_only: bool):
        with HessianCollector(layers, self.device, share) as collector:
            batches = stage.forwards()
            for _ in self._beside_dense(stage, collector, batches) if stage.dense else batches:
                collector.end_batch()
                if first_batch_only:
                    break
        return collector.groups(), collector.hessians

    @staticmethod
    def _beside_dense(stage: _Stage, collector: HessianCollector, batches: Iterator) -> Iterator:
        """Each batch of the dense model's inputs, then the same of the pruned model's."""
        collector.watches_dense = True
        for _ in stage.dense():
            collector.watches_dense = False
            next(batches)
            yield
            collector.watches_dense = True

    def _write(self, pruned: Pruned, results: dict) -> None:
        """Put a pruned weight into its Linear and keep what replaces it later."""
        layer, row = pruned.layer, pruned.report
        self.rows[layer.name] = row
        if pruned.weight is None:
            return
        weight = pruned.weight
        if self.compress:
            results[layer.name] = compress_weight(weight, pruned.mask)
            row.bytes_sparse = results[layer.name].nbytes
            weight = results[layer.name].to_dense()
        else:
            results[layer.name] = weight
        models.write_weight(layer.module, weight)

    def _compress_stage(self, stage: _Stage, results: dict) -> None:
        """Replace the pruned layers of a stage by SparseLinear."""
        for layer in stage.layers:
            w24 = results.get(layer.name)
            if isinstance(w24, Sparse24):
                old = layer.module
                new = SparseLinear.from_sparse24(w24.to(old.weight.device), old.bias)
                models.replace_module(self.model, old, new)
                # Nothing may hold on to the dense layer: its memory is freed here.
                self.training[id(new)] = (new, self.training.pop(id(old))[1])
                layer.module = old = None

    # --------------------------------------------------------------------------------- small change

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """model.eval() and config.use_cache = False for the duration; every module's own flag is
        restored."""
        self.training = {id(module): (module, module.training) for module in self.model.modules()}
        config = getattr(self.model, "config", None)
        cache = getattr(config, "use_cache", None)
        try:
            self.model.eval()
            if cache is not None:
                config.use_cache = False
            yield
        finally:
            for module, flag in self.training.values():
                module.training = flag
            if cache is not None:
                config.use_cache = cache

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Time a phase; on a GPU it ends when its kernels have, once per phase and block."""
        start = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            phases = self.report.phases
            phases[name] = phases.get(name, 0.0) + time.perf_counter() - start


def _home(model: nn.Module) -> torch.device:
    """Where the inputs of the model have to be: with its embedding, or with its first parameter."""
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    parameter = next((embedding if embedding is not None else model).parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


@contextlib.contextmanager
def _on_device(module: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Move a module to `device` and back to where its first parameter was."""
    home = _home(module) if module is not None else device
    moves = module is not None and home != device
    try:
        if moves:
            module.to(device)
        yield
    finally:
        if moves:
            module.to(home)
