"""Text for recovery: packed rows of tokens, text that the teacher writes, overlap with a test.

    texts ─► token ids ─► pack ─► rows [count, window] ─► batch_rows(step): the order of a seed
    teacher ─► generate ─► rows, cached on disk under the digest of everything that decides them

Training on the model's own samples needs no data at all (Liu et al. 2023, "LLM-QAT",
arXiv:2305.17888); it is always reported as such (`Corpus.sources`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.oneshot.fingerprint import of_model as fingerprint
from sparsekern.utils.json_store import cache_folder

OP = "sparsekern.finetune.data"


@dataclass
class Source:
    """Where rows came from. kind: "text" or "teacher" (sampled from the teacher itself)."""

    kind: str
    name: str
    tokens: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Corpus:
    """Rows of token ids to train on.

    rows: int64 or int32 [count, window] on the CPU.      sources: what they are made of.
    """

    rows: Tensor
    sources: list[Source] = field(default_factory=list)

    def __post_init__(self) -> None:
        good = self.rows.dim() == 2 and self.rows.shape[0] > 0 and self.rows.shape[1] >= 2
        check(good, f"{OP}.Corpus", "rows [count, window >= 2]", list(self.rows.shape))
        integer = not self.rows.is_floating_point() and self.rows.dtype != torch.bool
        check(integer, f"{OP}.Corpus", "rows of integer ids", self.rows.dtype, exc=TypeError)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows.numel()

    @property
    def window(self) -> int:
        """Tokens per row."""
        return self.rows.shape[1]

    def describe(self) -> dict[str, Any]:
        """Counts, sources and a digest of the ids, JSON-able."""
        sha = hashlib.sha256(self.rows.to(torch.int32).contiguous().numpy().tobytes())
        return {
            "rows": self.rows.shape[0],
            "window": self.window,
            "tokens": self.tokens,
            "sha256": sha.hexdigest()[:32],
            "sources": [asdict(source) for source in self.sources],
        }

    def __add__(self, other: Corpus) -> Corpus:
        """Both, one after the other; the order of training is shuffled anyway."""
        check(self.window == other.window, f"{OP}.Corpus", f"window {self.window}", other.window)
        rows = torch.cat((self.rows.to(torch.int32), other.rows.to(torch.int32)))
        return Corpus(rows, [*self.sources, *other.sources])


def pack(documents: Sequence[Tensor], window: int, separator: int | None = None) -> Tensor:
    """Documents one after another, cut into rows; the remainder is dropped.

    Args:
        documents: int64 [tokens] each.      window: tokens per row.
        separator: id put after each document, such as the end-of-text token; None: nothing.
    Returns:
        int32 [rows, window].
    Raises:
        ValueError: fewer tokens than one window.
    """
    parts: list[Tensor] = []
    for document in documents:
        parts.append(document.reshape(-1).to(torch.int32))
        if separator is not None:
            parts.append(torch.tensor([separator], dtype=torch.int32))
    ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
    remedy = "Give more text or a smaller window."
    check(window >= 2, f"{OP}.pack", "window >= 2", window)
    got = f"{ids.numel()} tokens"
    check(ids.numel() >= window, f"{OP}.pack", f"at least {window} tokens", got, remedy)
    return ids[: ids.numel() // window * window].view(-1, window)


def batch_rows(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Which rows step number `step` (from 0) trains on: every row once per pass, in an order that
    depends on the seed and the pass alone, so that a resumed run needs no more than its step.

    Returns:
        int64 [batch]; a batch at the end of a pass takes the rest from the next one.
    """
    places = torch.arange(step * batch, (step + 1) * batch)
    rows = torch.empty_like(places)
    for number in (places // count).unique().tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        order = torch.randperm(count, generator=generator)
        here = places // count == number
        rows[here] = order[places[here] % count]
    return rows


# ---------------------------------------------------------------------- text made by the teacher


@torch.no_grad()
def generate(
    teacher: nn.Module,
    tokens: int,
    seed: int = 0,
    *,
    window: int = 1024,
    batch: int = 256,
    temperature: float = 1.0,
    prompts: Tensor | None = None,
    start: int | None = None,
    cache: str | Path | bool = True,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> Corpus:
    """Rows of text sampled from the teacher: x_t ~ softmax(logits / temperature), whole vocabulary.

    Args:
        teacher: a Transformers causal language model, on the device where it is to run.
        tokens: how many, rounded up to whole rows.      seed: of a private generator.
        window: tokens per row.      batch: rows sampled at a time.
        temperature: 1 samples the teacher's own distribution.
        prompts: int64 [n, length < window]: row i starts with prompts[i % n]; None: with `start`.
        start: id that rows start with; None: the teacher's bos token, else its eos token.
        cache: a folder, True for sparsekern's cache folder, False for none. The file's name is the
            digest of weights and arguments; one that is there is read instead of sampled.
        autocast: dtype of the matmuls, for example torch.bfloat16; None: as the weights.
        progress: show a progress bar.
    Returns:
        Corpus with one Source of kind "teacher".
    Raises:
        ValueError: numbers that do not fit, no start token, non-finite logits.
    Notes:
        A row goes on after an end-of-text token with what the teacher says next, as in packed
        training text. Deterministic for one device, dtype and batch.
    """
    op = f"{OP}.generate"
    check(tokens >= 1 and window >= 2 and batch >= 1, op, "positive sizes", (tokens, window, batch))
    check(temperature > 0, op, "temperature > 0", temperature)
    if prompts is None:
        first = _start_token(teacher) if start is None else start
        check(first is not None, op, "a start token", "none in the config", "Pass start=.")
        prompts = torch.tensor([[first]])
    fits = prompts.dim() == 2 and 1 <= prompts.shape[1] < window
    check(fits, op, f"prompts [n, 1 to {window - 1}]", list(prompts.shape))
    count = -(-tokens // window)
    device = next(teacher.parameters()).device
    settings = {
        "teacher": fingerprint(teacher),
        "rows": count,
        "window": window,
        "seed": seed,
        "batch": batch,
        "temperature": temperature,
        "prompts": hashlib.sha256(prompts.to(torch.int64).cpu().numpy().tobytes()).hexdigest(),
        "autocast": str(autocast),
        "device": device.type,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    details = {"seed": seed, "temperature": temperature, "digest": digest}
    details["prompted"] = prompts.shape[0] if prompts.shape[1] > 1 else 0
    source = Source("teacher", type(teacher).__name__, count * window, details)
    file = None
    if cache is not False:
        folder = cache_folder() / "teacher-text" if cache is True else Path(cache)
        file = folder / f"{digest}.safetensors"
        if file.exists():
            return Corpus(_read_rows(file, op, count, window), [source])
    rows = _sample(teacher, prompts, count, window, batch, temperature, seed, autocast, progress)
    if file is not None:
        from safetensors.torch import save

        from sparsekern.utils.files import write_atomic

        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, save({"rows": rows}, metadata={"settings": json.dumps(settings)}))
    return Corpus(rows, [source])


def _read_rows(file: Path, op: str, count: int, window: int) -> Tensor:
    from safetensors.torch import load_file

    rows: Tensor = load_file(file)["rows"]
    got, remedy = list(rows.shape), f"Delete {file}."
    check(got == [count, window], op, f"cached rows [{count}, {window}]", got, remedy)
    return rows


def _sample(
    teacher: nn.Module,
    prompts: Tensor,
    count: int,
    window: int,
    batch: int,
    temperature: float,
    seed: int,
    autocast: torch.dtype | None,
    progress: bool,
) -> Tensor:
    from tqdm import tqdm

    device = next(teacher.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    flags = [(module, module.training) for module in teacher.modules()]
    teacher.eval()
    parts = []
    steps = -(-count // batch) * (window - prompts.shape[1])
    try:
        decoder = _Decoder(teacher, prompts[:2].to(device), autocast)
        with tqdm(total=steps, desc="teacher text", unit="token", disable=not progress) as bar:
            for begin in range(0, count, batch):
                numbers = torch.arange(begin, min(begin + batch, count)) % prompts.shape[0]
                ids = torch.empty(len(numbers), window, dtype=torch.int64, device=device)
                length = prompts.shape[1]
                ids[:, :length] = prompts[numbers].to(device)
                step = decoder.start(window)
                last = ids[:, :length]
                for place in range(length, window):
                    logits = step(last).float() / temperature
                    # argmax(p / Exp(1)) is a sample of p.
                    noise = torch.empty_like(logits).exponential_(generator=generator)
                    ids[:, place] = (logits.softmax(-1) / noise).argmax(-1)
                    last = ids[:, place : place + 1]
                    bar.update()
                finite = bool(logits.isfinite().all())
                check(finite, f"{OP}.generate", "finite logits", "NaN or Inf")
                parts.append(ids.to(torch.int32).cpu())
    finally:
        for module, flag in flags:
            module.training = flag
    return torch.cat(parts)


class _Decoder:
    """Token-by-token forwards with a key-value cache.

    A static cache is preferred: one that grows is copied at every step. The first kind of cache
    that gives the logits of forwards without one is taken.
    """

    def __init__(self, teacher: nn.Module, prompt: Tensor, autocast: torch.dtype | None) -> None:
        self.teacher, self.autocast = teacher, autocast
        known = inspect.signature(teacher.forward).parameters
        # The argument's name from Transformers 5.24 on, and before.
        self.name = "cache" if "cache" in known else "past_key_values"
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        size = int(self._forward(prompt, None).shape[-1])
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, size, (prompt.shape[0], 4), generator=generator)
        reasons = []
        for kind in ("StaticCache", "DynamicCache"):
            self.kind = kind
            reason = self._disagrees(prompt, ids.to(prompt.device))
            if not reason:
                return
            reasons.append(f"{kind}: {reason}")
        op = f"{OP}.generate"
        check(False, op, "a key-value cache that gives the model's logits", "; ".join(reasons))

    def start(self, length: int) -> Callable[[Tensor], Tensor]:
        """A function of the next tokens [batch, n] -> logits of the last [batch, vocabulary], for
        rows of up to `length` tokens."""
        import transformers

        options: dict[str, Any] = {"config": self.teacher.config}
        if self.kind == "StaticCache":
            options["max_cache_len"] = length
        cache = getattr(transformers, self.kind)(**options)
        return lambda ids: self._forward(ids, cache)

    def _forward(self, ids: Tensor, cache: Any) -> Tensor:
        options = {"use_cache": False} if cache is None else {self.name: cache, "use_cache": True}
        kind, on = ids.device.type, self.autocast is not None
        with torch.autocast(kind, self.autocast or torch.bfloat16, enabled=on):
            output = self.teacher(input_ids=ids, **options, **self.options)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _disagrees(self, prompt: Tensor, ids: Tensor) -> str:
        """Why this kind of cache cannot be used; "" when it can."""
        try:
            step = self.start(prompt.shape[1] + ids.shape[1] + 3)  # longer than what is filled
            step(prompt)
            for place in range(ids.shape[1]):
                logits = step(ids[:, place : place + 1])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        whole = self._forward(torch.cat((prompt, ids), 1), None)
        distance = (logits.float().softmax(-1) - whole.float().softmax(-1)).abs().sum(-1) / 2
        far = float(distance.max())
        return "" if far < 0.1 else f"probabilities differ by {far:.2f}"


def _start_token(teacher: nn.Module) -> int | None:
    for config in (getattr(teacher, "generation_config", None), getattr(teacher, "config", None)):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(config, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int):
                return value
    return None


# ---------------------------------------------------------------------- is test text in training?


@dataclass(frozen=True)
class Overlap:
    """How much of a test text occurs in the training rows.

    n: length of the n-grams.      test: n-grams of the test text.      found: those that occur.
    """

    n: int
    test: int
    found: int

    @property
    def share(self) -> float:
        """found / test."""
        return self.found / self.test if self.test else 0.0

    def __str__(self) -> str:
        return f"{self.found} of {self.test} test {self.n}-grams in training ({self.share:.4%})"


def overlap(rows: Tensor, test: Tensor, n: int = 13) -> Overlap:
    """Count the n-grams of a test text that occur in training rows.

    Args:
        rows: ids [count, window]; n-grams do not cross rows.
        test: ids [tokens].
        n: 13 is the length that contamination studies use (Brown et al. 2020, arXiv:2005.14165).
    Notes:
        n-grams are compared by a 64-bit hash: a count may be one too high once in 10^5 runs of
        10^7 tokens, never too low.
    """
    op = f"{OP}.overlap"
    check(n >= 1, op, "n >= 1", n)
    check(test.numel() >= n, op, f"a test text of at least {n} tokens", test.numel())
    wanted = _ngram_hashes(test.reshape(1, -1), n)
    if rows.shape[1] < n:
        return Overlap(n, wanted.size, 0)
    unique = np.unique(wanted)
    hit = np.zeros(unique.size, dtype=bool)
    for part in rows.split(max(1, (1 << 22) // rows.shape[1])):  # 4 M tokens at a time
        hashes = np.unique(_ngram_hashes(part, n))
        places = np.searchsorted(unique, hashes)
        places = np.minimum(places, unique.size - 1)
        hit[places[unique[places] == hashes]] = True
    seen = hit[np.searchsorted(unique, wanted)]
    return Overlap(n, wanted.size, int(seen.sum()))


def without_overlap(corpus: Corpus, test: Tensor, n: int = 13) -> tuple[Corpus, int]:
    """The corpus without the rows that hold an n-gram of the test text, and how many those are.

    Args:
        corpus: training rows.      test: ids [tokens].      n: as in `overlap`.
    Raises:
        ValueError: no row is left.
    """
    op = f"{OP}.without_overlap"
    wanted = np.unique(_ngram_hashes(test.reshape(1, -1), n))
    keep = []
    for part in corpus.rows.split(max(1, (1 << 22) // corpus.window)):
        hashes = _ngram_hashes(part, n).reshape(part.shape[0], -1)
        places = np.minimum(np.searchsorted(wanted, hashes), wanted.size - 1)
        keep.append(torch.from_numpy((wanted[places] != hashes).all(axis=1)))
    kept = torch.cat(keep)
    check(bool(kept.any()), op, "rows without test text", "none", "Give other training text.")
    return Corpus(corpus.rows[kept], corpus.sources), int((~kept).sum())


def _ngram_hashes(rows: Tensor, n: int) -> Any:
    """uint64 hash of each n-gram within the rows, flat: Σ id·multiplier^i, then mixed."""
    ids = rows.to(torch.int64).cpu().numpy().astype(np.uint64)
    with np.errstate(over="ignore"):
        # Ids are mixed first, so that the sum is not linear in them.
        ids = (ids + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        ids ^= ids >> np.uint64(31)
        columns = ids.shape[1] - n + 1
        total = np.zeros((ids.shape[0], columns), dtype=np.uint64)
        for i in range(n):
            total = total * np.uint64(0x94D049BB133111EB) + ids[:, i : i + columns]
        total ^= total >> np.uint64(29)
    return total.reshape(-1)
