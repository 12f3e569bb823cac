"""What a run of prune_model trains: rounds of reconstruction in the walk and after it."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import cast

import torch
from torch import Tensor, nn

from sparsekern.backends.compress import compress as compress_weight
from sparsekern.errors import check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.replace import write_weight
from sparsekern.oneshot import discovery as models
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
            rounds after the walk.      late: how weights are quantised after the last of these.
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
    ) -> str:
        """Reconstruct one block; returns what its layers' rows say."""
        walk, index = cast(Walk, self.walk.walk), cast(int, stage.index)
        block = cast(nn.Module, stage.module)
        options = cast(Reconstruction, self.extra.block)
        final = self.final if index == len(walk.blocks) - 1 else None
        if options.target == "dense" and options.parts == "block":
            walk.free_dense_inputs()
        seconds = None
        if options.seconds is not None:
            spent = sum(row["seconds"] for row in self.report.reconstruction)
            seconds = max(0.0, options.seconds - spent) / (len(walk.blocks) - index)
        ranks = self.walk.ranks
        with self.walk.phase("reconstruct"), on_device(final, self.walk.device):
            shares: list[float] = []
            if ranks is not None:
                walk, shares = portion(walk, index, self.walk.batches, ranks)
            given = (block, index, walk, masks, dense, options, final, seconds, ranks, shares)
            fits = reconstruct_block(*given)
            if ranks is not None:
                weights = [module.weight for module in masks]
                for module, weight in zip(masks, ranks.share(weights, 0)):
                    cast(Tensor, module.weight).copy_(weight)
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


def _said(fit: Fit) -> str:
    """A fit in the words of a layer's note."""
    first, last = fit.blocks[0], fit.blocks[-1]
    where = f"block {first}" if first == last else f"blocks {first}-{last}"
    text = f"{where} reconstructed: held-out error {fit.before:.4g} -> {fit.after:.4g}"
    return text if fit.kept else f"{where}: reconstruction was no better ({fit.before:.4g})"
