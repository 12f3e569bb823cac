"""Recipe: how to train; DistillReport: what a run did."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from sparsekern.errors import check
from sparsekern.finetune.masked import Masked
from sparsekern.finetune.metrics import finite
from sparsekern.formats import dtypes
from sparsekern.utils.arguments import SEEDS, Uses, check_fields

OP = "sparsekern.finetune.distill"
# name -> dtype of autocast; float32 needs none
PRECISIONS: dict[str, torch.dtype | None] = {
    "float32": None,
    **{dtypes.PLAIN[dtype].name: dtype for dtype in dtypes.NATIVE},
}

USES: Uses = {
    "passes": (
        "neither steps nor minutes",
        lambda given: given["steps"] is None and given["minutes"] is None,
    ),
    "temperature": ("alpha < 1", lambda given: given["alpha"] < 1),
}


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        steps: optimizer steps. minutes: or a time, counted from the end of the first step (which
            compiles). With neither: `passes` passes over the rows.
        batch: rows per step, over all processes.
        micro_batch: rows per forward and process; None: all of a process' share at once.
        lr: the highest rate.   warmup: share of the run in which it rises from 0.
        final: share of lr at the end of the cosine.
        betas, eps, weight_decay: of AdamW. No decay by default: kept weights need none in short
            runs, and dropped ones are zero.
        clip: largest norm of the gradient of the kept weights, 0 for no limit.
        alpha, temperature: see losses.py. Pure KL is best in short runs.
        block: weight of the matching of block outputs (SquareHead), 0 for none.
        precision: "float32" | "bfloat16" | "float16" of the matmuls, by autocast (float16 with a
            GradScaler); None: bfloat16 on a GPU, float32 elsewhere.
        compile: torch.compile the decoder blocks of student and teacher (one of each is compiled,
            the others share its code; without blocks, or with `block`, the whole body), and the
            loss of a chunk.
        seed: of the order of the rows, and of torch's generators at the start.
        log_every, eval_every, save_every: in steps; 0: only at the end (save: never).
    """

    steps: int | None = None
    minutes: float | None = None
    passes: float = 1.0
    batch: int = 16
    micro_batch: int | None = None
    lr: float = 6e-4
    warmup: float = 0.03
    final: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    alpha: float = 0.0
    temperature: float = 1.0
    block: float = 0.0
    precision: str | None = None
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        whole, rows, positive = (1, 2**63), (1, 2**31), (0, math.inf)
        check_fields(OP, self, USES, steps=whole, batch=rows, micro_batch=rows, seed=SEEDS)
        most = (0, 10**9)
        check_fields(OP, self, minutes=most, passes=most, temperature=most, block=most)
        every = (0, 2**63)
        check_fields(OP, self, log_every=every, eval_every=every, save_every=every)
        check_fields(OP, self, lr=(0, 10**3), clip=positive, weight_decay=positive, eps=(0, 1))
        check(self.steps is None or self.steps >= 1, OP, "steps >= 1", self.steps)
        check(self.minutes is None or self.minutes > 0, OP, "minutes > 0", self.minutes)
        both = self.steps is not None and self.minutes is not None
        check(not both, OP, "steps or minutes", "both", "Leave one out.")
        check(self.passes > 0, OP, "passes > 0", self.passes)
        check(self.batch >= 1, OP, "batch >= 1", self.batch)
        check(
            self.micro_batch is None or self.micro_batch >= 1,
            OP,
            "micro_batch >= 1",
            self.micro_batch,
        )
        check(self.lr > 0, OP, "lr > 0", self.lr)
        fits = all(0 <= beta < 1 for beta in self.betas)
        check(fits, OP, "betas from 0 to below 1", self.betas)
        for name in ("warmup", "final", "alpha"):
            value = getattr(self, name)
            check(0 <= value <= 1, OP, f"0 <= {name} <= 1", value)
        check(self.block >= 0, OP, "block >= 0", self.block)
        check(self.temperature > 0, OP, "temperature > 0", self.temperature)
        known = self.precision is None or self.precision in PRECISIONS
        check(known, OP, f"precision in {sorted(PRECISIONS)}", repr(self.precision))

    def autocast(self, device: torch.device) -> torch.dtype | None:
        """The dtype of autocast on this device, None for float32."""
        return PRECISIONS[self.precision or ("bfloat16" if device.type == "cuda" else "float32")]

    def rate(self, progress: float) -> float:
        """The learning rate at a share of the run, 0 to 1: linear warm-up, then a cosine."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        share = (progress - self.warmup) / max(1e-12, 1 - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return self.lr * (self.final + (1 - self.final) * cosine)


@dataclass
class DistillReport:
    """What a run did.

    Attributes:
        recipe: as given, steps resolved.      data: Corpus.describe() of the training rows.
        teacher: "live", "offloaded", "cache" or "none".
        steps, tokens, seconds: of the whole run, resumed parts included.
        first_step: seconds of this process' first step, which compiles; with minutes not counted
            in `seconds`.
        tokens_per_second: over the steps after the first (which compiles), without evaluations.
        evaluations: [{"step", name: value, ...}].      final: the last of them.
        loss: of the last logged steps.
        violations: Masked.check() at the end: 0.
        overlap: name of a test text -> {"n", "test", "found"}: its n-grams that are in training.
        resumed: the step that this process started from.
        stopped: the run is not at its end: limit_seconds was reached, a checkpoint is there.
        notes: what was out of the ordinary.
        masked: the Masked object, for .compress(). Not part of the JSON.
    """

    recipe: dict[str, Any]
    data: dict[str, Any]
    teacher: str
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_step: float = 0.0
    tokens_per_second: float = 0.0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    loss: float = float("nan")
    violations: int = -1
    overlap: dict[str, dict[str, int]] = field(default_factory=dict)
    resumed: int = 0
    stopped: bool = False
    notes: list[str] = field(default_factory=list)
    masked: Masked | None = None

    @property
    def final(self) -> dict[str, float]:
        """The last evaluation, {} without any."""
        return self.evaluations[-1] if self.evaluations else {}

    def to_json(self) -> str:
        """Everything but `masked`, as JSON; numbers that are not finite become null."""
        rows = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "masked"}
        return json.dumps({"schema": 1, **finite(rows)}, indent=1, allow_nan=False)

    def summary(self) -> str:
        """One line: steps, tokens, time, loss, evaluations."""
        made = sum(s["tokens"] for s in self.data["sources"] if s["kind"] == "teacher")
        text = f"{self.steps} steps, {self.tokens} tokens in {self.seconds:.0f} s"
        text += f" ({self.tokens_per_second:.0f} tokens/s), loss {self.loss:.4f}"
        values = ", ".join(f"{k} {v:.4g}" for k, v in self.final.items() if k != "step")
        text += f", {values}" if values else ""
        text += f", {made} of {self.data['tokens']} tokens of text made by the teacher"
        return f"{text}, {self.violations} violations of the masks"

    __str__ = summary


def from_options(options: dict[str, Any]) -> Recipe:
    """A Recipe of these fields."""
    known = {f.name for f in fields(Recipe)}
    unknown = sorted(set(options) - known)
    check(not unknown, OP, f"options in {sorted(known)}", unknown, exc=TypeError)
    return Recipe(**options)
