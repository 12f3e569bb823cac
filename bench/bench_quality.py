"""What each part of the pruner is worth: perplexity, seconds and memory, one row per variant.

    python -m bench quality --gguf SmolLM2-135M-Instruct.Q4_1.gguf --calibration c4.utf8 \\
        --test wiki.test.raw --runs fast,default,best
    python -m bench quality ... --explore --budget 230 --eval-windows 48   # rates, targets, spans

A row is prune_model on a fresh copy of the model (GGUF rounded to bfloat16), calibrated on the
calibration text alone, and perplexity in float32 of the weights as they are stored, by the WikiText
protocol. `seconds` is the whole call, rotation and reconstruction included. Rows are independent:
one that fails, or that is over --row-seconds, is a line of the table and exit code 1. Rotation and
rounds of a row have three quarters of its time (of --row-seconds, or of what --budget leaves,
without the evaluation): they end there with what they have, which `fits` of the record says.

    python -m bench quality ... --matrix c4.utf8,wiki.utf8,code.utf8,technical.utf8

--matrix calibrates on each of the texts, and on all of them in equal shares, and evaluates on the
last --tail bytes of each, which no calibration sees, with the distance of their token frequencies.

Rows of --runs are parts with "+" between them: the presets; published (SparseGPT without refine and
match_dense); reconstruct (each block in the walk); span (all blocks after it); rotate, permute;
admm (the method, else SparseGPT); compile (the rounds after the walk); twice (a text of fewer
windows than --samples is used twice, texts.side_by_side). Rows of --explore train
copies of one model (sparsekern.reconstruct), pruned as --start says, or vary the walk.

--skip repeats each row of --runs with each of these skip rules (oneshot/skip.py): "lm_head" is the
default of prune_model, a file the skip list of a sweep, "random:0.1:3" layers drawn with seed 3
until they have a tenth of the weights.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import random
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsekern
from sparsekern import Reconstruction
from sparsekern.eval import mix, texts
from sparsekern.integrations.loading import load_model
from sparsekern.nn.replace import dense_weight, is_linear
from sparsekern.oneshot.calibration import make_batches
from sparsekern.oneshot.presets import PRESETS
from sparsekern.oneshot.rotation_stream import find_stream
from sparsekern.oneshot.rounds import as_rounds

from .options import Run, Watch, parser, timed, told, watchdog

WINDOW = 2048
LATE = 20.0  # seconds after the budget at which the process ends, whatever it does
SHARE = 0.75  # of a row's time, for its rotation and rounds
SPAN = Reconstruction(span=None, epochs=4, between=1.0)
BLOCK = Reconstruction(span=1, epochs=4)
LONG = Reconstruction(span=None, epochs=8, between=1.0, recut=True, batch=2)
LATER = dataclasses.replace(LONG, batch=4, epochs=10, compile=True)
# What the names of --runs are put together from, with "+" between them.
PARTS: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in PRESETS},
    "published": {"refine": 0, "match_dense": 0.0},
    "reconstruct": {"reconstruct": BLOCK},
    "span": {"reconstruct": SPAN},
    "rotate": {"rotate": True},
    "permute": {"permute": True},
    "admm": {"method": "admm"},
    "compile": {"compile": True},
    "twice": {"twice": True},
}


def options_of(run: str) -> dict[str, Any]:
    """Keywords of prune_model for a name of --runs; `compile` is for the rounds after the walk."""
    options: dict[str, Any] = {}
    for name in run.split("+"):
        if name not in PARTS:
            raise ValueError(f"bench quality: expected runs in {[*PARTS]}, got {name!r}.")
        options |= PARTS[name]
    return options


def _with(options: Reconstruction, **changes: Any) -> Reconstruction:
    return dataclasses.replace(options, **changes)


def _rounds(options: dict[str, Any]) -> tuple[Reconstruction, ...]:
    """The rounds that these keywords of prune_model mean."""
    preset = PRESETS.get(options.get("preset", ""))
    return as_rounds(options.get("reconstruct", preset.rounds if preset else ()))


# What --explore tries: name -> (seconds it may need on an H200, from the pruned start or by
# prune_model anew, what). The most telling ones are first: the budget ends the list.
EXPLORE: dict[str, tuple[float, str, Any]] = {
    "recut, batch 2, 8 epochs": (35, "start", LONG),
    "channel loss": (35, "start", _with(LONG, loss="channel")),
    "rotate": (35, "prune", {"rotate": True, "untie": True, "reconstruct": BLOCK}),
    "recut, batch 2, reselect": (40, "start", _with(LONG, reselect=0.5)),
    "recut, batch 2, noise": (35, "start", _with(LONG, noise=0.1)),
    "recut, batch 2, lr x 2": (35, "start", _with(LONG, lr=1.2e-3)),
    "recut, batch 4, lr / 4": (45, "start", _with(LATER, lr=1.5e-4)),
    "recut, batch 4, lr / 8": (45, "start", _with(LATER, lr=7.5e-5)),
    "recut, batch 4, lr / 4, noise": (45, "start", _with(LATER, lr=1.5e-4, noise=0.1)),
    "recut, batch 4, lr / 4, end alone": (45, "start", _with(LATER, lr=1.5e-4, between=0.0)),
    "block, channel loss": (25, "prune", {"reconstruct": _with(BLOCK, loss="channel")}),
    "block, lr x 2": (25, "prune", {"reconstruct": _with(BLOCK, lr=1.2e-3)}),
    "block, pruned targets": (25, "prune", {"reconstruct": _with(BLOCK, target="pruned")}),
    "recut, batch 2, end alone": (35, "start", _with(LONG, between=0.0)),
    "recut, batch 8, 8 epochs": (35, "start", _with(LONG, batch=8)),
    "block, sublayers": (35, "prune", {"reconstruct": _with(BLOCK, parts="sublayers")}),
    "rotate 1000 steps": (50, "prune", {"rotate": {"steps": 1000}, "untie": True,
                                        "reconstruct": BLOCK}),
    "recut, batch 2, compiled": (60, "start", _with(LONG, compile=True)),
    "windows of 4": (35, "start", _with(SPAN, span=4, epochs=3)),
}  # fmt: skip


def make_parser():
    result = parser("quality", "Perplexity of every variant of the pruner.", budget=540)
    source = result.add_mutually_exclusive_group()
    source.add_argument("--gguf", metavar="FILE", help="a .gguf file")
    source.add_argument("--model", metavar="DIR", help="a folder of safetensors files")
    result.add_argument("--calibration", default="builtin", metavar="FILE|hf:NAME|builtin")
    result.add_argument("--test", default="builtin", metavar="FILE|hf:NAME|builtin")
    result.add_argument("--runs", default="fast,default", metavar="NAME,...")
    result.add_argument("--skip", default="", metavar="RULE,...", help="each with every run")
    result.add_argument("--explore", action="store_true", help="the table of EXPLORE, not --runs")
    result.add_argument("--only", default="", metavar="TEXT,...", help="rows of --explore with it")
    result.add_argument("--start", default="reconstruct", metavar="NAME", help="of --explore")
    result.add_argument("--matrix", default="", metavar="FILE,...", help="not --runs, see above")
    result.add_argument("--tail", type=int, default=120_000, help="bytes (default 120000)")
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
        options_of(name)
    start = options_of(args.start)
    if start.get("rotate") or start.get("preset") == "best":
        raise ValueError(
            f"bench quality: expected --start without rotation, got {args.start!r}: its blocks are "
            "trained to those of the model as it is."
        )
    run = Run(path, args)
    table = Table(run, args)
    with watchdog(args.budget + 120), Watch(run, args.budget + LATE, table.rescue):
        if args.matrix:
            table.matrix()
        elif args.explore:
            table.explore()
        else:
            table.rows()
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
        begin, self.name = time.perf_counter(), "dense"
        with run.phase("dense evaluation"):
            self.dense = self.perplexity(copy.deepcopy(self.model).to(run.device))
        self.evaluation = time.perf_counter() - begin
        self.lines.append(("dense", f"{self.dense:.2f}", "", "", "", "", ""))
        run.say(f"dense: {self.dense:.3f}")

    # ------------------------------------------------------------------------------------ the rows

    def rows(self) -> None:
        for seed in range(self.args.seeds):
            for name in self.args.runs.split(","):
                options = options_of(name)
                preset = PRESETS.get(options.get("preset", ""))
                if options.get("rotate") or (preset and preset.rotate):
                    options["untie"] = True
                if self.run.left < 0:
                    self.run.say(f"no time for {name}, seed {seed}")
                    continue
                samples = self.args.samples or (preset.samples if preset else 128)
                apart = preset is None or preset.side_by_side
                for rule in self.args.skip.split(","):
                    shown = f"{name}, skip {Path(rule).name}" if rule else name
                    more = {"skip": skip_rules(self.model, rule)} if rule else {}
                    with self.row(shown, seed):
                        self.prune(shown, options | more, seed, samples, apart)

    def explore(self) -> None:
        """Everything with the windows of the text side by side, one seed."""
        samples, start = self.args.samples or 256, None
        wanted = [text for text in self.args.only.split(",") if text]
        options = options_of(self.args.start)
        with self.row(self.args.start, 0):
            start, _ = self.prune(self.args.start, options, 0, samples, True)
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

    def matrix(self) -> None:
        """The preset of --runs, calibrated on each text and on all of them, evaluated on each."""
        preset = self.args.runs.split(",")[0]
        train, tails = {}, {}
        for name in self.args.matrix.split(","):
            raw = "".join(texts.read_rows(name, "train")).encode()
            label, cut = Path(name).name, self.args.tail
            head, tail = raw[:-cut].decode("utf-8", "ignore"), raw[-cut:].decode("utf-8", "ignore")
            train[label] = texts.tokenize(self.tokenizer, head)
            tails[label] = texts.tokenize(self.tokenizer, tail)
        tails[Path(self.args.test).name] = self.test
        samples = self.args.samples or 32
        rows = {
            label: texts.side_by_side(ids, samples, self.window, 0) for label, ids in train.items()
        }
        count = min(ids.shape[0] for ids in rows.values())
        rows = {label: ids[:count] for label, ids in rows.items()}
        part = max(1, count // len(rows))
        rows["blend"] = torch.cat([ids[:part] for ids in rows.values()])
        dense = copy.deepcopy(self.model).to(self.run.device)
        values = {label: self.perplexity(copy.deepcopy(dense), ids) for label, ids in tails.items()}
        self.lines.append(("dense on each", *_cells(values)))
        for label, ids in rows.items():
            if self.run.left < 0:
                self.run.say(f"no time for {label}")
                continue
            with self.row(label, 0):
                self.calibrated_on(label, ids, tails, values, preset)

    def calibrated_on(
        self,
        label: str,
        ids: torch.Tensor,
        tails: dict[str, torch.Tensor],
        dense: dict[str, float],
        preset: str,
    ) -> None:
        """One row of the matrix; recorded."""
        model = copy.deepcopy(self.model).to(self.run.device)
        report = sparsekern.prune_model(
            model, None, ids, compress=False, device=self.run.device, preset=preset,
            untie=preset == "best", progress=False, undo=False,
            **{k: v for k, v in self.limited({"preset": preset}).items() if k != "preset"},
        )  # fmt: skip
        layers = check_24(model)
        values = {n: self.perplexity(copy.deepcopy(model), test) for n, test in tails.items()}
        known = mix.sketch(ids)
        apart = {name: round(mix.distance(known, test), 4) for name, test in tails.items()}
        self.run.add(
            op="calibration",
            backend=label,
            check=f"{layers} layers have two of four",
            case=f"{self.source.name}, calibrated on {label}, {preset}",
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            settings={"samples": ids.shape[0], "window": ids.shape[1], "preset": preset},
            details={"dense": dense, "distance": apart},
            metrics={"seconds": round(report.seconds, 2)}
            | {f"perplexity {name}": round(value, 4) for name, value in values.items()},
        )
        self.lines.append((label, *_cells(values)))
        self.run.say(f"{label}: {values}; distance {apart}")

    @contextlib.contextmanager
    def row(self, name: str, seed: int) -> Iterator[None]:
        """One row, whatever becomes of it."""

        def over(number: int, frame: Any) -> None:
            raise TimeoutError(f"over its {seconds:.0f} s, in phase {self.run.now}")

        self.name, seconds = name, max(0.1, min(self.args.row_seconds, self.run.left))
        self.end = time.perf_counter() + seconds
        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, seconds)
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

    def rescue(self, why: str) -> None:
        """A record that says which row was not finished."""
        self.run.add(
            op="quality_stopped",
            backend=self.name,
            check=f"not finished: {why}",
            case=f"{self.case}, {self.name}, stopped",
            details={"why": why, "phase": self.run.now, "phases": dict(self.run.phases)},
            metrics={"dense": round(self.dense, 4), "seconds": round(self.run.elapsed, 1)},
        )
        self.run.say(f"{why}: {self.name} is not finished, phase {self.run.now or 'none'}")
        self.show()

    @functools.cached_property
    def rotates(self) -> bool:
        """Whether the model allows a preset's rotation. One with a time is asked for by hand, and
        is refused where the preset leaves its own out."""
        probe = make_batches(self.windows(0, 1, True), self.model, 1, torch.device("cpu"))[0]
        try:
            with torch.no_grad():
                find_stream(self.model, probe.probe(), torch.device("cpu"))
        except ValueError as error:
            self.run.say(f"no rotation: {error}")
            return False
        return True

    def limited(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options with times for rotation and rounds."""
        preset, rounds = PRESETS.get(options.get("preset", "")), _rounds(options)
        turn = options.get("rotate", preset is not None and preset.rotate and self.rotates)
        if not rounds and not turn:
            return options
        left = self.end - time.perf_counter() - self.evaluation
        made = timed(rounds, bool(turn), SHARE * left)
        if isinstance(turn, dict):
            made["rotate"] |= turn
        return {**options, **made}

    def windows(self, seed: int, samples: int, apart: bool, twice: bool = False) -> torch.Tensor:
        """Calibration windows: side by side, or at random places as published."""
        if apart:
            return texts.side_by_side(self.train, samples, self.window, seed, twice)
        return texts.calibration_windows(self.train, samples, self.window, seed)

    def prune(self, name: str, options: dict[str, Any], seed: int, samples: int, apart: bool):
        """(the pruned model, its report) of one prune_model; recorded."""
        model = copy.deepcopy(self.model).to(self.run.device)
        options = dict(options)
        ids = self.windows(seed, samples, apart, options.pop("twice", False))
        method, compiled = options.pop("method", None), options.pop("compile", False)
        rounds = _rounds(options)
        if rounds and (seed or compiled):
            options["reconstruct"] = [
                _with(r, seed=r.seed + seed, compile=r.compile or (compiled and r.span != 1))
                for r in rounds
            ]
        options = self.limited(options)
        self.reset_peak()
        with self.run.phase(f"{name}: prune_model"), told(self.run):
            report = sparsekern.prune_model(
                model,
                method,
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
            "method": report.method,
            "options": report.options,
            "rotation": report.rotation,
            "permutation": report.permutation,
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
        left = self.end - begin - self.evaluation
        options = _with(options, seconds=max(0.1, SHARE * left))
        with self.run.phase(f"{name}: reconstruct"), told(self.run):
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
        with self.run.phase(f"{name}: evaluation"):
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
        error = ""
        if last:
            error = f"{last['before']:.4f}>{last['after']:.4f} (train {last['train']:.4f})"
        note = " ".join(f"{k} {v}" for k, v in shown.items())
        self.lines.append(
            (name, f"{value:.2f}", f"{seconds:.1f}", f"{peak:.1f}", str(seed), error, note)
        )
        self.run.say(f"{name}, seed {seed}: {value:.3f} in {seconds:.1f} s  {error}  {note}")

    def perplexity(self, model: Any, ids: torch.Tensor | None = None) -> float:
        """In float32, of a model that is the caller's to spend."""
        ids = self.test if ids is None else ids
        model = model.to(self.run.device)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        window = min(self.window, ids.numel())
        return sparsekern.perplexity(model, ids, window=window, batch_size=2)

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
            if entry["op"] == "quality":
                by_name.setdefault(entry["backend"], []).append(entry["metrics"]["perplexity"])
        for name, values in by_name.items():
            if len(values) > 1:
                mean, spread = statistics.fmean(values), statistics.stdev(values)
                print(f"{name}: {mean:.2f} +- {spread:.2f} over {len(values)} seeds")


def _cells(values: dict[str, float]) -> tuple[str, ...]:
    """One line of the table for a row of the matrix."""
    return ("", "", "", "", "", " ".join(f"{name} {value:.2f}" for name, value in values.items()))


def skip_rules(model: nn.Module, rule: str) -> str | list[str]:
    """A rule of --skip as prune_model takes it; random:SHARE:SEED is drawn here."""
    if not rule.startswith("random:"):
        return rule
    share, seed = rule.split(":")[1:]
    head = model.get_output_embeddings()
    sizes = {
        n: m.weight.numel() for n, m in model.named_modules() if is_linear(m) and m is not head
    }
    names, left = sorted(sizes), float(share) * sum(sizes.values())
    random.Random(int(seed)).shuffle(names)
    chosen = ["lm_head"]
    for name in names:
        if sizes[name] <= left:
            chosen.append(name)
            left -= sizes[name]
    return chosen


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
            "train": round(row["train"], 6) if row["train"] == row["train"] else None,
            "epochs": row["epochs"],
            "steps": row["steps"],
            "kept": row["kept"],
            "seconds": round(row["seconds"], 2),
            "part": row["part"],
            "stopped": row["stopped"],
        }
        for row in rows
    ]
