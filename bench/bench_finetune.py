"""Recovery of a real model: pruned, trained for some minutes under its masks, evaluated.

    python -m bench finetune --gguf SmolLM2-135M-Instruct.Q4_1.gguf \\
        --train c4.utf8,wiki.utf8,code.utf8,technical.utf8 --held-out c4.utf8,code.utf8 \\
        --test wiki.test.raw --start sparsegpt --minutes 4 --compile

The dense model is the teacher; nothing else supervises (--alpha adds cross-entropy). Training text
is the files, without the held-out tails of some (the last --tail bytes), and text that the teacher
samples for at most --teacher-seconds, half of its rows begun with 16 tokens of the training text.
Rows that share a 13-gram with any evaluation text are left out, and counted.

Perplexities are computed in float32 from the weights as they are stored (bfloat16): the test by
the WikiText protocol (rows joined with a blank line, windows of 2048 side by side), held-out tails
as they are; those of the start and before_rounding are of the weights while they are trained.
`minutes` counts training from the end of the first step; `gpu_seconds` pruning, sampling and
training.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern import SparseLinear
from sparsekern.eval import texts
from sparsekern.finetune import data, schedule
from sparsekern.finetune.trainer import distill, read_metrics
from sparsekern.integrations.loading import load_model

from .options import Run, parser, watchdog

PROMPT, SAMPLE = 16, 512  # tokens that a prompt has, and that a sampled text has
KINDS = {"magnitude": "Magnitude", "sr-ste": "SRSTE", "rigl": "RigL"}


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
    result.add_argument("--start", default="sparsegpt", choices=("sparsegpt", "magnitude", "wanda"))
    result.add_argument("--calibration", metavar="FILE", help="default: the first of --train")
    result.add_argument("--samples", type=int, default=128)
    result.add_argument("--minutes", type=float, default=4.0)
    result.add_argument("--steps", type=int, help="instead of --minutes")
    result.add_argument("--teacher-seconds", type=float, default=90.0)
    result.add_argument(
        "--teacher-rows", type=int, default=4096, help=f"of {SAMPLE} tokens, at once"
    )
    result.add_argument("--window", type=int, default=1024)
    result.add_argument("--batch", type=int, default=16)
    result.add_argument("--micro-batch", type=int)
    result.add_argument("--lr", type=float, default=6e-4)
    result.add_argument("--alpha", type=float, default=0.0)
    result.add_argument("--block", type=float, default=0.0)
    result.add_argument("--schedule", default="frozen", choices=("frozen", *KINDS))
    result.add_argument("--freeze-at", type=int, default=500)
    result.add_argument("--compile", action="store_true")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--baseline", action="store_true", help="time dense training, too")
    result.add_argument("--save", type=Path, metavar="DIR", help="keep the compressed model")
    result.add_argument("--work", type=Path, metavar="DIR", help="metrics, plot, report")
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    if not (args.gguf or args.model):
        print("bench finetune: give --gguf FILE or --model DIR; nothing was measured.", flush=True)
        return 0
    run = Run(path, args)
    with watchdog(args.budget + 300):
        code = Recovery(run, args).measure()
    run.close()
    return code


class Recovery:
    """One start, one training run, one record."""

    def __init__(self, run: Run, args: Any):
        self.run, self.args = run, args
        self.bf16 = torch.bfloat16 if run.device.type == "cuda" else None
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
        run.say(f"evaluation tokens {counts}")

    def _test_ids(self) -> torch.Tensor:
        rows = texts.read_rows(self.args.test, "test")
        text = "".join(rows) if self.args.test == "builtin" else texts.join_rows(rows)
        return texts.tokenize(self.tokenizer, text)

    def measure(self) -> int:
        run, args = self.run, self.args
        dense = self.perplexities(copy.deepcopy(self.teacher).float())
        run.say(f"dense: {dense}")
        begin = time.perf_counter()
        student, seconds_prune = self.prune()
        sampling = time.perf_counter()
        corpus, dropped, made = self.corpus()
        seconds_sample = time.perf_counter() - sampling
        run.say(f"{corpus.tokens} training tokens, {made} sampled in {seconds_sample:.1f} s, "
                f"{dropped} rows with test text left out")  # fmt: skip
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # of the sampling
        moving = None
        if args.schedule != "frozen":
            moving = schedule.KINDS[KINDS[args.schedule]](freeze_at=args.freeze_at)
        report = distill(
            student,
            self.teacher,
            corpus,
            schedule=moving,
            evaluate=self.tests,
            eval_window=args.eval_window,
            folder=args.work,
            resume=False,
            device=run.device,
            progress=False,
            steps=args.steps,
            minutes=None if args.steps else args.minutes,
            batch=args.batch,
            micro_batch=args.micro_batch,
            lr=args.lr,
            alpha=args.alpha,
            block=args.block,
            compile=args.compile,
            seed=args.seed,
            log_every=20,
        )
        run.say(f"dense {dense}; {report.summary()}")
        if report.violations or report.masked is None:
            run.say(f"FAILED: {report.violations} violations of the masks")
            return 1
        final = self.perplexities(copy.deepcopy(student).float())  # of the weights as stored
        layers = report.masked.compress()
        count = 0
        for module in student.modules():
            if isinstance(module, SparseLinear):
                sparsekern.verify(module.weight)
                count += 1
        start = {name: report.evaluations[0][name] for name in self.tests}
        metrics = {f"perplexity {name}": round(value, 4) for name, value in final.items()}
        metrics |= {f"start {name}": round(value, 4) for name, value in start.items()}
        metrics |= {f"dense {name}": round(value, 4) for name, value in dense.items()}
        metrics |= {
            "minutes": round(report.seconds / 60, 3),
            "steps": report.steps,
            "tokens": report.tokens,
            "tokens_per_s": round(report.tokens_per_second),
            "gpu_seconds": round(seconds_prune + seconds_sample + report.seconds, 1),
            "wall_seconds": round(time.perf_counter() - begin, 1),
        }
        if run.device.type == "cuda":
            metrics["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if args.baseline:
            metrics["dense_training_tokens_per_s"] = round(self.dense_speed(corpus))
        finished = [row for row in read_metrics(args.work) if "loss" in row] if args.work else []
        thin = max(1, len(finished) // 20)
        run.add(
            op="finetune",
            backend=args.start,
            check=f"0 violations, {count} layers verified",
            case=f"{self.source.name}, {Path(args.test).name}, window {args.eval_window}",
            seed=args.seed,
            dtype="bfloat16" if self.bf16 else "float32",
            settings={
                **{k: v for k, v in report.recipe.items() if not k.endswith("_every")},
                "schedule": args.schedule,
                "calibration_samples": args.samples,
                "training_tokens": corpus.tokens,
                "sampled_tokens": made,
                "rows_left_out": dropped,
            },
            details={
                "sources": report.data["sources"],
                "overlap": report.overlap,
                "before_rounding": {name: report.final[name] for name in self.tests},
                "left_dense": layers,
                "seconds": {"prune": round(seconds_prune, 1), "sample": round(seconds_sample, 1)},
                "loss": report.loss,
                "losses": [round(row["loss"], 5) for row in finished[::thin]],
                "notes": report.notes,
            },
            metrics=metrics,
        )
        if args.save:
            sparsekern.save_pretrained(student.cpu(), args.save, tokenizer=self.tokenizer)
        return 0

    def perplexities(self, model) -> dict[str, float]:
        window = self.args.eval_window
        return {
            name: sparsekern.perplexity(model, ids, window=min(window, ids.numel()))
            for name, ids in self.tests.items()
        }

    def prune(self):
        """(the student with dense 2:4 weights on the device, seconds)."""
        args = self.args
        student = copy.deepcopy(self.teacher)
        calibration = None
        if args.start != "magnitude":
            name = Path(args.calibration).name if args.calibration else next(iter(self.train_ids))
            ids = self.train_ids[name]
            positions = getattr(student.config, "max_position_embeddings", 2048)
            window = min(2048, positions, ids.numel() - 1)
            calibration = texts.calibration_windows(ids, args.samples, window, args.seed)
        report = sparsekern.prune_model(
            student,
            args.start,
            calibration,
            compress=False,
            device=self.run.device,
            progress=False,
        )
        self.run.say(report.summary())
        return student.to(self.run.device), report.seconds

    def corpus(self):
        """(rows to train on, rows left out because of test text, tokens sampled)."""
        args = self.args
        end = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        if not isinstance(end, int) or end == self.tokenizer.unk_token_id:
            end = self.tokenizer.eos_token_id
        rows = data.pack(list(self.train_ids.values()), args.window, end)
        sources = [data.Source("text", n, ids.numel()) for n, ids in self.train_ids.items()]
        corpus = data.Corpus(rows, sources)
        made, number, begin = 0, 0, time.perf_counter()
        length = min(SAMPLE, args.window)
        whole = args.teacher_rows // 2 // (args.window // length) * (args.window // length)
        last = 0.0
        while args.teacher_seconds and whole:
            # Another round is begun only where one like the last would end in time.
            if number and time.perf_counter() - begin + last > args.teacher_seconds:
                break
            started = time.perf_counter()
            for prompts in (self.prompts(number, whole), None):
                part = data.generate(
                    self.teacher,
                    whole * length,
                    args.seed + 1 + number,
                    window=length,
                    batch=whole,
                    prompts=prompts,
                    start=end,
                    cache=False,
                    autocast=self.bf16,
                    progress=False,
                )
                corpus = corpus + data.Corpus(part.rows.view(-1, args.window), part.sources)
                made += part.tokens
            number += 1
            last = time.perf_counter() - started
            self.run.say(f"sampled {made} tokens, {2 * whole * length / last:.0f} tokens/s")
        dropped = 0
        for ids in self.tests.values():
            corpus, count = data.without_overlap(corpus, ids)
            dropped += count
        return corpus, dropped, made

    def prompts(self, number: int, count: int) -> torch.Tensor:
        """Random windows of the training text, int64 [count, PROMPT]."""
        ids = torch.cat(list(self.train_ids.values()))
        length = min(PROMPT, self.args.window // 2)
        return texts.calibration_windows(ids, count, length, self.args.seed + number)

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


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
