"""Calibration data from several sources: text, JSONL, chat transcripts, Parquet, Hugging Face data
sets, in given shares, as rows of token ids with a description that goes into the report.

    c4.txt                            a UTF-8 file, one document
    notes.jsonl (.ndjson), notes.json one object a line, or a list of them: {"text": ...} or a chat,
                                      {"messages": [{"role": ..., "content": ...}, ...]}
    rows.parquet                      the same as columns; read by pandas or pyarrow
    hf:NAME[:CONFIG[:SPLIT]], builtin as in eval/texts.py, one document a row
    c4.txt=0.7,code.jsonl=0.3         shares of the tokens; without numbers equal ones

A chat becomes what the model's own template makes of it. Documents are joined by the tokenizer's
end token and cut into windows side by side, or with whole_documents=True no row holds tokens of two
of them. How far two texts are apart is the Jensen-Shannon divergence, in bits, of their token
frequencies (`distance`): 0 for the same, 1 for no common token.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sparsekern.errors import check, message
from sparsekern.eval import texts
from sparsekern.utils.arguments import SEEDS, checked, folded, shown

OP = "sparsekern.calibration_mix"
SKETCH = 1024  # most frequent tokens that a report keeps, for `distance`
# With a sketch of C4: held-out C4 0.02, technical prose 0.06, Wikipedia 0.11 to 0.12, source code
# 0.22; with one of source code any prose has 0.25 to 0.40. Perplexity after calibration on the
# other side of it is 2 x and more of what it could be.
FAR = 0.2
PIECES = 8  # rows of whole documents have a multiple of window / 8 tokens
Spec = str | os.PathLike[str] | Mapping[str, float] | Iterable[Any]
CHAT_KEYS = ("messages", "conversations", "conversation")
Documents = list[list[int]]


@dataclass
class Mix:
    """Rows of token ids; pass it to prune_model as calibration.

    Attributes:
        rows: int64 [tokens] each, of equal length unless whole_documents.
        sources: per source its name, share asked for, documents, tokens there and taken, sha256 of
            its text.
        settings: tokens (asked for), window, seed, whole_documents.
    """

    rows: list[Tensor]
    sources: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(row.numel() for row in self.rows)

    def described(self) -> dict[str, Any]:
        """What the report says of it, beside counts and checksum of the rows."""
        return {"sources": self.sources, **self.settings, "unigrams": sketch(self.rows)}


def parse(spec: Spec) -> list[tuple[str, float]]:
    """[(source, share)], shares adding up to 1: of "a=0.7,b=0.3", of a dict, or of names or pairs.

    Raises:
        ValueError: no source, one twice, a share that is no positive number, or shares for some.
        TypeError: a source that is no name.
    """
    items: list[Any]
    one = isinstance(spec, str) and os.path.isfile(spec)  # whatever its name has in it
    if isinstance(spec, os.PathLike) or one:
        items = [(spec, None)]
    elif isinstance(spec, str):
        items = [part.strip() for part in spec.split(",") if part.strip()]
    else:
        items = list(spec.items()) if isinstance(spec, Mapping) else list(spec)
    found: list[tuple[str, float | None]] = []
    for item in items:
        pair = isinstance(item, (tuple, list)) and len(item) == 2
        if not pair and not isinstance(item, (str, os.PathLike)):
            expected = "names of text sources, or pairs (name, share)"
            remedy = "Texts and token ids themselves go to prune_model(calibration=)."
            raise TypeError(message(OP, expected, shown(item), remedy))
        name, share = item if pair else (str(item), None)
        if isinstance(spec, str) and not pair and "=" in name:
            name, _, share = name.rpartition("=")
        try:
            found.append((str(name), None if share is None else float(share)))
        except (TypeError, ValueError):
            expected = f"a number as the share of {name}"
            check(False, OP, expected, repr(share), "Write NAME=0.5.")
    check(bool(found), OP, "at least one source", repr(spec))
    names = [name for name, _ in found]
    check(len(set(names)) == len(names), OP, "each source once", names)
    given = [share for _, share in found if share is not None]
    check(len(given) in (0, len(found)), OP, "a share for every source, or none", repr(spec))
    shares = given or [1.0] * len(found)
    for name, share in zip(names, shares):
        fits = math.isfinite(share) and share > 0
        check(fits, OP, f"a positive share of {name}", share, "Leave the source out.")
    return [(name, share / sum(shares)) for name, share in zip(names, shares)]


def is_mix(spec: str) -> bool:
    """Whether a text names more than one plain text source, and so is for calibration_mix."""
    one = os.path.isfile(spec) or not ("," in spec or "=" in spec)
    return not one or spec.lower().endswith(texts.RECORDS)


@checked(OP, tokens=(1, 10**12), window=(1, 10**9), seed=SEEDS)
def calibration_mix(
    spec: Spec,
    tokenizer: Any,
    *,
    tokens: int = 262144,
    window: int = 2048,
    seed: int = 0,
    whole_documents: bool = False,
) -> Mix:
    """Rows of token ids of several sources.

    Args:
        spec: "a.txt=0.7,b.jsonl=0.3", {"a.txt": 0.7, ...}, or a list of sources (module docstring).
        tokenizer: of the model; its chat template is used for chats.
        tokens: budget over all sources, rounded to whole windows per source.
        window: tokens in a row.
        seed: of the order of documents and of rows.
        whole_documents: no row holds tokens of two documents: a document is cut into windows, and
            the rest to a multiple of window / 8 (a shorter rest is left out). Rows of one length
            follow each other.
    Returns:
        Mix.
    Raises:
        ValueError: a source with fewer tokens than its share of the budget; shares, JSON or columns
            that do not fit.
        FileNotFoundError, ModuleNotFoundError (`datasets`, or neither pandas nor pyarrow).
    """
    positive = tokens > 0 and window > 0
    check(positive, OP, "positive tokens and window", f"{tokens} and {window}")
    check(
        callable(tokenizer),
        OP,
        "tokenizer: a function text -> ids",
        shown(tokenizer),
        exc=TypeError,
    )
    end = getattr(tokenizer, "eos_token_id", None)
    joint = [end] if isinstance(end, int) else []
    rows: list[Tensor] = []
    sources = []
    for number, (name, share) in enumerate(parse(spec)):
        wanted = max(1, round(tokens * share / window))
        generator = torch.Generator().manual_seed(folded(seed * 1009 + number))
        documents, sha = _documents(name, tokenizer)
        order = torch.randperm(len(documents), generator=generator, device="cpu").tolist()
        shuffled = [documents[i] for i in order]
        cut = _whole(shuffled, window) if whole_documents else _joined(shuffled, window, joint)
        order = torch.randperm(len(cut), generator=generator, device="cpu").tolist()
        taken: list[Tensor] = []
        for i in order:
            if sum(row.numel() for row in taken) >= wanted * window:
                break
            taken.append(cut[i])
        there = sum(len(document) for document in documents)
        count = sum(row.numel() for row in taken)
        enough = count >= wanted * window
        less = f", or a budget of {int(count / share)} tokens at most" if count else ""
        remedy = f"Give a longer text{less}."
        check(enough, OP, f"{wanted * window} tokens of {name}", count, remedy)
        rows += taken
        sources.append(
            {
                "name": Path(name).name if Path(name).is_file() else name,
                "share": round(share, 6),
                "documents": len(documents),
                "tokens": there,
                "taken": count,
                "sha256": sha,
            }
        )
    order = torch.randperm(
        len(rows), generator=torch.Generator().manual_seed(seed), device="cpu"
    ).tolist()
    rows = [rows[i] for i in order]
    if whole_documents:
        rows.sort(key=lambda row: -row.numel())
    settings = {
        "asked": tokens,
        "window": window,
        "seed": seed,
        "whole_documents": whole_documents,
    }
    return Mix(rows, sources, settings)


def _joined(documents: Documents, window: int, joint: list[int]) -> list[Tensor]:
    """Windows of all documents one after the other."""
    ids: list[int] = []
    for number, document in enumerate(documents):
        ids += (joint if number else []) + document
    stream = torch.tensor(ids, dtype=torch.int64, device="cpu")
    return list(stream[: stream.numel() // window * window].view(-1, window))


def _whole(documents: Documents, window: int) -> list[Tensor]:
    """Windows of each document, and its rest in a multiple of window / PIECES."""
    piece = max(1, window // PIECES)
    rows = []
    for document in documents:
        ids = torch.tensor(document, dtype=torch.int64, device="cpu")
        for part in torch.split(ids, window):
            length = part.numel() // piece * piece
            if length > 1:
                rows.append(part[:length])
    return rows


# ------------------------------------------------------------------------------------- the sources


def _documents(source: str, tokenizer: Any) -> tuple[Documents, str]:
    """Token ids of each document of a source, and the sha256 over its texts."""
    records = _records(source)
    sha = hashlib.sha256()
    found = []
    for record in records:
        text = record if isinstance(record, str) else json.dumps(record, ensure_ascii=False)
        sha.update(f"{len(text)} {text}\n".encode())
        ids = _tokenized(record, tokenizer, source)
        if ids:
            found.append(ids)
    check(bool(found), OP, f"text in {source}", "none")
    return found, sha.hexdigest()


def _records(source: str) -> list[Any]:
    """Documents of a source: texts, or lists of messages."""
    path = Path(source)
    suffix = path.suffix.lower()
    if not suffix or source == "builtin" or source.startswith("hf:"):
        rows = cast("list[str]", texts.read_rows(source, "train"))
        return ["".join(rows)] if path.is_file() else rows
    if suffix in texts.RECORDS:
        if not path.is_file():
            raise FileNotFoundError(f"{OP}: no file at {path}. Give the path of one that is there.")
        if suffix == ".parquet":
            return [_record(row, f"row {i} of {path}") for i, row in enumerate(_parquet(path))]
        return [_record(row, where) for row, where in _json(path)]
    return ["".join(cast("list[str]", texts.read_rows(source, "train")))]


def _json(path: Path) -> Iterator[tuple[Any, str]]:
    """(object, where it stands) of a JSONL file, or of a JSON file with a list."""
    text = texts.utf8(path, OP)
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(text)
        except ValueError as error:
            remedy = "Name it .jsonl where it has an object a line."
            check(False, OP, f"{path} to hold JSON", str(error), remedy)
        remedy = "Save the list of its texts alone."
        check(isinstance(whole, list), OP, f"a list in {path}", type(whole).__name__, remedy)
        yield from ((row, f"entry {i} of {path}") for i, row in enumerate(whole))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = json.loads(line)
        except ValueError as error:
            check(False, OP, f"{where} to hold JSON", str(error), "Mend the line, or leave it out.")
        yield row, where


def _record(row: Any, where: str) -> Any:
    """The text of an object, or its messages."""
    if isinstance(row, str):
        return _storable(row, where)
    expected = f'an object with "text" or "messages" in {where}'
    remedy = "Rename its key, or leave the record out."
    check(isinstance(row, Mapping), OP, expected, type(row).__name__, remedy)
    for key in CHAT_KEYS:
        messages = row.get(key)
        if messages is not None and not isinstance(messages, str):
            made = [_message(message, where) for message in messages]
            check(bool(made), OP, f"messages in {where}", "none", "Leave the record out.")
            return made
    text = row.get("text")
    got = f"{text!r} as text" if "text" in row else f"the keys {sorted(map(str, row))}"
    check(isinstance(text, str), OP, expected, got[:80], remedy)
    return _storable(text, where)


def _storable(text: Any, where: str) -> str:
    """The text, if it can be written as UTF-8: half a pair of surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got, remedy = f"{text[error.start]!r} at {error.start}", "Mend it, or leave the record out."
        check(False, OP, f"a text in {where}", got, remedy)
    return str(text)


def _message(message: Any, where: str) -> dict[str, str]:
    """{"role", "content"} of a message; "from" and "value" are other names of them."""
    role = content = None
    if isinstance(message, Mapping):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
    role = {"human": "user", "gpt": "assistant"}.get(str(role), role)
    fits = isinstance(role, str) and isinstance(content, str)
    expected, remedy = f'messages with "role" and "content" in {where}', "Make both texts."
    check(fits, OP, expected, repr(message)[:80], remedy)
    return {"role": str(role), "content": _storable(content, where)}


def _parquet(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file as dicts of plain values."""
    try:
        pyarrow = importlib.import_module("pyarrow.parquet")
        return cast("list[dict[str, Any]]", pyarrow.read_table(path).to_pylist())
    except ModuleNotFoundError:
        pass
    try:
        pandas = importlib.import_module("pandas")
        frame = pandas.read_parquet(path)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{OP}: Parquet needs pyarrow, or pandas with an engine of its own, for {path}. "
            "Run: pip install pyarrow, or convert the file to JSONL."
        ) from error
    return cast("list[dict[str, Any]]", frame.to_dict("records"))


def _tokenized(record: Any, tokenizer: Any, source: str) -> list[int]:
    """Token ids of a text, or of a chat by the tokenizer's template."""
    if isinstance(record, str):
        return cast("list[int]", texts.tokenize(tokenizer, record).tolist())
    remedy = "Give a tokenizer with a chat template, or plain texts."
    template = getattr(tokenizer, "chat_template", None)
    check(bool(template), OP, f"a chat template for the messages in {source}", "none", remedy)
    text = tokenizer.apply_chat_template(record, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids)


# ------------------------------------------------------------------------------------ how far apart


def sketch(ids: Tensor | Iterable[Tensor], most: int = SKETCH) -> dict[str, Any]:
    """Token frequencies in short: {"tokens": "id:count id:count ...", "rest": count}, the most
    frequent ones first."""
    parts = [ids] if isinstance(ids, Tensor) else list(ids)
    flat = torch.cat([part.reshape(-1).to("cpu", torch.int64) for part in parts])
    counts = torch.bincount(flat)
    order = counts.argsort(descending=True, stable=True)[:most].tolist()
    found = [(i, int(counts[i])) for i in order if counts[i]]
    text = " ".join(f"{token}:{count}" for token, count in found)
    return {"tokens": text, "rest": flat.numel() - sum(count for _, count in found)}


def distance(known: Mapping[str, Any], ids: Tensor | Sequence[int]) -> float:
    """Jensen-Shannon divergence, bits, between a sketch and the frequencies of `ids` over the
    tokens of the sketch and all others together: 0 (equal) to 1 (nothing in common).

    JS(p, q) = KL(p, m)/2 + KL(q, m)/2 with m = (p + q)/2. A lower bound of that of all tokens.

    Raises:
        ValueError: no ids; not a sketch.
    """
    op = "sparsekern.eval.distance"
    flat = torch.as_tensor(ids).reshape(-1).to("cpu", torch.int64)
    check(flat.numel() > 0, op, "token ids", "none")
    try:
        pairs = [pair.split(":") for pair in known["tokens"].split()]
        names = torch.tensor([int(token) for token, _ in pairs], dtype=torch.int64, device="cpu")
        p = torch.tensor(
            [int(count) for _, count in pairs] + [int(known["rest"])], device="cpu"
        ).double()
    except (KeyError, TypeError, ValueError, AttributeError):
        names = torch.empty(0, dtype=torch.float32, device="cpu")
    check(names.numel() > 0, op, "a sketch of token frequencies", repr(known)[:80])
    counts = torch.bincount(flat, minlength=int(names.max()) + 1)[names].double()
    q = torch.cat([counts, (flat.numel() - counts.sum())[None]])
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2

    def divergence(a: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / middle).log2(), torch.zeros_like(a)).sum()

    return max(0.0, float(divergence(p) + divergence(q)) / 2)


def warning(known: Mapping[str, Any] | None, ids: Tensor, name: str) -> str | None:
    """What to say where calibration text and a text that is evaluated are far apart, else None.

    known: PruneReport.calibration; nothing is said without a sketch in it.
    """
    unigrams = known.get("unigrams") if known else None
    if not unigrams:
        return None
    apart = distance(unigrams, ids)
    if apart <= FAR:
        return None
    return (
        f"{name} is far from the text that the model was calibrated on: token frequencies differ "
        f"by {apart:.2f} bits (Jensen-Shannon; above {FAR:g} is far). Calibrate on text like it."
    )
