"""distill: train a pruned model towards its dense teacher, masks kept, from start to checkpoint.

    rows ──► teacher: targets ─┐
        └──► student: hidden ──┴─► loss, chunk by chunk ─► gradients ─► masked step ─► metrics

Weights are trained in float32 (bfloat16 ones would swallow the last, small steps) and come back in
their own dtypes at the end. With `steps` a run on the CPU is reproducible bit for bit, whether it
was interrupted or not; with `minutes` the clock decides. torchrun makes it data parallel.

Defaults are those measured on SmolLM2-135M (AdamW 6e-4, cosine, batch 16 x 1024 tokens). The rate
falls about with the width: 1e-4 to 2e-5 for 7B models (SparseForge, AST, CAST).

Source: Hinton et al. 2015 (arXiv:1503.02531); Kurtic et al. 2023 (arXiv:2310.06927); the losses of
AST (arXiv:2407.20584) and SparseForge (arXiv:2605.06402): logits and cross-entropy, no hidden
states, which is the default here.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from sparsekern.errors import FormatError, check
from sparsekern.eval.perplexity import check_model, perplexity
from sparsekern.finetune import attention, metrics
from sparsekern.finetune import data as text
from sparsekern.finetune.data import Corpus
from sparsekern.finetune.losses import IGNORED, Target, distillation_loss, square_head
from sparsekern.finetune.masked import Masked
from sparsekern.finetune.recipe import OP, PRECISIONS, DistillReport, Recipe
from sparsekern.finetune.recipe import from_options as recipe_from
from sparsekern.finetune.schedule import Frozen, Schedule
from sparsekern.finetune.teacher import CachedTeacher, LiveTeacher, Split, compiled
from sparsekern.finetune.world import World
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot.devices import check_data
from sparsekern.oneshot.discovery import check_basis
from sparsekern.oneshot.fingerprint import of_tensors
from sparsekern.utils.arguments import Given, Uses, check_used, checked, folded, shown
from sparsekern.utils.files import renamed, write_atomic
from sparsekern.utils.staging import check_writable

CHECKPOINT, REPORT = "checkpoint.pt", "report.json"
ROWS_ON_DEVICE = 2 << 30  # bytes of training rows that a GPU may hold
Evaluation = Callable[[nn.Module], float]


def _evaluates(given: Given) -> bool:
    return any(isinstance(what, Tensor) for what in (given["evaluate"] or {}).values())


def _fits_rows(given: Given) -> bool:
    rows = getattr(given["data"], "rows", given["data"])
    return not isinstance(rows, Tensor) or rows.dim() == 1 or rows.shape[1] == given["window"]


USES: Uses = {
    "generate_tokens": ("data=None", lambda given: given["data"] is None),
    "window": ("data=None, ids [tokens], or rows of as many", _fits_rows),
    "eval_window": ("ids to evaluate", _evaluates),
    "offload_teacher": ("a model as teacher", lambda g: isinstance(g.get("teacher"), nn.Module)),
    "shorten": ("limit_seconds", lambda given: given["limit_seconds"] is not None),
}
# The same of fields of the recipe, and of what the recipe decides on.
RECIPE_USES: Uses = {
    "eval_every": ("evaluate", lambda given: given["evaluate"]),
    "save_every": ("a folder", lambda given: given["folder"] is not None),
    "teacher": (
        "alpha < 1, block > 0 or data=None",
        lambda given: given["alpha"] < 1 or given["block"] or given["data"] is None,
    ),
}


@checked(OP, uses=USES, window=(2, 2**31), eval_window=(2, 2**31), generate_tokens=(1, 2**40))
def distill(
    model: nn.Module,
    teacher: nn.Module | str | Path | None,
    data: Corpus | Tensor | None = None,
    *,
    masks: Masked | dict[str, Tensor] | None = None,
    schedule: Schedule | None = None,
    evaluate: Mapping[str, Tensor | Evaluation] | None = None,
    window: int = 1024,
    eval_window: int = 2048,
    generate_tokens: int = 4_000_000,
    folder: str | Path | None = None,
    resume: bool = True,
    limit_seconds: float | None = None,
    shorten: bool = False,
    device: torch.device | str | None = None,
    offload_teacher: bool = False,
    progress: bool = True,
    on_step: Callable[[int], object] | None = None,
    recipe: Recipe | None = None,
    **options: Any,
) -> DistillReport:
    """Train `model` in place towards the teacher's distribution, with its 2:4 masks kept.

        loss = (1 − α)·T²·KL(teacher ‖ model) + α·CE(next token) + block·Σ‖h − h_t‖²/‖h_t‖² / blocks

    Args:
        model: a causal language model with dense 2:4 weights: prune_model(..., compress=False).
        teacher: the dense model (of the same vocabulary; its parameters are frozen), or a folder
            that teacher.build_cache wrote, or None with alpha=1: cross-entropy alone.
        data: a Corpus; or ids [rows, window]; or ids [tokens], packed into rows of `window`; or
            None: text that the teacher samples (data.generate), `generate_tokens` of it.
        masks: a Masked object, or as for Masked; None: the zeros of the weights.
        schedule: how masks move (schedule.py), where masks is no Masked.
        evaluate: name -> test ids (their perplexity in windows of `eval_window` is measured, and
            their overlap with the training rows counted), or a function(model) -> number.
        folder: where checkpoint.pt, metrics.jsonl, plot.png and report.json go; None: nowhere.
        resume: go on from the folder's checkpoint when there is one. The run has to be the same.
        limit_seconds: end training this long after the call, whatever the recipe says: with a
            checkpoint in `folder` and report.stopped, without the last evaluation, so that the same
            call goes on.
        shorten: instead of that, a run by minutes gets, after its first step, the minutes that are
            left, so that its rates fall to the end.
        device: None: "cuda" if there is one (under torchrun this process' own), else the CPU.
        offload_teacher: keep the teacher's weights on the host between steps.
        progress: show a progress bar with the time left.
        on_step: called with the number of each finished step; where it returns True the run ends
            with this step, and a note says so (the same on every process).
        recipe, options: a Recipe, or its fields by name.
    Returns:
        DistillReport; report.masked.compress() then makes SparseLinear layers.
    Raises:
        ValueError: arguments that do not fit or that nothing reads, masks that would never move,
            ids beyond the vocabulary, a teacher of another one, a resumed run that is another, a
            loss that is not finite.   TypeError: arguments of another kind.   FormatError: a
            damaged checkpoint.
    Notes:
        Under torchrun every process calls this with the same arguments. Weights are left on
        `device`, in their dtypes, without gradients, in eval mode; the teacher stays frozen. An
        exception leaves what was trained until then, in the modes from before. torch's random
        numbers go on as if it had not been called.
    """
    begin = time.perf_counter()
    check(recipe is None or not options, OP, "recipe or its fields", "both", "Leave one out.")
    check(limit_seconds is None or limit_seconds > 0, OP, "limit_seconds > 0", limit_seconds)
    resumable = limit_seconds is None or shorten or folder is not None
    remedy = "Pass folder=, or shorten=True with minutes."
    check(resumable, OP, "a folder for the checkpoint, with limit_seconds", "none", remedy)
    free = folder is None or Path(folder).is_dir() or not Path(folder).exists()
    check(free, OP, "folder: a folder, or the name of a new one", repr(str(folder)))
    recipe = recipe or recipe_from(options)
    given = {"evaluate": evaluate, "folder": folder, "teacher": teacher, "data": data}
    defaults = {**asdict(Recipe()), **dict.fromkeys(given)}
    check_used(OP, RECIPE_USES, {**asdict(recipe), **given}, defaults)
    check_data(OP, model)
    if isinstance(teacher, nn.Module):
        check_data(OP, teacher, "teacher")
    if folder is not None:
        check_writable(folder, OP)
    run = _Run(
        model,
        recipe,
        World.join(device),
        folder,
        progress,
        on_step,
        schedule,
        eval_window,
    )
    if limit_seconds is not None:
        by_time = run.recipe.minutes is not None
        check(by_time or not shorten, OP, "minutes with shorten", "steps")
        run.deadline, run.shorten = begin + limit_seconds, shorten
    with run.restored():
        run.open_data(data, teacher, window, generate_tokens)
        run.open_model(masks)
        run.open_teacher(teacher, offload_teacher)
        run.open_evaluations(evaluate or {})
        with run.attention():
            return run.train(resume)


def eval_batch(model: nn.Module, window: int, device: torch.device) -> int:
    """Windows per forward of an evaluation: logits of at most 2^30 entries on a GPU."""
    if device.type != "cuda":
        return 1
    size = _entries(model, "get_input_embeddings") or 1 << 18
    return int(max(1, min(8, (1 << 30) // (window * size))))


def _entries(model: nn.Module, getter: str) -> int | None:
    """Rows of an embedding of Transformers' models; None where the model does not say."""
    embedding: Any = getattr(model, getter, lambda: None)()
    shape = getattr(getattr(embedding, "weight", None), "shape", None)
    return None if shape is None else int(shape[0])


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


# ---------------------------------------------------------------------- the run


class _Run:
    """One call of distill."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        world: World,
        folder: str | Path | None,
        progress: bool,
        on_step: Callable[[int], object] | None,
        schedule: Schedule | None,
        eval_window: int,
    ) -> None:
        self.model, self.recipe, self.world = model, recipe, world
        self.folder = None if folder is None else Path(folder)
        self.progress, self.on_step, self.schedule = progress, on_step, schedule
        self.eval_window = eval_window
        self.deadline: float | None = None
        self.shorten = False
        self.minutes = recipe.minutes
        self.device = world.device
        default = "bfloat16" if self.device.type == "cuda" else "float32"
        self.autocast = PRECISIONS[recipe.precision or default]
        share = recipe.batch % world.size
        check(share == 0, OP, f"batch divisible by {world.size} processes", recipe.batch)
        self.mine = recipe.batch // world.size
        self.micro = min(recipe.micro_batch or self.mine, self.mine)
        self.trained: list[nn.Parameter] = []
        self.end = contextlib.ExitStack()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Afterwards dtypes, gradients, hooks and torch's random numbers are as distill says."""
        model, devices = self.model, [self.device] if self.device.type == "cuda" else []
        flags = [(module, module.training) for module in model.modules()]
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        try:
            with (
                self.end,
                torch.inference_mode(False),
                torch.enable_grad(),  # whatever the caller has
                torch.random.fork_rng(devices),
            ):
                yield
        except BaseException:
            for module, flag in flags:
                module.training = flag
            raise
        finally:
            for parameter in self.trained:
                parameter.grad = None
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(dtypes[name])

    # ------------------------------------------------------------------ what goes in

    def open_data(
        self,
        data: Corpus | Tensor | None,
        teacher: nn.Module | str | Path | None,
        window: int,
        generate_tokens: int,
    ) -> None:
        if data is None:
            remedy = "Pass data=."
            check(
                isinstance(teacher, nn.Module), OP, "a live teacher to write text", "none", remedy
            )
            assert isinstance(teacher, nn.Module)
            teacher.to(self.device)
            options: dict[str, Any] = {
                "window": window,
                "seed": self.recipe.seed,
                "autocast": self.autocast,
            }
            show = self.progress and self.world.first
            if self.world.first:  # the others then read its file
                text.generate(teacher, generate_tokens, progress=show, **options)
            self.world.wait()
            data = text.generate(teacher, generate_tokens, progress=False, **options)
        elif isinstance(data, Tensor):
            rows = text.pack([data], window) if data.dim() == 1 else data
            data = Corpus(rows.cpu(), [text.Source("text", "ids", rows.numel())])
        if data.rows.is_inference():
            data = Corpus(data.rows.clone(), data.sources)
        self._check_ids("data", data.rows)
        self.corpus = data
        self.rows = data.rows
        if self.device.type == "cuda" and data.rows.nbytes <= ROWS_ON_DEVICE:
            self.rows = data.rows.to(self.device)  # no copy that waits for the step before
        described = data.describe()
        count = data.rows.shape[0]
        steps = self.recipe.steps
        if steps is None and self.recipe.minutes is None:
            steps = max(1, round(self.recipe.passes * count / self.recipe.batch))
        self.steps = steps
        stated = {**asdict(self.recipe), "steps": steps}
        self.report = DistillReport(stated, described, "none")

    def _check_ids(self, name: str, ids: Tensor) -> None:
        """ValueError for ids that the model's embedding does not have."""
        count = _entries(self.model, "get_input_embeddings")
        if count is None or not ids.numel():
            return
        low, high = int(ids.min()), int(ids.max())
        expected, remedy = f"{name}: ids from 0 to {count - 1}", "Use the model's own tokenizer."
        check(0 <= low and high < count, OP, expected, f"{low} to {high}", remedy)

    def open_model(self, masks: Masked | dict[str, Tensor] | None) -> None:
        model = self.model
        packed = [n for n, m in model.named_modules() if isinstance(m, SparseLinear)]
        remedy = "Prune with compress=False; compress after training."
        got = f"{len(packed)} SparseLinear, first {packed[0] if packed else ''}"
        check(not packed, OP, "a model with dense weights", got, remedy)
        model.to(self.device)
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        if isinstance(masks, Masked):
            check(self.schedule is None, OP, "schedule or a Masked object", "both")
            self.masked = masks
        else:
            self.masked = Masked(model, masks, schedule=self.schedule)
        self._check_moves()
        self.report.masked = self.masked
        self.split = Split(model)
        if not self.split.plain:
            self.report.notes.append("logits are no plain product: they are materialised")
        ids = self.corpus.rows[:1].to(self.device, torch.int64)
        kwargs = {"use_cache": False} if hasattr(model, "config") else {}
        check_model(OP, model, ids, kwargs, causal=False)
        trained = [p for p in model.parameters() if p.requires_grad]
        remedy = "Call model.requires_grad_(True)."
        check(trained, OP, "parameters with requires_grad", "none", remedy)
        recipe = self.recipe
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.end.callback(self.masked.detach)
        self.masked.attach(self.optimizer)
        half = self.autocast is not None and self.autocast == PRECISIONS["float16"]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.trained = trained

    def _check_moves(self) -> None:
        """ValueError for a schedule that moves masks, but in none of the run's steps."""
        schedule, step = self.masked.schedule, self.masked.step
        first = (step // schedule.every + 1) * schedule.every
        moving = schedule.live(first) and self.steps is not None
        expected = f"steps >= {first - step}, at which {type(schedule).__name__} first moves a mask"
        remedy = f"Train longer, or with another schedule (every < {schedule.every})."
        check(not moving or first - step <= (self.steps or 0), OP, expected, self.steps, remedy)

    def open_teacher(self, teacher: nn.Module | str | Path | None, offload: bool) -> None:
        self.teacher: LiveTeacher | CachedTeacher | None = None
        if isinstance(teacher, nn.Module):
            remedy = "Pass copy.deepcopy(model) from before the pruning."
            check(teacher is not self.model, OP, "a teacher of its own", "the model itself", remedy)
            ours, theirs = (_entries(m, "get_output_embeddings") for m in (self.model, teacher))
            same = ours is None or theirs is None or ours == theirs
            remedy = "The teacher is the dense model of the same family and tokenizer."
            check(same, OP, f"teacher: a vocabulary of {ours}", theirs, remedy)
            if self.recipe.block:
                check_basis(OP, self.model, teacher)
            self.teacher = LiveTeacher(
                teacher,
                self.device,
                offload=offload,
                autocast=self.autocast,
                compile=self.recipe.compile and not offload,
                blocks=self.recipe.block > 0,
            )
            if not self.teacher.split.plain:  # else compared with its logits already
                ids = self.corpus.rows[:1].to(next(teacher.parameters()).device, torch.int64)
                kwargs = {"use_cache": False} if hasattr(teacher, "config") else {}
                with torch.no_grad():
                    check_model(OP, teacher, ids, kwargs, causal=False)
            self.report.teacher = "offloaded" if offload else "live"
        elif teacher is not None:
            self.teacher = CachedTeacher(teacher, self.corpus, self.device)
            self.report.teacher = "cache"
        alone = self.teacher is not None or (self.recipe.alpha == 1 and not self.recipe.block)
        remedy = "Pass alpha=1 (and block=0) for cross-entropy alone."
        check(alone, OP, "a teacher", None, remedy)

    def open_evaluations(self, evaluate: Mapping[str, Tensor | Evaluation]) -> None:
        self.evaluations: dict[str, Evaluation] = {}
        for name, what in evaluate.items():
            check(name not in ("step", "seconds"), OP, "another name of a test", name)
            good = isinstance(what, Tensor) or callable(what)
            expected = f"evaluate[{name!r}]: a tensor of ids or a function of the model"
            check(good, OP, expected, shown(what), "Tokenize the text.", TypeError)
            if isinstance(what, Tensor):
                self._check_ids(f"evaluate[{name!r}]", what)
                found = text.overlap(self.corpus.rows, what.reshape(-1))
                self.report.overlap[name] = asdict(found)
                ids = what.reshape(-1)

                def measure(model: nn.Module, ids: Tensor = ids) -> float:
                    window = min(self.eval_window, ids.numel())
                    return perplexity(model, ids, window, eval_batch(model, window, self.device))

                self.evaluations[name] = measure
            else:
                self.evaluations[name] = what

    @contextlib.contextmanager
    def attention(self) -> Iterator[None]:
        """Attention without a mask in student and teacher, where theirs agrees with it."""
        models = [self.model]
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

    # ------------------------------------------------------------------ the loop

    def train(self, resume: bool) -> DistillReport:
        from tqdm import tqdm

        recipe, world, report = self.recipe, self.world, self.report
        torch.manual_seed(folded(recipe.seed + world.rank))
        self.manifest = json.loads(json.dumps(self._identity())) if self.folder is not None else {}
        self.spent = 0.0  # seconds in steps, of earlier processes of the run, too
        step = self._load() if resume else 0
        report.resumed = step
        if self.folder is not None and world.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            metrics.truncate(self.folder, step)
        module: Any = Step(self.split, self._body(), recipe, self.autocast)
        module.train()
        if world.size > 1:
            module = nn.parallel.DistributedDataParallel(module)
        shown = self.progress and world.first
        total = self.steps if self.steps is not None else math.ceil(60 * (recipe.minutes or 0))
        unit = "step" if self.steps is not None else "s"
        tokens = recipe.batch * self.corpus.window
        sums = torch.zeros(4, device=self.device, dtype=torch.float32)
        first_done = step > 0
        seen = 0  # steps that count for the speed
        before = self.spent  # without the first step, which compiles
        if step == 0 and self.evaluations:
            self._evaluate(0)
            module.train()
        with tqdm(total=total, initial=step, desc="distill", unit=unit, disable=not shown) as bar:
            while not self._finished(step):
                start = time.perf_counter()
                done = self._progress(step)
                rate = recipe.rate(done)
                sums += self._one_step(module, step, rate)
                step += 1
                last = self.steps is not None and step >= self.steps
                if step % recipe.log_every == 0 or last or not first_done:
                    values = (world.mean(sums.clone()) / sums[3].clamp(min=1)).tolist()
                    self._synchronise()
                took = time.perf_counter() - start
                report.first_step = report.first_step if first_done else took
                if first_done:
                    self.spent += took
                    seen += 1
                elif self.steps is not None:
                    self.spent += took
                    before += took
                if not last and self.steps is None and self._finished(step):
                    last = True
                    waited = time.perf_counter()
                    values = (world.mean(sums.clone()) / sums[3].clamp(min=1)).tolist()
                    self._synchronise()
                    self.spent += time.perf_counter() - waited
                if step % recipe.log_every == 0 or last:
                    loss = values[0]
                    check(math.isfinite(loss), OP, "a finite loss", loss, "Lower lr.")
                    report.loss = loss
                    speed = seen * tokens / max(1e-9, self.spent - before) if seen else 0.0
                    report.tokens_per_second = speed
                    self._log({
                        "step": step, "tokens": step * tokens, "loss": loss, "kl": values[1],
                        "ce": values[2], "lr": rate, "grad_norm": float(self.norm),
                        "tokens_per_s": speed, "seconds": self.spent,
                    })  # fmt: skip
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    sums.zero_()
                if not first_done and self.deadline is not None and self.shorten:
                    left = world.same(self.deadline - time.perf_counter()) / 60
                    self.minutes = max(1e-3, min(self.minutes or left, left))
                    report.recipe["minutes"] = round(self.minutes, 3)
                first_done = True
                bar.update(1 if self.steps is not None else int(self.spent) - bar.n)
                if recipe.eval_every and step % recipe.eval_every == 0 and not last:
                    self._evaluate(step)
                    module.train()
                if recipe.save_every and step % recipe.save_every == 0 and not last:
                    self._save(step)
                asked = self.on_step is not None and self.on_step(step) is True
                if asked and not last:
                    report.notes.append(f"ended by on_step with step {step}")
                    report.loss = values[0] if math.isnan(report.loss) else report.loss
                    break
                if not last and self._out_of_time(step):
                    report.stopped = True
                    break
        return self._finish(step, tokens)

    def _identity(self) -> dict[str, Any]:
        """What a resumed run has to have in common with this one. The student's weights are not in
        it, which may be the trained ones already; under masks that do not move those say enough."""
        report, masked, teacher = self.report, self.masked, self.teacher
        if isinstance(teacher, LiveTeacher):
            weights = of_tensors(teacher.split.model.named_parameters())
        else:
            weights = teacher.manifest if teacher is not None else ""
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        fixed = isinstance(masked.schedule, Frozen)
        return {
            "recipe": {k: v for k, v in report.recipe.items() if not k.endswith("_every")},
            "data": report.data["sha256"],
            "teacher": report.teacher,
            "weights of the teacher": weights,
            "model": of_tensors((), type(self.model).__name__, json.dumps(shapes)),
            "schedule": masked.schedule.describe(),
            "masks": of_tensors(sorted(masked.masks.items())) if fixed else None,
            "processes": self.world.size,
        }

    def _out_of_time(self, step: int) -> bool:
        """Whether limit_seconds is reached; looked at with every log, when the device is idle."""
        if self.deadline is None or self.shorten or step % self.recipe.log_every:
            return False
        return self.world.same(self.deadline - time.perf_counter()) < 0

    def _body(self) -> Any:
        if not self.recipe.compile:
            return self.split
        return compiled(self.split, whole=self.recipe.block > 0)

    def _one_step(self, module: Any, step: int, rate: float) -> Tensor:
        """Returns [loss, kl, ce, 1] of this process."""
        recipe, world = self.recipe, self.world
        count = self.corpus.rows.shape[0]
        numbers = text.batch_rows(count, recipe.batch, recipe.seed, step)[world.rank :: world.size]
        parts = numbers.split(self.micro)
        batches = [self._ids(part) for part in parts]
        empty: tuple[Target, list[Tensor]] = (Target(), [])
        if self.teacher is None:
            targets = [empty] * len(parts)
        else:
            targets = self.teacher.targets(batches, parts, recipe.block > 0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(4, device=self.device, dtype=torch.float32)
        kind, on = self.device.type, self.autocast is not None
        for number, (ids, (target, theirs)) in enumerate(zip(batches, targets)):
            wait = number + 1 < len(batches) and world.size > 1
            with module.no_sync() if wait else contextlib.nullcontext():
                with torch.autocast(kind, self.autocast, enabled=on):
                    loss, kl, ce = module(ids, target, theirs)
                weight = len(ids) / self.mine
                self.scaler.scale(loss * weight).backward()
            total[:3] += torch.stack((loss.detach(), kl, ce)) * weight
        self.scaler.unscale_(self.optimizer)
        self.masked.mask_gradients()
        limit = recipe.clip or float("inf")
        self.norm = nn.utils.clip_grad_norm_(self.trained, limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        total[3] = 1
        return total

    def _ids(self, numbers: Tensor) -> Tensor:
        """Rows of these numbers, int64 on the device."""
        if self.rows.device.type == "cuda":
            numbers = numbers.pin_memory().to(self.device, non_blocking=True)
        return self.rows[numbers].to(self.device, torch.int64)

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

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _finish(self, step: int, tokens: int) -> DistillReport:
        report = self.report
        report.steps, report.tokens, report.seconds = step, step * tokens, self.spent
        if self.folder is not None and (self.recipe.save_every or report.stopped):
            self._save(step)
        self.model.eval()
        report.violations = self.masked.check()
        known = bool(report.evaluations) and report.final["step"] == step
        if self.evaluations and not known and not report.stopped:
            self._evaluate(step)
        if self.folder is not None and self.world.first:
            try:
                metrics.plot(self.folder)
            except ImportError as error:
                report.notes.append(str(error))
            write_atomic(self.folder / REPORT, report.to_json().encode())
        self.world.wait()
        return report

    def _evaluate(self, step: int) -> None:
        self.model.eval()
        values: dict[str, float] = {}
        for name, measure in self.evaluations.items():
            found = measure(self.model)
            one = not isinstance(found, Tensor) or found.numel() == 1
            number = isinstance(found, SupportsFloat) and one
            expected = f"a number from evaluate[{name!r}]"
            check(number, OP, expected, shown(found), "Return one.", TypeError)
            values[name] = float(found)
        row = {"step": step, **values}
        self.report.evaluations.append(row)
        self._log({"step": step, "evaluation": values, "seconds": self.spent})

    # ------------------------------------------------------------------ files

    def _log(self, row: dict[str, Any]) -> None:
        if self.folder is not None and self.world.first:
            metrics.append(self.folder, row)

    def _save(self, step: int) -> None:
        rng = self.world.gather(torch.get_rng_state())
        cuda = self.device.type == "cuda"
        device_rng = self.world.gather(torch.cuda.get_rng_state(self.device)) if cuda else []
        masked = self.masked.state_dict()
        if not self.world.first or self.folder is None:
            return
        state = {
            "manifest": self.manifest,
            "step": step,
            "seconds": self.spent,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "masked": masked,
            "rng": rng,
            "device_rng": device_rng,
            "evaluations": self.report.evaluations,
            "loss": self.report.loss,
        }
        final = self.folder / CHECKPOINT
        partial = final.with_suffix(".part")
        remedy = "Make room there: the same call goes on from the checkpoint before."
        with renamed(OP, partial, final, remedy):
            torch.save(state, partial)

    def _load(self) -> int:
        """The step to go on from."""
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return 0
        path = self.folder / CHECKPOINT
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            remedy = "Delete it to start again."
            text_ = f"{type(error).__name__}: {error}"
            check(False, OP, f"a checkpoint in {path}", text_, remedy, FormatError)
            raise
        remedy = "Choose another folder, or delete it to start again."
        known = isinstance(state, dict) and isinstance(state.get("manifest"), dict)
        check(known, OP, f"a checkpoint of distill in {path}", shown(state), remedy, FormatError)
        differing = [k for k in self.manifest if state["manifest"].get(k) != self.manifest[k]]
        remedy = "Choose another folder, or pass resume=False."
        check(not differing, OP, f"the run of {path}", f"another {', '.join(differing)}", remedy)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.masked.load_state_dict(state["masked"])
        torch.set_rng_state(state["rng"][self.world.rank])
        if state["device_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_rng"][self.world.rank], self.device)
        self.report.evaluations = list(state["evaluations"])
        self.report.loss = float(state["loss"])
        self.spent = float(state["seconds"])
        return int(state["step"])
