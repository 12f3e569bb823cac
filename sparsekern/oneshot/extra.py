"""What prune_model does beside pruning: a rotation and a permutation before the walk over the
blocks, reconstruction in it and after it, as presets and arguments ask for."""

from __future__ import annotations

import functools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import FormatError, check
from sparsekern.nn.wrappers import taken_off
from sparsekern.oneshot.calibration import Batch
from sparsekern.oneshot.permutation import Energies, added_up, observed, permute_on
from sparsekern.oneshot.presets import find_preset, for_blocks
from sparsekern.oneshot.ranks import RankError, Ranks
from sparsekern.oneshot.report import PruneReport
from sparsekern.oneshot.resume import PERMUTATION, ROTATION, once
from sparsekern.oneshot.rotation import rotate_on
from sparsekern.oneshot.rounds import Given, Reconstruction, as_rounds, described

OP = "sparsekern.prune_model"
logger = logging.getLogger("sparsekern")
# What says nothing of the model: another rank, or what is in the folder to resume from.
NOT_THE_MODEL = (RankError, FormatError)


class Extra:
    """What a preset or the caller adds to the walk: a rotation and a permutation before it,
    reconstruction in it and after it.

    Attributes:
        block: the round inside the walk.      spans: the rounds after it.
        rotate: keywords of rotate_on, None for no rotation.      permute: of permute_on.
        optional, turn_optional, order_optional: rounds, rotation or permutation are the preset's:
            what the model does not allow is left out with a warning.
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
        permute: bool | Mapping[str, Any] | None = None,
    ) -> None:
        row = find_preset(OP, preset)
        self.preset = preset
        self._rules: dict[str, str] = {}
        self.optional = reconstruct is None
        rounds = row.rounds if reconstruct is None else as_rounds(reconstruct, OP)
        self.turn_optional = rotate is None
        wanted = row.rotate if rotate is None else rotate
        known = {"steps", "seconds", "rate", "heads", "seed", "untie"}
        self.rotate = _keywords("rotate", wanted, known)
        if self.rotate is not None:
            self.rotate["untie"] = untie or bool(self.rotate.get("untie"))
        self.order_optional = permute is None
        ordered = row.permute if permute is None else permute
        self.permute = _keywords("permute", ordered, {"rounds", "heads", "seed"})
        possible = calibration is not None and hessians is None
        remedy = "Pass token ids [samples, tokens] as calibration=."
        for name, asked, optional in (
            ("reconstruct", bool(rounds), self.optional),
            ("rotate", self.rotate is not None, self.turn_optional),
            ("permute", self.permute is not None, self.order_optional),
        ):
            if asked and not possible:
                check(optional, OP, f"calibration data for {name}", "none", remedy)
                warnings.warn(f"{OP}: preset {preset} without calibration: no {name}", stacklevel=4)
        if not possible:
            rounds, self.rotate, self.permute = (), None, None
        both = true_sequential and any(r.span == 1 and r.target == "dense" for r in rounds)
        one = 'a round of span 1 with target="dense"'
        one = f"preset {preset!r}, with a round inside the walk," if self.optional else one
        check(not both, OP, f"{one} or true_sequential", "both", "Leave true_sequential out.")
        self.block = next((r for r in rounds if r.span == 1), None)
        self.spans = [r for r in rounds if r.span != 1]

    def adapt(self, blocks: Iterable[nn.Module]) -> None:
        """The preset's round inside the walk as it is for blocks of this size."""
        if self.block is not None and self.optional:
            self.block, rule = for_blocks(self.block, blocks)
            if rule is not None:
                self._rules["reconstruct"] = rule
                logger.info("%s: preset %s with %s", OP, self.preset, rule)

    @property
    def rule(self) -> str | None:
        """What of the preset is otherwise for this model (presets.py), or None."""
        return "; ".join(self._rules.values()) or None

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model is walked beside the pruned one."""
        return self.block is not None and self.block.target == "dense"

    def check_order(self, pattern: tuple[int, int], masks: bool) -> None:
        """Refuse a permutation that cannot be, or leave the preset's out.

        Raises:
            ValueError: one that the caller asks for, with another pattern or given masks.
        """
        if pattern != (2, 4):
            self.drop_order(f"with pattern {pattern}")
        if masks:
            self.drop_order("with masks that are given")
        if self.permute is not None:
            expected = "pattern (2, 4) with permute"
            check(pattern == (2, 4), OP, expected, repr(pattern), "Leave permute out.")
            remedy = "Call sparsekern.permute first."
            check(not masks, OP, "masks or permute", "both of them", remedy)

    def drop_order(self, why: str) -> None:
        """Leave out the preset's permutation, with a warning."""
        if self.permute is None or not self.order_optional:
            return
        warnings.warn(f"{OP}: preset {self.preset} without permutation {why}.", stacklevel=4)
        self.permute, self._rules["permute"] = None, "no permutation"

    def drop(self) -> None:
        """Leave out the rounds."""
        self.block, self.spans = None, []
        self._rules["reconstruct"] = "no reconstruction"

    @property
    def rounds(self) -> list[Reconstruction]:
        """All rounds, that inside the walk first."""
        return [r for r in (self.block, *self.spans) if r is not None]

    def described(self) -> dict[str, Any]:
        """As options of the report and of the manifest."""
        rounds = described(self.rounds)
        made: dict[str, Any] = {"reconstruct": rounds} if rounds else {}
        made |= {"preset_rule": self.rule} if self.rule is not None else {}
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
    ) -> Callable[[], None] | None:
        """Permute the model; returns how to take it back, None where the preset does without."""
        assert self.permute is not None
        try:
            search: Callable[..., Any] = permute_on
            with taken_off(model):
                if ranks is not None:
                    heads = self.permute.get("heads", True)
                    energies = _observed_together(model, batches, device, heads, ranks)
                    search = functools.partial(permute_on, energies=energies)
                steps = model, batches, device, resume, self.permute, ranks
                made = _found(PERMUTATION, search, *steps)
        except (ValueError, RuntimeError) as error:
            if not self.order_optional or isinstance(error, NOT_THE_MODEL):
                raise
            report.permutation, self.permute = {"skipped": str(error)}, None
            self._rules["permute"] = "no permutation"
            warnings.warn(f"{OP}: preset {self.preset} without permutation. {error}", stacklevel=3)
            return None
        report.permutation = asdict(made.report)
        undo: Callable[[], None] = made.undo
        return undo

    def turn(
        self,
        model: nn.Module,
        batches: list[Batch],
        device: torch.device,
        resume: str | os.PathLike[str] | None,
        report: PruneReport,
        ranks: Ranks | None = None,
    ) -> Callable[[], None] | None:
        """Rotate the model; returns how to take it back, None where the preset does without."""
        assert self.rotate is not None
        try:
            with taken_off(model):
                steps = model, batches, device, resume, self.rotate, ranks
                turned = _found(ROTATION, rotate_on, *steps)
        except (ValueError, RuntimeError) as error:
            if not self.turn_optional or isinstance(error, NOT_THE_MODEL):
                raise
            report.rotation, self.rotate = {"skipped": str(error)}, None
            self._rules["rotate"] = "no rotation"
            warnings.warn(f"{OP}: preset {report.preset} without rotation. {error}", stacklevel=3)
            return None
        report.rotation = asdict(turned.report)
        undo: Callable[[], None] = turned.undo
        return undo


def _observed_together(
    model: nn.Module, batches: list[Batch], device: torch.device, heads: bool, ranks: Ranks
) -> Energies:
    """What input_energies returns, bit for bit: each rank goes through some of the batches. What
    one raises, all raise."""
    begin = time.perf_counter()
    own: dict[str, list[Tensor]] | Exception
    try:
        own = observed(model, batches[ranks.rank :: ranks.world], device, heads)
    except (ValueError, RuntimeError) as error:
        own = error
    parts = list(ranks.in_turn(own, ranks.world))
    for part in parts:
        if isinstance(part, Exception):
            raise part
    return Energies(added_up(model, parts, heads), time.perf_counter() - begin)


def _found(
    step: str,
    function: Callable[..., Any],
    model: nn.Module,
    batches: list[Batch],
    device: torch.device,
    resume: str | os.PathLike[str] | None,
    keywords: Mapping[str, Any],
    ranks: Ranks | None,
) -> Any:
    """What rotate_on or permute_on returns. Of several ranks the first searches, and all apply what
    it has found, or raise what it has raised."""
    made: Any = None
    found: tuple[dict[str, Tensor], dict[str, Any]] | Exception | None = None
    if ranks is None or ranks.rank == 0:
        try:
            if resume is None:
                made = function(model, batches, device, **keywords)
            else:
                made = once(step, function, model, batches, device, resume, dict(keywords))
            found = made.tensors(), {"report": made.report} if step == PERMUTATION else {}
        except (ValueError, RuntimeError) as error:
            if ranks is None:
                raise
            found = error
    if ranks is not None:
        found = ranks.share(found, 0)
    if isinstance(found, Exception):
        raise found
    if made is not None:
        return made
    assert found is not None
    known, more = found
    return function(model, batches, device, known=known, **more, **keywords)


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
