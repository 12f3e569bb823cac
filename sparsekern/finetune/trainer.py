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

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.finetune.data import Corpus
from sparsekern.finetune.files import RunFiles
from sparsekern.finetune.inputs import (
    Evaluation,
    kind_of,
    open_corpus,
    open_evaluations,
    open_teacher,
)
from sparsekern.finetune.loop import Loop
from sparsekern.finetune.masked import Masked
from sparsekern.finetune.recipe import OP, DistillReport, Recipe
from sparsekern.finetune.recipe import from_options as recipe_from
from sparsekern.finetune.schedule import Schedule
from sparsekern.finetune.student import Student, restored
from sparsekern.finetune.world import World
from sparsekern.oneshot.devices import check_data
from sparsekern.utils.arguments import Given, Uses, check_used, checked
from sparsekern.utils.staging import check_writable


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
    world = World.join(device)
    share = recipe.batch % world.size
    check(share == 0, OP, f"batch divisible by {world.size} processes", recipe.batch)
    check(recipe.minutes is not None or not shorten, OP, "minutes with shorten", "steps")
    progress = progress and world.first
    with restored(model, world.device) as end:
        corpus = open_corpus(
            data,
            model,
            teacher,
            recipe,
            world,
            window=window,
            generate_tokens=generate_tokens,
            progress=progress,
        )
        steps = recipe.steps
        if steps is None and recipe.minutes is None:
            steps = max(1, round(recipe.passes * corpus.rows.shape[0] / recipe.batch))
        first = corpus.rows[:1]
        student = Student(model, masks, schedule, recipe, steps, first, world.device, end)
        asked = open_teacher(teacher, model, corpus, recipe, world.device, offload=offload_teacher)
        evaluations, overlap = open_evaluations(
            evaluate or {}, model, corpus, eval_window, world.device
        )
        report = DistillReport(
            {**asdict(recipe), "steps": steps},
            corpus.describe(),
            kind_of(asked),
            overlap=overlap,
            masked=student.masked,
        )
        if not student.split.plain:
            report.notes.append("logits are no plain product: they are materialised")
        loop = Loop(
            student,
            asked,
            corpus,
            evaluations,
            recipe,
            steps,
            world,
            report,
            RunFiles(folder, student, asked, report, world),
            deadline=None if limit_seconds is None else begin + limit_seconds,
            shorten=shorten,
            progress=progress,
            on_step=on_step,
        )
        return loop.run(resume)
