"""One run of prune_model, checked and planned: stage after stage is pruned, reconstructed,
compressed and stored; what an exception leaves is put right."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern import prune
from sparsekern.backends.compress import compress as compress_weight
from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.replace import dense_weight, write_weight
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot import fingerprint
from sparsekern.oneshot import keep_dense as dense_rule
from sparsekern.oneshot.estimate import Progress
from sparsekern.oneshot.executor import Calibration, Stage, on_device
from sparsekern.oneshot.extra import OP, Extra
from sparsekern.oneshot.layerwise import (
    Options,
    describe_quantized,
    new_report,
    prune_group,
)
from sparsekern.oneshot.layerwise import quantize as quantize_layer
from sparsekern.oneshot.reconstruct import reconstruct_block
from sparsekern.oneshot.report import LayerReport, PruneReport
from sparsekern.oneshot.resume import ResumeDir
from sparsekern.oneshot.rounds import Fit, Reconstruction
from sparsekern.oneshot.sequential import Walk
from sparsekern.oneshot.spans import SpanRound, final_norm, fitting, rebatch
from sparsekern.prune import Hessian, Method

logger = logging.getLogger("sparsekern")


class Run:
    """One call of prune_model."""

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        compress: bool,
        walk: Calibration,
        report: PruneReport,
        extra: Extra,
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
        few = "less than half was pruned"
        if report.unquantized:
            few = f"{len(report.pruned)} layers were pruned and quantised"
        done = few if report.pruned else "nothing was pruned"
        already = sum(row.is_24 for row in report.skipped)
        if already:
            done += f", {already} layers were 2:4 already"
        if report.unquantized:
            done += f", {len(report.unquantized)} of them keep the numbers that they had (see "
            done += "sparsekern.compress_model(model, quantize=...))"
        text = f"{done}: {report.share:.1%} of the linear weights of {report.model} are 2:4"
        warnings.warn(f"{OP}: {text}. Dense: {why or 'none'}.", stacklevel=5)


def _said(fit: Fit) -> str:
    """A fit in the words of a layer's note."""
    first, last = fit.blocks[0], fit.blocks[-1]
    where = f"block {first}" if first == last else f"blocks {first}-{last}"
    text = f"{where} reconstructed: held-out error {fit.before:.4g} -> {fit.after:.4g}"
    return text if fit.kept else f"{where}: reconstruction was no better ({fit.before:.4g})"
