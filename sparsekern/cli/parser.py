"""What the commands take: names, options, defaults, help texts. cli/main.py does the work."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Mapping
from typing import Any

from sparsekern.cli import finetune, sensitivity
from sparsekern.formats.dtypes import QUANTIZED
from sparsekern.oneshot.presets import PRESETS
from sparsekern.ops.quantize import GROUPS
from sparsekern.prune import methods
from sparsekern.prune.quantize import METHODS as QUANTIZE_METHODS

DTYPES = ("float32", "float16", "bfloat16")
# Calibration by default: samples and tokens of each. The first is that of the publications; the
# second prunes SmolLM2-135M in minutes on a few cores.
GPU_WINDOWS, CPU_WINDOWS = (128, 2048), (20, 512)
SHORT_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


def make_parser(
    runs: Mapping[str, Callable[[argparse.Namespace], int | None]],
) -> argparse.ArgumentParser:
    """The argument parser.

    Args:
        runs: command name -> function(args) that carries it out; it becomes `run` of the parsed
            arguments.
    """
    from sparsekern import __version__

    parser = argparse.ArgumentParser(
        prog="sparsekern", description="2:4 sparse models: prune, evaluate, store, run."
    )
    parser.add_argument("--version", action="version", version=f"sparsekern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=runs[name], parser=sub)
        return sub

    model_help = (
        "folder with config.json and safetensors files (dense or pruned), a .gguf file, or the id "
        "of a model on the Hub"
    )
    device_help = "cpu, cuda or cuda:N (default: cuda if there is one)"

    sub = command("prune", "Prune a model to 2:4 and save it compressed.")
    sub.epilog = "torchrun --nproc-per-node N -m sparsekern prune ... shares the work among N GPUs."
    sub.add_argument("model", metavar="MODEL", help=model_help)
    sub.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write; must be new or empty"
    )
    sub.add_argument(
        "--method",
        choices=tuple(methods()),
        help="of each layer (default: the preset's, sparsegpt without one)",
    )
    sub.add_argument(
        "--calibration",
        metavar="FILE|hf:NAME|builtin",
        help="calibration text: .txt, .jsonl (texts or chats), .parquet, or shares of several: "
        "a.txt=0.7,b.jsonl=0.3 (default: builtin, the Python language reference, where anything "
        "reads it)",
    )
    sub.add_argument(
        "--whole-documents",
        action="store_true",
        help="no calibration row holds tokens of two documents",
    )
    sub.add_argument(
        "--samples",
        type=int,
        help=f"calibration windows (default {GPU_WINDOWS[0]} or the preset's, on a CPU "
        f"{CPU_WINDOWS[0]})",
    )
    sub.add_argument(
        "--window",
        type=int,
        help=f"tokens per window (default {GPU_WINDOWS[1]}, on a CPU {CPU_WINDOWS[1]}, or the "
        "model's positions where those are fewer)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the random window starts (default 0)")
    sub.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="what is done beyond the layer-wise method (default: nothing): "
        + "; ".join(f"{name}: {preset.help}" for name, preset in PRESETS.items()),
    )
    sub.add_argument(
        "--untie",
        action="store_true",
        help="let a preset that rotates give a tied head a weight of its own",
    )
    sub.add_argument(
        "--permute",
        action=argparse.BooleanOptionalAction,
        help="first change the order of the channels inside MLPs and attention heads, which folds "
        "away, so that 2:4 loses less (default: as the preset says)",
    )
    sub.add_argument(
        "--skip",
        action="append",
        metavar="RULE",
        help="layers to leave dense: name, glob, re:..., class, block:3 or block:20-29; may be "
        "repeated (default: lm_head)",
    )
    sub.add_argument(
        "--target",
        action="append",
        metavar="RULE",
        help="prune only layers that match; rules as for --skip; may be repeated",
    )
    sub.add_argument(
        "--pattern",
        default="2:4",
        metavar="N:M",
        help="weights kept of each M, or '4:8 in pairs' (Blackwell's fp4); all but 2:4 are saved "
        "as dense weights with zeros (default 2:4)",
    )
    sub.add_argument(
        "--true-sequential", action="store_true", help="prune inside a block in order of execution"
    )
    sub.add_argument(
        "--damp",
        type=float,
        help="of the Hessian, for sparsegpt, admm, --refine, --match-dense and gptq (default 0.01)",
    )
    sub.add_argument(
        "--option",
        action="append",
        type=_option,
        metavar="NAME=VALUE",
        help=f"of the method; may be repeated. {_options_help()}",
    )
    sub.add_argument(
        "--refine",
        type=int,
        metavar="STEPS",
        help="then move the kept weights towards the least-squares fit (default: 16 with "
        "sparsegpt and admm, else 0; 0 is the published method)",
    )
    sub.add_argument(
        "--match-dense",
        type=float,
        metavar="SHARE",
        help="with sparsegpt or admm: this share of the correction for changed inputs (default: "
        "0.25 on a chain of decoder blocks; 0 is the published method)",
    )
    sub.add_argument(
        "--quantize",
        choices=QUANTIZED,
        help="then quantise the kept weights: fp8 or int8 with a scale for each output channel, or "
        "int4 with one for each group of columns",
    )
    sub.add_argument(
        "--quantize-method",
        choices=QUANTIZE_METHODS,
        help="gptq reads the Hessian of the inputs, rtn rounds to nearest (default: gptq, but rtn "
        "where nothing else reads calibration)",
    )
    sub.add_argument(
        "--quantize-group", type=int, choices=GROUPS, help="columns of a group (default 128)"
    )
    sub.add_argument(
        "--batch-size", type=int, help="calibration windows per forward (default: by tokens)"
    )
    sub.add_argument("--device", help=device_help)
    sub.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as stored; bfloat16 for GGUF)"
    )
    sub.add_argument(
        "--keep-dense",
        choices=("if-slower",),
        help="measure each layer shape here, and leave dense what 2:4 makes slower",
    )
    sub.add_argument(
        "--keep-dense-tokens",
        type=_counts,
        default=[1, 16, 256],
        metavar="N,N,...",
        help="numbers of tokens to measure for it (default 1,16,256)",
    )
    sub.add_argument(
        "--resume", metavar="DIR", help="store each finished block here, and go on from it"
    )
    sub.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="read one block at a time from the folder and keep what is done in DIR of --resume "
        "(default OUT.parts); without it where the folder is larger than free memory",
    )
    sub.add_argument(
        "--activations",
        default="auto",
        metavar="auto|device|host|DIR",
        help="where the calibration's hidden states are kept; DIR: in files there (default: auto, "
        "by free GPU memory)",
    )
    sub.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a written file, such as 2GB (default 5 GiB)"
    )
    sub.add_argument(
        "--allow-partial",
        action="store_true",
        help="exit with 0 even if less than half of the weights became 2:4 (else with 3)",
    )
    sub.add_argument("--quiet", action="store_true", help="no progress bar, no table")

    sub = command(
        "eval",
        "Perplexity by the WikiText protocol: one tokenisation, windows side by side.",
    )
    sub.add_argument("model", metavar="MODEL", help=model_help)
    sub.add_argument(
        "--text",
        default="builtin",
        metavar="FILE|hf:NAME|builtin",
        help="text to score (default: builtin, held-out part of the Python language reference)",
    )
    sub.add_argument(
        "--join",
        choices=("rows", "none"),
        help="rows: lines are rows, joined with a blank line as for WikiText; "
        "none: the text as it is (default: rows, none for builtin)",
    )
    sub.add_argument("--window", type=int, default=2048, help="tokens per window (default 2048)")
    sub.add_argument("--batch-size", type=int, default=1, help="windows per forward (default 1)")
    sub.add_argument("--device", help=device_help)
    sub.add_argument(
        "--dtype", choices=DTYPES, help="of weights and activations (default: as stored)"
    )
    sub.add_argument("--quiet", action="store_true", help="no progress bar")

    sub = command("verify", "Check a folder against every rule of the format, layer by layer.")
    sub.add_argument("directory", metavar="DIR")

    sub = command("export", "Write a pruned folder in another form.")
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument(
        "--to",
        choices=("dense",),
        required=True,
        help="dense: ordinary weights that hold the zeros",
    )
    sub.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write; must be new or empty"
    )
    sub.add_argument(
        "--keep-quantized",
        action="store_true",
        help="leave quantised layers as dense fp8, int8 or packed int4 with their scales",
    )

    sub = command("bench", "Time sparse against dense layers, losses included.")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"{model_help}: all shapes of the layers that prune converts, and their sum; or the "
        "word kernels: every kernel on --shapes, cuBLAS, cuSPARSELt and Triton beside ours",
    )
    what.add_argument(
        "--shape", action="append", type=_shape, metavar="OUTxIN", help="one shape; may be repeated"
    )
    sub.add_argument(
        "--tokens", type=_counts, default=[1, 16, 256], metavar="N,N,...", help="default 1,16,256"
    )
    sub.add_argument("--device", help=device_help)
    sub.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    extra = sub.add_argument_group("bench kernels")
    extra.add_argument(
        "--shapes",
        type=_bench_shapes,
        metavar="MODEL|OUTxIN,...",
        help="llama3-1b, llama3-3b, llama3-8b, llama3-70b or sizes (default: llama3-8b)",
    )
    extra.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a kernel of yours, linear(x, w24) or build(w24, tokens); may be repeated",
    )
    extra.add_argument("--out", metavar="FILE", help="append each row as a line of JSON")
    extra.add_argument(
        "--plot", metavar="NAME.svg", help="write NAME-roofline.svg and NAME-speedup.svg"
    )

    sub = command(
        "tune",
        "Measure every variant of the CUDA kernels, and remember the fastest for later calls.",
    )
    what = sub.add_mutually_exclusive_group()
    what.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"{model_help}: its layer shapes (default: those of Llama-3 1B, 3B, 8B and 70B)",
    )
    what.add_argument("--shapes", type=_shapes, metavar="OUTxIN,...", help="these shapes")
    sub.add_argument(
        "--tokens", type=_counts, metavar="N,N,...", help="default: 18 numbers from 1 to 8192"
    )
    sub.add_argument(
        "--dtype",
        type=_tunable_dtypes,
        default=["bfloat16"],
        metavar="bf16,...",
        help="some of bf16, fp16, and fp8, int8, int4 of weights (default: bf16)",
    )
    sub.add_argument(
        "--out",
        metavar="FILE",
        help="table to add to (default: your own, tuning.json in SPARSEKERN_CACHE or the user's "
        "cache folder)",
    )
    sub.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin nothing after them; cells of most tokens come first",
    )
    sub.add_argument(
        "--cell-seconds",
        type=float,
        metavar="S",
        help="let the last rounds of a cell take no longer (default: 0.1, under load 5)",
    )
    sub.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="only the I-th of N parts of the cells; N processes may write to one --out",
    )
    sub.add_argument(
        "--log",
        metavar="FILE",
        help="append all times, one line of JSON per cell, for python -m bench.fit",
    )
    sub.add_argument("--device", help="cuda or cuda:N (default: cuda)")
    what.add_argument(
        "--merge",
        nargs="+",
        metavar="FILE",
        help="measure nothing: add the cells of these tables to --out, whose others stay",
    )

    sub = command("doctor", "Show GPU, kernels and libraries, and what will run.")
    sub.add_argument("--json", action="store_true", help="the same as JSON")

    sub = command(
        "demo",
        "A real model end to end: dense, magnitude, Wanda and SparseGPT in one table.",
    )
    sub.add_argument(
        "--gguf",
        metavar="FILE",
        help="another .gguf file (default: SmolLM2-135M-Instruct)",
    )
    sub.add_argument(
        "--cache",
        metavar="DIR",
        help="where the model file is kept (default: the user's cache folder)",
    )
    sub.add_argument(
        "--out", metavar="DIR", help="keep the checkpoints here (default: a temporary folder)"
    )
    sub.add_argument("--device", help=device_help)
    finetune.add_parser(commands)
    sensitivity.add_parser(commands)
    return parser


def _options_help() -> str:
    """What the registered methods have, in words."""
    texts = [
        f"{method.name}: {option.name} (default {option.default}), {option.help}"
        for method in methods().values()
        for option in method.options
    ]
    return "; ".join(texts).replace("%", "%%") or "No method has any"


def _option(text: str) -> tuple[str, Any]:
    """The option in a text such as "blocksize=64": ("blocksize", 64). What is no Python literal is
    a str."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE such as blocksize=64, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _shape(text: str) -> tuple[int, int]:
    """The shape in a text such as "4096x14336": (4096, 14336)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected OUTxIN such as 4096x14336, got {text!r}")
    return int(parts[0]), int(parts[1])


def _bench_shapes(text: str) -> list[tuple[int, int]]:
    """The shapes in a text such as "llama3-8b,4096x4096"."""
    from sparsekern.profiling.kernel_bench import MODELS

    return [shape for part in text.split(",") for shape in MODELS.get(part) or [_shape(part)]]


def _shapes(text: str) -> list[tuple[int, int]]:
    """The shapes in a text such as "4096x4096,8192x1024"."""
    return [_shape(part) for part in text.split(",")]


def _tunable_dtypes(text: str) -> list[str]:
    """The types in a text such as "bf16,float16": ["bfloat16", "float16"]; fp8, int8 and int4 are
    those of quantised weights, with x of 16 bits, and of the same type if that has 8."""
    from sparsekern.profiling.tune import EIGHT, KINDS, QUANTIZED

    kinds: list[str] = []
    for part in text.split(","):
        name = {**SHORT_DTYPES, "fp8": EIGHT[0]}.get(part, part)
        if name not in (*SHORT_DTYPES.values(), *QUANTIZED):
            expected = "expected some of bf16, fp16, fp8, int8, int4"
            raise argparse.ArgumentTypeError(f"{expected}, got {name!r}")
        kinds += [key for key, types in KINDS.items() if types.weight == name]
    return list(dict.fromkeys(kinds))


def _shard(text: str) -> tuple[int, int]:
    """ "1/2": (1, 2)."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"expected a part such as 1/2, got {text!r}")
    return int(number), int(of)


def _counts(text: str) -> list[int]:
    """The numbers in a text such as "1,16,256": [1, 16, 256]."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected positive numbers such as 1,16,256, got {text!r}"
        )
    return [int(part) for part in parts]
