"""The command line: sparsekern prune | eval | verify | export | bench | tune | finetune |
sensitivity | doctor | demo.

Every command is a few lines around the public Python API. An error is one line on stderr and exit
code 2 (--debug shows the traceback); `verify` exits with 1 when a folder breaks a rule; `prune`
exits with 3 when the model it saved is less than half 2:4, unless --allow-partial; a command whose
output is closed (head) with 141; everything else exits with 0.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsekern.cli.common import (
    check_files,
    check_flags,
    device_name,
    device_of,
    dtype_of,
    needed,
    new_folder,
)
from sparsekern.cli.parser import make_parser
from sparsekern.cli.prune import PARTIAL as PARTIAL
from sparsekern.cli.prune import run_prune
from sparsekern.cli.spelling import as_flags, warnings_in_flags
from sparsekern.errors import check
from sparsekern.integrations.loading import (
    folder_bytes,
    load_model,
)
from sparsekern.oneshot.ranks import RankError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        with warnings_in_flags(args):
            code: int | None = args.run(args)
        print(end="", flush=True)
        return code or 0
    except KeyboardInterrupt:
        print("sparsekern: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for what is left to be flushed
        return 141
    except Exception as error:
        if args.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        kinds = (ValueError, OSError, ImportError, NotImplementedError, RankError)
        known = isinstance(error, kinds)
        known |= isinstance(error, TypeError) and text.startswith("sparsekern.")
        text = as_flags(text, args) if known else text
        rank = os.environ.get("RANK", "0")
        if rank != "0" and isinstance(error, RankError):
            return 2  # rank 0 says it
        who = "error" if rank == "0" else f"error (rank {rank})"
        print(
            f"{who}: {text}"
            if known
            else f"{who}: {type(error).__name__}: {text} (--debug shows where)",
            file=sys.stderr,
        )
        return 2


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What was typed, as the parser has it; and as it is, as `words`. A ~ that the shell has left,
    as in --out=~/pruned, is the home folder."""
    home = os.path.expanduser("~")
    words = [re.sub(r"(^|[=,])~(?=/|$)", lambda m: m[1] + home, word) for word in words]
    parser = build_parser()
    for word in words:
        if word.startswith("--") and word.endswith("=--"):  # argparse makes a list of it
            parser.error(f"argument {word[:-3]}: expected a value, got '--'")
    return parser.parse_args(words, argparse.Namespace(words=words))


def build_parser() -> argparse.ArgumentParser:
    """The argument parser; parse_args(...).run is the function of the command."""
    return make_parser(
        {
            "prune": run_prune,
            "eval": run_eval,
            "verify": run_verify,
            "export": run_export,
            "bench": run_bench,
            "tune": run_tune,
            "doctor": run_doctor,
            "demo": run_demo,
        }
    )


# ------------------------------------------------------------------------------------------------
# commands


def run_eval(args: argparse.Namespace) -> None:
    """Perplexity, with everything that is needed to compare it."""
    import sparsekern as sk
    from sparsekern.eval import mix, texts

    device = device_of(args.device)
    model, tokenizer = load_model(args.model, device, dtype_of(args.dtype))
    rows = texts.read_rows(args.text, "test")
    as_rows = args.join == "rows" or (args.join is None and args.text != "builtin")
    text = texts.join_rows(rows) if as_rows else "".join(rows)
    ids = texts.tokenize(needed(tokenizer, args.model), text)
    start = time.perf_counter()
    value = sk.perplexity(
        model, ids, window=args.window, batch_size=args.batch_size, progress=not args.quiet
    )
    joined = "rows joined with a blank line" if as_rows else "as it is"
    warned = mix.warning(_calibration_of(args.model), ids, args.text)
    if warned:
        print(f"warning: {warned}", file=sys.stderr)
    for name, content in (
        ("model", args.model),
        ("text", f"{args.text}, {joined}"),
        ("tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer)} entries"),
        ("tokens", ids.numel()),
        ("window", f"{args.window}, {ids.numel() // args.window} windows without overlap"),
        ("dtype", str(next(model.parameters()).dtype).removeprefix("torch.")),
        ("device", device),
        ("seconds", f"{time.perf_counter() - start:.1f}"),
        ("perplexity", f"{value:.4f}"),
    ):
        print(f"{name:<11}{content}")


def run_verify(args: argparse.Namespace) -> int:
    """Exit code 0 when every rule holds, 1 otherwise."""
    from sparsekern.checkpoint import verify_checkpoint
    from sparsekern.checkpoint.arguments import folder_path
    from sparsekern.cli.pattern import other_pattern, verify_pattern

    check(
        folder_path("sparsekern verify", "DIR", args.directory).is_dir(),
        "sparsekern verify",
        "a model folder",
        f"no folder at {args.directory}",
        exc=FileNotFoundError,
    )
    if (pruned := other_pattern(args.directory)) is not None:
        return verify_pattern(args.directory, pruned)
    report = verify_checkpoint(args.directory)
    print(report.table())
    return 0 if report.ok else 1


def run_export(args: argparse.Namespace) -> None:
    from sparsekern.checkpoint import export_dense

    out = new_folder(args.out)
    export_dense(args.directory, out, keep_quantized=args.keep_quantized)
    print(f"saved    {out} ({folder_bytes(out)} bytes of weights, dense)")


def run_bench(args: argparse.Namespace) -> int | None:
    """One row per shape and number of tokens; for a model also the sum over its layers."""
    from sparsekern.profiling.layer_bench import bench_shape, table

    device = device_of(args.device)
    dtype = dtype_of(args.dtype) or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    if args.model == "kernels":
        return _bench_kernels(args, device, dtype)
    kernels = ("the word 'kernels'", lambda given: given["model"] == "kernels")
    flags = ("shapes", "kernel", "out", "plot")
    check_flags("sparsekern bench", dict.fromkeys(flags, kernels), args)
    counts = None if args.shape else _counted_shapes(args.model)
    shapes: list[tuple[int, int]] = list(dict.fromkeys(args.shape or counts or ()))
    print(f"{device_name(device)}, torch {torch.__version__}")
    rows = [
        bench_shape(*shape, tokens, dtype=dtype, device=device)
        for shape in shapes
        for tokens in args.tokens
    ]
    print(table(rows, counts))
    return None


def _bench_kernels(args: argparse.Namespace, device: str, dtype: torch.dtype) -> int:
    """Exit code 1 when a kernel failed its check."""
    from sparsekern.profiling import kernel_bench, kernel_plot

    check_files(kernel_bench.OP, args, "out", "plot")
    if args.plot:
        kernel_plot.usable(args.plot)
    kernels = [kernel_bench.load_kernel(path) for path in args.kernel]
    shapes = list(dict.fromkeys(args.shapes or kernel_bench.MODELS["llama3-8b"]))
    rows, limits = kernel_bench.bench_kernels(
        shapes,
        args.tokens,
        dtype=dtype,
        device=device,
        kernels=kernels,
        out=args.out,
        say=functools.partial(print, flush=True),
    )
    if args.plot:
        print(
            "plots    " + ", ".join(str(path) for path in kernel_plot.plot(rows, limits, args.plot))
        )
    return 1 if any(row.status.startswith("FAILED") for row in rows) else 0


def run_tune(args: argparse.Namespace) -> None:
    """One line per cell; the table file is written after each shape."""
    from sparsekern.backends.cuda import tuned_tables
    from sparsekern.profiling import tune as tuner
    from sparsekern.profiling import tune_table

    measured = ("measurements, no --merge,", lambda given: not given["merge"])
    flags = ("tokens", "dtype", "budget", "cell_seconds", "shard", "log", "device")
    check_flags("sparsekern tune", dict.fromkeys(flags, measured), args)
    check_files("sparsekern tune", args, "log")
    check_files("sparsekern tune", args, "out", makes=True)
    for name in ("budget", "cell_seconds"):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        good = value is None or value > 0
        check(good, "sparsekern tune", f"{flag} > 0", value, f"Leave {flag} out for no limit.")
    if args.merge:
        tune_table.merge(args.merge, args.out or tuned_tables.user_path())
        return
    device = device_of(args.device)
    shapes = args.shapes or (list(_counted_shapes(args.model)) if args.model else tuner.SHAPES)
    budget = float("inf") if args.budget is None else args.budget
    say = functools.partial(print, flush=True)
    tokens = args.tokens or tuner.TOKENS
    tuner.tune(
        shapes,
        tokens,
        args.dtype,
        device,
        args.out,
        budget,
        say,
        log=args.log,
        shard=args.shard,
        most_s=args.cell_seconds,
    )


def run_doctor(args: argparse.Namespace) -> int:
    from sparsekern.cli import doctor

    return doctor.main(json_output=args.json)


def run_demo(args: argparse.Namespace) -> None:
    from sparsekern.cli import demo

    fetches = ("the default model, no --gguf,", lambda given: given["gguf"] is None)
    check_flags("sparsekern demo", {"cache": fetches}, args)
    demo.run(gguf=args.gguf, cache=args.cache, out=args.out, device=device_of(args.device))


# ------------------------------------------------------------------------------------------------
# shared parts


def _calibration_of(path: str) -> dict[str, Any] | None:
    """What the report beside a pruned model says of its calibration; None without one."""
    from sparsekern.oneshot.report import PruneReport

    try:
        text = (Path(path) / "prune_report.json").read_text(encoding="utf-8")
        return PruneReport.from_json(text).calibration
    except (OSError, ValueError, TypeError):
        return None


def _counted_shapes(path: str) -> dict[tuple[int, int], int]:
    """{(out_features, in_features): layers} of a model's layers; ValueError when 2:4 fits none."""
    from sparsekern.cli.shapes import count_shapes

    counts = count_shapes(load_model(path, "cpu")[0])
    check(counts, "sparsekern", "a model with linear layers that 2:4 fits", f"none in {path}")
    return counts
