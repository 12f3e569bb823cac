"""Accuracy and time of pruning a real model, by the protocol of the published 2:4 numbers.

    python -m bench prune --gguf SmolLM2-135M-Instruct.Q4_1.gguf --calibration c4.txt \\
        --eval wiki.test.raw --methods dense,magnitude,wanda,sparsegpt

The model is read as the command line reads it (GGUF rounded to bfloat16) and pruned in --dtype,
calibrated on windows at random starts of one tokenisation (texts.calibration_windows), pruned by
prune_model with its defaults, and evaluated in float32 on the rows of the text joined with a blank
line, in windows side by side. `seconds` is the whole call of prune_model: moving blocks, the
calibration forwards, Hessians, masks, compression; not loading the model, not tokenising.

One pruned model is then saved in bfloat16, loaded in a new process, and both must give the same
logits bit for bit; the bytes of its pruned layers in the files are counted.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import sparsekern
from sparsekern import SparseLinear
from sparsekern.eval import texts
from sparsekern.integrations.loading import cast_weights, load_model

from . import record
from .options import Run, parser, watchdog

METHODS = ("dense", "magnitude", "wanda", "sparsegpt")
NEEDED_S = {"dense": 5, "magnitude": 20, "wanda": 30, "sparsegpt": 60}  # not begun with less left
WEIGHT_KEYS = (".compressed", ".bitmask", ".shape")
LOGIT_TOKENS = 64
HANG_S = 500.0
CHILD_S = 180.0


def make_parser():
    result = parser("prune", "Prune a model and measure what it costs.", budget=400)
    source = result.add_mutually_exclusive_group()
    source.add_argument("--gguf", metavar="FILE", help="a .gguf file")
    source.add_argument("--model", metavar="DIR", help="a folder of safetensors files")
    result.add_argument("--calibration", default="builtin", metavar="FILE|hf:NAME|builtin")
    result.add_argument("--eval", default="builtin", metavar="FILE|hf:NAME|builtin")
    result.add_argument(
        "--methods",
        "--only-methods",
        default=",".join(METHODS),
        help="comma-separated; default: all",
    )
    result.add_argument("--samples", type=int, default=128)
    result.add_argument("--window", type=int, default=2048)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--damp", type=float, default=0.01)
    result.add_argument("--blocksize", type=int, default=128)
    result.add_argument("--refine", type=int, help="as in prune_model")
    result.add_argument("--match-dense", type=float, help="as in prune_model")
    result.add_argument("--dtype", default="bfloat16", help="of the model while it is pruned")
    result.add_argument("--true-sequential", action="store_true")
    result.add_argument("--batch-size", type=int, help="calibration windows per forward")
    result.add_argument(
        "--eval-weights",
        default="sparse",
        choices=("sparse", "dense"),
        help="dense: evaluate the same weights through torch (other rounding, another speed)",
    )
    result.add_argument("--reload", metavar="DIR", help=_child_help("folder to load"))
    result.add_argument("--logits", metavar="FILE", help=_child_help("file to write"))
    return result


def _child_help(what: str) -> str:
    return f"for the child process: {what}"


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    if args.reload:
        torch.save(_logits(load_model(args.reload, args.device)[0]), args.logits)
        return 0
    if not (args.gguf or args.model):
        print("bench prune: give --gguf FILE or --model DIR; nothing was measured.", flush=True)
        return 0
    methods = args.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"bench prune: expected methods in {METHODS}, got {sorted(unknown)}.")
    run = Run(path, args)
    if run.quick:
        args.samples = min(args.samples, 16)
    with watchdog(max(HANG_S, args.budget + 60)):
        problem = Problem(run, args)
        done = [method for method in methods if problem.measure(method)]
        code = problem.check_reload(done[-1]) if done and done[-1] != "dense" else 0
    run.close()
    return code


class Problem:
    """The model, its calibration windows and its held-out text."""

    def __init__(self, run: Run, args):
        self.run, self.args = run, args
        source = args.gguf or args.model
        dtype = getattr(torch, args.dtype)
        self.model, tokenizer = load_model(source, "cpu", dtype)
        train = texts.tokenize(tokenizer, "".join(texts.read_rows(args.calibration, "train")))
        test = texts.tokenize(tokenizer, texts.join_rows(texts.read_rows(args.eval, "test")))
        self.calibration = texts.calibration_windows(train, args.samples, args.window, args.seed)
        windows = test.numel() // args.window
        self.test = test[: 8 * args.window] if run.quick else test
        self.case = f"{Path(source).name}, {Path(args.eval).name}, window {args.window}"
        if run.quick:
            self.case += f", quick: {min(8, windows)} windows, {args.samples} samples"
        self.settings = {
            "calibration": Path(args.calibration).name,
            "samples": args.samples,
            "calibration_tokens": train.numel(),
            "eval_tokens": test.numel(),
            "window": args.window,
            "damp": args.damp,
            "blocksize": args.blocksize,
            "batch_size": args.batch_size,
            "true_sequential": args.true_sequential,
            "eval_weights": args.eval_weights,
        }
        run.say(f"{self.case}: {train.numel()} calibration tokens, {test.numel()} of evaluation")

    def measure(self, method: str) -> bool:
        """Prunes a copy, evaluates, records; False when there is no time for it."""
        run, args = self.run, self.args
        if run.left < NEEDED_S[method] * (1 if run.device.type == "cuda" else 0):
            run.say(f"no time for {method}")
            return False
        self.pruned = copy.deepcopy(self.model).to(run.device)
        metrics, details, check = {}, {}, "finite"
        if method != "dense":
            report, peak = self._prune(method)
            for module in self.pruned.modules():
                if isinstance(module, SparseLinear):
                    sparsekern.verify(module.weight)
            check = "masks verified"
            errors, worst = _errors(report)
            metrics = {"seconds": round(report.seconds, 2), **errors}
            metrics |= {"peak_gb": round(peak / 1e9, 2)} if peak else {}
            details = {
                "phases": {name: round(seconds, 2) for name, seconds in report.phases.items()},
                "worst_layer": worst,
                "notes": sum(row.note is not None for row in report.pruned),
                "refine": report.options.get("refine", 0),
                "match_dense": report.options.get("match_dense", 0),
            }
            self.report = report
            run.say(report.summary())
        model = dense_twin(self.pruned) if args.eval_weights == "dense" else self.pruned
        model = cast_weights(copy.deepcopy(model), torch.float32)
        value = sparsekern.perplexity(model, self.test, window=args.window)
        if not value < float("inf"):
            raise RuntimeError(f"bench prune: expected a finite perplexity, got {value}.")
        metrics = {"perplexity": round(value, 4), **metrics}
        run.add(
            op="prune_model",
            backend=method,
            check=check,
            case=self.case,
            seed=args.seed,
            dtype=args.dtype,
            settings=self.settings,
            details=details,
            metrics=metrics,
        )
        run.say(f"{method}: perplexity {value:.4f}")
        return True

    def _prune(self, method: str):
        """(PruneReport, peak bytes on the GPU) of pruning self.pruned in place."""
        args, on_gpu = self.args, self.run.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        known = {option.name for option in sparsekern.prune.methods()[method].options}
        known |= {"damp"} if args.refine else set()
        known |= {"match_dense"} if method == "sparsegpt" else set()
        known |= {"batch_size", "true_sequential"} if method != "magnitude" else set()
        names = ("damp", "blocksize", "match_dense", "batch_size", "true_sequential")
        report = sparsekern.prune_model(
            self.pruned,
            method,
            None if method == "magnitude" else self.calibration,
            device=self.run.device,
            refine=args.refine,
            progress=False,
            **{name: getattr(args, name) for name in names if name in known},
        )
        return report, torch.cuda.max_memory_allocated() if on_gpu else 0

    def check_reload(self, method: str) -> int:
        """Saves the last pruned model, loads it in a new process, compares logits and bytes."""
        run = self.run
        model = cast_weights(self.pruned, torch.bfloat16)
        with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as temporary:
            folder, file = Path(temporary) / "model", Path(temporary) / "logits.pt"
            sparsekern.save_pretrained(model, folder)
            wanted = _logits(model)
            logits_in_new_process(folder, file, run.device.type)
            got = torch.load(file, weights_only=True)
            stored = pruned_bytes(folder)
        dense = sum(2 * out * inner for out, inner in (r.shape for r in self.report.pruned))
        if not torch.equal(got, wanted):
            largest = (got.float() - wanted.float()).abs().max().item()
            run.say(f"FAILED: logits differ after loading, by up to {largest:.3g}")
            return 1
        metrics = {
            "pruned_layer_bytes": stored,
            "of_dense_bf16": round(stored / dense, 6),
            "logits": "equal bits in a new process",
        }
        run.add(op="checkpoint", backend=method, check="exact", case=self.case, metrics=metrics)
        run.say(f"saved and loaded: {metrics}")
        return 0


def logits_in_new_process(folder: Path, file: Path, device: str) -> None:
    """Another Python loads the folder and writes `_logits` to the file."""
    command = [sys.executable, "-m", "bench", "prune", "--device", device]
    subprocess.run(
        [*command, "--reload", str(folder), "--logits", str(file)],
        cwd=record.ROOT,
        check=True,
        timeout=CHILD_S,
        stdout=subprocess.DEVNULL,
    )


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy with nn.Linear layers of the same weights, zeros included."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            w24 = module.weight
            linear = nn.Linear(*reversed(w24.shape), bias=False, device="meta")
            linear.weight = nn.Parameter(sparsekern.decompress(w24), requires_grad=False)
            linear.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


def pruned_bytes(folder: Path) -> int:
    """Bytes of the tensors of pruned layers in the folder's safetensors files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name.endswith(WEIGHT_KEYS):
                begin, end = entry["data_offsets"]
                total += end - begin
    return total


def _errors(report) -> tuple[dict, str | None]:
    """Mean and worst relative error over the pruned layers as metrics, and the worst one's name."""
    layers = [layer for layer in report.pruned if layer.relative_error is not None]
    if not layers:
        return {}, None
    worst = max(layers, key=lambda layer: layer.relative_error)
    mean = statistics.fmean(layer.relative_error for layer in layers)
    errors = {"mean_error": round(mean, 6), "worst_error": round(worst.relative_error, 6)}
    return errors, worst.name


@torch.inference_mode()
def _logits(model: nn.Module) -> torch.Tensor:
    """Logits of fixed token ids, on the CPU."""
    device = next(model.parameters()).device
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(LOGIT_TOKENS) * 7919 % size).unsqueeze(0)
    return model(ids.to(device), use_cache=False).logits.cpu()
