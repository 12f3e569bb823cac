"""prune_model: a whole model in, the same model with 2:4 layers out, block by block on the inputs
the pruned model produces. Checks, plan, run; the stages are in executor.py."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern import prune
from sparsekern.backends.compress import compress as compress_weight
from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.count import num_parameters
from sparsekern.nn.replace import dense_weight, write_weight
from sparsekern.nn.sparse_linear import check_before_loading
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot import fingerprint
from sparsekern.oneshot import keep_dense as dense_rule
from sparsekern.oneshot.calibration import Batch, digest, make_batches
from sparsekern.oneshot.estimate import Progress, free_host_bytes
from sparsekern.oneshot.executor import Calibration, Stage, on_device
from sparsekern.oneshot.experts import with_experts_apart
from sparsekern.oneshot.layerwise import (
    DAMP,
    Options,
    describe_quantized,
    new_report,
    prune_group,
)
from sparsekern.oneshot.layerwise import quantize as quantize_layer
from sparsekern.oneshot.presets import find_preset
from sparsekern.oneshot.reconstruct import reconstruct_block
from sparsekern.oneshot.report import LayerReport, PruneReport
from sparsekern.oneshot.resume import ResumeDir, rotate_resumed
from sparsekern.oneshot.rotation import rotate_on
from sparsekern.oneshot.rounds import Fit, Given, Reconstruction, as_rounds, described
from sparsekern.oneshot.selection import check_options, check_weights, describe, select
from sparsekern.oneshot.sequential import Walk
from sparsekern.oneshot.skip import DEFAULT_RULE
from sparsekern.oneshot.spans import SpanRound, final_norm, fitting, rebatch
from sparsekern.prune import Hessian, Method
from sparsekern.prune.methods import find_method

OP = "sparsekern.prune_model"
logger = logging.getLogger("sparsekern")


@with_experts_apart
def prune_model(
    model: nn.Module,
    method: str | Method | Callable[[Tensor, Hessian | None], Tensor] = "sparsegpt",
    calibration: Any = None,
    skip: Any = (DEFAULT_RULE,),
    compress: bool = True,
    *,
    targets: Any = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    tokenizer: Callable[..., Any] | None = None,
    pattern: tuple[int, int] = (2, 4),
    masks: Mapping[str, Tensor] | None = None,
    true_sequential: bool = False,
    damp: float | None = None,
    blocksize: int | None = None,
    refine: int | None = None,
    match_dense: float | None = None,
    on_error: str = "raise",
    offload_activations: bool | str = "auto",
    keep_dense: str | None = None,
    keep_dense_tokens: Sequence[int] = dense_rule.TOKENS,
    hessians: Mapping[str, Hessian | Tensor] | None = None,
    keep_hessians: bool = False,
    resume: str | os.PathLike[str] | None = None,
    undo: bool | str = "auto",
    progress: bool = True,
    quantize: str | None = None,
    quantize_method: str | None = None,
    quantize_group: int | None = None,
    preset: str | None = None,
    reconstruct: Given = None,
    rotate: bool | Mapping[str, Any] | None = None,
    untie: bool = False,
    **options: Any,
) -> PruneReport:
    """Prune the linear layers of `model` to 2:4, in place: W' minimises ‖(W − W')X‖² layer by layer
    (SparseGPT), or keeps the weights of highest score.

    Args:
        model: a Transformers model, or any nn.Module. Where it is a chain of blocks they are
            calibrated one by one on what the pruned blocks before them return; else, with a
            warning, every layer in one pass on the unpruned model.
        method: "sparsegpt" (mask and weight update), "wanda" (|W|·‖x‖₂), "magnitude" (|W|), the
            name of a method registered with prune.register_method, a prune.Method, or a function
            (w [out_features, in_features], Hessian or None) -> scores of the same shape, higher =
            kept.
        calibration: token ids, int64 [samples, tokens], or whatever else the model takes: texts
            (with tokenizer=), a tokenizer's output, dicts, (ids, target) pairs, a dataset, a
            DataLoader, pixel tensors; for plain modules a tensor [samples, ...] or an iterable of
            tensors, tuples or dicts, each one forward call. Positions where an attention mask is 0
            do not count. See oneshot/calibration.py. Needed by methods that need more than the
            weights; the others then report errors too.
        skip: layers to leave dense: names, globs, "re:...", class names, block indices or ranges;
            see oneshot/skip.py.
        compress: replace each pruned layer by a SparseLinear. False leaves dense weights with
            zeros.
        targets: rules as for skip: only layers that match are pruned. None: all.
        device: where blocks are run and pruned, one at a time; None: "cuda" if there is one, else
            where the model is.
        batch_size: samples per forward; None: by tokens, 16384 on a GPU and 4096 on a CPU.
        tokenizer: for texts as calibration: a callable text -> {"input_ids": [...]}.
        pattern: (n, m), n kept of each m; compress=True needs (2, 4).
        masks: layer name -> bool [out_features, in_features], True = kept; other layers get the
            method's mask. A method that updates weights ("sparsegpt") still does.
        true_sequential: prune the layers of a block in order of execution, each group on the
            outputs of the groups before. Slower: one more forward of the block per group.
        damp, blocksize: as in prune.sparsegpt; None: 0.01 and 128. damp is also that of refine and
            match_dense.
        refine: steps of prune.refine after each layer's own method: the kept weights move towards
            the least-squares fit under the mask. None: the method's default, 16 with "sparsegpt",
            else 0. With 0 the method is the published one.
        match_dense: with "sparsegpt", the share (0 to 1) of prune.retarget that is applied before
            it: layers then make up for what pruning has changed in their inputs. Costs one more
            forward per block and a second set of hidden states. 0 is the published method. None:
            the method's default (0.25 with "sparsegpt") on a model that is a chain of decoder
            blocks, unless true_sequential or hessians; else 0. Layers that get only some of the
            tokens, as experts do, are left out.
        on_error: "raise" or "skip" (leave the layer dense, reason in the report): NaN or Inf in a
            weight or its inputs, or a method that fails on it (prune.PruneError). Layers that no
            method could prune (in_features, dtype, tied weights, never called) are always skipped
            with the reason.
        offload_activations: True keeps the hidden states of the calibration on the host, False on
            `device`, "auto" decides by free memory.
        keep_dense: "if-slower" measures every distinct layer shape on `device`, dense and 2:4, and
            leaves those dense whose time, summed over keep_dense_tokens, is longer with 2:4. They
            are in the report with the times. On a CPU that is every layer, with a warning.
        keep_dense_tokens: numbers of tokens per call that matter to you.
        hessians: layer name -> Hessian (or its matrix) for every layer to prune: used in place of a
            calibration.
        keep_hessians: report.hessians then holds them, on the host.
        resume: a directory. Each finished block is stored there; the same call on a freshly loaded
            model continues after the last of them, with the same result as an uninterrupted run.
        undo: True keeps the dense weights on the host until the run has succeeded, so that an
            exception leaves the model as it was; "auto": where half of the free memory holds them.
            Without it, and with `resume`, an exception leaves the finished blocks pruned and the
            others as they were, and its notes name the last one.
        progress: show a progress bar with the time left.
        quantize: "fp8", "int8" or "int4": each layer's kept weights become levels with scales once
            it is pruned and refined (see sparsekern.quantize), and the layers after it are
            calibrated on that. Needs pattern (2, 4). With compress=False the dense weights hold
            the numbers of the levels.
        quantize_method: "gptq" (needs a calibration; prune.gptq), "rtn" (every weight to its
            nearest level), or None: "gptq" where there is a calibration. The report says which.
        quantize_group: columns that share a scale, of int4: 64, 128 or None (128).
        preset: "fast", "default" or "best" (oneshot/presets.py): what reconstruct and rotate are
            where they are None. What the model or the calibration does not allow is then left out
            with a warning. None: neither.
        reconstruct: rounds of gradient descent on the hidden states that pruned blocks return: a
            Reconstruction, its keywords as a dict, a list of them, True for one with the defaults,
            () for none. For a model that is a chain of decoder blocks.
        rotate: True, or keywords of sparsekern.rotate (steps, seconds, rate, heads, seed): change
            the basis of the residual stream first. The dense model stays the same up to rounding.
            False: not.
        untie: allow `rotate` to give the head a weight of its own.
        **options: of a registered method.
    Returns:
        PruneReport with one row per weight that takes part in matrix products.
    Raises:
        ValueError: an argument that does not fit; a skip rule or mask name that matches nothing;
            non-finite weights; a resume directory of another run. Checked before anything is
            changed.
        TypeError: arguments of the wrong type.
        PruneError (a RuntimeError): the method failed on a layer.
    Warns:
        UserWarning: nothing, or less than half of what was asked for, is 2:4 in the end
            (report.partial); it names the largest reasons.
    Notes:
        Experts in 3-D parameters are pruned one by one, as layers `<module>.<expert>.<parameter>`,
        each on the tokens that reach it and, the fewer these are, on others of its layer
        (oneshot/experts.py has the rule); the report names those that saw fewer tokens than they
        have in_features (report.few_tokens). With compress their module becomes a SparseExperts.
        Training flags, hooks, config.use_cache, tied weights and the model's device are left as
        they were. The output is deterministic for one device and batch size. Progress is logged to
        "sparsekern".
    Source: Frantar and Alistarh 2023 (arXiv:2301.00774); Sun et al. 2024, "Wanda"
    (arXiv:2306.11695).
    """
    start = time.perf_counter()
    model = models.unwrapped(model)
    chosen = find_method(OP, method)
    calibrated = calibration is not None or hessians is not None
    extra = _Extra(preset, reconstruct, rotate, untie, calibration, hessians, true_sequential)
    may_match = match_dense is None and bool(chosen.match_dense) and not true_sequential
    may_match = may_match and hessians is None
    wanted = Options(
        chosen,
        tuple(pattern),  # type: ignore[arg-type]
        dict(masks or {}),
        _values(chosen, {"damp": damp, "blocksize": blocksize}, options),
        DAMP if damp is None else damp,
        chosen.refine if refine is None else refine,
        float(chosen.match_dense or 0) if may_match else match_dense or 0.0,
        on_error,
        quantize,
        quantize_method,
        quantize_group,
        OP,
    )
    check_options(wanted, true_sequential, compress, calibrated, offload_activations, OP)
    late = bool(extra.spans) and quantize_method == "gptq"
    expected = 'quantize_method "rtn" or None with rounds of reconstruction after the walk'
    check(not late, OP, expected, "'gptq'", "No Hessian is left after them.")
    check(undo in (True, False, "auto"), OP, 'undo True, False or "auto"', repr(undo))
    timed_tokens = dense_rule.check_arguments(keep_dense, keep_dense_tokens, compress, OP)

    def walked() -> Calibration:
        selection = select(model, skip, wanted.pattern, compress, targets=targets, op=OP)
        check_weights(selection, wanted, compress)
        keeps = undo if isinstance(undo, bool) else _fits_twice(selection.active)
        return Calibration(
            model,
            selection,
            op=OP,
            device=device,
            true_sequential=true_sequential,
            beside_dense=bool(wanted.match_dense) or extra.needs_dense,
            optional_dense=may_match or not wanted.match_dense,
            offload=None if offload_activations == "auto" else bool(offload_activations),
            hessians=hessians,
            undo="stage" if resume is not None or not keeps else "run",
        )

    walk = walked()
    batches = []
    if calibration is not None and hessians is None:
        batches = make_batches(calibration, model, batch_size, walk.device, tokenizer, OP)
    report = PruneReport(type(model).__name__, chosen.name, device=str(walk.device), preset=preset)
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
        if extra.rotate is not None:
            undo_rotation = extra.turn(model, batches, walk.device, resume, report)
            if undo_rotation is not None:
                if walk.undo == "run":
                    stack.push(_on_error(undo_rotation))
                phases = {"rotate": report.rotation["seconds"]} if report.rotation else {}
                walk = walked()  # the head may have a weight of its own now
                walk.phases |= phases
        walk.batches = batches
        report.phases = walk.phases
        report.options = describe(skip, wanted, compress, true_sequential, targets)
        report.options |= extra.described()
        if keep_dense:
            report.options |= {"keep_dense": keep_dense, "keep_dense_tokens": list(timed_tokens)}
        if batches:
            keys = ("samples", "tokens")
            totals = {key: sum(getattr(b, key) for b in walk.batches) for key in keys}
            report.calibration = {**totals, "sha256": digest(walk.batches)}
            more = getattr(calibration, "described", None)  # eval/mix.py
            report.calibration |= more() if callable(more) else {}
        if keep_hessians:
            report.hessians = {}
        run = _Run(model, wanted, compress, walk, report, extra)
        if resume is not None:
            run.resume = ResumeDir(resume, run.manifest(method, hessians))
            stack.callback(run.resume.close)
        if keep_dense:
            run.leave_slow_layers_dense(timed_tokens)
        run.execute(progress)
    if compress and report.pruned:
        check_before_loading(model)
    counted = num_parameters(model)
    report.parameters = {"dense": counted.dense, "stored": counted.stored}
    report.seconds = time.perf_counter() - start
    run.say()
    return report


def _on_error(undo: Callable[[], None]) -> Callable[..., None]:
    """For ExitStack.push: call undo where the block ends with an exception."""

    def leave(kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            undo()

    return leave


class _Extra:
    """What a preset or the caller adds to the walk: a rotation before it, reconstruction in it and
    after it.

    Attributes:
        block: the round inside the walk.      spans: the rounds after it.
        rotate: keywords of rotate_on, None for no rotation.
        optional: what the model does not allow is left out with a warning.
    """

    def __init__(
        self,
        preset: str | None,
        reconstruct: Given,
        rotate: bool | Mapping[str, Any] | None,
        untie: bool,
        calibration: Any,
        hessians: Any,
        true_sequential: bool,
    ) -> None:
        row = find_preset(OP, preset)
        self.optional = reconstruct is None
        rounds = row.rounds if reconstruct is None else as_rounds(reconstruct, OP)
        self.turn_optional = rotate is None
        wanted = row.rotate if rotate is None else rotate
        kinds = isinstance(wanted, (bool, Mapping))
        expected = "rotate as a bool or keywords of sparsekern.rotate"
        check(kinds, OP, expected, type(wanted).__name__, exc=TypeError)
        self.rotate: dict[str, Any] | None = None
        if wanted is not False:
            self.rotate = {**(wanted if isinstance(wanted, Mapping) else {}), "untie": untie}
            known = {"steps", "seconds", "rate", "heads", "seed", "untie"}
            unknown = sorted(set(self.rotate) - known)
            check(not unknown, OP, f"keywords of sparsekern.rotate: {sorted(known)}", unknown)
        possible = calibration is not None and hessians is None
        for name, asked, optional in (
            ("reconstruct", bool(rounds), self.optional),
            ("rotate", self.rotate is not None, self.turn_optional),
        ):
            if asked and not possible:
                check(optional, OP, f"calibration data for {name}", "none")
                warnings.warn(f"{OP}: preset {preset} without calibration: no {name}", stacklevel=4)
        if not possible:
            rounds, self.rotate = (), None
        both = true_sequential and any(r.span == 1 and r.target == "dense" for r in rounds)
        remedy = 'Use target="pruned".'
        check(
            not both, OP, 'a round of span 1 with target="dense" or true_sequential', "both", remedy
        )
        self.block = next((r for r in rounds if r.span == 1), None)
        self.spans = [r for r in rounds if r.span != 1]

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model is walked beside the pruned one."""
        return self.block is not None and self.block.target == "dense"

    def drop(self) -> None:
        """Leave out the rounds."""
        self.block, self.spans = None, []

    def described(self) -> dict[str, Any]:
        """As options of the report and of the manifest."""
        rounds = described([r for r in (self.block, *self.spans) if r is not None])
        made: dict[str, Any] = {"reconstruct": rounds} if rounds else {}
        return made | ({"rotate": dict(self.rotate)} if self.rotate is not None else {})

    def turn(
        self,
        model: nn.Module,
        batches: list[Batch],
        device: torch.device,
        resume: str | os.PathLike[str] | None,
        report: PruneReport,
    ) -> Callable[[], None] | None:
        """Rotate the model; returns how to take it back, None where the preset does without."""
        assert self.rotate is not None
        try:
            if resume is None:
                turned = rotate_on(model, batches, device, **self.rotate)
            else:
                turned = rotate_resumed(model, batches, device, resume, self.rotate)
        except (ValueError, RuntimeError) as error:
            if not self.turn_optional:
                raise
            report.rotation, self.rotate = {"skipped": str(error)}, None
            warnings.warn(f"{OP}: preset {report.preset} without rotation. {error}", stacklevel=3)
            return None
        report.rotation = asdict(turned.report)
        return turned.undo


def _said(fit: Fit) -> str:
    """A fit in the words of a layer's note."""
    first, last = fit.blocks[0], fit.blocks[-1]
    where = f"block {first}" if first == last else f"blocks {first}-{last}"
    text = f"{where} reconstructed: held-out error {fit.before:.4g} -> {fit.after:.4g}"
    return text if fit.kept else f"{where}: reconstruction was no better ({fit.before:.4g})"


def _values(
    method: Method, common: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The method's own options: what prune_model has a keyword for, where the method knows it, and
    the rest as given."""
    declared = {option.name for option in method.options}
    given = {k: v for k, v in common.items() if v is not None and k in declared}
    return method.values(OP, {**given, **options})


def _fits_twice(layers: Sequence[models.Layer]) -> bool:
    """Whether half of the host's free memory holds a copy of these weights."""
    free = free_host_bytes()
    return free is not None and sum(layer.bytes_dense for layer in layers) <= free / 2


class _Run:
    """One call of prune_model."""

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        compress: bool,
        walk: Calibration,
        report: PruneReport,
        extra: _Extra,
    ) -> None:
        self.model, self.options, self.compress = model, options, compress
        self.late: Options | None = None  # how weights are quantised after the last round
        self.walk, self.report, self.extra = walk, report, extra
        self.resume: ResumeDir | None = None
        self.rows: dict[str, LayerReport] = {}
        self.final: nn.Module | None = None  # the norm behind the last block
        self.teachers: list[nn.Module] = []  # dense copies of the blocks, for the rounds after

    def _matched(self) -> float:
        """match_dense, left out where it is the default and the model is no chain."""
        if self.walk.optional_dense and not self.walk.beside_dense:
            self.report.options.pop("match_dense", None)
            return 0.0
        return self.options.match_dense

    def _prepare_rounds(self) -> None:
        """What reconstruction needs of the dense model; nothing where the blocks are no chain."""
        extra = self.extra
        if extra.block is None and not extra.spans:
            return
        kind, remedy = type(self.model).__name__, "Leave reconstruct out."
        if not self.walk.chained:
            expected = "a model that is a chain of decoder blocks, for reconstruct"
            check(extra.optional, OP, expected, kind, remedy)
            text = f"preset {self.report.preset} without reconstruction: {kind} is no chain"
            warnings.warn(f"{OP}: {text} of decoder blocks.", stacklevel=4)
            extra.drop()
            self.report.options.pop("reconstruct", None)
            return
        blocks = self.walk.selection.blocks
        with self.walk.evaluating():
            probe = self.walk.batches[0].probe()
            self.final = final_norm(self.model, blocks, probe, self.walk.home)
        if extra.optional and self.walk.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.walk.device).total_memory
            extra.spans = [
                fitting(options, blocks, self.walk.batches, memory) for options in extra.spans
            ]
            self.report.options |= extra.described()
        moving = any(options.reselect for options in extra.spans)
        fixed = not (moving and self.options.masks)
        check(fixed, OP, "masks or reselect", "both of them", "Pass reselect=0.")
        if extra.spans:
            self.teachers = [copy.deepcopy(b).to("cpu").requires_grad_(False) for b in blocks]

    def manifest(self, method: Any, hessians: Any) -> dict[str, Any]:
        """What a resumed run has to share with this one."""
        chosen, batches = self.options.method, self.walk.batches
        module = "" if isinstance(method, str) else f"{getattr(method, '__module__', '')}."
        made: dict[str, Any] = {
            "model": self.report.model,
            "weights": fingerprint.of_model(self.model),
            "method": module + chosen.name,
            "function": [
                fingerprint.of_function(f)
                for f in (
                    chosen.function if isinstance(method, (str, Method)) else method,
                    chosen.finish,
                )
                if f is not None
            ],
            "calibration": self.report.calibration,
            "batch_size": [b.samples for b in batches[:1]],
            "device": self.walk.device.type,
            "on_error": self.options.on_error,
            **self.report.options,
        }
        if self.walk.hessians is not None:
            named = sorted((k, h.matrix) for k, h in self.walk.hessians.items())
            made["hessians"] = fingerprint.of_tensors(named)
        return made

    def leave_slow_layers_dense(self, tokens: tuple[int, ...]) -> None:
        """Give layers that 2:4 makes slower their reason; a resumed run takes the stored times."""
        layers, device = self.walk.selection.active, self.walk.device
        with self.walk.phase("layer times"):
            measure = functools.partial(dense_rule.measure, layers, tokens, device)
            times = self.resume.remember("layer_times", measure) if self.resume else measure()
        dense_rule.decide(layers, times, tokens, device, OP)
        for layer in layers:
            layer.asked = layer.reason is None

    def execute(self, progress: bool) -> None:
        """Prune stage after stage. An exception takes back what was not final."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        stages = self.walk.plan()
        self.options.match_dense = self._matched()
        self._prepare_rounds()
        if self.extra.spans and self.options.quantize:  # there is no Hessian after them
            self.late = replace(self.options, quantize_method="rtn")
            self.options = replace(self.options, quantize=None)
        expected = f"a model that is a chain of blocks, with calibration, for {self.report.method}"
        possible = self.options.method.finish is None or self.walk.chained
        check(possible, OP, expected, type(self.model).__name__, "Use another method.")
        done = self._finished(stages)
        count = sum(bool(stage.layers) for stage in stages)
        last = ""
        walked = self.walk.stages(done)
        name = self.options.method.name
        with tqdm(total=count, desc=name, unit="block", disable=not progress) as bar:
            watch = Progress(self.walk, [s for s in stages if s.key not in done], bar, OP)
            try:
                with contextlib.closing(walked):
                    for stage in walked:
                        self._load(stage) if stage.key in done else self._prune(stage)
                        if stage.layers:
                            last = stage.key
                            bar.update()
                            watch.done(stage.key)
                if self.extra.spans:
                    self._train_spans(progress)
            except BaseException as error:
                self.walk.rollback()
                self._note(error, last)
                raise
            finally:
                self.walk.on_tick = None
                self.report.estimate = watch.estimate
        for layer in self.walk.selection.layers:
            if layer.name not in self.rows:
                self.rows[layer.name] = new_report(layer)
                self.rows[layer.name].asked = layer.asked
        self.report.layers = [self.rows[layer.name] for layer in self.walk.selection.layers]

    def _finished(self, stages: list[Stage]) -> set[str]:
        """Keys of the leading stages that the resume directory holds."""
        done: set[str] = set()
        for stage in stages:
            if stage.layers:
                if self.resume is None or not self.resume.has(stage.key):
                    break
                done.add(stage.key)
        return done

    def _load(self, stage: Stage) -> None:
        assert self.resume is not None
        device = self.walk.device if stage.module is not None else self.walk.home
        results, reports = self.resume.load(stage.key, stage.layers, device)
        self.report.resumed += 1
        self.rows.update({r.name: r for r in reports})
        for name, weight in results.items():
            stage.replace(name, weight)

    def _prune(self, stage: Stage) -> None:
        """Prune the layers of a stage in place, dense; what replaces them later is kept by it."""
        if not stage.layers:
            return
        results: dict[str, Sparse24 | Tensor] = {}
        kept: dict[str, tuple[Tensor, Tensor, Hessian | None]] = {}
        finish = self.options.method.finish is not None
        finish |= self.extra.block is not None and stage.index is not None
        with contextlib.closing(stage.groups()) as groups:
            for group in groups:
                if self.report.hessians is not None and group.hessian is not None:
                    stored = group.hessian.to("cpu")
                    self.report.hessians |= {layer.name: stored for layer in group.layers}
                with self.walk.phase("prune"):
                    for pruned in prune_group(group.layers, group.hessian, self.options):
                        self._tick(stage)
                        layer, weight, mask = pruned.layer, pruned.weight, pruned.mask
                        self.rows[layer.name] = pruned.report
                        if weight is None or mask is None:
                            continue
                        if finish:
                            kept[layer.name] = layer.weight.clone(), mask, group.hessian
                            stage.replace(layer.name, weight)
                            continue
                        results[layer.name] = self._final(
                            pruned.report, weight, mask, pruned.quantized
                        )
                        stage.replace(layer.name, results[layer.name])
        if finish and kept:
            self._finish(stage, kept, results)
        for layer in stage.layers:
            if layer.name not in self.rows:
                self.rows[layer.name] = new_report(layer)
        if self.resume is not None:
            rows = [self.rows[layer.name] for layer in stage.layers]
            self.resume.save(stage.key, results, rows)

    def _tick(self, stage: Stage) -> None:
        if self.walk.on_tick is not None:
            done = sum(layer.name in self.rows for layer in stage.layers) + 1
            self.walk.on_tick(stage.key, "prune", done, len(stage.layers))

    def _final(
        self, row: LayerReport, weight: Tensor, mask: Tensor, quantized: Sparse24 | None
    ) -> Sparse24 | Tensor:
        """What the stage keeps of a pruned weight."""
        if self.extra.spans:
            return weight  # a round after the walk compresses
        if not self.compress:
            return weight if quantized is None else quantized.to_dense()
        compressed = compress_weight(weight, mask) if quantized is None else quantized
        row.bytes_sparse = compressed.nbytes
        return compressed

    def _finish(
        self,
        stage: Stage,
        kept: dict[str, tuple[Tensor, Tensor, Hessian | None]],
        results: dict[str, Sparse24 | Tensor],
    ) -> None:
        """Let a method with needs="outputs", and reconstruction, work on the whole block, and take
        its weights."""
        by_name = {layer.name: layer for layer in stage.layers}
        masks = {by_name[name].module: mask for name, (_, mask, _) in kept.items()}
        dense = {by_name[name].module: weight for name, (weight, _, _) in kept.items()}
        method, note = self.options.method, ""
        if method.finish is not None:
            with self.walk.phase("prune"):
                method.call(method.finish, stage, masks, dense, values=self.options.values)
        if self.extra.block is not None and stage.index is not None:
            note = self._reconstruct(stage, masks, dense)
        for name, (weight, mask, hessian) in kept.items():
            new = dense_weight(by_name[name].module).masked_fill(~mask, 0).contiguous()
            expected = f"finite weights of {name} after {method.name}"
            check(bool(new.isfinite().all()), OP, expected, "NaN or Inf", exc=prune.PruneError)
            row = self.rows[name]
            row.note = "; ".join(filter(None, (row.note, note))) or None
            if hessian is not None:
                row.relative_error = prune.relative_error(weight, new, hessian)
            quantized = None
            if self.options.quantize:
                quantized, _ = quantize_layer(weight, new, mask, hessian, self.options)
                describe_quantized(row, weight, quantized, hessian, self.options)
            results[name] = self._final(row, new, mask, quantized)
            stage.replace(name, results[name])

    def _reconstruct(
        self,
        stage: Stage,
        masks: dict[nn.Module, Tensor],
        dense: dict[nn.Module, Tensor],
    ) -> str:
        """Reconstruct one block; returns what its layers' rows say."""
        walk, index = cast(Walk, self.walk.walk), cast(int, stage.index)
        block = cast(nn.Module, stage.module)
        options = cast(Reconstruction, self.extra.block)
        final = self.final if index == len(walk.blocks) - 1 else None
        seconds = None
        if options.seconds is not None:
            spent = sum(row["seconds"] for row in self.report.reconstruction)
            seconds = max(0.0, options.seconds - spent) / (len(walk.blocks) - index)
        with self.walk.phase("reconstruct"), on_device(final, self.walk.device):
            fits = reconstruct_block(block, index, walk, masks, dense, options, final, seconds)
        self.report.reconstruction += [fit.row() for fit in fits]
        return _said(fits[-1]) if fits else ""

    def _train_spans(self, progress: bool) -> None:
        """The rounds after the walk, then compression."""
        from tqdm import tqdm

        layers = {
            layer.name: layer
            for layer in self.walk.selection.active
            if layer.name in self.rows and not self.rows[layer.name].skipped
        }
        inside = {name: layer for name, layer in layers.items() if layer.block is not None}
        # As a resumed run sees it: what is stored is the weights.
        masks = {layer.module: layer.weight != 0 for layer in inside.values()}
        with self.walk.evaluating():
            for number, options in enumerate(self.extra.spans):
                with self.walk.phase("capture"):
                    spans = SpanRound(
                        self.walk.captured(rebatch(self.walk.batches, options.batch)),
                        self.teachers,
                        masks,
                        options,
                        self.final,
                        self.walk.captured,
                    )
                count = len(spans.windows)
                name = f"reconstruct {number + 1}"
                for window in tqdm(range(count), name, unit="window", disable=not progress):
                    self._train_window(spans, number, window, inside)
        if self.compress or self.late:
            with self.walk.phase("prune"):
                for name, layer in layers.items():
                    compressed = self._compressed(self.rows[name], layer.weight)
                    if self.compress:
                        self.walk.compress(layer, compressed)
                    else:
                        write_weight(layer.module, compressed.to_dense())

    def _compressed(self, row: LayerReport, weight: Tensor) -> Sparse24:
        if self.late is None:
            compressed = compress_weight(weight, weight != 0)
        else:
            compressed, _ = quantize_layer(weight, weight, weight != 0, None, self.late)
            describe_quantized(row, weight, compressed, None, self.late)
        row.bytes_sparse = compressed.nbytes if self.compress else row.bytes_sparse
        return compressed

    def _train_window(
        self, spans: SpanRound, number: int, window: int, layers: dict[str, models.Layer]
    ) -> None:
        """One window of a round after the walk, or what the resume folder has of it."""
        first, end = spans.windows[window]
        mine = {
            name: layer
            for name, layer in layers.items()
            if layer.block is not None and first <= layer.block < end
        }
        rows = [self.rows[name] for name in mine]
        key = f"round-{number}-window-{window:05d}"
        if self.resume is not None and self.resume.has(key):
            results, rows = self.resume.load(key, list(mine.values()), self.walk.home)
            self.report.resumed += 1
            self.rows.update({row.name: row for row in rows})
            for name, weight in results.items():
                write_weight(mine[name].module, cast(Tensor, weight))
            return
        with self.walk.phase("reconstruct"):
            fit = spans.fit(window)
        self.report.reconstruction.append(fit.row())
        for row in rows:
            row.note = "; ".join(filter(None, (row.note, _said(fit))))
        if self.resume is not None:
            weights: dict[str, Sparse24 | Tensor] = {n: la.weight for n, la in mine.items()}
            self.resume.save(key, weights, rows)

    def _note(self, error: BaseException, last: str) -> None:
        """Say with the exception what state the model is in."""
        if self.resume is None and self.walk.undo == "run":
            text = "every weight of the model is as it was before the call"
        elif last:
            text = f"the model is pruned up to and with stage {last}; the rest is as it was"
            if self.resume is not None:
                text += ". The same call on a freshly loaded model continues there"
        else:
            text = "no weight of the model was changed"
        logger.info("%s failed: %s", OP, text)
        if hasattr(error, "add_note"):
            error.add_note(f"{OP}: {text}.")

    def say(self) -> None:
        """Log the outcome, and warn when less was done than was asked for."""
        report = self.report
        logger.info("%s", report.summary())
        if not report.partial:
            return
        why = "; ".join(
            f"{share:.0%} {reason} ({count})" for reason, count, share in report.why_dense()[:4]
        )
        done = "nothing was pruned" if not report.pruned else "less than half was pruned"
        already = sum(row.is_24 for row in report.skipped)
        if already:
            done += f", {already} layers were 2:4 already"
        text = f"{done}: {report.share:.1%} of the linear weights of {report.model} are 2:4"
        warnings.warn(f"{OP}: {text}. Dense: {why or 'none'}.", stacklevel=4)
