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
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern import SparseLinear
from sparsekern.finetune import data, schedule
from sparsekern.finetune.metrics import read_metrics
from sparsekern.finetune.trainer import distill
from sparsekern.oneshot.presets import PRESETS

from .options import Run, Watch, parser, told, watchdog
from .recovery import STARTS, Evaluated, Material, add_options, finite, shown, synchronise

KINDS = {"magnitude": "Magnitude", "sr-ste": "SRSTE", "rigl": "RigL"}
LAST = 5.0  # seconds before the limit at which the process ends, whatever it does
AFTERWARDS = 10.0  # seconds that checks and the record take after the last evaluation, and LAST
START_WINDOWS = 24  # of each text, that a start is evaluated on where there is a limit
GROWTH = 1.2  # a last evaluation may take this many times the dense one


def make_parser():
    result = parser("finetune", "Recover a pruned model by masked distillation.", budget=540)
    add_options(result, teacher_seconds=60.0)
    result.add_argument(
        "--start",
        "--starts",  # torchrun would take --start for an option of its own
        default="sparsegpt",
        metavar="NAME,...",
        help=f"of {', '.join(STARTS)}",
    )
    per_start = "; one number, or one for each start"
    result.add_argument("--minutes", default="4", metavar="N,...", help="of training" + per_start)
    result.add_argument("--steps", type=int, help="instead of --minutes")
    result.add_argument("--lr", default="6e-4", metavar="N,...", help="highest rate" + per_start)
    result.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW (default 0)")
    result.add_argument("--block", type=float, default=0.0)
    result.add_argument("--schedule", default="frozen", choices=("frozen", *KINDS))
    result.add_argument("--freeze-at", type=int, default=500)
    result.add_argument("--baseline", action="store_true", help="time dense training, too")
    result.add_argument("--save", type=Path, metavar="DIR", help="keep the compressed models")
    result.add_argument("--work", type=Path, metavar="DIR", help="metrics, plot, report")
    result.add_argument("--resume", type=Path, metavar="DIR", help="checkpoints to go on from")
    result.add_argument(
        "--start-windows",
        type=int,
        metavar="N",
        help=f"of each text, for the starts; 0: all (default: {START_WINDOWS} with a limit)",
    )
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


class Recovery(Material):
    """One model and one text, training runs from several starts, a record for each."""

    def __init__(self, run: Run, args: Any):
        super().__init__(run, args)
        self.state: dict[str, Any] = {}  # of the start that runs: what `rescue` records
        self.stopped = 0  # records of that kind

    def measure(self) -> int:
        args = self.args
        self.prepare()
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
                dense = shown(self.dense.values(begun))
                self.say(f"{start}: dense {dense}; pruned {shown(begun.values())}")
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
                self.teacher if args.alpha < 1 or args.block else None,
                self.corpus,
                schedule=moving,
                folder=folder,
                resume=args.resume is not None,
                # A run of so many steps without a folder is ended by the watch alone.
                limit_seconds=limit if folder is not None or args.steps is None else None,
                shorten=args.resume is None and args.steps is None and limit is not None,
                device=run.device,
                progress=False,
                steps=args.steps,
                minutes=None if args.steps else args.minutes[number],
                batch=args.batch,
                micro_batch=args.micro_batch,
                lr=args.lr[number],
                weight_decay=args.weight_decay,
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
        metrics = {f"perplexity {name}": finite(value) for name, value in values.items()}
        metrics |= {f"start {name}": finite(v) for name, v in begun.values().items()}
        dense = self.dense.values(None if final.whole else final)
        metrics |= {f"dense {name}": finite(value) for name, value in dense.items()}
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
        self.say(f"{start}: {shown(values)} after {metrics['minutes']} minutes, {report.tokens} "
                f"tokens at {metrics['tokens_per_s']} tokens/s: recorded")  # fmt: skip
        if done is not None:
            done.write_text(json.dumps(record))
        if args.save:
            place = args.save / start if len(args.starts) > 1 else args.save
            sparsekern.save_pretrained(student.cpu(), place, tokenizer=self.tokenizer)
        return 0

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
        metrics: dict[str, Any] = {f"dense {name}": finite(v) for name, v in dense.items()}
        metrics |= {f"start {name}": finite(v) for name, v in state.get("begun", {}).items()}
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

    def dense_speed(self, corpus: data.Corpus, steps: int = 20) -> float:
        """Tokens a second of plain dense training: bf16 autocast, torch.compile, cross-entropy."""
        args, device = self.args, self.run.device
        model = copy.deepcopy(self.teacher).float().requires_grad_(True).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=device.type == "cuda")
        compiled = torch.compile(model) if args.compile else model
        begin = 0.0
        for step in range(steps + 3):
            if step == 3:
                synchronise(device)
                begin = time.perf_counter()
            numbers = data.batch_rows(corpus.rows.shape[0], args.batch, 0, step)
            ids = corpus.rows[numbers].to(device, torch.int64)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16 is not None):
                loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronise(device)
        return steps * args.batch * args.window / (time.perf_counter() - begin)


class _NoTime(Exception):
    """--limit-seconds leaves a start too little."""
