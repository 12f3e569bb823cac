"""The training loop of distill: steps until the run is at its end, what is logged, the end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsekern.errors import check
from sparsekern.finetune import attention
from sparsekern.finetune.data import Corpus, batch_rows
from sparsekern.finetune.files import RunFiles
from sparsekern.finetune.inputs import Evaluation, Teacher
from sparsekern.finetune.losses import IGNORED, Target, distillation_loss, square_head
from sparsekern.finetune.recipe import OP, DistillReport, Recipe
from sparsekern.finetune.student import Student
from sparsekern.finetune.teacher import LiveTeacher, Split, compiled
from sparsekern.finetune.world import World
from sparsekern.utils.arguments import folded, shown

ROWS_ON_DEVICE = 2 << 30  # bytes of training rows that a GPU may hold


class Step(nn.Module):
    """Forward and loss in one module, so that DDP sees one call."""

    def __init__(
        self, split: Split, body: Any, recipe: Recipe, autocast: torch.dtype | None
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.split = split
        self._body = [body]  # not a submodule: a compiled body shares the model's parameters
        self.recipe = recipe

    def forward(
        self, ids: Tensor, target: Target, theirs: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        recipe, body = self.recipe, self._body[0]
        hidden, states = body(ids, recipe.block > 0)
        if self.autocast is not None and self.split.plain:
            hidden = hidden.to(self.autocast)  # float32 where the residual stream is
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        loss, kl, ce = distillation_loss(
            hidden.flatten(0, 1),
            self.split.head,
            target,
            labels.flatten(),
            alpha=recipe.alpha,
            temperature=recipe.temperature,
            fused=recipe.compile,
        )
        if recipe.block:
            loss = loss + recipe.block * square_head(states, theirs)
        return loss, kl, ce


@dataclass
class Loop:
    """One call of distill, once everything that goes in is open.

    steps: of the run, None when recipe.minutes decide. deadline: time.perf_counter() at which
    limit_seconds is over. progress: whether this process shows it. shorten, on_step: as in distill.
    """

    student: Student
    teacher: Teacher | None
    corpus: Corpus
    evaluations: dict[str, Evaluation]
    recipe: Recipe
    steps: int | None
    world: World
    report: DistillReport
    files: RunFiles
    deadline: float | None
    shorten: bool
    progress: bool
    on_step: Callable[[int], object] | None

    def __post_init__(self) -> None:
        recipe, rows, self.device = self.recipe, self.corpus.rows, self.world.device
        self.rows = rows
        if self.device.type == "cuda" and rows.nbytes <= ROWS_ON_DEVICE:
            self.rows = rows.to(self.device)  # no copy that waits for the step before
        self.autocast = recipe.autocast(self.device)
        self.mine = recipe.batch // self.world.size
        self.micro = min(recipe.micro_batch or self.mine, self.mine)
        self.minutes = recipe.minutes
        self.spent = 0.0  # seconds in steps, of earlier processes of the run, too

    def run(self, resume: bool) -> DistillReport:
        """Train to the end, from the files' checkpoint if there is one and `resume`."""
        torch.manual_seed(folded(self.recipe.seed + self.world.rank))
        step = 0
        if resume:
            step, self.spent = self.files.load()
        self.report.resumed = step
        self.files.begin(step)
        with self._attention():
            return self._finish(self._train(step))

    def _train(self, step: int) -> int:
        """The steps after `step`; returns the last one."""
        from tqdm import tqdm

        recipe, report = self.recipe, self.report
        module = self._module()
        total = self.steps if self.steps is not None else math.ceil(60 * (recipe.minutes or 0))
        unit = "step" if self.steps is not None else "s"
        tokens = recipe.batch * self.corpus.window
        sums = torch.zeros(4, device=self.device, dtype=torch.float32)
        seen = 0  # steps that count for the speed
        before = self.spent  # without the first step, which compiles
        first_done = step > 0
        if step == 0 and self.evaluations:
            self._evaluate(0)
            module.train()
        off = not self.progress
        with tqdm(total=total, initial=step, desc="distill", unit=unit, disable=off) as bar:
            while not self._finished(step):
                start = time.perf_counter()
                rate = recipe.rate(self._progress(step))
                sums += self._one_step(module, step, rate)
                step += 1
                last = self.steps is not None and step >= self.steps
                logged = last or _due(recipe.log_every, step)
                if logged or not first_done:
                    self._synchronise()
                took = time.perf_counter() - start
                if first_done or self.steps is not None:
                    self.spent += took
                if first_done:
                    seen += 1
                else:
                    report.first_step, before, first_done = took, self.spent, True
                    self._shorten()
                if not last and self._finished(step):
                    last = logged = True
                    waited = time.perf_counter()
                    self._synchronise()
                    self.spent += time.perf_counter() - waited
                if logged:
                    loss, kl, ce = self._means(sums)
                    check(math.isfinite(loss), OP, "a finite loss", loss, "Lower lr.")
                    report.loss = loss
                    speed = seen * tokens / max(1e-9, self.spent - before) if seen else 0.0
                    report.tokens_per_second = speed
                    self.files.log({
                        "step": step, "tokens": step * tokens, "loss": loss, "kl": kl, "ce": ce,
                        "lr": rate, "grad_norm": float(self.norm), "tokens_per_s": speed,
                        "seconds": self.spent,
                    })  # fmt: skip
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    sums.zero_()
                bar.update(1 if self.steps is not None else int(self.spent) - bar.n)
                if _due(recipe.eval_every, step) and not last:
                    self._evaluate(step)
                    module.train()
                if _due(recipe.save_every, step) and not last:
                    self.files.save(step, self.spent)
                asked = self.on_step is not None and self.on_step(step) is True
                if last:
                    break
                if asked:
                    report.notes.append(f"ended by on_step with step {step}")
                report.stopped = not asked and self._out_of_time(step)
                if asked or report.stopped:
                    if math.isnan(report.loss):  # nothing was logged
                        report.loss = self._means(sums)[0]
                    break
        return step

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Attention without a mask in student and teacher, where theirs agrees with it."""
        models = [self.student.model]
        if isinstance(self.teacher, LiveTeacher) and not self.teacher.offload:
            models.append(self.teacher.split.model)
        with contextlib.ExitStack() as stack:
            if self.world.size > 1 and self.recipe.compile:
                # One graph: gradients of all layers are exchanged at its end.
                import torch._dynamo

                stack.enter_context(torch._dynamo.config.patch(optimize_ddp=False))
            for model in models:
                if not attention.why_not_causal(model, self.corpus.window):
                    stack.enter_context(attention.use(model, attention.CAUSAL, attention.causal))
            yield

    def _module(self) -> Any:
        """The student's step, compiled and data parallel as the run is."""
        recipe, split = self.recipe, self.student.split
        body = compiled(split, whole=recipe.block > 0) if recipe.compile else split
        module = Step(split, body, recipe, self.autocast).train()
        return DistributedDataParallel(module) if self.world.size > 1 else module

    def _one_step(self, module: Any, step: int, rate: float) -> Tensor:
        """Returns [loss, kl, ce, 1] of this process."""
        recipe, world, student = self.recipe, self.world, self.student
        count = self.corpus.rows.shape[0]
        numbers = batch_rows(count, recipe.batch, recipe.seed, step)[world.rank :: world.size]
        parts = numbers.split(self.micro)
        batches = [self._ids(part) for part in parts]
        empty: tuple[Target, list[Tensor]] = (Target(), [])
        if self.teacher is None:
            targets = [empty] * len(parts)
        else:
            targets = self.teacher.targets(batches, parts, recipe.block > 0)
        student.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(4, device=self.device, dtype=torch.float32)
        kind, on = self.device.type, self.autocast is not None
        for number, (ids, (target, theirs)) in enumerate(zip(batches, targets)):
            wait = number + 1 < len(batches) and world.size > 1
            with module.no_sync() if wait else contextlib.nullcontext():
                with torch.autocast(kind, self.autocast, enabled=on):
                    loss, kl, ce = module(ids, target, theirs)
                weight = len(ids) / self.mine
                student.scaler.scale(loss * weight).backward()
            total[:3] += torch.stack((loss.detach(), kl, ce)) * weight
        self.norm = student.step(rate, recipe.clip)
        total[3] = 1
        return total

    def _ids(self, numbers: Tensor) -> Tensor:
        """Rows of these numbers, int64 on the device."""
        if self.rows.device.type == "cuda":
            numbers = numbers.pin_memory().to(self.device, non_blocking=True)
        return self.rows[numbers].to(self.device, torch.int64)

    def _means(self, sums: Tensor) -> list[float]:
        """[loss, kl, ce], means over the steps that are summed up and over the processes."""
        loss, kl, ce, _ = (self.world.mean(sums.clone()) / sums[3]).tolist()
        return [loss, kl, ce]

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------ how long

    def _progress(self, step: int) -> float:
        """The share of the run that is behind, for the rate: in the middle of this step."""
        if self.steps is not None:
            return (step + 0.5) / self.steps
        assert self.minutes is not None
        return min(1.0, self.world.same(self.spent) / (60 * self.minutes))

    def _finished(self, step: int) -> bool:
        if self.steps is not None:
            return step >= self.steps
        assert self.minutes is not None
        return self.world.same(self.spent) >= 60 * self.minutes

    def _shorten(self) -> None:
        """After the first step, with `shorten`: at most the minutes that limit_seconds leaves."""
        if self.shorten and self.deadline is not None:
            left = self.world.same(self.deadline - time.perf_counter()) / 60
            self.minutes = max(1e-3, min(self.minutes or left, left))
            self.report.recipe["minutes"] = round(self.minutes, 3)

    def _out_of_time(self, step: int) -> bool:
        """Whether limit_seconds is reached; looked at with every log, when the device is idle, or
        with every step where none are asked for."""
        if self.deadline is None or self.shorten or not _due(self.recipe.log_every or 1, step):
            return False
        return self.world.same(self.deadline - time.perf_counter()) < 0

    # ------------------------------------------------------------------ what comes out

    def _evaluate(self, step: int) -> None:
        self.student.model.eval()
        values: dict[str, float] = {}
        for name, measure in self.evaluations.items():
            found = measure(self.student.model)
            one = not isinstance(found, Tensor) or found.numel() == 1
            number = isinstance(found, SupportsFloat) and one
            expected = f"a number from evaluate[{name!r}]"
            check(number, OP, expected, shown(found), "Return one.", TypeError)
            values[name] = float(found)
        self.report.evaluations.append({"step": step, **values})
        self.files.log({"step": step, "evaluation": values, "seconds": self.spent})

    def _finish(self, step: int) -> DistillReport:
        report = self.report
        report.steps, report.seconds = step, self.spent
        report.tokens = step * self.recipe.batch * self.corpus.window
        if self.recipe.save_every or report.stopped:
            self.files.save(step, self.spent)
        self.student.model.eval()
        report.violations = self.student.masked.check()
        known = bool(report.evaluations) and report.final["step"] == step
        if self.evaluations and not known and not report.stopped:
            self._evaluate(step)
        self.files.end()
        return report


def _due(every: int, step: int) -> bool:
    """Whether something that is done `every` so many steps, 0 for never, is done with this one."""
    return every > 0 and step % every == 0
