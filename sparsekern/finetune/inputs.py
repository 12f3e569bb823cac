"""What a run of distill is given beside its model: rows of text, a teacher, and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.eval.perplexity import check_model, perplexity
from sparsekern.finetune import data as text
from sparsekern.finetune.data import Corpus
from sparsekern.finetune.recipe import OP, Recipe
from sparsekern.finetune.teacher import CachedTeacher, LiveTeacher
from sparsekern.finetune.world import World
from sparsekern.oneshot.discovery import check_basis
from sparsekern.utils.arguments import shown

Evaluation = Callable[[nn.Module], float]
Teacher = LiveTeacher | CachedTeacher


def open_corpus(
    data: Corpus | Tensor | None,
    model: nn.Module,
    teacher: nn.Module | str | Path | None,
    recipe: Recipe,
    world: World,
    *,
    window: int,
    generate_tokens: int,
    progress: bool,
) -> Corpus:
    """The rows that distill's `data` stands for, on the host."""
    if data is None:
        remedy = "Pass data=."
        check(isinstance(teacher, nn.Module), OP, "a live teacher to write text", "none", remedy)
        assert isinstance(teacher, nn.Module)
        teacher.to(world.device)
        options: dict[str, Any] = {
            "window": window,
            "seed": recipe.seed,
            "autocast": recipe.autocast(world.device),
        }
        if world.first:  # the others then read its file
            text.generate(teacher, generate_tokens, progress=progress, **options)
        world.wait()
        data = text.generate(teacher, generate_tokens, progress=False, **options)
    elif isinstance(data, Tensor):
        rows = text.pack([data], window) if data.dim() == 1 else data
        data = Corpus(rows.cpu(), [text.Source("text", "ids", rows.numel())])
    if data.rows.is_inference():
        data = Corpus(data.rows.clone(), data.sources)
    _check_ids(model, "data", data.rows)
    return data


def open_teacher(
    teacher: nn.Module | str | Path | None,
    model: nn.Module,
    corpus: Corpus,
    recipe: Recipe,
    device: torch.device,
    *,
    offload: bool,
) -> Teacher | None:
    """The teacher of a run; None without one."""
    alone = teacher is not None or (recipe.alpha == 1 and not recipe.block)
    remedy = "Pass alpha=1 (and block=0) for cross-entropy alone."
    check(alone, OP, "a teacher", None, remedy)
    if teacher is None:
        return None
    if not isinstance(teacher, nn.Module):
        return CachedTeacher(teacher, corpus, device)
    remedy = "Pass copy.deepcopy(model) from before the pruning."
    check(teacher is not model, OP, "a teacher of its own", "the model itself", remedy)
    ours, theirs = (_entries(m, "get_output_embeddings") for m in (model, teacher))
    same = ours is None or theirs is None or ours == theirs
    remedy = "The teacher is the dense model of the same family and tokenizer."
    check(same, OP, f"teacher: a vocabulary of {ours}", theirs, remedy)
    if recipe.block:
        check_basis(OP, model, teacher)
    live = LiveTeacher(
        teacher,
        device,
        offload=offload,
        autocast=recipe.autocast(device),
        compile=recipe.compile and not offload,
        blocks=recipe.block > 0,
    )
    if not live.split.plain:  # else compared with its logits already
        ids = corpus.rows[:1].to(next(teacher.parameters()).device, torch.int64)
        kwargs = {"use_cache": False} if hasattr(teacher, "config") else {}
        with torch.no_grad():
            check_model(OP, teacher, ids, kwargs, causal=False)
    return live


def kind_of(teacher: Teacher | None) -> str:
    """DistillReport.teacher."""
    if isinstance(teacher, LiveTeacher):
        return "offloaded" if teacher.offload else "live"
    return "none" if teacher is None else "cache"


def open_evaluations(
    evaluate: Mapping[str, Tensor | Evaluation],
    model: nn.Module,
    corpus: Corpus,
    eval_window: int,
    device: torch.device,
) -> tuple[dict[str, Evaluation], dict[str, dict[str, int]]]:
    """(name -> function of the model, name -> DistillReport.overlap of a text)."""
    evaluations: dict[str, Evaluation] = {}
    overlap: dict[str, dict[str, int]] = {}
    for name, what in evaluate.items():
        check(name not in ("step", "seconds"), OP, "another name of a test", name)
        good = isinstance(what, Tensor) or callable(what)
        expected = f"evaluate[{name!r}]: a tensor of ids or a function of the model"
        check(good, OP, expected, shown(what), "Tokenize the text.", TypeError)
        if isinstance(what, Tensor):
            _check_ids(model, f"evaluate[{name!r}]", what)
            ids = what.reshape(-1)
            overlap[name] = asdict(text.overlap(corpus.rows, ids))

            def measure(model: nn.Module, ids: Tensor = ids) -> float:
                window = min(eval_window, ids.numel())
                return perplexity(model, ids, window, eval_batch(model, window, device))

            evaluations[name] = measure
        else:
            evaluations[name] = what
    return evaluations, overlap


def eval_batch(model: nn.Module, window: int, device: torch.device) -> int:
    """Windows per forward of an evaluation: logits of at most 2^30 entries on a GPU."""
    if device.type != "cuda":
        return 1
    size = _entries(model, "get_input_embeddings") or 1 << 18
    return int(max(1, min(8, (1 << 30) // (window * size))))


def _check_ids(model: nn.Module, name: str, ids: Tensor) -> None:
    """ValueError for ids that the model's embedding does not have."""
    count = _entries(model, "get_input_embeddings")
    if count is None or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    expected, remedy = f"{name}: ids from 0 to {count - 1}", "Use the model's own tokenizer."
    check(0 <= low and high < count, OP, expected, f"{low} to {high}", remedy)


def _entries(model: nn.Module, getter: str) -> int | None:
    """Rows of an embedding of Transformers' models; None where the model does not say."""
    embedding: Any = getattr(model, getter, lambda: None)()
    shape = getattr(getattr(embedding, "weight", None), "shape", None)
    return None if shape is None else int(shape[0])
