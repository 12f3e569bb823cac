"""sparsekern prune: load, prune, save; in one process, in the ranks of torchrun, or block by block
from the files."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekern.checkpoint.arguments import parse_size
from sparsekern.cli.common import (
    beside_the_model,
    check_apart,
    check_flags,
    copy_beside,
    device_of,
    dtype_of,
    files_beside,
    needed,
    new_folder,
    reads_data,
    skip_rules,
)
from sparsekern.cli.parser import CPU_WINDOWS, GPU_WINDOWS
from sparsekern.errors import check, message
from sparsekern.formats import dtypes
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.integrations.loading import (
    cast_weights,
    cpu_has_bfloat16,
    folder_bytes,
    load_model,
    load_tokenizer,
)
from sparsekern.oneshot.discovery import positions
from sparsekern.oneshot.estimate import available_host_bytes, size
from sparsekern.oneshot.presets import find_preset
from sparsekern.oneshot.report import PruneReport
from sparsekern.prune import Pattern
from sparsekern.utils.arguments import Given

if TYPE_CHECKING:
    from sparsekern.checkpoint.stream import Streamed
    from sparsekern.eval.mix import Mix

OP = "sparsekern prune"
PARTIAL = 3  # exit code of a prune that left more than half of the weights dense
GROUP_HOURS = 24  # for what is exchanged; oneshot/ranks.py has its own, shorter time to wait


def _reads_data(given: Given) -> bool:
    """Whether anything that is asked for reads calibration data."""
    flags = given["calibration"], given["refine"], given["permute"]
    asked = any(flags) or given["quantize_method"] == "gptq"
    return asked or reads_data(given["method"], find_preset(OP, given["preset"]))


USES = dict.fromkeys(
    (
        *("samples", "window", "seed", "whole_documents"),
        *("batch_size", "true_sequential", "activations"),
    ),
    ("--calibration, or another method than magnitude,", _reads_data),
)


def run_prune(args: argparse.Namespace) -> int:
    """Load, prune, save; prints the report's table and where everything went. Returns PARTIAL
    where that is less than was asked for. Under torchrun every rank prunes, and the first one
    prints and saves."""
    with launched() as rank:
        return _run(args, rank)


@contextlib.contextmanager
def launched() -> Iterator[int]:
    """The number of this process under torchrun, within its process group; else 0."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    dist = torch.distributed
    if world < 2 or "RANK" not in os.environ or dist.is_initialized():
        yield dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_local_rank())
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=GROUP_HOURS))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _local_rank() -> int:
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    count, remedy = torch.cuda.device_count(), "Start as many processes on it as it has GPUs."
    check(rank < count, OP, f"a GPU for rank {rank} of this machine", f"{count} of them", remedy)
    return rank


def _device(name: str | None) -> str:
    """device_of, and the rank's own GPU under torchrun."""
    device = device_of(name)
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or not device.startswith("cuda"):
        return device
    check(":" not in device, OP, "--device cuda or cpu under torchrun", device)
    return f"cuda:{torch.cuda.current_device()}"


def _run(args: argparse.Namespace, rank: int) -> int:
    import sparsekern as sk

    out = new_folder(args.out) if rank == 0 else Path(args.out)
    check_apart(OP, "--resume", args.resume, out)
    for name, least in (("samples", 1), ("window", 2)):
        value = getattr(args, name)
        fits = value is None or value >= least
        check(fits, OP, f"--{name} >= {least}", value)
    check_flags(OP, USES, args)
    activations = _activations(args.activations)
    knobs: dict[str, Any] = {}
    if args.max_shard_size is not None:
        knobs["max_shard_size"] = parse_size(OP, args.max_shard_size)
    pattern = Pattern.of(args.pattern, OP)
    for flag, given in (("--stream", args.stream), ("--keep-dense", args.keep_dense)):
        fits, remedy = not given or pattern == (2, 4), f"Leave {flag} out."
        check(fits, OP, f"--pattern 2:4 with {flag}", args.pattern, remedy)
    taken = sorted(set(dict(args.option or ())) & set(vars(args)))
    remedy = "Write --" + " --".join(name.replace("_", "-") for name in taken)
    check(not taken, OP, "--option with what is no flag", taken, f"{remedy}.")
    device = _device(args.device)
    with contextlib.ExitStack() as stack:
        if rank:
            stack.enter_context(contextlib.redirect_stdout(None))
        streamed = _streamed(args)
        if streamed is None:
            model, tokenizer = load_model(args.model, "cpu", dtype_of(args.dtype))
        else:
            model, tokenizer = streamed.model, load_tokenizer(streamed.folder)
        beside = [] if rank else files_beside(args.model)
        calibration = calibration_of(args, model, tokenizer, device)
        options = dict(args.option or ())
        stored = compute_in_float32(model, device) if calibration is not None else None
        parts = args.resume
        if streamed is not None and parts is None:
            parts = f"{args.out.rstrip('/')}.parts"
        report = sk.prune_model(
            model,
            args.method,
            calibration,
            skip=skip_rules(args.skip),
            compress=pattern == (2, 4),
            pattern=pattern,
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
            offload_activations=activations,
            resume=parts,
            progress=not args.quiet,
            preset=args.preset,
            untie=args.untie,
            permute=args.permute,
            source=streamed,
            **options,
        )
        if stored is not None:
            as_stored(report, cast_weights(model, stored), stored)
        if rank:
            return 0
        knobs["tokenizer"] = tokenizer
        if streamed is None:
            sk.save_pretrained(model, out, **knobs)
        else:
            from sparsekern.checkpoint.stream import save_streamed

            save_streamed(streamed, parts, out, **knobs)
            if args.resume is None:
                shutil.rmtree(parts)
        with beside_the_model(OP, out):
            copy_beside(beside, out)
            report.save(out / "prune_report.json")
    return _say(args, out, report)


def _say(args: argparse.Namespace, out: Path, report: PruneReport) -> int:
    """Say what there is; the exit code."""
    print(report.summary() if args.quiet else report.table())
    print(f"saved    {out} ({folder_bytes(out)} bytes of weights), prune_report.json beside them")
    if not report.partial:
        return 0
    print(
        message(
            OP,
            *report.shortfall,
            "prune_report.json has the reasons; --allow-partial makes this exit code 0.",
        ),
        file=sys.stderr,
    )
    return 0 if args.allow_partial else PARTIAL


def _streamed(args: argparse.Namespace) -> Streamed | None:
    """The model for --stream, and without it for a folder that is larger than free memory."""
    if args.stream is False:
        return None
    folder = Path(args.model)
    if args.stream is None:
        needs = folder_bytes(folder) if os.path.isdir(folder) else 0
        needs *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = available_host_bytes()
        if not needs or free is None or needs < free:
            return None
        print(
            f"{args.model} needs {size(needs)} of memory, and {size(free)} are free: block by "
            "block from the files, as with --stream (--no-stream loads all of it)"
        )
    from sparsekern.checkpoint.stream import Streamed

    got, remedy = f"{args.model}", "Give a folder, or leave --stream out."
    check(os.path.isdir(folder), OP, "--stream with a model folder", got, remedy)
    return Streamed(folder, dtype_of(args.dtype))


def _activations(text: str) -> bool | str:
    """offload_activations in the words of --activations. ValueError: none, and no folder."""
    words: dict[str, bool | str] = {"auto": "auto", "device": False, "host": True}
    expected, remedy = "--activations auto, device, host or a folder", "Make the folder first."
    check(text in words or os.path.isdir(text), OP, expected, f"no folder at {text!r}", remedy)
    return words.get(text, text)


def compute_in_float32(model: nn.Module, device: str) -> torch.dtype | None:
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


def as_stored(report: PruneReport, model: nn.Module, dtype: torch.dtype) -> None:
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


def calibration_of(
    args: argparse.Namespace, model: nn.Module, tokenizer: Any, device: str
) -> Mix | None:
    """Windows by the published protocol, or a mix of sources; None where nothing that is asked for
    reads them."""
    preset = find_preset(OP, args.preset)
    if not _reads_data(vars(args)):
        return None
    source = args.calibration or "builtin"
    from sparsekern.eval import mix, texts

    tokenizer = needed(tokenizer, args.model)
    apart = preset.side_by_side
    samples, window = CPU_WINDOWS if device == "cpu" else (preset.samples, GPU_WINDOWS[1])
    window = min(window, positions(model) or window)
    samples = samples if args.samples is None else args.samples
    window = window if args.window is None else args.window
    if mix.is_mix(source) or args.whole_documents:
        made = mix.calibration_mix(
            source,
            tokenizer,
            tokens=samples * window,
            window=window,
            seed=args.seed,
            whole_documents=args.whole_documents,
        )
        parts = ", ".join(f"{row['taken']} of {row['name']}" for row in made.sources)
        print(f"calibration: {made.tokens} tokens in {len(made)} rows ({parts}), seed {args.seed}")
        return made
    ids = texts.tokenize(tokenizer, "".join(texts.read_rows(source, "train")))
    draw: Any = texts.side_by_side if apart else texts.calibration_windows
    windows: Tensor = draw(ids, samples, window, args.seed)
    print(
        f"calibration: {windows.shape[0]} windows of {window} tokens from {source} "
        f"({ids.numel()} tokens), seed {args.seed}" + ", side by side" * apart
    )
    row = {"name": source, "taken": windows.numel(), "tokens": ids.numel()}
    settings = {"window": window, "seed": args.seed, "side_by_side": apart}
    return mix.Mix(list(windows), [row], settings)
