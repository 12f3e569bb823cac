"""What a benchmark of training a pruned model starts from: model, text, start, and its evaluation.

Options, texts, pruned starts and float32 perplexities as bench_finetune.py describes them; shared
with bench_lora.py.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern.cli.finetune import densify
from sparsekern.eval import texts
from sparsekern.finetune import data
from sparsekern.finetune.inputs import eval_batch
from sparsekern.integrations.loading import load_model
from sparsekern.oneshot.presets import PRESETS

from .options import Run, Watch, timed

PROMPT, SAMPLE = 16, 512  # tokens that a prompt has, and that a sampled text has
STARTS = ("sparsegpt", "magnitude", "wanda", "default", "best")


def add_options(result: argparse.ArgumentParser, teacher_seconds: float) -> None:
    """Model, texts, pruning and rows; --start and what trains are the benchmark's own."""
    source = result.add_mutually_exclusive_group()
    source.add_argument("--gguf", metavar="FILE", help="a .gguf file")
    source.add_argument("--model", metavar="DIR", help="a folder of safetensors files")
    result.add_argument("--train", default="builtin", metavar="FILE,...")
    result.add_argument("--held-out", default="", metavar="FILE,...", help="of --train: keep tails")
    result.add_argument("--tail", type=int, default=120_000, help="bytes (default 120000)")
    result.add_argument("--test", default="builtin", metavar="FILE")
    result.add_argument("--eval-window", type=int, default=2048)
    result.add_argument("--calibration", metavar="FILE", help="default: the first of --train")
    result.add_argument("--samples", type=int, help="default: 128, or the preset's")
    result.add_argument(
        "--teacher-seconds",
        type=float,
        default=teacher_seconds,
        help=f"of sampling text (default {teacher_seconds:g})",
    )
    result.add_argument("--teacher-tokens", type=int, metavar="N", help="no more than N sampled")
    result.add_argument("--teacher-rows", type=int, default=4096, help="sampled at once")
    result.add_argument(
        "--sample-window", type=int, default=SAMPLE, help=f"tokens of a row (default {SAMPLE})"
    )
    result.add_argument("--window", type=int, default=1024)
    result.add_argument("--batch", type=int, default=16)
    result.add_argument("--micro-batch", type=int)
    result.add_argument("--alpha", type=float, default=0.0, help="share of the cross-entropy")
    result.add_argument("--compile", action="store_true")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--cache", type=Path, metavar="DIR", help="sampled text, pruned weights")
    result.add_argument("--limit-seconds", type=float, metavar="N", help="for the whole process")


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


class Material:
    """One model and one text: the dense model is the teacher.

    Attributes:
        teacher, tokenizer: the model, in its own dtype on the run's device.
        train_ids, tests: name -> ids.      corpus: the rows to train on, after `prepare`.
        dense: the teacher's perplexities, after `prepare`.
    """

    def __init__(self, run: Run, args: Any):
        self.run, self.args = run, args
        self.bf16 = torch.bfloat16 if run.device.type == "cuda" else None
        self.parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.first = not self.parallel or torch.distributed.get_rank() == 0
        self.source = Path(args.gguf or args.model)
        self.watch: Watch | None = None
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
            raise ValueError(f"bench: --held-out {sorted(unknown)} are not in --train.")
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

    def prepare(self, windows: int = 0) -> None:
        """`dense`, over so many windows of each text (0: all), and `corpus`."""
        with self.run.phase("dense evaluation"):
            if self.first:
                self.dense = self.remembered("dense", self.teacher, windows)
        self.say(f"dense: {shown(self.dense.values())}")
        begin = time.perf_counter()
        self.corpus, self.dropped, self.made = self.in_turn(self.make_corpus)
        self.seconds_sample = time.perf_counter() - begin
        self.say(
            f"{self.corpus.tokens} training tokens, {self.made} of them the teacher's, "
            f"{self.seconds_sample:.1f} s, {self.dropped} rows with test text left out"
        )

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

    def evaluate(self, model: Any, count: int, until: float | None = None) -> Evaluated:
        """In float32: `count` windows of each text (0: all), the texts in turn; where `until` (of
        the run's seconds) does not allow all, the first ones, at least a batch of each."""
        model = densify(copy.deepcopy(model)).float()
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
                untie(student)
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


def untie(model: Any) -> None:
    """A head of its own, as `rotate` makes it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def finite(value: float) -> float | None:
    """As JSON has it."""
    return round(value, 4) if math.isfinite(value) else None


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
