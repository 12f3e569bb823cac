"""One run of prune_model, checked and planned: stage after stage is pruned, reconstructed,
compressed and stored; what an exception leaves is put right."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from sparsekern import prune
from sparsekern.backends.compress import compress as compress_weight
from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.replace import dense_weight, write_weight
from sparsekern.oneshot import fingerprint
from sparsekern.oneshot import keep_dense as dense_rule
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.estimate import Progress
from sparsekern.oneshot.executor import Calibration
from sparsekern.oneshot.extra import OP, Extra
from sparsekern.oneshot.layerwise import (
    Options,
    Pruned,
    describe_quantized,
    new_report,
    prune_group,
)
from sparsekern.oneshot.layerwise import quantize as quantize_layer
from sparsekern.oneshot.ranks import Ranks, divided
from sparsekern.oneshot.report import LayerReport, PruneReport
from sparsekern.oneshot.resume import ResumeDir
from sparsekern.oneshot.run_rounds import Rounds
from sparsekern.oneshot.selection import check_finite
from sparsekern.oneshot.stages import Group, Stage
from sparsekern.prune import Hessian, Method

logger = logging.getLogger("sparsekern")
SPLIT_FROM = 2**38  # multiplications of a solver that ranks do together: tens of ms of a GPU


class Run(Rounds):
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
        super().__init__()
        self.model, self.options, self.compress = model, options, compress
        self.walk, self.report, self.extra = walk, report, extra
        self.resume: ResumeDir | None = None  # of several ranks the first alone has it
        self.resumes = False
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
            "weights": fingerprint.of_model(self.model)
            if self.walk.source is None
            else self.walk.source.fingerprint(),
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
            ranks, times = self.walk.ranks, cast("dict[str, list[float]]", {})
            if ranks is None or ranks.rank == 0:
                times = self.resume.remember("layer_times", measure) if self.resume else measure()
            if ranks is not None:
                times = ranks.share(times, 0)
        dense_rule.decide(layers, times, tokens, device, OP)
        for layer in layers:
            layer.asked = layer.reason is None

    def execute(self, progress: bool) -> None:
        """Prune stage after stage. An exception takes back what was not final."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        with self.walk.part("before: plan"):
            stages = self.walk.plan()
            self.options.match_dense = self._matched()
            self._prepare_rounds()
        if self.extra.spans and self.options.quantize:  # they change the weights
            self.late = self.options
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
        """Keys of the leading stages that the resume directory holds, which rank 0 has."""
        done: set[str] = set()
        ranks = self.walk.ranks
        if ranks is not None and ranks.rank:
            found: set[str] = ranks.share(None, 0)
            return found
        for stage in stages:
            if stage.layers:
                if self.resume is None or not self.resume.has(stage.key):
                    break
                done.add(stage.key)
        return done if ranks is None else cast("set[str]", ranks.share(done, 0))

    def _load(self, stage: Stage) -> None:
        device = self.walk.device if stage.module is not None else self.walk.home
        loaded: Any = None
        if self.resume is not None:
            loaded = self.resume.load(stage.key, stage.layers, device)
        if self.walk.ranks is not None:
            loaded = self.walk.ranks.share(loaded, 0)
        results, reports = loaded
        self.report.resumed += 1
        self.rows.update({r.name: r for r in reports})
        for name, weight in results.items():
            stage.replace(name, weight)

    def _prune(self, stage: Stage) -> None:
        """Prune the layers of a stage in place, dense; what replaces them later is kept by it."""
        if not stage.layers:
            return
        if self.walk.source is not None:  # what could not be looked at before
            check_finite(stage.layers, self.options)
            stage.layers = [layer for layer in stage.layers if layer.reason is None]
        results: dict[str, Sparse24 | Tensor] = {}
        kept: dict[str, tuple[Tensor, Tensor, Hessian | None]] = {}
        finish = self._finishes(stage)
        if self.walk.ranks is not None:
            with self.walk.phase("exchange"):
                self.walk.ranks.same_weights(stage.layers, stage.key)
        with contextlib.closing(self._solved(stage)) as groups:
            for group, solved in groups:
                with self.walk.phase("prune"):
                    for pruned in solved:
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
                if group.hessian is not None and self.walk.hessians is None:
                    if self.report.hessians is None:
                        group.hessian.free_drift()
        if finish and kept:
            self._finish(stage, kept, results)
        for layer in stage.layers:
            if layer.name not in self.rows:
                self.rows[layer.name] = new_report(layer)
        if self.resume is not None:
            rows = [self.rows[layer.name] for layer in stage.layers]
            self.resume.save(stage.key, results, rows)

    def _finishes(self, stage: Stage) -> bool:
        """Whether the weights of a stage change once more after its solvers (`_finish`)."""
        trained = self.extra.block is not None and stage.index is not None
        return trained or self.options.method.finish is not None

    def _solved(self, stage: Stage) -> Generator[tuple[Group, Iterable[Pruned]], None, None]:
        """Each group, on the device, with what its layers become. Several ranks solve the costly
        groups together and each some of the others, and all have all results."""
        ranks = self.walk.ranks
        if ranks is None:
            with contextlib.closing(stage.groups()) as one_by_one:
                for group in one_by_one:
                    self._keep_hessian(group)
                    yield group, self._ticked(stage, prune_group, group)
            return
        for groups in stage.passes():
            costs = [self._cost(group) for group in groups]
            owners = divided(costs, ranks.world, SPLIT_FROM if self._splits() else math.inf)
            solved: dict[int, list[Any]] = {}
            mine: dict[int, list[Any]] = {}
            for number in sorted(range(len(groups)), key=lambda i: owners[i] is not None):
                group, owner = groups[number], owners[number]
                self._keep_hessian(group)
                if owner is None or owner == ranks.rank:
                    team = ranks if owner is None else None
                    with group.on_device(), self.walk.phase("prune"):
                        found = self._ticked(stage, prune_group, group, team)
                        parts = [(p.report, p.weight, p.mask, p.quantized) for p in found]
                    (solved if owner is None else mine)[number] = parts
                if self.extra.block is None:  # else the errors after it need it
                    group.hessian = None
            with self.walk.phase("exchange"):
                for part in ranks.in_turn(mine, ranks.world):
                    solved |= part
            mine.clear()
            for number, group in enumerate(groups):
                rows = zip(group.layers, solved.pop(number))
                with group.on_device():
                    yield group, [Pruned(layer, *row) for layer, row in rows]

    def _splits(self) -> bool:
        """Whether ranks may solve one group together: quantised weights come from one alone."""
        return self.options.method.together and not self.options.quantize

    def _cost(self, group: Group) -> float:
        """About the multiplications of a group's solver, and the steps of refine."""
        rows, width = sum(layer.shape[0] for layer in group.layers), group.layers[0].shape[1]
        if group.hessian is None:
            return float(rows * width)
        method, steps = self.options.method, float(rows) * width**2 * self.options.refine
        if method.work is not None:
            return steps + float(method.call(method.work, rows, width, values=self.options.values))
        return steps + float(width) ** 2 * (width + 2 * rows)

    def _keep_hessian(self, group: Group) -> None:
        if self.report.hessians is not None and group.hessian is not None:
            stored = group.hessian.to("cpu")
            self.report.hessians |= {layer.name: stored for layer in group.layers}

    def _ticked(
        self,
        stage: Stage,
        solve: Callable[..., list[Pruned]],
        group: Group,
        team: Ranks | None = None,
    ) -> Any:
        """The results of a group one by one, with a tick for each."""
        options = replace(self.options, team=team, errors=not self._finishes(stage))
        for pruned in solve(group.layers, group.hessian, options):
            self._tick(stage)
            yield pruned

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
        method, notes = self.options.method, cast("list[str]", [])
        if method.finish is not None:
            with self.walk.phase("prune"):
                method.call(method.finish, stage, masks, dense, values=self.options.values)
        trained = self.extra.block is not None and stage.index is not None
        if trained:
            notes.append(self._reconstruct(stage, masks, dense))
        with self.walk.phase("prune"):
            quantized = self._described(by_name, kept, trained)
        through = trained and bool(quantized) and self._through
        if through:
            starts = {module: dense_weight(module).clone() for module in masks}
            levels = {by_name[name].module: weight for name, weight in quantized.items()}
            notes.append(self._reconstruct(stage, masks, dense, levels, starts))
            quantized = {name: levels[by_name[name].module] for name in quantized}
        with self.walk.phase("prune"):
            self._take(by_name, kept, quantized, through, results, stage, notes)

    def _described(
        self,
        by_name: dict[str, Layer],
        kept: dict[str, tuple[Tensor, Tensor, Hessian | None]],
        trained: bool,
    ) -> dict[str, Sparse24]:
        """Zero what the masks prune of the weights that the block has now, enter their errors into
        the rows, and quantise them where that is asked for. trained: as a block; a layer's own
        dense weights are no longer what it is to come close to."""
        method, quantized = self.options.method, cast("dict[str, Sparse24]", {})
        for name, (weight, mask, hessian) in kept.items():
            module = by_name[name].module
            new = dense_weight(module).masked_fill(~mask, 0).contiguous()
            expected = f"finite weights of {name} after {method.name}"
            check(bool(new.isfinite().all()), OP, expected, "NaN or Inf", exc=prune.PruneError)
            write_weight(module, new)
            if hessian is not None:
                with self.walk.part("prune: errors"):
                    self.rows[name].relative_error = prune.relative_error(weight, new, hessian)
            if self.options.quantize:
                aim = new if trained else weight
                quantized[name], _ = quantize_layer(aim, new, mask, hessian, self.options)
        return quantized

    def _take(
        self,
        by_name: dict[str, Layer],
        kept: dict[str, tuple[Tensor, Tensor, Hessian | None]],
        quantized: dict[str, Sparse24],
        through: bool,
        results: dict[str, Sparse24 | Tensor],
        stage: Stage,
        notes: list[str],
    ) -> None:
        """The rows and the final form of the weights that the block has now."""
        for name, (weight, mask, hessian) in kept.items():
            new = dense_weight(by_name[name].module).contiguous()
            row, levels = self.rows[name], quantized.get(name)
            row.note = "; ".join(filter(None, (row.note, *notes))) or None
            if levels is not None:
                describe_quantized(row, weight, levels, hessian, self.options, through)
            results[name] = self._final(row, new, mask, levels)
            stage.replace(name, results[name])

    def _note(self, error: BaseException, last: str) -> None:
        """Say with the exception what state the model is in."""
        if self.walk.undo == "run":
            text = "every weight of the model is as it was before the call"
        elif last:
            text = f"the model is pruned up to and with stage {last}; the rest is as it was"
            if self.resumes:
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
            levels = any(row.quantized for row in report.unquantized)
            first = "sparsekern.decompress_model(model), then " if levels else ""
            done += f", {len(report.unquantized)} of them keep the numbers that they had (see "
            done += f"{first}sparsekern.compress_model(model, quantize=...))"
        text = f"{done}: {report.share:.1%} of the linear weights of {report.model}"
        text += f" are {report.pattern}"
        warnings.warn(f"{OP}: {text}. Dense: {why or 'none'}.", stacklevel=5)
