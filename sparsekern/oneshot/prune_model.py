"""prune_model: a whole model in, the same model with 2:4 layers out, block by block on the inputs
the pruned model produces. Checks, plan, run; the stages are in executor.py."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern import prune
from sparsekern.backends.compress import compress as compress_weight
from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.replace import dense_weight
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot import fingerprint
from sparsekern.oneshot import keep_dense as dense_rule
from sparsekern.oneshot.calibration import digest, make_batches
from sparsekern.oneshot.executor import Calibration, Stage
from sparsekern.oneshot.experts import with_experts_apart
from sparsekern.oneshot.layerwise import DAMP, Options, new_report, prune_group
from sparsekern.oneshot.report import LayerReport, PruneReport
from sparsekern.oneshot.resume import ResumeDir
from sparsekern.oneshot.selection import check_options, check_weights, describe, select
from sparsekern.oneshot.skip import DEFAULT_RULE
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
        OP,
    )
    check_options(wanted, true_sequential, compress, calibrated, offload_activations, OP)
    check(undo in (True, False, "auto"), OP, 'undo True, False or "auto"', repr(undo))
    timed_tokens = dense_rule.check_arguments(keep_dense, keep_dense_tokens, compress, OP)
    selection = select(model, skip, wanted.pattern, compress, targets=targets, op=OP)
    check_weights(selection, wanted, compress)
    keeps = undo if isinstance(undo, bool) else _fits_twice(selection.active)
    walk = Calibration(
        model,
        selection,
        op=OP,
        device=device,
        true_sequential=true_sequential,
        beside_dense=bool(wanted.match_dense),
        optional_dense=may_match,
        offload=None if offload_activations == "auto" else bool(offload_activations),
        hessians=hessians,
        undo="stage" if resume is not None or not keeps else "run",
    )
    report = PruneReport(type(model).__name__, chosen.name, device=str(walk.device))
    report.phases = walk.phases
    report.options = describe(skip, wanted, compress, true_sequential, targets)
    if keep_dense:
        report.options |= {"keep_dense": keep_dense, "keep_dense_tokens": list(timed_tokens)}
    if calibration is not None and hessians is None:
        walk.batches = make_batches(calibration, model, batch_size, walk.device, tokenizer, OP)
        totals = {key: sum(getattr(b, key) for b in walk.batches) for key in ("samples", "tokens")}
        report.calibration = {**totals, "sha256": digest(walk.batches)}
    if keep_hessians:
        report.hessians = {}
    run = _Run(model, wanted, compress, walk, report)
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
        if resume is not None:
            run.resume = ResumeDir(resume, run.manifest(method, hessians))
            stack.callback(run.resume.close)
        if keep_dense:
            run.leave_slow_layers_dense(timed_tokens)
        run.execute(progress)
    report.seconds = time.perf_counter() - start
    run.say()
    return report


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
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return False
    return sum(layer.bytes_dense for layer in layers) <= free / 2


class _Run:
    """One call of prune_model."""

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        compress: bool,
        walk: Calibration,
        report: PruneReport,
    ) -> None:
        self.model, self.options, self.compress = model, options, compress
        self.walk, self.report = walk, report
        self.resume: ResumeDir | None = None
        self.rows: dict[str, LayerReport] = {}

    def _matched(self) -> float:
        """match_dense, left out where it is the default and the model is no chain."""
        if self.walk.optional_dense and not self.walk.beside_dense:
            self.report.options.pop("match_dense", None)
            return 0.0
        return self.options.match_dense

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
        expected = f"a model that is a chain of blocks, with calibration, for {self.report.method}"
        possible = self.options.method.finish is None or self.walk.chained
        check(possible, OP, expected, type(self.model).__name__, "Use another method.")
        done = self._finished(stages)
        count = sum(bool(stage.layers) for stage in stages)
        last = ""
        walked = self.walk.stages(done)
        name = self.options.method.name
        with tqdm(total=count, desc=name, unit="block", disable=not progress) as bar:
            try:
                with contextlib.closing(walked):
                    for stage in walked:
                        self._load(stage) if stage.key in done else self._prune(stage)
                        if stage.layers:
                            last = stage.key
                            bar.update()
            except BaseException as error:
                self.walk.rollback()
                self._note(error, last)
                raise
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
        finish = self.options.method.finish
        with contextlib.closing(stage.groups()) as groups:
            for group in groups:
                if self.report.hessians is not None and group.hessian is not None:
                    stored = group.hessian.to("cpu")
                    self.report.hessians |= {layer.name: stored for layer in group.layers}
                with self.walk.phase("prune"):
                    for pruned in prune_group(group.layers, group.hessian, self.options):
                        layer, weight, mask = pruned.layer, pruned.weight, pruned.mask
                        self.rows[layer.name] = pruned.report
                        if weight is None or mask is None:
                            continue
                        if finish is not None:
                            kept[layer.name] = layer.weight.clone(), mask, group.hessian
                            stage.replace(layer.name, weight)
                            continue
                        results[layer.name] = self._final(pruned.report, weight, mask)
                        stage.replace(layer.name, results[layer.name])
        if finish is not None and kept:
            self._finish(stage, kept, results)
        for layer in stage.layers:
            if layer.name not in self.rows:
                self.rows[layer.name] = new_report(layer)
        if self.resume is not None:
            rows = [self.rows[layer.name] for layer in stage.layers]
            self.resume.save(stage.key, results, rows)

    def _final(self, row: LayerReport, weight: Tensor, mask: Tensor) -> Sparse24 | Tensor:
        """What the stage keeps of a pruned weight."""
        if not self.compress:
            return weight
        compressed = compress_weight(weight, mask)
        row.bytes_sparse = compressed.nbytes
        return compressed

    def _finish(
        self,
        stage: Stage,
        kept: dict[str, tuple[Tensor, Tensor, Hessian | None]],
        results: dict[str, Sparse24 | Tensor],
    ) -> None:
        """Let a method with needs="outputs" work on the whole block, and take its weights."""
        by_name = {layer.name: layer for layer in stage.layers}
        masks = {by_name[name].module: mask for name, (_, mask, _) in kept.items()}
        dense = {by_name[name].module: weight for name, (weight, _, _) in kept.items()}
        finish = cast(Callable[..., None], self.options.method.finish)
        with self.walk.phase("prune"):
            self.options.method.call(finish, stage, masks, dense, values=self.options.values)
            for name, (weight, mask, hessian) in kept.items():
                new = dense_weight(by_name[name].module).masked_fill(~mask, 0).contiguous()
                expected = f"finite weights of {name} after {self.options.method.name}"
                check(bool(new.isfinite().all()), OP, expected, "NaN or Inf", exc=prune.PruneError)
                row = self.rows[name]
                if hessian is not None:
                    row.relative_error = prune.relative_error(weight, new, hessian)
                results[name] = self._final(row, new, mask)
                stage.replace(name, results[name])

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
        warnings.warn(f"{OP}: {text}. Dense: {why or 'none'}.", stacklevel=3)
