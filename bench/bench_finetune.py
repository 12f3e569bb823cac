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
training. --limit-seconds is for the whole call: without --resume the runs are shortened so that
every start ends, with its rates falling to zero, in equal parts of what is left; with --resume
training stops with a checkpoint, and the same call goes on.

On several GPUs: torchrun --nproc-per-node N -m bench finetune --starts ..., with --cache: the first
process samples, prunes, evaluates and records, and --batch is that of all together.

Starts: magnitude; sparsegpt (the default preset); wanda; best (the best preset without training:
rotate, then sparsegpt).

Perplexities are computed in float32 from the weights as they are stored (bfloat16): the test by
the WikiText protocol (rows joined with a blank line, windows of 2048 side by side), held-out tails
as they are; those of the start and before_rounding are of the weights while they are trained.
`minutes` counts training from the end of the first step; `gpu_seconds` pruning, sampling and
training.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern import SparseLinear
from sparsekern.eval import texts
from sparsekern.finetune import data, schedule
from sparsekern.finetune.trainer import distill, eval_batch, read_metrics
from sparsekern.integrations.loading import load_model

from .options import Run, parser, watchdog

PROMPT, SAMPLE = 16, 512  # tokens that a prompt has, and that a sampled text has
KINDS = {"magnitude": "Magnitude", "sr-ste": "SRSTE", "rigl": "RigL"}
STARTS = ("sparsegpt", "magnitude", "wanda", "best")
AFTERWARDS = 25.0  # seconds that a start takes after its training, and the next one to begin


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
    result.add_argument("--samples", type=int, default=128)
    per_start = "; one number, or one for each start"
    result.add_argument("--minutes", default="4", metavar="N,...", help="of training" + per_start)
    result.add_argument("--steps", type=int, help="instead of --minutes")
    result.add_argument("--teacher-seconds", type=float, default=60.0)
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
    result.add_argument("--limit-seconds", type=float, metavar="N", help="for the whole call")
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
    with watchdog(longest + 300):
        code = Recovery(run, args).measure()
    if parallel:
        torch.distributed.destroy_process_group()
    run.close()
    return code


class Recovery:
    """One model and one text, training runs from several starts, a record for each."""

    def __init__(self, run: Run, args: Any):
        self.run, self.args = run, args
        self.bf16 = torch.bfloat16 if run.device.type == "cuda" else None
        self.parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.first = not self.parallel or torch.distributed.get_rank() == 0
        self.source = Path(args.gguf or args.model)
        self.teacher, self.tokenizer = load_model(self.source, "cpu", None)
        self.teacher.to(run.device)
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
        counts = {name: ids.numel() for name, ids in self.tests.items()}
        self.say(f"evaluation tokens {counts}")

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
        run, args = self.run, self.args
        self.dense = self.perplexities(copy.deepcopy(self.teacher).float()) if self.first else {}
        self.say(f"dense: {_shown(self.dense)}")
        begin = time.perf_counter()
        self.corpus, self.dropped, self.made = self.in_turn(self.make_corpus)
        self.seconds_sample = time.perf_counter() - begin
        self.say(f"{self.corpus.tokens} training tokens, {self.made} of them the teacher's, "
                f"{self.seconds_sample:.1f} s, {self.dropped} rows with test text left out")  # fmt: skip
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
                    self.say(f"{start}: {error}; not begun")
                    code = 1
        return code

    def one(self, number: int, start: str, left: int) -> int:
        """One start: 0 when its record is written."""
        run, args = self.run, self.args
        begin = time.perf_counter()
        kept = args.resume or args.work
        folder = kept / f"{number}-{start}" if kept else None
        done = None if args.resume is None else args.resume / f"{number}-{start}" / "record.json"
        if done is not None and done.exists():
            self.say(f"{start}: finished, see {done}")
            return 0
        student, seconds_prune = self.in_turn(self.prune, start)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        moving = None
        if args.schedule != "frozen":
            moving = schedule.KINDS[KINDS[args.schedule]](freeze_at=args.freeze_at)
        limit = self.limit(left)
        report = distill(
            student,
            self.teacher,
            self.corpus,
            schedule=moving,
            evaluate=self.tests,
            eval_window=args.eval_window,
            folder=folder,
            resume=args.resume is not None,
            limit_seconds=limit,
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
        )
        self.say(f"{start}: dense {_shown(self.dense)}; {report.summary()}")
        if report.violations or report.masked is None:
            self.say(f"FAILED: {report.violations} violations of the masks")
            return 1
        if report.stopped:
            self.say(f"{start}: stopped at step {report.steps}; the same call goes on from {folder}")
            return 0
        if not self.first:
            return 0
        final = self.perplexities(copy.deepcopy(student).float())  # of the weights as stored
        layers = report.masked.compress()
        count = 0
        for module in student.modules():
            if isinstance(module, SparseLinear):
                sparsekern.verify(module.weight)
                count += 1
        processes = torch.distributed.get_world_size() if self.parallel else 1
        first = {name: report.evaluations[0][name] for name in self.tests}
        metrics = {f"perplexity {name}": round(value, 4) for name, value in final.items()}
        metrics |= {f"start {name}": round(value, 4) for name, value in first.items()}
        metrics |= {f"dense {name}": round(value, 4) for name, value in self.dense.items()}
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
        record = run.add(
            op="finetune",
            backend=start,
            check=f"0 violations, {count} layers verified",
            case=f"{self.source.name}, {Path(args.test).name}, window {args.eval_window}",
            seed=args.seed,
            dtype="bfloat16" if self.bf16 else "float32",
            settings={
                **{k: v for k, v in report.recipe.items() if not k.endswith("_every")},
                "schedule": args.schedule,
                "calibration_samples": args.samples,
                "training_tokens": self.corpus.tokens,
                "sampled_tokens": self.made,
                "rows_left_out": self.dropped,
            },
            details={
                "sources": report.data["sources"],
                "overlap": report.overlap,
                "before_rounding": {name: report.final[name] for name in self.tests},
                "left_dense": layers,
                "seconds": {
                    "prune": round(seconds_prune, 1),
                    "sample": round(self.seconds_sample, 1),
                },
                "loss": report.loss,
                "losses": [round(row["loss"], 5) for row in finished[::thin]],
                "notes": report.notes,
            },
            metrics=metrics,
        )
        self.say(f"{start}: {_shown(final)} after {metrics['minutes']} minutes, {report.tokens} "
                f"tokens at {metrics['tokens_per_s']} tokens/s: recorded")  # fmt: skip
        if done is not None:
            done.write_text(json.dumps(record))
        if args.save:
            place = args.save / start if len(args.starts) > 1 else args.save
            sparsekern.save_pretrained(student.cpu(), place, tokenizer=self.tokenizer)
        return 0

    def limit(self, left: int) -> float | None:
        """Seconds that this start's training may take, of those that the call has."""
        if self.args.limit_seconds is None:
            return None
        seconds = (self.args.limit_seconds - self.run.elapsed) / left - AFTERWARDS
        if self.parallel:  # the first process' clock counts
            shared = torch.tensor(seconds, dtype=torch.float64, device=self.run.device)
            torch.distributed.broadcast(shared, 0)
            seconds = float(shared)
        if seconds < 10:
            raise _NoTime(f"{seconds:.0f} s are left for it")
        return seconds

    def perplexities(self, model) -> dict[str, float]:
        found = {}
        for name, ids in self.tests.items():
            window = min(self.args.eval_window, ids.numel())
            batch = eval_batch(model, window, self.run.device)
            found[name] = sparsekern.perplexity(model, ids, window=window, batch_size=batch)
        return found

    def prune(self, start: str):
        """(the student with dense 2:4 weights on the device, seconds that pruning took)."""
        args = self.args
        student = copy.deepcopy(self.teacher).requires_grad_(True)  # a teacher is frozen
        file = self.cached(f"start-{start}", args.calibration, args.samples, args.seed)
        if file is not None and file.exists():
            state = torch.load(file, map_location="cpu", weights_only=True)
            if start == "best":
                _untie(student)
            student.load_state_dict(state["model"])
            self.say(f"{start}: weights of {file}")
            return student.to(self.run.device), state["seconds"]
        calibration = None
        if start != "magnitude":
            name = Path(args.calibration).name if args.calibration else next(iter(self.train_ids))
            ids = self.train_ids[name]
            positions = getattr(student.config, "max_position_embeddings", 2048)
            window = min(2048, positions, ids.numel() - 1)
            calibration = texts.calibration_windows(ids, args.samples, window, args.seed)
        begin = time.perf_counter()
        if start == "best":
            rotation = sparsekern.rotate(
                student, calibration, untie=True, device=self.run.device, seed=args.seed
            )
            self.say(str(rotation))
        report = sparsekern.prune_model(
            student,
            "sparsegpt" if start == "best" else start,
            calibration,
            compress=False,
            device=self.run.device,
            progress=False,
        )
        self.say(report.summary())
        seconds = time.perf_counter() - begin
        if file is not None:
            torch.save({"model": student.state_dict(), "seconds": seconds}, file)
        return student.to(self.run.device), seconds

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
        if args.teacher_seconds:
            part = data.generate(
                self.teacher,
                1 << 40,
                args.seed + 1,
                window=length,
                batch=args.teacher_rows,
                prompts=self.prompts(end, length),
                seconds=args.teacher_seconds,
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
        for ids in self.tests.values():
            corpus, count = data.without_overlap(corpus, ids)
            dropped += count
        return corpus, dropped, made

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


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
