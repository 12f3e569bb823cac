"""sparsekern finetune: prune if needed, distil under the masks, compress, save."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from sparsekern.cli.common import (
    beside_the_model,
    check_apart,
    check_flags,
    copy_beside,
    files_beside,
    new_folder,
    reads_data,
)
from sparsekern.errors import check
from sparsekern.oneshot.discovery import positions
from sparsekern.oneshot.presets import PRESETS, find_preset
from sparsekern.utils.arguments import Given, Uses
from sparsekern.utils.files import write_atomic
from sparsekern.utils.staging import check_writable

OP = "sparsekern finetune"
SOURCE = "FILE|hf:NAME|builtin"


def _calibrates(given: Given) -> bool:
    return not given["sparse"] and reads_data(given["method"], find_preset(OP, given["preset"]))


def _samples(given: Given) -> bool:
    """Whether the teacher writes text."""
    tokens = given["teacher_tokens"]
    return not given["text"] if tokens is None else tokens > 0


def _distils(given: Given) -> bool:
    """Whether the loss reads the teacher."""
    return bool(given["alpha"] < 1 or given["block"] > 0)


_PRUNES = ("a model to prune, no --sparse,", lambda given: not given["sparse"])
_CALIBRATES = ("a method that reads calibration, no --sparse,", _calibrates)
_EVALUATES = ("--eval", lambda given: given["eval"])
USES: Uses = {
    **dict.fromkeys(("method", "preset", "untie"), _PRUNES),
    **dict.fromkeys(("calibration", "samples", "calibration_window"), _CALIBRATES),
    **dict.fromkeys(("eval_window", "eval_every"), _EVALUATES),
    "teacher_seconds": ("text by the teacher (--teacher-tokens, or no --text)", _samples),
    "freeze_at": ("another --schedule than frozen", lambda given: given["schedule"] != "frozen"),
    "offload_teacher": ("--alpha < 1 or --block", _distils),
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command `finetune` to a parser's subparsers; its `run` is this module's."""
    text = "Train a 2:4 model towards its dense teacher, masks kept, and save it compressed."
    sub: argparse.ArgumentParser = subparsers.add_parser("finetune", help=text, description=text)
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub.set_defaults(run=run, parser=sub)
    model_help = "folder with config.json and safetensors files, or a .gguf file"
    sub.add_argument("model", metavar="MODEL", help=f"the dense model: {model_help}; the teacher")
    sub.add_argument(
        "--sparse",
        metavar="DIR",
        help="the pruned model to start from (default: prune MODEL with --preset or --method)",
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for the compressed model")
    sub.add_argument(
        "--work",
        metavar="DIR",
        help="the pruned start, checkpoints, metrics.jsonl, plot.png; the same command goes on "
        "from there "
        "(default: OUT with -run added)",
    )
    sub.add_argument(
        "--method",
        choices=("sparsegpt", "admm", "wanda", "magnitude"),
        help="to prune with (default: the preset's, sparsegpt without one)",
    )
    sub.add_argument("--preset", choices=tuple(PRESETS), help="of prune (default: none)")
    sub.add_argument("--untie", action="store_true", help="as of prune")
    sub.add_argument("--calibration", default="builtin", metavar=SOURCE, help="text to prune with")
    sub.add_argument(
        "--samples", type=int, help="calibration windows (default 128, or the preset's)"
    )
    fewer = "or the model's positions where those are fewer"
    sub.add_argument(
        "--calibration-window", type=int, help=f"tokens per window (default 2048, {fewer})"
    )
    sub.add_argument(
        "--text",
        action="append",
        default=[],
        metavar=SOURCE,
        help="text to train on; may be repeated",
    )
    sub.add_argument(
        "--teacher-tokens",
        type=int,
        metavar="N",
        help="tokens of text that the teacher samples (default: 4000000 without --text, else 0)",
    )
    sub.add_argument(
        "--teacher-seconds", type=float, metavar="N", help="sample for at most N seconds"
    )
    sub.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar=SOURCE,
        help="text whose perplexity is measured, rows joined with a blank line; may be repeated",
    )
    sub.add_argument("--eval-window", type=int, help=f"tokens (default 2048, {fewer})")
    sub.add_argument("--window", type=int, help=f"tokens per row (default 1024, {fewer})")
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps (default: one pass)")
    length.add_argument("--minutes", type=float, help="train for a time instead")
    length.add_argument("--passes", type=float, help="passes over the rows")
    sub.add_argument("--batch", type=int, default=16, help="rows per step (default 16)")
    sub.add_argument("--micro-batch", type=int, help="rows per forward (default: all)")
    sub.add_argument("--lr", type=float, default=6e-4, help="highest rate (default 6e-4)")
    sub.add_argument("--warmup", type=float, default=0.03, help="share of the run (default 0.03)")
    sub.add_argument(
        "--alpha", type=float, default=0.0, help="share of the cross-entropy (default 0)"
    )
    sub.add_argument("--temperature", type=float, default=1.0, help="of the KL (default 1)")
    sub.add_argument("--block", type=float, default=0.0, help="weight of block outputs (default 0)")
    sub.add_argument(
        "--schedule",
        choices=("frozen", "magnitude", "sr-ste", "rigl"),
        default="frozen",
        help="how masks move (default: they do not)",
    )
    sub.add_argument("--freeze-at", type=int, help="last step that may move a mask")
    sub.add_argument("--precision", choices=("float32", "bfloat16", "float16"))
    sub.add_argument("--compile", action="store_true", help="torch.compile the student")
    sub.add_argument("--offload-teacher", action="store_true", help="keep its weights on the host")
    sub.add_argument("--eval-every", type=int, default=0, metavar="STEPS")
    sub.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    sub.add_argument(
        "--limit-seconds",
        type=float,
        metavar="N",
        help="end training after N seconds with a checkpoint; the same command goes on",
    )
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    sub.add_argument("--quiet", action="store_true", help="no progress bars")
    return sub


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    import sparsekern as sk
    from sparsekern.finetune.recipe import Recipe
    from sparsekern.finetune.trainer import distill
    from sparsekern.integrations.loading import cast_weights, folder_bytes, load_model

    check_flags(OP, USES, args)
    out = new_folder(args.out)
    recipe = Recipe(
        steps=args.steps,
        minutes=args.minutes,
        passes=1.0 if args.passes is None else args.passes,
        batch=args.batch,
        micro_batch=args.micro_batch,
        lr=args.lr,
        warmup=args.warmup,
        alpha=args.alpha,
        temperature=args.temperature,
        block=args.block,
        precision=args.precision,
        compile=args.compile,
        seed=args.seed,
        eval_every=args.eval_every,
        save_every=args.save_every,
    )
    work = Path(args.work) if args.work else out.with_name(out.name + "-run")
    check_apart(OP, "--work", args.work, out)
    check(work.is_dir() or not work.exists(), OP, "--work to be a folder, or a new one", work)
    check_writable(work, "sparsekern finetune --work")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    teacher, tokenizer = load_model(args.model, "cpu")
    sparse = any(isinstance(module, sk.SparseLinear) for module in teacher.modules())
    remedy = "Give the model that it was made of, and this one as --sparse."
    check(not sparse, OP, "MODEL to be dense", f"2:4 layers in {args.model}", remedy)
    for name, usual in (("calibration_window", 2048), ("eval_window", 2048), ("window", 1024)):
        if getattr(args, name) is None:
            setattr(args, name, min(usual, positions(teacher) or usual))
    beside = files_beside(args.model)
    check(tokenizer is not None, OP, "a tokenizer with the model", "none", "Add tokenizer.json.")
    given = _given(args, tokenizer)  # what is wrong with a text is said before the pruning
    names = [Path(name).name for name in args.eval]
    names = names if len(set(names)) == len(names) else args.eval
    evaluate = {k: _ids(tokenizer, name, "test") for k, name in zip(names, args.eval)}
    student, report = _student(args, teacher, tokenizer, device, work)
    corpus = _corpus(args, teacher, given, device)
    result = distill(
        student,
        teacher if _distils(vars(args)) else None,
        corpus,
        schedule=_schedule(args),
        evaluate=evaluate,
        **({"eval_window": args.eval_window} if args.eval else {}),
        folder=work,
        limit_seconds=args.limit_seconds,
        device=device,
        offload_teacher=args.offload_teacher,
        progress=not args.quiet,
        recipe=recipe,
    )
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    if parallel and torch.distributed.get_rank() > 0:
        return 0
    if result.stopped:
        print(result.summary())
        print(f"stopped  at step {result.steps}; the same command goes on from {work}")
        return 0
    assert result.masked is not None
    dense = result.masked.compress()
    sk.save_pretrained(cast_weights(student.cpu(), torch.bfloat16), out, tokenizer=tokenizer)
    with beside_the_model(OP, out):
        copy_beside(beside, out)
        write_atomic(out / "finetune_report.json", result.to_json().encode())
        if report is not None:
            print(report.summary())
            report.save(out / "prune_report.json")
    print(result.summary())
    for name, found in result.overlap.items():
        print(
            f"overlap  {name}: {found['found']} of {found['test']} {found['n']}-grams in training"
        )
    for name, reason in dense.items():
        print(f"dense    {name}: {reason}")
    print(f"saved    {out} ({folder_bytes(out)} bytes of weights); metrics and plot in {work}")
    return 0


def _student(
    args: argparse.Namespace, teacher: Any, tokenizer: Any, device: str, work: Path
) -> Any:
    """(the model with dense 2:4 weights, PruneReport or None); pruned once for a work folder."""
    import copy

    import sparsekern as sk
    from sparsekern.eval import mix, texts
    from sparsekern.finetune import start
    from sparsekern.integrations.loading import load_model
    from sparsekern.oneshot import fingerprint

    first = int(os.environ.get("RANK", "0")) == 0
    if args.sparse:
        student = densify(load_model(args.sparse, "cpu")[0])
        asked: dict[str, Any] = {"sparse": fingerprint.of_model(student)}
        start.once(work, teacher, asked, lambda: (student, None), weights=False, write=first)
        return student, None
    calibration, preset = None, find_preset(OP, args.preset)
    if _calibrates(vars(args)):
        samples = preset.samples if args.samples is None else args.samples
        window, seed = args.calibration_window, args.seed
        if mix.is_mix(args.calibration):
            made = mix.calibration_mix(
                args.calibration, tokenizer, tokens=samples * window, window=window, seed=seed
            )
            calibration = torch.stack(made.rows)
        else:
            ids = _ids(tokenizer, args.calibration, "train")
            draw: Any = texts.side_by_side if preset.side_by_side else texts.calibration_windows
            calibration = draw(ids, samples, window, seed)
    asked = {
        "model": fingerprint.of_model(teacher),
        "preset": args.preset,
        "method": args.method or preset.method,
        "options": repr(dataclasses.replace(preset, help="")),
        "untie": args.untie,
        "calibration": None if calibration is None else fingerprint.of_tensor(calibration),
    }

    def make() -> Any:
        student = copy.deepcopy(teacher)
        report = sk.prune_model(
            student,
            args.method,
            calibration,
            compress=False,
            device=device,
            progress=not args.quiet,
            preset=args.preset,
            untie=args.untie,
            ranks=False if preset.rounds else "auto",  # what trains, each rank does by itself
        )
        return student, report

    student, report, read = start.once(work, teacher, asked, make, write=first)
    if read and first:
        print(f"start    {work / start.FILE}, pruned by an earlier call")
    return student, report


def densify(model: Any) -> Any:
    """Replace every SparseLinear by an nn.Linear of the same weight, zeros included, in place."""
    from sparsekern.nn.replace import replace_module
    from sparsekern.nn.sparse_linear import SparseLinear

    for module in list(model.modules()):
        if isinstance(module, SparseLinear):
            out_features, in_features = module.weight.shape
            linear = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
            linear.weight = torch.nn.Parameter(module.weight.to_dense())
            if module.bias is not None:
                linear.bias = module.bias
            replace_module(model, module, linear)
    return model


def _given(args: argparse.Namespace, tokenizer: Any) -> Any:
    """Rows of the texts that were given, or None."""
    from sparsekern.finetune import data

    if not args.text:
        return None
    documents = [_ids(tokenizer, name, "train") for name in args.text]
    rows = data.pack(documents, args.window, tokenizer.eos_token_id)
    counts = zip(args.text, documents)
    sources = [data.Source("text", Path(n).name, ids.numel()) for n, ids in counts]
    return data.Corpus(rows, sources)


def _corpus(args: argparse.Namespace, teacher: Any, corpus: Any, device: str) -> Any:
    """The rows that were given, and those that the teacher samples."""
    from sparsekern.finetune import data

    made = args.teacher_tokens
    if made is None:
        made = 0 if args.text else 4_000_000
    if made:
        autocast = torch.bfloat16 if device.startswith("cuda") else None
        teacher.to(device)
        sampled = data.generate(
            teacher,
            made,
            args.seed,
            window=args.window,
            seconds=args.teacher_seconds,
            autocast=autocast,
            progress=not args.quiet,
        )
        corpus = sampled if corpus is None else corpus + sampled
    check(corpus is not None, OP, "--text or --teacher-tokens", "neither")
    return corpus


def _schedule(args: argparse.Namespace) -> Any:
    from sparsekern.finetune import schedule

    if args.schedule == "frozen":
        return None
    kinds = {"magnitude": "Magnitude", "sr-ste": "SRSTE", "rigl": "RigL"}
    options = {} if args.freeze_at is None else {"freeze_at": args.freeze_at}
    return schedule.KINDS[kinds[args.schedule]](**options)


def _ids(tokenizer: Any, name: str, split: str) -> torch.Tensor:
    from sparsekern.eval import texts

    rows = texts.read_rows(name, split)
    as_rows = split == "test" and name != "builtin"
    ids: torch.Tensor = texts.tokenize(
        tokenizer, texts.join_rows(rows) if as_rows else "".join(rows)
    )
    return ids
