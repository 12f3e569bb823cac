"""sparsekern sensitivity: what pruning each part of a model costs, and a skip list for prune."""

from __future__ import annotations

import argparse
from typing import Any

from sparsekern.cli.common import check_files, check_flags, needed, skip_rules
from sparsekern.errors import check
from sparsekern.oneshot.discovery import positions

OP = "sparsekern sensitivity"
SOURCE = "FILE|hf:NAME|builtin"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to a parser's subparsers; its `run` is this module's."""
    text = "Rank layers, types of layer or blocks by what pruning them costs."
    sub: argparse.ArgumentParser = subparsers.add_parser("sensitivity", help=text, description=text)
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub.set_defaults(run=run, parser=sub)
    help = "the dense model: folder with config.json and safetensors files, or a .gguf file"
    sub.add_argument("model", metavar="MODEL", help=help)
    sub.add_argument("--calibration", default="builtin", metavar=SOURCE, help="text to prune with")
    sub.add_argument("--samples", type=int, default=32, help="calibration windows (default 32)")
    sub.add_argument("--text", default="builtin", metavar=SOURCE, help="text to evaluate")
    sub.add_argument(
        "--window",
        type=int,
        help="tokens per window (default 1024, or the model's positions where those are fewer)",
    )
    sub.add_argument("--windows", type=int, default=8, help="windows of the text (default 8)")
    sub.add_argument("--by", choices=("layer", "type", "block"), default="layer")
    sub.add_argument(
        "--mode",
        choices=("leave", "add"),
        default="leave",
        help="leave one part dense in the pruned model (default), or add one to the dense model",
    )
    sub.add_argument("--method", default="sparsegpt")
    sub.add_argument("--skip", action="append", metavar="RULE", help="as of prune")
    sub.add_argument("--seed", type=int, default=0, help="of the calibration windows (default 0)")
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    sub.add_argument("--out", metavar="FILE.jsonl", help="keep rows here, and go on from it")
    sub.add_argument("--plot", metavar="FILE", help="draw the effects (needs matplotlib)")
    sub.add_argument(
        "--rows", type=int, default=30, metavar="N", help="of the table (default 30; 0: all)"
    )
    sub.add_argument("--skip-out", metavar="FILE.json", help="write a skip list: prune --skip FILE")
    budget = sub.add_mutually_exclusive_group()
    budget.add_argument("--share", type=float, help="of the weights that the list may leave dense")
    budget.add_argument("--perplexity", type=float, help="that the list has to reach")
    budget.add_argument("--milliseconds", type=float, help="that the list may cost per step")
    sub.add_argument(
        "--tokens", type=int, default=1, help="per step, for --milliseconds (default 1)"
    )
    sub.add_argument("--quiet", action="store_true", help="no progress bar")
    return sub


def run(args: argparse.Namespace) -> None:
    """Sweep, print the ranked table, write what was asked for."""
    import torch

    import sparsekern as sk
    from sparsekern.eval import mix, texts
    from sparsekern.integrations.loading import load_model
    from sparsekern.profiling import kernel_plot

    timed = ("--milliseconds", lambda given: given["milliseconds"] is not None)
    check_flags(OP, {"tokens": timed}, args)
    names = ("share", "perplexity", "milliseconds")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    both = "--skip-out with a budget (--share, --perplexity or --milliseconds)"
    check(bool(given) == bool(args.skip_out), OP, both, "one without the other")
    check(args.rows >= 0, OP, "--rows >= 0", args.rows)
    check_files(OP, args, "skip_out", "plot", "out")
    if args.plot:
        kernel_plot.usable(args.plot, OP)
    for name, value in given.items():
        check(0 < value < float("inf"), OP, f"a positive --{name}", value)
    check(args.share is None or args.share <= 1, OP, "--share of at most 1", args.share)
    model, tokenizer = load_model(args.model, "cpu", None)
    tokenizer = needed(tokenizer, args.model)
    if args.window is None:
        args.window = min(1024, positions(model) or 1024)
    if mix.is_mix(args.calibration):
        tokens = args.samples * args.window
        made = mix.calibration_mix(
            args.calibration, tokenizer, tokens=tokens, window=args.window, seed=args.seed
        )
        data: Any = made.rows
    else:
        source = "".join(texts.read_rows(args.calibration, "train"))
        ids = texts.tokenize(tokenizer, source)
        data = texts.calibration_windows(ids, args.samples, args.window, args.seed)
    rows = texts.read_rows(args.text, "test")
    joined = "".join(rows) if args.text == "builtin" else texts.join_rows(rows)
    warned = mix.warning(
        {"unigrams": mix.sketch(data)}, texts.tokenize(tokenizer, joined), args.text
    )
    if warned:
        print(f"warning: {warned}")
    report = sk.sensitivity(
        model,
        data,
        texts.tokenize(tokenizer, joined),
        by=args.by,
        mode=args.mode,
        method=args.method,
        skip=skip_rules(args.skip),
        window=args.window,
        windows=args.windows,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        time_tokens=(args.tokens,) if args.milliseconds else None,
        out=args.out,
        progress=not args.quiet,
    )
    print(report.table(args.rows or None))
    if args.plot:
        report.plot(args.plot)
        print(f"plot     {args.plot}")
    if args.skip_out:
        chosen = report.save_skip(args.skip_out, **given)
        print(f"skip     {args.skip_out}: {len(chosen)} layers stay dense")
