"""Recovery of a real model: pruned, trained for some minutes under its masks, evaluated.

    python -m bench finetune --gguf SmolLM2-135M-Instruct.Q4_1.gguf \\
        --train c4.utf8,wiki.utf8,code.utf8,technical.utf8 --held-out c4.utf8,code.utf8 \\
        --test wiki.test.raw --start sparsegpt,magnitude --minutes 4,2 --compile --cache DIR

The dense model is the teacher; nothing else supervises (--alpha adds cross-entropy). Training text
is the files, without the held-out tails of some (the last --tail bytes), and text that the teacher
samples for at most --teacher-seconds, half of its rows begun with 16 tokens of the training text.
Rows that share a 13-gram with any evaluation text are left out, and counted.

Model, text and compiled code are shared by all starts; each start appends its record when it is
finished. --cache keeps sampled text and pruned weights for a later call, --resume checkpoints of
training. --limit-seconds is for the whole process: without --resume the runs are shortened so that
every start ends, with its rates falling to zero, in equal parts of what is left, the last
evaluation (as long as the dense one took) and the record kept back; with --resume training stops
with a checkpoint, and the same call goes on. A last evaluation that is out of time covers the first
windows of each text, which case and details say. At the limit less 5 s, and on SIGTERM, a record of
op finetune_stopped says how far it came, whatever the process is doing; on SIGTERM training ends
with its step, and what 10 s allow is evaluated.

On several GPUs: torchrun --nproc-per-node N -m bench finetune --starts ..., with --cache: the first
process samples, prunes, evaluates and records, and --batch is that of all together.

Starts: magnitude, wanda and sparsegpt, layer by layer, calibrated on windows of --calibration; and
prune_model's presets default and best, calibrated on windows of all training texts.

Perplexities are computed in float32 from the weights as they are stored (bfloat16): the test by
the WikiText protocol (rows joined with a blank line, windows of 2048 side by side), held-out tails
as they are; those of the start, with a limit, over the first --start-windows of each text.
`minutes` counts training from the end of the first step; `gpu_seconds` pruning, sampling and
training.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern import SparseLinear
from sparsekern.eval import texts
from sparsekern.finetune import data, schedule
from sparsekern.finetune.metrics import read_metrics
from sparsekern.finetune.trainer import distill, eval_batch
from sparsekern.integrations.loading import load_model
from sparsekern.oneshot.presets import PRESETS

from .options import Run, Watch, parser, timed, told, watchdog

PROMPT, SAMPLE = 16, 512  # tokens that a prompt has, and that a sampled text has
KINDS = {"magnitude": "Magnitude", "sr-ste": "SRSTE", "rigl": "RigL"}
STARTS = ("sparsegpt", "magnitude", "wanda", "default", "best")
LAST = 5.0  # seconds before the limit at which the process ends, whatever it does
AFTERWARDS = 10.0  # seconds that checks and the record take after the last evaluation, and LAST
START_WINDOWS = 24  # of each text, that a start is evaluated on where there is a limit
GROWTH = 1.2  # a last evaluation may take this many times the dense one


def make_parser():
    result = parser("finetune", "Recover a pruned model by masked distillation.", budget=540)
    source = result.add_mutually_exclusive_group()
    source.add_argument("--gguf", metavar="FILE", help="a .gguf file")
    source.add_argument("--model", metavar="DIR", help="a folder of safetensors files")
    result.add_argument("--train", default="builtin", metavar="FILE,...")
    result.add_argument("--held-out", default="", metavar="FILE,...", help="of --train: keep tails")
    result.add_argument("--tail", type=int, default=120_000, help="bytes (default 120000)")
    result.add_argument("--test", default="builtin", metavar="FILE")
    result.add_argument("--eval-window", type=int, default=2048)
    result.add_argument(
        "--start",
        "--starts",  # torchrun would take --start for an option of its own
        default="sparsegpt",
        metavar="NAME,...",
        help=f"of {', '.join(STARTS)}",
    )
    result.add_argument("--calibration", metavar="FILE", help="default: the first of --train")
    result.add_argument("--samples", type=int, help="default: 128, or the preset's")
    per_start = "; one number, or one for each start"
    result.add_argument("--minutes", default="4", metavar="N,...", help="of training" + per_start)
    result.add_argument("--steps", type=int, help="instead of --minutes")
    result.add_argument("--teacher-seconds", type=float, default=60.0)
    result.add_argument("--teacher-tokens", type=int, metavar="N", help="no more than N sampled")
    result.add_argument("--teacher-rows", type=int, default=4096, help="sampled at once")
    result.add_argument(
        "--sample-window", type=int, default=SAMPLE, help=f"tokens of a row (default {SAMPLE})"
    )
    result.add_argument("--window", type=int, default=1024)
    result.add_argument("--batch", type=int, default=16)
    result.add_argument("--micro-batch", type=int)
    result.add_argument("--lr", default="6e-4", metavar="N,...", help="highest rate" + per_start)
    result.add_argument("--alpha", type=float, default=0.0)
    result.add_argument("--block", type=float, default=0.0)
    result.add_argument("--schedule", default="frozen", choices=("frozen", *KINDS))
    result.add_argument("--freeze-at", type=int, default=500)
    result.add_argument("--compile", action="store_true")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--baseline", action="store_true", help="time dense training, too")
    result.add_argument("--save", type=Path, metavar="DIR", help="keep the compressed models")
    result.add_argument("--work", type=Path, metavar="DIR", help="metrics, plot, report")
    result.add_argument("--cache", type=Path, metavar="DIR", help="sampled text, pruned weights")
    result.add_argument("--resume", type=Path, metavar="DIR", help="checkpoints to go on from")
    result.add_argument(
        "--start-windows",
        type=int,
        metavar="N",
        help=f"of each text, for the starts; 0: all (default: {START_WINDOWS} with a limit)",
    )
    result.add_argument("--limit-seconds", type=float, metavar="N", help="for the whole process")
    return result


def main(path, arguments=()) -> int:
    options = make_parser()
    args = options.parse_args(list(arguments))
    args.starts = args.start.split(",")
    if unknown := set(args.starts) - set(STARTS):
        options.error(f"argument --start: no start {', '.join(sorted(unknown))}")
    for name in ("minutes", "lr"):
        numbers = [float(number) for number in getattr(args, name).split(",")]
        if len(numbers) not in (1, len(args.starts)):
            options.error(f"argument --{name}: one number, or one for each start")
        setattr(args, name, numbers * (len(args.starts) if len(numbers) == 1 else 1))
    if not (args.gguf or args.model):
        print("bench finetune: give --gguf FILE or --model DIR; nothing was measured.", flush=True)
        return 0
    parallel = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if parallel and args.cache is None:
        options.error("argument --cache: needed with several processes, which share it")
    if args.device == "cuda" and parallel:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if parallel:
        torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    run = Run(path, args)
    longest = args.limit_seconds or sum(args.minutes) * 60 + args.budget
    if args.start_windows is None:
        args.start_windows = START_WINDOWS if args.limit_seconds else 0
    recovery = Recovery(run, args)
    last = None if args.limit_seconds is None else args.limit_seconds - LAST
    with watchdog(longest + 300), Watch(run, last, recovery.rescue) as watch:
        recovery.watch = watch
        code = recovery.measure()
    if parallel:
        torch.distributed.destroy_process_group()
    run.close()
    return code


@dataclass
class Evaluated:
    """Perplexities over windows, batch by batch.

    sums: name of a text -> [windows, sum of their mean cross-entropies] of each batch, in order.
    windows: how many each text has.      seconds: that it took.
    """

    sums: dict[str, list[list[float]]] = field(default_factory=dict)
    windows: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def used(self) -> dict[str, int]:
        """Windows of each text that it covers."""
        return {name: int(sum(n for n, _ in rows)) for name, rows in self.sums.items()}

    @property
    def whole(self) -> bool:
        return self.used() == self.windows

    def values(self, like: Evaluated | None = None) -> dict[str, float]:
        """Perplexity of each text; over the batches that `like` has, too."""
        found = {}
        for name, rows in self.sums.items():
            rows = rows if like is None else rows[: len(like.sums[name])]
            mean = sum(total for _, total in rows) / sum(n for n, _ in rows)
            found[name] = math.exp(mean) if mean < 700 else math.inf
        return found

    def per_window(self) -> float:
        """Seconds."""
        return self.seconds / max(1, sum(self.used().values()))


class Recovery:
    """One model and one text, training runs from several starts, a record for each."""

    def __init__(self, run: Run, args: Any):
        self.run, self.args = run, args
        self.bf16 = torch.bfloat16 if run.device.type == "cuda" else None
        self.parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.first = not self.parallel or torch.distributed.get_rank() == 0
        self.source = Path(args.gguf or args.model)
        self.watch: Watch | None = None
        self.state: dict[str, Any] = {}  # of the start that runs: what `rescue` records
        self.stopped = 0  # records of that kind
        self.dense = Evaluated()
        with run.phase("load"):
            self.load()
        counts = {name: ids.numel() for name, ids in self.tests.items()}
        self.say(f"evaluation tokens {counts}")

    def load(self) -> None:
        """The teacher, and the texts as ids."""
        args = self.args
        self.teacher, self.tokenizer = load_model(self.source, "cpu", None)
        self.teacher.to(self.run.device)
        names = args.train.split(",")
        tails = set(filter(None, args.held_out.split(",")))
        if unknown := tails - set(names):
            raise ValueError(f"bench finetune: --held-out {sorted(unknown)} are not in --train.")
        self.train_ids: dict[str, torch.Tensor] = {}
        self.tests = {Path(args.test).name: self._test_ids()}
        for name in names:
            text = "".join(texts.read_rows(name, "train"))
            if name in tails:
                raw = text.encode()
                text = raw[: -args.tail].decode("utf-8", "ignore")
                tail = raw[-args.tail :].decode("utf-8", "ignore")
                self.tests[f"{Path(name).name} tail"] = texts.tokenize(self.tokenizer, tail)
            self.train_ids[Path(name).name] = texts.tokenize(self.tokenizer, text)

    def say(self, text: str) -> None:
        """Progress, of the first process."""
        if self.first:
            self.run.say(text)

    def wait(self) -> None:
        """Until every process is here."""
        if self.parallel:
            torch.distributed.barrier()

    def in_turn(self, function, *arguments: Any):
        """The function's result; of several processes the first one calls it first and leaves in
        --cache what the others then find."""
        if not self.first:
            self.wait()
        result = function(*arguments)
        if self.first:
            self.wait()
        return result

    def _test_ids(self) -> torch.Tensor:
        rows = texts.read_rows(self.args.test, "test")
        text = "".join(rows) if self.args.test == "builtin" else texts.join_rows(rows)
        return texts.tokenize(self.tokenizer, text)

    def measure(self) -> int:
        args = self.args
        with self.run.phase("dense evaluation"):
            if self.first:
                self.dense = self.remembered("dense", self.teacher, 0)
        self.say(f"dense: {_shown(self.dense.values())}")
        begin = time.perf_counter()
        self.corpus, self.dropped, self.made = self.in_turn(self.make_corpus)
        self.seconds_sample = time.perf_counter() - begin
        self.say(
            f"{self.corpus.tokens} training tokens, {self.made} of them the teacher's, "
            f"{self.seconds_sample:.1f} s, {self.dropped} rows with test text left out"
        )
        self.dense_tokens_per_s = None
        if args.baseline and self.first:
            self.dense_tokens_per_s = round(self.dense_speed(self.corpus))
            self.say(f"dense training: {self.dense_tokens_per_s} tokens/s")
        code = 0
        # Every start is a model of its own to the compiler.
        with torch._dynamo.config.patch(recompile_limit=64):
            for number, start in enumerate(args.starts):
                left = len(args.starts) - number
                try:
                    code |= self.one(number, start, left)
                except _NoTime as error:
                    self.say(f"{start}: {error}; training is not begun")
                    self.rescue(str(error))
                    code = 1
                if self.watch is not None and self.watch.asked:
                    return 1
        return code

    def one(self, number: int, start: str, left: int) -> int:
        """One start: 0 when its record is written."""
        run, args = self.run, self.args
        begin = time.perf_counter()
        self.state = {"start": start}
        kept = args.resume or args.work
        folder = kept / f"{number}-{start}" if kept else None
        done = None if args.resume is None else args.resume / f"{number}-{start}" / "record.json"
        if done is not None and done.exists():
            self.say(f"{start}: finished, see {done}")
            return 0
        with run.phase(f"{start}: prune"), told(run):
            student, seconds_prune = self.in_turn(self.prune, start, left)
        begun = Evaluated()
        with run.phase(f"{start}: start's evaluation"):
            if self.first:
                begun = self.remembered(f"start-{start}", student, args.start_windows)
                self.state["begun"] = begun.values()
                shown = _shown(self.dense.values(begun))
                self.say(f"{start}: dense {shown}; pruned {_shown(begun.values())}")
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        moving = None
        if args.schedule != "frozen":
            moving = schedule.KINDS[KINDS[args.schedule]](freeze_at=args.freeze_at)
        share = self.share(left)
        limit = self.limit(share)
        self.told = run.elapsed
        with run.phase(f"{start}: train"):
            report = distill(
                student,
                self.teacher,
                self.corpus,
                schedule=moving,
                folder=folder,
                resume=args.resume is not None,
                # A run of so many steps without a folder is ended by the watch alone.
                limit_seconds=limit if folder is not None or args.steps is None else None,
                shorten=args.resume is None and args.steps is None,
                device=run.device,
                progress=False,
                steps=args.steps,
                minutes=None if args.steps else args.minutes[number],
                batch=args.batch,
                micro_batch=args.micro_batch,
                lr=args.lr[number],
                alpha=args.alpha,
                block=args.block,
                compile=args.compile,
                seed=args.seed,
                log_every=20,
                on_step=self.on_step,
            )
        self.say(f"{start}: first step, compiled: {report.first_step:.1f} s; {report.summary()}")
        if report.violations or report.masked is None:
            self.say(f"FAILED: {report.violations} violations of the masks")
            return 1
        if report.stopped:
            self.say(
                f"{start}: stopped at step {report.steps}; the same call goes on from {folder}"
            )
            return 0
        if not self.first:
            return 0
        with run.phase(f"{start}: last evaluation"):  # of the weights as they are stored
            final = self.evaluate(student, 0, None if share is None else share - AFTERWARDS)
        with run.phase(f"{start}: compress and verify"):
            layers = report.masked.compress()
            count = 0
            for module in student.modules():
                if isinstance(module, SparseLinear):
                    sparsekern.verify(module.weight)
                    count += 1
        processes = torch.distributed.get_world_size() if self.parallel else 1
        values = final.values()
        metrics = {f"perplexity {name}": _number(value) for name, value in values.items()}
        metrics |= {f"start {name}": _number(v) for name, v in begun.values().items()}
        dense = self.dense.values(None if final.whole else final)
        metrics |= {f"dense {name}": _number(value) for name, value in dense.items()}
        metrics |= {
            "minutes": round(report.seconds / 60, 3),
            "steps": report.steps,
            "tokens": report.tokens,
            "tokens_per_s": round(report.tokens_per_second),
            "gpu_seconds": round(
                seconds_prune + self.seconds_sample + processes * report.seconds, 1
            ),
            "processes": processes,
            "wall_seconds": round(time.perf_counter() - begin, 1),
        }
        if run.device.type == "cuda":
            metrics["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if self.dense_tokens_per_s:
            metrics["dense_training_tokens_per_s"] = self.dense_tokens_per_s
        finished = [row for row in read_metrics(folder) if "loss" in row] if folder else []
        thin = max(1, len(finished) // 20)
        part = "" if final.whole else f", the first {max(final.used().values())} windows"
        record = run.add(
            op="finetune",
            backend=start,
            check=f"0 violations, {count} layers verified",
            case=self.case + part,
            seed=args.seed,
            dtype="bfloat16" if self.bf16 else "float32",
            settings={
                **{k: v for k, v in report.recipe.items() if not k.endswith("_every")},
                "schedule": args.schedule,
                "calibration_samples": args.samples
                or (PRESETS[start].samples if start in PRESETS else 128),
                "training_tokens": self.corpus.tokens,
                "sampled_tokens": self.made,
                "rows_left_out": self.dropped,
            },
            details={
                "sources": report.data["sources"],
                "overlap": self.overlap,
                "windows": {"all": final.windows, "last": final.used(), "start": begun.used()},
                "dense_as_start": self.dense.values(begun),
                "left_dense": layers,
                "seconds": {
                    "prune": round(seconds_prune, 1),
                    "sample": round(self.seconds_sample, 1),
                    "first_step": round(report.first_step, 1),
                },
                "phases": run.phases,
                "loss": None if math.isnan(report.loss) else report.loss,
                "losses": [round(row["loss"], 5) for row in finished[::thin]],
                "notes": report.notes,
            },
            metrics=metrics,
        )
        self.state = {}
        self.say(f"{start}: {_shown(values)} after {metrics['minutes']} minutes, {report.tokens} "
                f"tokens at {metrics['tokens_per_s']} tokens/s: recorded")  # fmt: skip
        if done is not None:
            done.write_text(json.dumps(record))
        if args.save:
            place = args.save / start if len(args.starts) > 1 else args.save
            sparsekern.save_pretrained(student.cpu(), place, tokenizer=self.tokenizer)
        return 0

    @property
    def case(self) -> str:
        args = self.args
        return f"{self.source.name}, {Path(args.test).name}, window {args.eval_window}"

    def share(self, left: int) -> float | None:
        """When this start is to be recorded, in seconds of the run; `left` starts are left."""
        if self.args.limit_seconds is None:
            return None
        now = self.run.elapsed
        return now + (self.args.limit_seconds - now) / left

    def limit(self, share: float | None) -> float | None:
        """Seconds that this start's training may take."""
        if share is None:
            return None
        seconds = share - self.run.elapsed - AFTERWARDS - GROWTH * self.dense.seconds
        if self.parallel:  # the first process' clock counts
            shared = torch.tensor(seconds, dtype=torch.float64, device=self.run.device)
            torch.distributed.broadcast(shared, 0)
            seconds = float(shared)
        self.say(f"{seconds:.0f} s for training")
        if seconds < 1:
            raise _NoTime(f"{seconds:.0f} s are left for training")
        return seconds

    def on_step(self, step: int) -> bool:
        """Says how far training is; True ends it: SIGTERM."""
        self.state["steps"] = step
        if step == 1 or self.run.elapsed - self.told > 20:
            self.told = self.run.elapsed
            self.say(f"  step {step}, {step * self.args.batch * self.args.window} tokens")
        return self.watch is not None and self.watch.asked and not self.parallel

    def rescue(self, why: str) -> None:
        """Record how far the start came that runs, where it is not recorded."""
        if not self.first or not (self.state or self.dense.sums):
            return
        args, state, steps = self.args, self.state, self.state.get("steps", 0)
        dense = self.dense.values() if self.dense.sums else {}
        metrics: dict[str, Any] = {f"dense {name}": _number(v) for name, v in dense.items()}
        metrics |= {f"start {name}": _number(v) for name, v in state.get("begun", {}).items()}
        self.stopped += 1
        self.run.add(
            op="finetune_stopped",
            backend=state.get("start", "dense"),
            check=f"not trained to the end: {why}",
            case=f"{self.case}, stopped {self.stopped}",
            seed=args.seed,
            dtype="bfloat16" if self.bf16 else "float32",
            settings={"minutes": args.minutes, "limit_seconds": args.limit_seconds},
            details={"why": why, "phase": self.run.now, "phases": dict(self.run.phases)},
            metrics={
                **metrics,
                "steps": steps,
                "tokens": steps * args.batch * args.window,
                "wall_seconds": round(self.run.elapsed, 1),
            },
        )
        self.say(f"{why}: {steps} steps, phase {self.run.now or 'none'}: recorded as stopped")

    def evaluate(self, model: Any, count: int, until: float | None = None) -> Evaluated:
        """In float32: `count` windows of each text (0: all), the texts in turn; where `until` (of
        the run's seconds) does not allow all, the first ones, at least a batch of each."""
        model = copy.deepcopy(model).float()
        begin, found = time.perf_counter(), Evaluated()
        parts: dict[str, list[torch.Tensor]] = {}
        for name, ids in self.tests.items():
            window = min(self.args.eval_window, ids.numel())
            batch = eval_batch(model, window, self.run.device)
            found.windows[name], found.sums[name] = ids.numel() // window, []
            kept = min(found.windows[name], count or found.windows[name])
            parts[name] = list(ids.flatten()[: kept * window].split(batch * window))
        longest = 0.0
        for number in range(max(map(len, parts.values()))):
            for name in [name for name, rows in parts.items() if number < len(rows)]:
                end = until
                if self.watch is not None and self.watch.asked:
                    end = min(until or math.inf, (self.watch.limit or math.inf) - 3)
                if number and end is not None and self.run.elapsed + longest > end:
                    break
                ids, start = parts[name][number], time.perf_counter()
                window = min(self.args.eval_window, ids.numel())
                windows = ids.numel() // window
                value = sparsekern.perplexity(model, ids, window=window, batch_size=windows)
                found.sums[name].append([windows, windows * math.log(value)])
                longest = time.perf_counter() - start
        found.seconds = time.perf_counter() - begin
        return found

    def remembered(self, what: str, model: Any, count: int) -> Evaluated:
        """`evaluate`, or what --cache has of it."""
        tests = {name: ids.numel() for name, ids in self.tests.items()}
        asked = (f"{what}-evaluated", count, self.args.eval_window, tests)
        if what != "dense":
            asked += (self.args.calibration, self.args.samples, self.args.seed)
        file = self.cached(*asked)
        if file is not None and file.exists():
            return Evaluated(**json.loads(file.read_text()))
        found = self.evaluate(model, count)
        if file is not None:
            file.write_text(json.dumps(asdict(found)))
        return found

    def prune(self, start: str, left: int = 1):
        """(the student with dense 2:4 weights on the device, seconds that pruning took)."""
        args = self.args
        student = copy.deepcopy(self.teacher).requires_grad_(True)  # a teacher is frozen
        file = self.cached(f"start-{start}", args.calibration, args.samples, args.seed)
        if file is not None and file.exists():
            state = torch.load(file, map_location="cpu", weights_only=True)
            if state["untied"]:
                _untie(student)
            student.load_state_dict(state["model"])
            self.say(f"{start}: weights of {file}")
            return student.to(self.run.device), state["seconds"]
        calibration, options = None, {}
        positions = getattr(student.config, "max_position_embeddings", 2048)
        if start in PRESETS:
            ids = torch.cat(list(self.train_ids.values()))
            window = min(2048, positions, ids.numel())
            samples = args.samples or PRESETS[start].samples
            calibration = texts.side_by_side(ids, samples, window, args.seed)
            options = {"preset": start, "untie": True, **self.timed(start, left)}
        elif start != "magnitude":
            name = Path(args.calibration).name if args.calibration else next(iter(self.train_ids))
            ids = self.train_ids[name]
            window = min(2048, positions, ids.numel() - 1)
            calibration = texts.calibration_windows(ids, args.samples or 128, window, args.seed)
        begin = time.perf_counter()
        report = sparsekern.prune_model(
            student,
            None if start in PRESETS else start,
            calibration,
            compress=False,
            device=self.run.device,
            progress=False,
            ranks=False,  # presets train, which one process does
            **options,
        )
        self.say(report.summary())
        seconds = time.perf_counter() - begin
        if file is not None:
            head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
            untied = head.weight is not embedding.weight
            state = {"model": student.state_dict(), "seconds": seconds, "untied": untied}
            torch.save(state, file)
        return student.to(self.run.device), seconds

    def timed(self, start: str, left: int) -> dict[str, Any]:
        """A preset's rounds and rotation, with 40 % of the start's time in all."""
        share, preset = self.share(left), PRESETS[start]
        if share is None:
            return {}
        return timed(preset.rounds, preset.rotate, 0.4 * (share - self.run.elapsed))

    def cached(self, *what: Any) -> Path | None:
        """The file of --cache for this, whatever model and text these are."""
        if self.args.cache is None:
            return None
        self.args.cache.mkdir(parents=True, exist_ok=True)
        ids = {name: ids.numel() for name, ids in self.train_ids.items()}
        stated = json.dumps([str(self.source.resolve()), ids, *what])
        return self.args.cache / f"{what[0]}-{hashlib.sha256(stated.encode()).hexdigest()[:16]}.pt"

    def make_corpus(self):
        """(rows to train on, rows left out because of test text, tokens sampled)."""
        args = self.args
        end = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        if not isinstance(end, int) or end == self.tokenizer.unk_token_id:
            end = self.tokenizer.eos_token_id
        rows = data.pack(list(self.train_ids.values()), args.window, end)
        sources = [data.Source("text", n, ids.numel()) for n, ids in self.train_ids.items()]
        corpus = data.Corpus(rows, sources)
        made = 0
        length = min(args.sample_window, args.window)
        seconds = self.sampling_seconds(length)
        if seconds:
            with self.run.phase("sample"):
                part = data.generate(
                    self.teacher,
                    args.teacher_tokens or 1 << 40,
                    args.seed + 1,
                    window=length,
                    batch=args.teacher_rows,
                    prompts=self.prompts(end, length),
                    seconds=seconds,
                    cache=False if args.cache is None else args.cache,
                    autocast=self.bf16,
                    progress=False,
                )
            self.say(f"sampled: {part.sources[0].details}")
            whole = part.rows.flatten()
            whole = whole[: whole.numel() // args.window * args.window]
            corpus = corpus + data.Corpus(whole.view(-1, args.window), part.sources)
            made = whole.numel()
            if self.run.device.type == "cuda":
                torch.cuda.empty_cache()  # of the sampling
        dropped = 0
        with self.run.phase("text apart from the tests"):
            for ids in self.tests.values():
                corpus, count = data.without_overlap(corpus, ids)
                dropped += count
            rows = corpus.rows
            self.overlap = {n: asdict(data.overlap(rows, i)) for n, i in self.tests.items()}
        return corpus, dropped, made

    def sampling_seconds(self, length: int) -> float:
        """--teacher-seconds, or less where a limit does not leave them; as it was where --cache has
        the text."""
        args = self.args
        file = self.cached("sampled", args.teacher_seconds, args.teacher_rows, length, args.seed)
        if file is not None and file.exists():
            return float(json.loads(file.read_text()))
        seconds = args.teacher_seconds
        if args.limit_seconds is not None:
            seconds = min(seconds, max(1.0, 0.3 * (args.limit_seconds - self.run.elapsed)))
        if file is not None:
            file.write_text(json.dumps(seconds))
        return seconds

    def prompts(self, end: int, length: int, count: int = 1 << 17) -> torch.Tensor:
        """Random windows of the training text and starts alone in turn, int64 [count, PROMPT]."""
        ids = torch.cat(list(self.train_ids.values()))
        size = min(PROMPT, length // 2)
        found = texts.calibration_windows(ids, count, size, self.args.seed)
        found[::2] = -1
        found[::2, 0] = end
        return found

    def dense_speed(self, corpus: data.Corpus, steps: int = 20) -> float:
        """Tokens a second of plain dense training: bf16 autocast, torch.compile, cross-entropy."""
        args, device = self.args, self.run.device
        model = copy.deepcopy(self.teacher).float().requires_grad_(True).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=device.type == "cuda")
        compiled = torch.compile(model) if args.compile else model
        begin = 0.0
        for step in range(steps + 3):
            if step == 3:
                _synchronise(device)
                begin = time.perf_counter()
            numbers = data.batch_rows(corpus.rows.shape[0], args.batch, 0, step)
            ids = corpus.rows[numbers].to(device, torch.int64)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16 is not None):
                loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _synchronise(device)
        return steps * args.batch * args.window / (time.perf_counter() - begin)


class _NoTime(Exception):
    """--limit-seconds leaves a start too little."""


def _untie(model: Any) -> None:
    """A head of its own, as `rotate` makes it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def _number(value: float) -> float | None:
    """As JSON has it."""
    return round(value, 4) if math.isfinite(value) else None


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
