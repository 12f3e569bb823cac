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
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.errors import FormatError, check
from sparsekern.eval.perplexity import check_model
from sparsekern.finetune.sampler import Sampler, why_not
from sparsekern.oneshot.discovery import input_embedding, is_transformers
from sparsekern.oneshot.fingerprint import of_model as fingerprint
from sparsekern.utils.arguments import SEEDS, checked, folded, shown
from sparsekern.utils.json_store import cache_folder
from sparsekern.utils.staging import check_writable

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
        remedy = "Give rows of two tokens or more, or ids [tokens] and window=."
        check(good, f"{OP}.Corpus", "rows [count, window >= 2]", list(self.rows.shape), remedy)
        integer = not self.rows.is_floating_point() and self.rows.dtype != torch.bool
        expected, remedy = "rows of integer ids", "Tokenise the text."
        check(integer, f"{OP}.Corpus", expected, self.rows.dtype, remedy, TypeError)

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
        ValueError: fewer tokens than one window.   TypeError: a document that is no tensor of ids.
    """
    parts: list[Tensor] = []
    for i, document in enumerate(documents):
        expected = f"documents[{i}]: a tensor of ids"
        good = isinstance(document, Tensor) and not document.is_floating_point()
        check(good, f"{OP}.pack", expected, shown(document), "Tokenize the text.", TypeError)
        parts.append(document.reshape(-1).to(torch.int32))
        if separator is not None:
            parts.append(torch.tensor([separator], dtype=torch.int32, device="cpu"))
    ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device="cpu")
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
    places = torch.arange(step * batch, (step + 1) * batch, device="cpu")
    rows = torch.empty_like(places)
    for number in (places // count).unique().tolist():
        generator = torch.Generator().manual_seed(folded(seed * 1_000_003 + number))
        order = torch.randperm(count, generator=generator, device="cpu")
        here = places // count == number
        rows[here] = order[places[here] % count]
    return rows


# ---------------------------------------------------------------------- text made by the teacher


@torch.no_grad()
@checked(
    f"{OP}.generate",
    uses={"start": ("prompts=None", lambda given: given["prompts"] is None)},
    tokens=(1, 2**40),
    window=(2, 2**31),
    batch=(1, 2**31),
    seed=SEEDS,
)
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
    seconds: float | None = None,
    cache: str | Path | bool = True,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> Corpus:
    """Rows of text sampled from the teacher: x_t ~ softmax(logits / temperature), whole vocabulary.

    Args:
        teacher: a Transformers causal language model, on the device where it is to run.
        tokens: how many, rounded up to whole rows.      seed: of a private generator.
        window: tokens per row.      batch: rows sampled at a time; the larger, the faster.
        temperature: 1 samples the teacher's own distribution.
        prompts: int64 [n, length < window]: row i starts with prompts[i % n]; None: with `start`.
            -1 at the end of a prompt makes it shorter.
        start: id that rows start with, without prompts; None: the teacher's bos token, else its eos
            token.
        seconds: sample for at most this long, whatever `tokens` says. Rows that are not complete
            then are joined to whole ones.
        cache: a folder, True for sparsekern's cache folder, False for none. The file's name is the
            digest of weights and arguments; one that is there is read instead of sampled.
        autocast: dtype of the matmuls, for example torch.bfloat16; None: as the weights.
        progress: show a progress bar.
    Returns:
        Corpus with one Source of kind "teacher"; its details say how it was sampled, and, of a few
        rows, the teacher's entropy and mean −ln p of the tokens: of its own text they are equal but
        for chance.
    Raises:
        ValueError: numbers that do not fit, no start token, or one that the teacher has not; a
            teacher that is not causal or needs more than ids; non-finite logits, no row in
            `seconds`, text whose −ln p says that it is not the teacher's.
        TypeError: no model of Transformers.   FormatError: a damaged file in the cache.
    Notes:
        A row goes on after an end-of-text token with what the teacher says next, as in packed
        training text. Deterministic for one device, dtype and batch, but for `seconds`. A step is
        a CUDA graph where the model allows it (sampler.py).
    """
    op = f"{OP}.generate"
    check(seconds is None or seconds > 0, op, "seconds > 0", seconds)
    check(temperature > 0, op, "temperature > 0", temperature)
    got, remedy = type(teacher).__name__, "Unwrap it, or pass texts of your own as data."
    check(is_transformers(teacher), op, "teacher: a Transformers model", got, remedy, TypeError)
    if prompts is None:
        first = _start_token(teacher) if start is None else start
        check(
            first is not None,
            op,
            "a start token",
            "none in the config",
            "Pass start=, or set bos_token_id there.",
        )
        prompts = torch.tensor([[first]], device="cpu")
    fits = prompts.dim() == 2 and 1 <= prompts.shape[1] < window
    check(fits, op, f"prompts [n, 1 to {window - 1}]", list(prompts.shape))
    weight = getattr(input_embedding(teacher), "weight", None)
    entries = len(weight) if isinstance(weight, Tensor) else 2**31
    remedy = "Pass start=, an id of its tokenizer, or set bos_token_id in its config."
    expected, most = f"ids of prompts, or the start token, below {entries}", int(prompts.max())
    check(most < entries, op, expected, most, remedy)
    short = prompts < 0
    holes = bool((short[:, :-1] & ~short[:, 1:]).any() or short[:, 0].any())
    check(not holes, op, "-1 at the ends of prompts", "elsewhere, too")
    count = -(-tokens // window)
    device = next(teacher.parameters()).device
    settings = {
        "sampler": 2,
        "seconds": seconds,
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
    details["prompted"] = int((~short).sum(1).gt(1).sum())
    file = None
    if cache is not False:
        folder = cache_folder() / "teacher-text" if cache is True else Path(cache)
        file = check_writable(folder, op) / f"{digest}.safetensors"
        if file.exists():
            rows, stated = _read_rows(file, op, count, window, seconds)
            name = type(teacher).__name__
            return Corpus(rows, [Source("teacher", name, rows.numel(), {**details, **stated})])
    begin = time.perf_counter()
    deadline = None if seconds is None else begin + seconds
    flags = [(module, module.training) for module in teacher.modules()]
    teacher.eval()
    try:
        row = torch.arange(window, device=device).remainder(entries).unsqueeze(0)
        check_model(op, teacher, row, {"use_cache": False})
        options = (temperature, seed, autocast, progress, deadline)
        parts, how = _sample(teacher, prompts, count, window, min(batch, count), *options)
        details |= {"how": how, "sampling_seconds": round(time.perf_counter() - begin, 2)}
        rows, whole = _whole_rows(parts, window, op)
        given = int((~short).sum(1).max())
        if whole:
            details |= _own_text(teacher, rows[:whole], temperature, autocast, given)
    finally:
        for module, flag in flags:
            module.training = flag
    if file is not None:
        from safetensors.torch import save

        from sparsekern.utils.files import write_atomic

        file.parent.mkdir(parents=True, exist_ok=True)
        stated = {name: value for name, value in details.items() if name in STATED}
        metadata = {"settings": json.dumps(settings), "details": json.dumps(stated)}
        write_atomic(file, save({"rows": _narrow(rows)}, metadata=metadata))
    return Corpus(rows, [Source("teacher", type(teacher).__name__, rows.numel(), details)])


STATED = ("how", "sampling_seconds", "entropy", "nll")  # that a file of rows has beside them


def _narrow(rows: Tensor) -> Tensor:
    """int32 ids as id − 32768 in int16 where that holds them."""
    return (rows - 32768).to(torch.int16) if int(rows.max()) < 65536 else rows


def _read_rows(
    file: Path, op: str, count: int, window: int, seconds: float | None
) -> tuple[Tensor, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            rows: Tensor = opened.get_tensor("rows")
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        check(False, op, "cached rows", f"a damaged file: {error}", f"Delete {file}.", FormatError)
        raise
    if rows.dtype == torch.int16:
        rows = rows.to(torch.int32) + 32768
    got, remedy = list(rows.shape), f"Delete {file}."
    fits = len(got) == 2 and got[1] == window and (got[0] == count or seconds is not None)
    check(fits, op, f"cached rows [{count}, {window}]", got, remedy)
    return rows, json.loads(metadata.get("details", "{}"))


@torch.no_grad()
def _own_text(
    teacher: nn.Module, rows: Tensor, temperature: float, autocast: torch.dtype | None, given: int
) -> dict[str, float]:
    """{"entropy", "nll"} in nats a token over at most 32 rows, checked against each other."""
    device = next(teacher.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device="cpu")
    for row in rows[:: max(1, rows.shape[0] // 32)][:32]:
        ids = row.to(device, torch.int64).unsqueeze(0)
        on = autocast is not None
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=on):
            logits = teacher(input_ids=ids, use_cache=False).logits[0, max(0, given - 1) : -1]
        log_p = (logits.float() / temperature).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        nll = -log_p.gather(1, ids[0, max(1, given) :, None]).squeeze(1)
        far = (nll - entropy).double()
        found = (entropy.double().sum(), nll.double().sum(), far.square().sum())
        sums += torch.stack((*found, torch.tensor(far.numel(), device=device).double())).cpu()
    count = max(1.0, float(sums[3]))
    entropy, nll, deviation = (float(s) / count for s in sums[:3])
    bound = 0.1 + 6 * (deviation / count) ** 0.5
    remedy = "The sampler and the model disagree: please report it."
    got = f"{nll:.3f}, and {entropy:.3f} ± {bound:.3f} is expected"
    good = abs(nll - entropy) <= bound
    check(good, f"{OP}.generate", "mean −ln p of the teacher's own text", got, remedy)
    return {"entropy": round(entropy, 4), "nll": round(nll, 4)}


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
    deadline: float | None,
) -> tuple[list[Tensor], str]:
    """(int32 [rows, window or less] each, how they were made)."""
    from tqdm import tqdm

    op = f"{OP}.generate"
    device = next(teacher.parameters()).device
    reason = why_not(teacher, prompts[:2].to(device), window, autocast)
    if reason:
        return _sample_with_cache(
            teacher, prompts, count, window, batch, temperature, seed, autocast, progress, deadline
        ), f"Transformers' cache: {reason}"
    sampler = Sampler(teacher, batch, window, temperature, seed, autocast)
    parts: list[Tensor] = []
    steps = -(-count // batch) * (window - 1)
    with tqdm(total=steps, desc="teacher text", unit="token", disable=not progress) as bar:
        for begin in range(0, count, batch):
            if deadline is not None and time.perf_counter() > deadline:
                break
            numbers = torch.arange(begin, begin + batch, device="cpu") % prompts.shape[0]
            try:
                rows = sampler.fill(prompts[numbers], deadline, bar)
            except RuntimeError as error:
                check("not finite" not in str(error), op, "finite logits", "NaN or Inf")
                raise
            parts.append(rows[: count - begin])
    return parts, sampler.how


def _whole_rows(parts: list[Tensor], window: int, op: str) -> tuple[Tensor, int]:
    """The parts as [rows, window], and how many of these were sampled whole: what is shorter is
    joined, and its remainder dropped."""
    whole = [part for part in parts if part.shape[1] == window]
    count = sum(part.shape[0] for part in whole)
    rest = [part.reshape(-1) for part in parts if 16 <= part.shape[1] < window]
    if rest:
        ids = torch.cat(rest)
        whole.append(ids[: ids.numel() // window * window].view(-1, window))
    rows = torch.cat(whole) if whole else torch.empty(0, window, dtype=torch.int32, device="cpu")
    check(rows.shape[0] > 0, op, "time for one row", "none", "Raise seconds, lower batch.")
    return rows, count


def _sample_with_cache(
    teacher: nn.Module,
    prompts: Tensor,
    count: int,
    window: int,
    batch: int,
    temperature: float,
    seed: int,
    autocast: torch.dtype | None,
    progress: bool,
    deadline: float | None,
) -> list[Tensor]:
    from tqdm import tqdm

    op = f"{OP}.generate"
    device = next(teacher.parameters()).device
    length = int((prompts >= 0).sum(1).min())  # that all of them have: one forward
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    steps = -(-count // batch) * (window - length)
    decoder = _Decoder(teacher, prompts[:2, :length].to(device), autocast)
    with tqdm(total=steps, desc="teacher text", unit="token", disable=not progress) as bar:
        for begin in range(0, count, batch):
            if deadline is not None and time.perf_counter() > deadline:
                break
            numbers = (
                torch.arange(begin, min(begin + batch, count), device="cpu") % prompts.shape[0]
            )
            ids = torch.empty(len(numbers), window, dtype=torch.int64, device=device)
            given = prompts[numbers].to(device)
            ids[:, :length] = given[:, :length]
            step = decoder.start(window)
            last = ids[:, :length]
            made = length
            for place in range(length, window):
                late = deadline is not None and time.perf_counter() > deadline
                if place % 8 == 0 and late:
                    break
                logits = step(last).float() / temperature
                # argmax(p / Exp(1)) is a sample of p.
                noise = torch.empty_like(logits).exponential_(generator=generator)
                drawn = (logits.softmax(-1) / noise).argmax(-1)
                if place < given.shape[1]:
                    drawn = torch.where(given[:, place] >= 0, given[:, place], drawn)
                ids[:, place] = drawn
                last = ids[:, place : place + 1]
                made = place + 1
                if place % 8 == 0 or made == window:
                    finite = bool(logits.isfinite().all())  # which waits for the device
                    check(finite, op, "finite logits", "NaN or Inf")
                bar.update()
            parts.append(ids[:, :made].to(torch.int32).cpu())
    return parts


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
        ids = torch.randint(0, size, (prompt.shape[0], 4), generator=generator, device="cpu")
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
    remedy = "Give a longer text."
    check(test.numel() >= n, op, f"a test text of at least {n} tokens", test.numel(), remedy)
    wanted = _ngram_hashes(test.reshape(1, -1), n)
    if rows.shape[1] < n:
        return Overlap(n, wanted.size, 0)
    known = _Known(wanted)
    found = []
    for part in rows.split(max(1, (1 << 22) // rows.shape[1])):  # 4 M tokens at a time
        hashes = _ngram_hashes(part, n)
        found.append(np.unique(hashes[known.holds(hashes)]))
    seen = np.isin(wanted, np.unique(np.concatenate(found)))
    return Overlap(n, wanted.size, int(seen.sum()))


def without_overlap(corpus: Corpus, test: Tensor, n: int = 13) -> tuple[Corpus, int]:
    """The corpus without the rows that hold an n-gram of the test text, and how many those are.

    Args:
        corpus: training rows.      test: ids [tokens].      n: as in `overlap`.
    Raises:
        ValueError: no row is left.
    """
    op = f"{OP}.without_overlap"
    known = _Known(_ngram_hashes(test.reshape(1, -1), n))
    keep = []
    for part in corpus.rows.split(max(1, (1 << 22) // corpus.window)):
        held = known.holds(_ngram_hashes(part, n)).reshape(part.shape[0], -1)
        keep.append(torch.from_numpy(~held.any(axis=1)))
    kept = torch.cat(keep)
    check(bool(kept.any()), op, "rows without test text", "none", "Give other training text.")
    return Corpus(corpus.rows[kept], corpus.sources), int((~kept).sum())


class _Known:
    """A set of hashes: their low bits mark a table that leaves few to look for."""

    BITS = 24

    def __init__(self, hashes: Any) -> None:
        self.sorted = np.unique(hashes)
        self.mask = np.uint64((1 << self.BITS) - 1)
        self.table = np.zeros(1 << self.BITS, dtype=bool)
        self.table[self.sorted & self.mask] = True

    def holds(self, hashes: Any) -> Any:
        """bool, of the same shape."""
        found = self.table[hashes & self.mask]
        some = hashes[found]
        places = np.minimum(np.searchsorted(self.sorted, some), self.sorted.size - 1)
        found[found] = self.sorted[places] == some
        return found


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
