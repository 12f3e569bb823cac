"""What each part of the pruner is worth: perplexity, seconds and memory, one row per variant.

    python -m bench quality --gguf SmolLM2-135M-Instruct.Q4_1.gguf --calibration c4.utf8 \\
        --test wiki.test.raw --runs fast,default,best
    python -m bench quality ... --explore --budget 230 --eval-windows 48   # rates, targets, spans

A row is prune_model on a fresh copy of the model (GGUF rounded to bfloat16), calibrated on the
calibration text alone, and perplexity in float32 of the weights as they are stored, by the WikiText
protocol. `seconds` is the whole call, rotation and reconstruction included. Rows are independent:
one that fails, or that is over --row-seconds, is a line of the table and exit code 1.

Rows of --runs: the presets; published (SparseGPT without refine and match_dense); reconstruct (each
block in the walk), span (all blocks after it), and "rotate+" before any of them. Rows of --explore
train copies of one pruned model (sparsekern.reconstruct) or vary the walk.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern import Reconstruction
from sparsekern.eval import texts
from sparsekern.integrations.loading import load_model
from sparsekern.nn.replace import dense_weight, is_linear
from sparsekern.oneshot.presets import PRESETS

from .options import Run, parser, watchdog

WINDOW = 2048
SPAN = Reconstruction(span=None, epochs=4, between=1.0)
BLOCK = Reconstruction(span=1, epochs=4)
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in PRESETS},
    "published": {"refine": 0, "match_dense": 0.0},
    "reconstruct": {"reconstruct": BLOCK},
    "span": {"reconstruct": SPAN},
}


def _with(options: Reconstruction, **changes: Any) -> Reconstruction:
    return dataclasses.replace(options, **changes)


# What --explore tries: name -> (seconds it may need on an H200, from the pruned start or by
# prune_model anew, what). The most telling ones are first: the budget ends the list.
EXPLORE: dict[str, tuple[float, str, Any]] = {
    "span": (15, "start", SPAN),
    "span, end alone": (15, "start", _with(SPAN, between=0.0)),
    "span, lr x 2": (15, "start", _with(SPAN, lr=1.2e-3)),
    "block": (30, "prune", {"reconstruct": BLOCK}),
    "span, recut, 8 epochs": (25, "start", _with(SPAN, epochs=8, recut=True)),
    "block + span": (45, "prune", {"reconstruct": [BLOCK, SPAN]}),
    "rotate": (35, "prune", {"rotate": True, "untie": True}),
    "span, recut, noise, 8 epochs": (25, "start", _with(SPAN, epochs=8, recut=True, noise=0.1)),
    "span, channel loss": (15, "start", _with(SPAN, loss="channel")),
    "block, pruned targets": (30, "prune", {"reconstruct": _with(BLOCK, target="pruned")}),
    "span, lr / 2": (15, "start", _with(SPAN, lr=3e-4)),
    "span 4": (25, "start", _with(SPAN, span=4, epochs=3)),
    "span, compiled, 16 epochs": (45, "start", _with(SPAN, epochs=16, compile=True)),
    "block, lr / 2": (30, "prune", {"reconstruct": _with(BLOCK, lr=3e-4)}),
    "block, sublayers": (40, "prune", {"reconstruct": _with(BLOCK, parts="sublayers")}),
    "rotate 1000 steps": (50, "prune", {"rotate": {"steps": 1000}, "untie": True}),
    "rotate + block + span": (60, "prune", {"rotate": True, "untie": True,
                                            "reconstruct": [BLOCK, SPAN]}),
}  # fmt: skip


def make_parser():
    result = parser("quality", "Perplexity of every variant of the pruner.", budget=540)
    source = result.add_mutually_exclusive_group()
    source.add_argument("--gguf", metavar="FILE", help="a .gguf file")
    source.add_argument("--model", metavar="DIR", help="a folder of safetensors files")
    result.add_argument("--calibration", default="builtin", metavar="FILE|hf:NAME|builtin")
    result.add_argument("--test", default="builtin", metavar="FILE|hf:NAME|builtin")
    result.add_argument("--runs", default="fast,default", metavar="NAME,...")
    result.add_argument("--explore", action="store_true", help="the table of EXPLORE, not --runs")
    result.add_argument("--only", default="", metavar="TEXT,...", help="rows of --explore with it")
    result.add_argument("--seeds", type=int, default=1, help="repeat each row (default 1)")
    result.add_argument("--samples", type=int, help="windows (default: the preset's, else 128)")
    result.add_argument("--batch-size", type=int, help="windows per forward and step")
    result.add_argument("--window", type=int, default=WINDOW)
    result.add_argument("--eval-windows", type=int, help="of the test text (default: all)")
    result.add_argument(
        "--row-seconds", "--model-seconds", type=float, default=400.0, help="that a row may take"
    )
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    if not (args.gguf or args.model):
        print("bench quality: give --gguf FILE or --model DIR; nothing was measured.", flush=True)
        return 0
    for name in args.runs.split(","):
        known = name.removeprefix("rotate+")
        if known not in RUNS and name != "rotate":
            raise ValueError(f"bench quality: expected runs in {[*RUNS]}, got {name!r}.")
    run = Run(path, args)
    with watchdog(args.budget + args.row_seconds + 120):
        table = Table(run, args)
        table.explore() if args.explore else table.rows()
        table.show()
    run.close()
    return 1 if table.failed else 0


class Table:
    """The model, its texts, and the rows so far."""

    def __init__(self, run: Run, args: Any):
        self.run, self.args = run, args
        self.source = Path(args.gguf or args.model)
        self.model, self.tokenizer = load_model(self.source, "cpu", None)
        positions = getattr(self.model.config, "max_position_embeddings", args.window)
        self.window = min(args.window, positions)
        train = "".join(texts.read_rows(args.calibration, "train"))
        self.train = texts.tokenize(self.tokenizer, train)
        rows = texts.read_rows(args.test, "test")
        text = "".join(rows) if args.test == "builtin" else texts.join_rows(rows)
        self.test = texts.tokenize(self.tokenizer, text)
        if run.quick and args.eval_windows is None:
            args.eval_windows = 8
        if args.eval_windows:
            self.test = self.test[: args.eval_windows * self.window]
        count = self.test.numel() // self.window
        self.case = f"{self.source.name}, {Path(args.test).name}, {count} windows of {self.window}"
        self.lines: list[tuple[str, ...]] = []
        self.failed = 0
        run.say(f"{self.case}; {self.train.numel()} calibration tokens")
        self.dense = self.perplexity(copy.deepcopy(self.model).to(run.device))
        self.lines.append(("dense", f"{self.dense:.2f}", "", "", "", "", ""))
        run.say(f"dense: {self.dense:.3f}")

    # ------------------------------------------------------------------------------------ the rows

    def rows(self) -> None:
        for seed in range(self.args.seeds):
            for name in self.args.runs.split(","):
                base = name.removeprefix("rotate+")
                options = {} if name == "rotate" else dict(RUNS[base])
                if name.startswith("rotate"):
                    options["rotate"] = True
                if options.get("rotate") or base == "best":
                    options["untie"] = True
                if self.run.left < 0:
                    self.run.say(f"no time for {name}, seed {seed}")
                    continue
                preset = PRESETS.get(base)
                samples = self.args.samples or (preset.samples if preset else 128)
                apart = preset is None or preset.side_by_side
                with self.row(name, seed):
                    self.prune(name, options, seed, samples, apart)

    def explore(self) -> None:
        """Everything with the windows of the text side by side, one seed."""
        samples, start = self.args.samples or 256, None
        wanted = [text for text in self.args.only.split(",") if text]
        with self.row("fast", 0):
            start, _ = self.prune("fast", {}, 0, samples, True)
        for name, (seconds, kind, what) in EXPLORE.items():
            if wanted and not any(text in name for text in wanted):
                continue
            if self.run.left < seconds:
                self.run.say(f"no time for {name}")
                continue
            with self.row(name, 0):
                if kind == "prune":
                    self.prune(name, what, 0, samples, True)
                elif start is not None:
                    self.train_copy(name, start, what, samples)

    @contextlib.contextmanager
    def row(self, name: str, seed: int) -> Iterator[None]:
        """One row, whatever becomes of it."""

        def over(number: int, frame: Any) -> None:
            raise TimeoutError(f"over --row-seconds {self.args.row_seconds:g}")

        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, self.args.row_seconds)
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            self.run.say(f"FAILED {name}, seed {seed}: {type(error).__name__}: {text}")
            self.lines.append((name, "failed", "", "", str(seed), "", type(error).__name__))
            self.failed += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            gc.collect()
            if self.run.device.type == "cuda":
                torch.cuda.empty_cache()

    def windows(self, seed: int, samples: int, apart: bool) -> torch.Tensor:
        """Calibration windows: side by side, or at random places as published."""
        if apart:
            return texts.side_by_side(self.train, samples, self.window, seed)
        return texts.calibration_windows(self.train, samples, self.window, seed)

    def prune(self, name: str, options: dict[str, Any], seed: int, samples: int, apart: bool):
        """(the pruned model, its report) of one prune_model; recorded."""
        model = copy.deepcopy(self.model).to(self.run.device)
        ids = self.windows(seed, samples, apart)
        if seed and "reconstruct" not in options and "preset" in options:
            rounds = PRESETS[options["preset"]].rounds
            options["reconstruct"] = [dataclasses.replace(r, seed=seed) for r in rounds]
        self.reset_peak()
        report = sparsekern.prune_model(
            model,
            "sparsegpt",
            ids,
            compress=False,
            device=self.run.device,
            batch_size=self.args.batch_size,
            progress=False,
            undo=False,
            **options,
        )
        shown = {key: round(value, 1) for key, value in report.phases.items()}
        errors = [row.relative_error for row in report.pruned if row.relative_error is not None]
        details = {
            "phases": shown,
            "options": report.options,
            "rotation": report.rotation,
            "fits": _short(report.reconstruction),
            "mean_error": round(statistics.fmean(errors), 6) if errors else None,
        }
        self.add(name, seed, model, report.seconds, ids, details, shown)
        return model, report

    def train_copy(self, name: str, start: Any, options: Reconstruction, samples: int) -> None:
        """One sparsekern.reconstruct of a copy of the pruned start; recorded."""
        model = copy.deepcopy(start)
        ids = self.windows(0, samples, True)
        self.reset_peak()
        begin = time.perf_counter()
        fits = sparsekern.reconstruct(
            model,
            self.model,
            ids,
            options,
            device=self.run.device,
            batch_size=self.args.batch_size,
            progress=False,
        )
        seconds = time.perf_counter() - begin
        rows = [fit.row() for fit in fits]
        details = {"options": dataclasses.asdict(options), "fits": _short(rows)}
        steps = sum(row["steps"] for row in rows)
        self.add(name, 0, model, seconds, ids, details, {"steps": steps})

    def add(self, name, seed, model, seconds, ids, details, shown) -> None:
        peak = 0.0
        if self.run.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 1e9
        layers = check_24(model)
        value = self.perplexity(copy.deepcopy(model))
        fits = details.get("fits") or []
        last = fits[-1] if fits else None
        metrics = {
            "perplexity": round(value, 4),
            "of_dense": round(value / self.dense, 4),
            "dense": round(self.dense, 4),
            "seconds": round(seconds, 2),
            "peak_gb": round(peak, 2),
        }
        self.run.add(
            op="quality",
            backend=name,
            check=f"{layers} layers have two of four",
            case=f"{self.case}, {name}, seed {seed}",
            seed=seed,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            settings={
                "calibration": Path(self.args.calibration).name,
                "samples": ids.shape[0],
                "window": ids.shape[1],
                "batch_size": self.args.batch_size,
            },
            details=details,
            metrics=metrics,
        )
        error = f"{last['before']:.4f}>{last['after']:.4f}" if last else ""
        note = " ".join(f"{k} {v}" for k, v in shown.items())
        self.lines.append(
            (name, f"{value:.2f}", f"{seconds:.1f}", f"{peak:.1f}", str(seed), error, note)
        )
        self.run.say(f"{name}, seed {seed}: {value:.3f} in {seconds:.1f} s  {error}  {note}")

    def perplexity(self, model: Any) -> float:
        """In float32, of a model that is the caller's to spend."""
        model = model.to(self.run.device)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        window = min(self.window, self.test.numel())
        return sparsekern.perplexity(model, self.test, window=window, batch_size=2)

    def reset_peak(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def show(self) -> None:
        head = ("row", "perplexity", "seconds", "GB", "seed", "held-out error", "")
        widths = [max(len(line[i]) for line in [head, *self.lines]) for i in range(len(head))]
        for line in [head, *self.lines]:
            print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
        by_name: dict[str, list[float]] = {}
        for entry in self.run.records:
            by_name.setdefault(entry["backend"], []).append(entry["metrics"]["perplexity"])
        for name, values in by_name.items():
            if len(values) > 1:
                mean, spread = statistics.fmean(values), statistics.stdev(values)
                print(f"{name}: {mean:.2f} +- {spread:.2f} over {len(values)} seeds")


def check_24(model: Any) -> int:
    """How many linear layers are 2:4; RuntimeError when none is."""
    count = 0
    for module in model.modules():
        if is_linear(module):
            weight = dense_weight(module)
            if weight.shape[1] % 4 == 0:
                kept = (weight != 0).reshape(-1, 4).sum(1)
                count += int(kept.max()) <= 2
    if not count:
        raise RuntimeError("bench quality: expected 2:4 layers, got none.")
    return count


def _short(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fits as they go into a record."""
    return [
        {
            "blocks": [row["blocks"][0], row["blocks"][-1]],
            "before": round(row["before"], 6),
            "after": round(row["after"], 6),
            "epochs": row["epochs"],
            "steps": row["steps"],
            "kept": row["kept"],
            "seconds": round(row["seconds"], 2),
            "part": row["part"],
        }
        for row in rows
    ]
