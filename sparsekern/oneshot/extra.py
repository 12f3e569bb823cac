"""What prune_model does beside pruning: a rotation before the walk over the blocks, reconstruction
in it and after it, as presets and arguments ask for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.oneshot.calibration import Batch
from sparsekern.oneshot.permutation import permute_on
from sparsekern.oneshot.presets import find_preset
from sparsekern.oneshot.ranks import RankError, Ranks
from sparsekern.oneshot.report import PruneReport
from sparsekern.oneshot.resume import PERMUTATION, ROTATION, once
from sparsekern.oneshot.rotation import rotate_on
from sparsekern.oneshot.rounds import Given, as_rounds, described

OP = "sparsekern.prune_model"


class Extra:
    """What a preset or the caller adds to the walk: a rotation before it, reconstruction in it and
    after it.

    Attributes:
        block: the round inside the walk.      spans: the rounds after it.
        rotate: keywords of rotate_on, None for no rotation.      permute: of permute_on.
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
        permute: bool | Mapping[str, Any] = False,
    ) -> None:
        row = find_preset(OP, preset)
        self.optional = reconstruct is None
        rounds = row.rounds if reconstruct is None else as_rounds(reconstruct, OP)
        self.turn_optional = rotate is None
        wanted = row.rotate if rotate is None else rotate
        known = {"steps", "seconds", "rate", "heads", "seed", "untie"}
        self.rotate = _keywords("rotate", wanted, known)
        if self.rotate is not None:
            self.rotate["untie"] = untie
        self.permute = _keywords("permute", permute, {"rounds", "heads", "seed"})
        possible = calibration is not None and hessians is None
        remedy = "Pass token ids [samples, tokens] as calibration=."
        check(possible or self.permute is None, OP, "calibration data for permute", "none", remedy)
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
        made |= {"rotate": dict(self.rotate)} if self.rotate is not None else {}
        return made | ({"permute": dict(self.permute)} if self.permute is not None else {})

    def reorder(
        self,
        model: nn.Module,
        batches: list[Batch],
        device: torch.device,
        resume: str | os.PathLike[str] | None,
        report: PruneReport,
        ranks: Ranks | None = None,
    ) -> Callable[[], None]:
        """Permute the model; returns how to take it back. Of several ranks the first searches."""
        assert self.permute is not None
        if ranks is not None and ranks.rank:
            made = permute_on(model, batches, device, known=ranks.share(None, 0), **self.permute)
        elif resume is None:
            made = permute_on(model, batches, device, **self.permute)
        else:
            made = once(PERMUTATION, permute_on, model, batches, device, resume, self.permute)
        if ranks is not None and not ranks.rank:
            ranks.share(made.tensors(), 0)
        report.permutation = asdict(made.report)
        return made.undo

    def turn(
        self,
        model: nn.Module,
        batches: list[Batch],
        device: torch.device,
        resume: str | os.PathLike[str] | None,
        report: PruneReport,
        ranks: Ranks | None = None,
    ) -> Callable[[], None] | None:
        """Rotate the model; returns how to take it back, None where the preset does without. Of
        several ranks the first searches, and all apply what it has found."""
        assert self.rotate is not None
        found: dict[str, Tensor] | ValueError | RuntimeError | None = None
        try:
            if ranks is None or ranks.rank == 0:
                if resume is None:
                    turned = rotate_on(model, batches, device, **self.rotate)
                else:
                    turned = once(ROTATION, rotate_on, model, batches, device, resume, self.rotate)
                found = turned.tensors()
        except (ValueError, RuntimeError) as error:
            if not self.turn_optional:
                raise
            found = error
        if ranks is not None:
            found = ranks.share(found, 0)
        try:
            if isinstance(found, Exception):
                raise found
            if ranks is not None and ranks.rank:
                turned = rotate_on(model, batches, device, known=found, **self.rotate)
        except (ValueError, RuntimeError) as error:
            if not self.turn_optional or isinstance(error, RankError):
                raise
            report.rotation, self.rotate = {"skipped": str(error)}, None
            warnings.warn(f"{OP}: preset {report.preset} without rotation. {error}", stacklevel=3)
            return None
        report.rotation = asdict(turned.report)
        return turned.undo


def _keywords(name: str, given: bool | Mapping[str, Any], known: set[str]) -> dict[str, Any] | None:
    """Keywords of a step that is asked for by True or by keywords; None for False."""
    kinds = isinstance(given, (bool, Mapping))
    expected = f"{name} as a bool or keywords of sparsekern.{name}"
    check(kinds, OP, expected, type(given).__name__, exc=TypeError)
    if given is False:
        return None
    keywords = dict(given) if isinstance(given, Mapping) else {}
    unknown = sorted(set(keywords) - known)
    check(not unknown, OP, f"keywords of sparsekern.{name}: {sorted(known)}", unknown)
    return keywords
