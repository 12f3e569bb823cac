"""Seconds and memory of prune_model for each block of a large model's shape, on one GPU or several:

    python -m bench.blocks --preset 8b --layers 3
    torchrun --nproc-per-node 2 -m bench.blocks --preset 8b --layers 3
    python -m bench.blocks --preset 70b --layers 3 --activations host

A Llama of random weights with few blocks, random token ids. A model of one block is pruned before
on few rows, so that what a process does once is apart, in `start_up` (kernels that are compiled,
libraries that start). A whole model takes about `rest` seconds for each of its blocks, and for each
as long before the walk (rotation, permutation, checks of weights, probes). `blocks` has the seconds
of each phase of each block ("prune: ..." are parts of prune), `parts` their sums with those of the
permutation. The sum of all weights' bits is printed: without reconstruction one GPU and several
give the same.
Rank 0 appends a record to --out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import sys
import time

import torch
from torch import nn

import sparsekern
from sparsekern.cli.prune import launched
from sparsekern.nn.sparse_linear import SparseLinear

from . import record

# hidden, intermediate, heads, key-value heads, blocks of the model itself
PRESETS = {
    "8b": (4096, 14336, 32, 8, 32),
    "70b": (8192, 28672, 64, 8, 80),
    "tiny": (64, 128, 4, 2, 2),
}
VOCABULARY = 2048
WARM_ROWS = 16


def make_parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m bench.blocks", description=__doc__)
    result.add_argument("--preset", choices=tuple(PRESETS), default="8b")
    result.add_argument("--layers", type=int, default=3, help="blocks that are pruned")
    result.add_argument("--samples", type=int, default=128)
    result.add_argument("--window", type=int, default=2048)
    result.add_argument("--batch-size", type=int)
    result.add_argument("--refine", type=int)
    result.add_argument("--match-dense", type=float)
    result.add_argument("--prune-preset", help="preset of prune_model, such as default")
    result.add_argument("--activations", default="auto", choices=("auto", "device", "host"))
    result.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    result.add_argument("--out", help="file to append a record to")
    return result


def build(args: argparse.Namespace, device: torch.device, layers: int) -> nn.Module:
    """The model of so many blocks, on the host; equal on every rank with one kind of GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, heads, kv, _ = PRESETS[args.preset]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=max(args.window, 64),
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).cpu().eval()


class Clock(logging.Handler):
    """Seconds of each stage and of what it consists of, from the lines that say that it is done.
    Each is printed as it comes: a run that is cut off has shown where its time went."""

    def __init__(self, shown: bool = True) -> None:
        super().__init__(logging.INFO)
        self.last, self.seconds = time.perf_counter(), dict[str, float]()
        self.parts: dict[str, dict[str, float]] = {}
        self.shown = shown

    def emit(self, entry: logging.LogRecord) -> None:
        text = entry.getMessage()
        words = text.split()
        if len(words) > 2 and words[2] == "done,":
            now = time.perf_counter()
            self.seconds[words[1]], self.last = round(now - self.last, 3), now
            found = re.findall(r"; ([^;]+) ([0-9.]+) s(?=;|$)", text)
            self.parts[words[1]] = {name: float(seconds) for name, seconds in found}
        if self.shown:
            print(text, file=sys.stderr, flush=True)


def prune(
    args: argparse.Namespace, model: nn.Module, ids: torch.Tensor, device: torch.device
) -> sparsekern.PruneReport:
    return sparsekern.prune_model(
        model,
        None,
        ids,
        device=device,
        batch_size=args.batch_size,
        refine=args.refine,
        match_dense=args.match_dense,
        preset=args.prune_preset,
        offload_activations={"auto": "auto", "device": False, "host": True}[args.activations],
        undo=False,
        progress=False,
    )


def checksum(model: nn.Module) -> int:
    """The sum of the bytes of all compressed weights, each of which is verified."""
    total = 0
    for module in model.modules():
        if isinstance(module, SparseLinear):
            sparsekern.verify(module.weight)
            for tensor in module.weight.rowmajor().tensors.values():
                total += int(tensor.contiguous().view(torch.uint8).sum(dtype=torch.int64))
    return total


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    with launched() as rank:
        device = torch.device(args.device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, VOCABULARY, (args.samples, args.window), generator=generator)
        begin = time.perf_counter()
        prune(args, build(args, device, 1), ids[:WARM_ROWS], device)
        start_up = time.perf_counter() - begin
        model = build(args, device, args.layers)
        clock, logger = Clock(not rank), logging.getLogger("sparsekern")
        logger.addHandler(clock)
        logger.setLevel(logging.INFO)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        clock.last = time.perf_counter()
        report = prune(args, model, ids, device)
        logger.removeHandler(clock)
        blocks = [s for key, s in clock.seconds.items() if key.startswith("block")]
        if rank:
            return 0
        rest = sum(blocks[1:]) / max(1, len(blocks) - 1)
        before = sum(report.phases.get(name, 0.0) for name in ("rotate", "permute"))
        before += sum(s for name, s in report.parts.items() if name.startswith("before: "))
        whole = PRESETS[args.preset][4]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        metrics = {
            "seconds": round(report.seconds, 2),
            "start_up": round(start_up, 2),
            "first": blocks[0],
            "rest": round(rest, 3),
            "before": round(before / args.layers, 3),
            "whole_minutes": round(
                (blocks[0] + rest * (whole - 1) + before * whole / args.layers) / 60, 2
            ),
            "peak_gb": round(peak / 1e9, 2),
            "host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        }
        details = {
            "ranks": int(os.environ.get("WORLD_SIZE", "1")),
            "phases": {name: round(seconds, 2) for name, seconds in report.phases.items()},
            "parts": {name: round(seconds, 2) for name, seconds in report.parts.items()},
            "stages": clock.seconds,
            "blocks": clock.parts,
            "checksum": checksum(model),
            "options": report.options,
        }
        print(json.dumps({**vars(args), **metrics, **details}), flush=True)
        if args.out:
            case = f"{args.preset}, {args.layers} blocks, {args.samples} x {args.window}"
            measured = {"op": "prune_blocks", "backend": report.method, "check": "masks verified"}
            measured |= {"case": case, "metrics": metrics, "details": details, "seed": 0}
            record.append(args.out, measured, record.environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
