"""What a run of prune_model trains: rounds of reconstruction in the walk and after it."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from sparsekern.backends.compress import compress as compress_weight
from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.replace import write_weight
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot.collector import collected
from sparsekern.oneshot.devices import on_device
from sparsekern.oneshot.executor import Calibration
from sparsekern.oneshot.extra import OP, Extra
from sparsekern.oneshot.layerwise import Options, describe_quantized
from sparsekern.oneshot.layerwise import quantize as quantize_layer
from sparsekern.oneshot.portion import portion
from sparsekern.oneshot.reconstruct import reconstruct_block
from sparsekern.oneshot.report import LayerReport, PruneReport
from sparsekern.oneshot.resume import ResumeDir
from sparsekern.oneshot.rounds import Fit, Reconstruction
from sparsekern.oneshot.sequential import Walk
from sparsekern.oneshot.spans import SpanRound, final_norm, fitting, rebatch
from sparsekern.oneshot.stages import Stage


class Rounds:
    """The part of a Run that reconstructs.

    Attributes:
        final: the norm behind the last block.      teachers: dense copies of the blocks, for the
            rounds after the walk.      late: how weights are quantised after the last of these:
            block by block and then trained through their levels, or (levels=False, and outside the
            blocks) to the nearest level.
    """

    model: nn.Module
    options: Options
    compress: bool
    walk: Calibration
    report: PruneReport
    extra: Extra
    resume: ResumeDir | None
    rows: dict[str, LayerReport]
    final: nn.Module | None = None
    late: Options | None = None

    def __init__(self) -> None:
        self.teachers: list[nn.Module] = []

    @property
    def _through(self) -> bool:
        """Whether blocks are trained once more in the walk, through the levels of their weights."""
        block = self.extra.block
        return block is not None and block.levels and self.options.quantize is not None

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
            self.report.options |= extra.described()
            return
        blocks = self.walk.selection.blocks
        with self.walk.evaluating(), self.walk.lazily():
            probe = self.walk.batches[0].probe()
            norm = functools.partial(final_norm, self.model, blocks, probe, self.walk.home)
            self.final = self.walk.looked(norm)
        if extra.optional and self.walk.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.walk.device).total_memory
            extra.spans = [
                fitting(options, blocks, self.walk.batches, memory) for options in extra.spans
            ]
            self.report.options |= extra.described()
        moving = any(options.reselect for options in extra.spans)
        right = not moving or self.options.pattern == (2, 4)
        expected = "pattern (2, 4) with reselect"
        check(right, OP, expected, repr(self.options.pattern), "Pass reselect=0.")
        fixed = not (moving and self.options.masks)
        check(fixed, OP, "masks or reselect", "both of them", "Pass reselect=0.")
        if extra.spans:
            self.teachers = [copy.deepcopy(b).to("cpu").requires_grad_(False) for b in blocks]

    def _reconstruct(
        self,
        stage: Stage,
        masks: dict[nn.Module, Tensor],
        dense: dict[nn.Module, Tensor],
        levels: dict[nn.Module, Sparse24] | None = None,
        starts: dict[nn.Module, Tensor] | None = None,
    ) -> str:
        """Reconstruct one block, through `levels` (which are changed) where there are some; returns
        what its layers' rows say."""
        walk, index = cast(Walk, self.walk.walk), cast(int, stage.index)
        block = cast(nn.Module, stage.module)
        options = cast(Reconstruction, self.extra.block)
        final = self.final if index == len(walk.blocks) - 1 else None
        if options.target == "dense" and options.parts == "block":
            walk.free_dense_inputs()
        seconds = None
        if options.seconds is not None:
            spent = sum(row["seconds"] for row in self.report.reconstruction)
            fits = (len(walk.blocks) - index) * (2 if self._through else 1)
            seconds = max(0.0, options.seconds - spent) / (fits - (levels is not None))
        ranks = self.walk.ranks
        if levels is not None and ranks is not None:
            levels.update(zip(list(levels), ranks.share(list(levels.values()), 0)))
        for module, weight in (levels or {}).items():
            write_weight(module, weight.to_dense())
        with self.walk.phase("reconstruct"), on_device(final, self.walk.device):
            shares: list[float] = []
            if ranks is not None:
                walk, shares = portion(walk, index, self.walk.batches, ranks)
            given = (block, index, walk, masks, dense, options, final, seconds, ranks, shares)
            done = reconstruct_block(*given, levels, starts)
            if ranks is not None:
                weights = [module.weight for module in masks]
                for module, weight in zip(masks, ranks.share(weights, 0)):
                    cast(Tensor, module.weight).copy_(weight)
                if levels is not None:
                    levels.update(zip(list(levels), ranks.share(list(levels.values()), 0)))
        self.report.reconstruction += [fit.row() for fit in done]
        through = "" if levels is None else " through levels"
        return _said(done[-1], through) if done else ""

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
            levels = self._train_levels(masks, inside, progress)
        if self.compress or self.late:
            with self.walk.phase("prune"):
                for name, layer in layers.items():
                    compressed = levels.get(name)
                    if compressed is None:
                        compressed = self._compressed(self.rows[name], layer.weight)
                    row = self.rows[name]
                    row.bytes_sparse = compressed.nbytes if self.compress else row.bytes_sparse
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
        return compressed

    def _train_levels(
        self, masks: dict[nn.Module, Tensor], layers: dict[str, models.Layer], progress: bool
    ) -> dict[str, Sparse24]:
        """After the last round: block by block from front to back, quantise the layers on inputs
        that the blocks before them give now, and train them through their levels."""
        from tqdm import tqdm

        last, levels = self.extra.spans[-1], cast("dict[str, Sparse24]", {})
        if self.late is None or not last.levels:
            return levels
        fixed = replace(last, span=1, between=0.0, recut=False, noise=0.0, reselect=0.0)
        with self.walk.phase("capture"):
            walk = self.walk.captured(rebatch(self.walk.batches, fixed.batch))
            spans = SpanRound(walk, self.teachers, masks, fixed, self.final)
        bar = tqdm(spans.windows, "levels", unit="block", disable=not progress)
        for index, _ in enumerate(bar):
            mine = {name: layer for name, layer in layers.items() if layer.block == index}
            key = f"levels-{index:05d}"
            if not mine:
                continue
            if self.resume is not None and self.resume.has(key):
                results, rows = self.resume.load(key, list(mine.values()), self.walk.home)
                self.report.resumed += 1
                self.rows.update({row.name: row for row in rows})
                found = cast("dict[str, Sparse24]", results)
            else:
                found = self._train_levels_of(spans, index, mine)
                if self.resume is not None:
                    stored = cast("dict[str, Sparse24 | Tensor]", found)
                    self.resume.save(key, stored, [self.rows[name] for name in mine])
            for name, weight in found.items():
                write_weight(mine[name].module, weight.to_dense())
            levels |= found
        return levels

    def _train_levels_of(
        self, spans: SpanRound, index: int, layers: dict[str, models.Layer]
    ) -> dict[str, Sparse24]:
        """One block of that."""
        options = cast(Options, self.late)
        levels: dict[nn.Module, Sparse24] = {}
        starts: dict[nn.Module, Tensor] = {}
        methods: dict[str, str] = {}

        def quantize() -> tuple[dict[nn.Module, Sparse24], dict[nn.Module, Tensor]]:
            hessians = collected(spans.walk, index, list(layers.values()))
            for name, layer in layers.items():
                module, weight = layer.module, layer.weight.contiguous()
                mask, own = spans.masks[module].to(weight.device), hessians.get(name)
                levels[module], done = quantize_layer(weight, weight, mask, own, options)
                methods[name] = done.method
                starts[module] = weight.clone()
                write_weight(module, levels[module].to_dense())
            return levels, starts

        with self.walk.phase("reconstruct"):
            fit = spans.fit(index, quantize)
        self.report.reconstruction.append(fit.row())
        for name, layer in layers.items():
            row = self.rows[name]
            row.note = "; ".join(filter(None, (row.note, _said(fit, " through levels"))))
            row.quantized = f"{levels[layer.module].spec.levels} {methods[name]} + blocks"
        return {name: levels[layer.module].to(self.walk.home) for name, layer in layers.items()}

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
                module, new = mine[name].module, cast(Tensor, weight)
                if spans.options.reselect and not torch.equal(mine[name].weight, new):
                    spans.masks[module] = new != 0  # they moved, as at the end of the fit
                write_weight(module, new)
            return
        with self.walk.phase("reconstruct"):
            fit = spans.fit(window)
        self.report.reconstruction.append(fit.row())
        for row in rows:
            row.note = "; ".join(filter(None, (row.note, _said(fit))))
        if self.resume is not None:
            weights: dict[str, Sparse24 | Tensor] = {n: la.weight for n, la in mine.items()}
            self.resume.save(key, weights, rows)


def _said(fit: Fit, through: str = "") -> str:
    """A fit in the words of a layer's note."""
    first, last = fit.blocks[0], fit.blocks[-1]
    where = f"block {first}" if first == last else f"blocks {first}-{last}"
    if not fit.kept:
        return f"{where}: reconstruction{through} was no better ({fit.before:.4g})"
    return f"{where} reconstructed{through}: held-out error {fit.before:.4g} -> {fit.after:.4g}"
