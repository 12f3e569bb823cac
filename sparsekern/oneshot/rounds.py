"""Rounds of reconstruction: what a caller can ask for, and what comes out of one fit. How it works
is in oneshot/reconstruct.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sparsekern.errors import check, message
from sparsekern.utils.arguments import Uses, check_used

OP = "sparsekern.reconstruct"
LR, RATE = 6e-4, 16.0  # see Reconstruction.lr


def _several(given: Mapping[str, Any]) -> bool:
    return bool(given["span"] != 1)


USES: Uses = {
    **dict.fromkeys(("between", "reselect", "batch"), ("span=None or of several blocks", _several)),
    "noise": ("recut=True", lambda given: given["recut"]),
}
TARGETS, PARTS, LOSSES = ("dense", "pruned"), ("block", "sublayers"), ("token", "channel", "mse")


@dataclass(frozen=True)
class Reconstruction:
    """One round of reconstruction.

    Attributes:
        span: blocks that are trained together; 1: each block right after it is pruned; None: all of
            them, after the walk. Windows of more than one block move on by half of their span.
        epochs: passes over the calibration rows that are not held out.
        seconds: time for the whole round, in equal parts for the fits that it still has; None: all
            epochs run. A fit that is out of time ends with the step that it is in, and the weights
            of the lowest held-out error stay; its rate has fallen with the time by then. How far it
            comes depends on the machine.
        lr: of AdamW (betas 0.9 and 0.95, no decay), after `warmup` of the steps; then a cosine to
            0. One step is one forward batch (prune_model's batch_size). None: LR with a span of
            several blocks; with span=1 each matrix has its own, RATE · LR, some 1 %, of the root
            mean square of its kept weights.
        target: "dense": what the dense model has there; "pruned": the dense blocks on the inputs
            that the pruned model gives them.
        between: weight of the blocks inside the span, which has several.
        parts: "block", or "sublayers": attention on the hidden states between it and the MLP
            first, then the MLP (span 1 only).
        loss: "token": each token's error relative to its size, as the next norm sees it; "channel":
            of that each channel relative to its variance; "mse": the sum of squares.
        recut: rows are cut and joined anew for each epoch, in other places and another order, so
            that tokens are seen in other contexts (all blocks, rows of token ids only).
        noise: with recut, the share of the tokens that are exchanged for random tokens of the text.
            Nothing has to be predicted: the dense model's hidden states are known for any input.
        batch: rows per step, for rounds after the walk on rows of token ids; None: as they are
            batched for the walk. More and smaller steps go further with the same tokens.
        reselect: share of the steps in which masks move, for rounds after the walk: pruned weights
            are kept track of, too, moved by the gradient that they would have, and every 10 steps
            the two largest of each group are taken. An experiment; 0 leaves the masks.
        warmup: share of the steps.      held_out: share of the batches, at least one where there
            are two; they decide when to stop and which weights are kept.
        patience: epochs without a lower held-out error before it stops; None: all epochs run, and
            the best weights count. While the rate is high the error may be, too.
        checkpoint: keep only the inputs of blocks for the backward pass (less memory, more time).
        compile: torch.compile the blocks; worth its start on long runs.
        levels: with prune_model(quantize=), once the weights are quantised train them again, for as
            many epochs, through their levels and scales (oneshot/levels.py); of rounds after the
            walk the last one counts, which a further one over single blocks then follows. Without
            quantize it changes nothing.
        seed: of the order of batches, and of recut.
    """

    span: int | None = 1
    epochs: int = 6
    seconds: float | None = None
    lr: float | None = None
    target: str = "dense"
    between: float = 0.0
    parts: str = "block"
    loss: str = "token"
    recut: bool = False
    noise: float = 0.0
    batch: int | None = None
    reselect: float = 0.0
    warmup: float = 0.05
    held_out: float = 0.1
    patience: int | None = None
    checkpoint: bool = False
    compile: bool = False
    levels: bool = True
    seed: int = 0

    def check(self, op: str = OP) -> None:
        """Raises ValueError for a value that does not fit."""

        def number(value: Any, low: float, high: float = math.inf) -> bool:
            return type(value) in (int, float) and low <= value <= high and math.isfinite(value)

        whole = type(self.span) is int and self.span >= 1
        check(self.span is None or whole, op, "span >= 1 or None", repr(self.span))
        for name, low in (("epochs", 1), ("patience", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            check(type(value) is int and value >= low, op, f"{name} >= {low}", repr(value))
        time_ = self.seconds is None or (number(self.seconds, 0) and self.seconds > 0)
        check(time_, op, "seconds > 0 or None", repr(self.seconds))
        rate = self.lr is None or (number(self.lr, 0) and self.lr > 0)
        check(rate, op, "lr > 0 or None", repr(self.lr))
        check(number(self.reselect, 0, 1), op, "reselect from 0 to 1", repr(self.reselect))
        check(number(self.between, 0), op, "between >= 0", repr(self.between))
        for name in ("warmup", "held_out", "noise"):
            value = getattr(self, name)
            check(number(value, 0, 0.5), op, f"{name} from 0 to 0.5", repr(value))
        for name, known in (("target", TARGETS), ("parts", PARTS), ("loss", LOSSES)):
            value = getattr(self, name)
            check(value in known, op, f"{name} in {known}", repr(value))
        whole_block = self.parts == "block" or self.span == 1
        check(whole_block, op, 'parts="block" with a span of several blocks', repr(self.parts))
        check(not self.recut or self.span is None, op, "span=None with recut", repr(self.span))
        rows = self.batch is None or (type(self.batch) is int and self.batch >= 1)
        check(rows, op, "batch >= 1 or None", repr(self.batch))
        flag = type(self.levels) is bool
        check(flag, op, "levels: True or False", repr(self.levels))
        check_used(op, USES, asdict(self), asdict(Reconstruction()))


Given = Reconstruction | Mapping[str, Any] | Sequence[Any] | bool | None


def as_rounds(given: Given, op: str = OP) -> tuple[Reconstruction, ...]:
    """The rounds that a caller means: True is one with the defaults, a dict its keywords.

    Raises:
        ValueError: values that do not fit; a round inside the walk after one behind it.
        TypeError: something else.
    """
    if given is None or given is False:
        return ()
    items = given if isinstance(given, Sequence) else [given]
    rounds = []
    for item in items:
        if item is True:
            item = Reconstruction()
        elif isinstance(item, Mapping):
            known = [f.name for f in fields(Reconstruction)]
            unknown = sorted(set(item) - set(known))
            check(not unknown, op, f"keywords of Reconstruction: {known}", unknown)
            item = Reconstruction(**item)
        remedy = "Pass sparsekern.Reconstruction(...), or a list of them."
        kind = type(item).__name__
        check(isinstance(item, Reconstruction), op, "a Reconstruction", kind, remedy, TypeError)
        item.check(op)
        rounds.append(item)
    late = [r.span != 1 for r in rounds]
    check(late == sorted(late), op, "rounds with span=1 before the others", "another order")
    check(late.count(False) <= 1, op, "at most one round with span=1", late.count(False))
    return tuple(rounds)


def warn_unjudged(rounds: Sequence[Reconstruction], batches: int, op: str, level: int) -> None:
    """UserWarning for a calibration of one batch, of which no round can hold out another; level:
    frames from here to the caller's."""
    if batches == 1 and any(r.held_out and r.batch is None for r in rounds):
        expected = "two batches of calibration or more, one of them held out, for reconstruct"
        remedy = "What is kept is judged on rows that it was trained on. Pass batch_size=."
        warnings.warn(message(op, expected, "one", remedy), UserWarning, stacklevel=level)


def described(rounds: Sequence[Reconstruction]) -> list[dict[str, Any]]:
    """The rounds as JSON-able values."""
    return [asdict(r) for r in rounds]


@dataclass
class Fit:
    """What one fit did. before, after: the held-out error E (of the training batches where nothing
    is held out). train: mean of E over the last epoch's steps; far below `after` it is over-fitted.
    epochs: that ran, a part of one included. kept: whether the new weights were better, and are in
    place. stopped: the seconds of the round ended it."""

    blocks: list[int]
    before: float
    after: float
    epochs: int
    steps: int
    kept: bool
    seconds: float
    train: float
    part: str = "block"
    stopped: bool = False

    def __str__(self) -> str:
        first, end = self.blocks[0], self.blocks[-1]
        text = f"blocks {first}-{end}, {self.part}: error {self.before:.4g} -> {self.after:.4g}"
        text += f", {self.steps} steps, {self.epochs} epochs, {self.seconds:.1f} s"
        return text + (", out of time" if self.stopped else "")

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)
