"""The command line: sparsekern prune | eval | verify | export | bench | tune | finetune |
sensitivity | doctor | demo.

Every command is a few lines around the public Python API. An error is one line on stderr and exit
code 2 (--debug shows the traceback); `verify` exits with 1 when a folder breaks a rule; `prune`
exits with 3 when the model it saved is less than half 2:4, unless --allow-partial; everything else
exits with 0.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekern.cli.parser import CPU_WINDOWS, GPU_WINDOWS, make_parser
from sparsekern.errors import check, message
from sparsekern.formats import dtypes
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.integrations.loading import (
    cast_weights,
    cpu_has_bfloat16,
    folder_bytes,
    load_model,
)
from sparsekern.oneshot.presets import find_preset
from sparsekern.oneshot.report import PruneReport

if TYPE_CHECKING:
    from sparsekern.eval.mix import Mix

PARTIAL = 3  # exit code of a prune that left more than half of the weights dense


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    for word in words:
        if word.startswith("--") and word.endswith("=--"):  # argparse makes a list of it
            parser.error(f"argument {word[:-3]}: expected a value, got '--'")
    args = parser.parse_args(words)
    try:
        code: int | None = args.run(args)
        return code or 0
    except KeyboardInterrupt:
        print("sparsekern: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        expected = isinstance(error, (ValueError, OSError, ImportError, NotImplementedError))
        expected |= isinstance(error, TypeError) and text.startswith("sparsekern.")
        print(
            f"error: {text}"
            if expected
            else f"error: {type(error).__name__}: {text} (--debug shows where)",
            file=sys.stderr,
        )
        return 2


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


def run_prune(args: argparse.Namespace) -> int:
    """Load, prune, save; prints the report's table and where everything went. Returns PARTIAL
    where that is less than was asked for."""
    import sparsekern as sk

    out = _new_folder(args.out)
    for name, least in (("samples", 1), ("window", 2)):
        value = getattr(args, name)
        fits = value is None or value >= least
        check(fits, "sparsekern prune", f"--{name} >= {least}", value)
    taken = sorted(set(dict(args.option or ())) & set(vars(args)))
    remedy = "Write --" + " --".join(name.replace("_", "-") for name in taken)
    check(not taken, "sparsekern prune", "--option with what is no flag", taken, f"{remedy}.")
    device = _device(args.device)
    model, tokenizer = load_model(args.model, "cpu", _dtype(args.dtype))
    calibration = _calibration(args, model, tokenizer, device)
    options = dict(args.option or ())
    stored = _compute_in_float32(model, device) if calibration is not None else None
    report = sk.prune_model(
        model,
        args.method,
        calibration,
        skip=_skip_rules(args.skip),
        targets=args.target,
        device=device,
        batch_size=args.batch_size,
        true_sequential=args.true_sequential,
        damp=args.damp,
        refine=args.refine,
        match_dense=args.match_dense,
        quantize=args.quantize,
        quantize_method=args.quantize_method,
        quantize_group=args.quantize_group,
        keep_dense=args.keep_dense,
        keep_dense_tokens=tuple(args.keep_dense_tokens),
        resume=args.resume,
        progress=not args.quiet,
        preset=args.preset,
        untie=args.untie,
        **options,
    )
    if stored is not None:
        _as_stored(report, cast_weights(model, stored), stored)
    sk.save_pretrained(model, out, tokenizer=tokenizer)
    report.save(out / "prune_report.json")
    print(report.summary() if args.quiet else report.table())
    print(f"saved    {out} ({folder_bytes(out)} bytes of weights), prune_report.json beside them")
    if not report.partial:
        return 0
    print(
        message(
            "sparsekern prune",
            "at least half of the weights to be 2:4",
            f"{report.share:.1%} of all",
            "prune_report.json has the reasons; --allow-partial makes this exit code 0.",
        ),
        file=sys.stderr,
    )
    return 0 if args.allow_partial else PARTIAL


def run_eval(args: argparse.Namespace) -> None:
    """Perplexity, with everything that is needed to compare it."""
    import sparsekern as sk
    from sparsekern.eval import mix, texts

    device = _device(args.device)
    model, tokenizer = load_model(args.model, device, _dtype(args.dtype))
    rows = texts.read_rows(args.text, "test")
    as_rows = args.join == "rows" or (args.join is None and args.text != "builtin")
    text = texts.join_rows(rows) if as_rows else "".join(rows)
    ids = texts.tokenize(_needed(tokenizer, args.model), text)
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

    check(
        Path(args.directory).is_dir(),
        "sparsekern verify",
        "a model folder",
        f"no folder at {args.directory}",
        exc=FileNotFoundError,
    )
    report = verify_checkpoint(args.directory)
    print(report.table())
    return 0 if report.ok else 1


def run_export(args: argparse.Namespace) -> None:
    from sparsekern.checkpoint import export_dense

    out = _new_folder(args.out)
    export_dense(args.directory, out, keep_quantized=args.keep_quantized)
    print(f"saved    {out} ({folder_bytes(out)} bytes of weights, dense)")


def run_bench(args: argparse.Namespace) -> int | None:
    """One row per shape and number of tokens; for a model also the sum over its layers."""
    from sparsekern.profiling.layer_bench import bench_shape, table

    device = _device(args.device)
    dtype = _dtype(args.dtype) or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    if args.model == "kernels":
        return _bench_kernels(args, device, dtype)
    for name in ("shapes", "kernel", "out", "plot"):
        given = bool(getattr(args, name))
        check(not given, "sparsekern bench", f"'kernels' before --{name}", "no such word")
    counts = None if args.shape else _counted_shapes(args.model)
    shapes: list[tuple[int, int]] = list(dict.fromkeys(args.shape or counts or ()))
    print(f"{_device_name(device)}, torch {torch.__version__}")
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
    from sparsekern.profiling import tune as tuner

    device = _device(args.device)
    shapes = args.shapes or (list(_counted_shapes(args.model)) if args.model else tuner.SHAPES)
    budget = float("inf") if args.budget is None else args.budget
    say = functools.partial(print, flush=True)
    tokens = args.tokens or tuner.TOKENS
    tuner.tune(shapes, tokens, args.dtype, device, args.out, budget, say, log=args.log)


def run_doctor(args: argparse.Namespace) -> int:
    from sparsekern.cli import doctor

    return doctor.main(json_output=args.json)


def run_demo(args: argparse.Namespace) -> None:
    from sparsekern.cli import demo

    demo.run(gguf=args.gguf, cache=args.cache, out=args.out, device=_device(args.device))


# ------------------------------------------------------------------------------------------------
# shared parts


def _needed(tokenizer: Any, path: str) -> Any:
    check(
        tokenizer is not None,
        "sparsekern",
        "a tokenizer beside the model",
        f"no tokenizer files in {path}",
        "Copy tokenizer.json and tokenizer_config.json of the model there.",
        exc=FileNotFoundError,
    )
    return tokenizer


def _compute_in_float32(model: nn.Module, device: str) -> torch.dtype | None:
    """Cast a 16-bit model to float32 where a CPU is to run it that has no 16-bit matrix unit.
    Returns its dtype, to be cast back to; None where nothing was changed."""
    dtype: torch.dtype = next(model.parameters()).dtype
    kinds = {p.dtype for p in model.parameters()}
    if device != "cpu" or kinds - {dtype} or dtype not in dtypes.PLAIN or dtype.itemsize != 2:
        return None
    if dtype == torch.bfloat16 and cpu_has_bfloat16():
        return None
    print(f"computing in float32, which is faster on this CPU than {dtype}; saved as {dtype}")
    cast_weights(model, torch.float32)
    return dtype


def _as_stored(report: PruneReport, model: nn.Module, dtype: torch.dtype) -> None:
    """Bytes and dtypes of a report for a model that was cast to `dtype` after it was pruned."""
    modules = dict(model.named_modules())
    for row in report.layers:
        if row.dtype != "float32":
            continue
        row.dtype, row.bytes_dense = (
            str(dtype).removeprefix("torch."),
            row.elements * dtype.itemsize,
        )
        w24 = getattr(modules.get(row.name), "weight", None)
        row.bytes_sparse = w24.nbytes if isinstance(w24, Sparse24) else row.bytes_dense


def _calibration(
    args: argparse.Namespace, model: nn.Module, tokenizer: Any, device: str
) -> Mix | None:
    """Windows by the published protocol, or a mix of sources; None where the method looks at
    the weights alone."""
    import sparsekern as sk

    if sk.prune.methods()[args.method].needs == "weights":
        return None
    from sparsekern.eval import mix, texts

    tokenizer = _needed(tokenizer, args.model)
    preset = find_preset("sparsekern prune", args.preset)
    apart = preset.side_by_side
    samples, window = CPU_WINDOWS if device == "cpu" else (preset.samples, GPU_WINDOWS[1])
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 1:
        window = min(window, positions)
    samples = samples if args.samples is None else args.samples
    window = window if args.window is None else args.window
    if mix.is_mix(args.calibration) or args.whole_documents:
        made = mix.calibration_mix(
            args.calibration,
            tokenizer,
            tokens=samples * window,
            window=window,
            seed=args.seed,
            whole_documents=args.whole_documents,
        )
        parts = ", ".join(f"{row['taken']} of {row['name']}" for row in made.sources)
        print(f"calibration: {made.tokens} tokens in {len(made)} rows ({parts}), seed {args.seed}")
        return made
    ids = texts.tokenize(tokenizer, "".join(texts.read_rows(args.calibration, "train")))
    draw: Any = texts.side_by_side if apart else texts.calibration_windows
    windows: Tensor = draw(ids, samples, window, args.seed)
    print(
        f"calibration: {windows.shape[0]} windows of {window} tokens from {args.calibration} "
        f"({ids.numel()} tokens), seed {args.seed}" + ", side by side" * apart
    )
    source = {"name": str(args.calibration), "taken": windows.numel(), "tokens": ids.numel()}
    settings = {"window": window, "seed": args.seed, "side_by_side": apart}
    return mix.Mix(list(windows), [source], settings)


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


def _skip_rules(rules: Sequence[str] | None) -> tuple[str, ...] | str:
    if rules is not None and len(rules) == 1 and rules[0].endswith(".json"):
        return rules[0]
    return ("lm_head",) if rules is None else tuple(rules)


def _new_folder(path: str) -> Path:
    """The folder as a Path, asked before any work is done for it.

    Raises:
        OSError: it cannot be written.   ValueError: something is in it.
    """
    from sparsekern.checkpoint import check_writable

    folder = check_writable(path, "sparsekern --out")
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    check(empty, "sparsekern", "--out to be a new or empty folder", path, "Choose another name.")
    return folder


def _device(name: str | None) -> str:
    """The device as a string; ValueError for one that this process does not have."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    number = index.isascii() and index.isdecimal()
    known = kind in ("cpu", "cuda") and (not index or (kind == "cuda" and number))
    check(known, "sparsekern", "--device cpu, cuda or cuda:N", name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    check(
        kind == "cpu" or int(index or 0) < count,
        "sparsekern",
        "a CUDA device that torch can see",
        f"{name} with {count} of them",
        "Run: sparsekern doctor.",
    )
    return name


def _device_name(device: str) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"CPU, {torch.get_num_threads()} threads"
    )


def _dtype(name: str | None) -> torch.dtype | None:
    """torch's dtype of that name, as the choices of --dtype spell it."""
    dtype: torch.dtype | None = None if name is None else getattr(torch, name)
    return dtype
