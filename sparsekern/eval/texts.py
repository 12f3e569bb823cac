"""Text for calibration and evaluation: where it comes from, how it becomes token ids and windows.

Three kinds of source, written the same way on the command line and in Python:
    path/to/file.txt            a UTF-8 file of plain text
    hf:NAME[:CONFIG[:SPLIT]]    a Hugging Face data set, read with the `datasets` package;
                                hf:wikitext2 and hf:c4 are short names
    builtin                     the Python language reference inside `pydoc_data`, which every full
                                Python has; its calibration and held-out parts share no paragraph

The two protocols are those of the published 2:4 numbers: `calibration_windows` draws windows at
random starts from one tokenisation of the whole text, and `join_rows` is how WikiText-2 is put
together before it is tokenised once and cut into non-overlapping windows (SparseGPT and Wanda
evaluation code; the perplexity itself is in eval/perplexity.py).

By hand: lm-eval scores by a protocol of its own; data sets are read by `datasets` when asked for.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sparsekern.errors import check, message
from sparsekern.eval.perplexity import as_ids
from sparsekern.utils.arguments import SEEDS, shown

RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")  # files of texts and what is beside them
HELD_OUT_EVERY = 5  # every fifth topic of the sorted list is held out
# short name -> (data set, configuration, {split: data file} where only one file is wanted)
HF_NAMES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None),
    "c4": (
        "allenai/c4",
        None,
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
}


def read_rows(source, split):
    """Rows of text of a source.

    Args:
        source: a file path, "hf:NAME[:CONFIG[:SPLIT]]" or "builtin" (module docstring).
        split: "train" for calibration, "test" for evaluation; a file has none and ignores it.
    Returns:
        list of str. A file gives its lines with their ends, as "\\n" whatever they were:
        "".join(rows) is its text.
    Raises:
        FileNotFoundError, ValueError (not UTF-8, no text), ModuleNotFoundError (`datasets` is
        needed and absent).
    """
    check(
        split in ("train", "test"),
        "sparsekern.read_rows",
        "split in ('train', 'test')",
        repr(split),
    )
    if source == "builtin":
        calibration, held_out = language_reference()
        rows = calibration if split == "train" else held_out
    elif str(source).startswith("hf:"):
        rows = _hf_rows(source[3:], split)
    else:
        path = Path(source)
        if not os.path.isfile(path):  # False for text that can be no name, too
            raise FileNotFoundError(
                f"sparsekern.read_rows: no text file at {str(path)[:200]}. "
                "Give a UTF-8 file, hf:NAME or builtin."
            )
        remedy = "Write its texts to a file of plain text."
        plain = path.suffix.lower() not in RECORDS
        check(plain, "sparsekern.read_rows", "plain text", f"records in {path}", remedy)
        text = utf8(path, "sparsekern.read_rows").replace("\r\n", "\n").replace("\r", "\n")
        *whole, last = text.split("\n")  # splitlines() would also split at form feeds
        rows = [row + "\n" for row in whole] + [last] * bool(last)
    check(
        any(row.strip() for row in rows),
        "sparsekern.read_rows",
        "text",
        f"none in {source}",
        "Give another.",
    )
    return rows


def join_rows(rows):
    """One string from WikiText rows: blank rows become empty, "\\n\\n" goes between rows."""
    return "\n\n".join(row if row.strip() else "" for row in rows)


def tokenize(tokenizer, text):
    """Token ids of a whole text in one call, int64 [tokens].

    Special tokens appear only where the tokenizer adds them by itself.
    """
    output = tokenizer(text, verbose=False)  # quiet: longer than the model's window
    try:
        ids = torch.as_tensor(output["input_ids"], dtype=torch.int64, device="cpu")
    except (TypeError, KeyError, IndexError, ValueError, RuntimeError):
        ids = None
    good = ids is not None and (ids.dim() == 1 or ids.dim() == 2 and ids.shape[0] == 1)
    expected = 'tokenizer(text)["input_ids"] to be a list of ids'
    remedy = "Pass a tokenizer of Transformers."
    check(good, "sparsekern.tokenize", expected, shown(output), remedy, TypeError)
    return ids.reshape(-1)


def utf8(path: Path, op: str) -> str:
    """The text of a file; ValueError, which names the byte, where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")  # without the mark that may be before it
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise ValueError(message(op, f"UTF-8 text in {path}", got, "Convert the file.")) from error


# Of a calibration: 32 GiB of ids.
MOST_TOKENS = 2**32


def _generator(seed, op):
    low, high = SEEDS
    known = isinstance(seed, int) and low <= seed <= high
    check(known, op, f"seed, an int from {low} to {high}", shown(seed), "The default is 0.")
    return torch.Generator().manual_seed(seed)


def calibration_windows(token_ids, samples=128, window=2048, seed=0):
    """Windows at random starts: rows token_ids[s : s + window], s from randint(0, tokens - window).

    Args:
        token_ids: int64 [tokens], one tokenisation of the whole text; a tensor, an array or a list.
        samples, window: how many windows, and tokens in each.
        seed: of a private torch.Generator on the CPU: the same windows on every machine.
    Returns:
        int64 [samples, window].
    Raises:
        ValueError: the text has no more tokens than one window, or a count is not positive.
    """
    op = "sparsekern.calibration_windows"
    check(samples >= 1, op, "samples >= 1", samples)
    check(window >= 1, op, "window >= 1", window)
    few = samples * window <= MOST_TOKENS
    check(few, op, f"samples * window <= {MOST_TOKENS} tokens", f"{samples} * {window}")
    token_ids = as_ids(op, "token_ids", token_ids)
    check(
        token_ids.dim() == 1 and token_ids.numel() > window,
        op,
        f"more than {window} tokens in one row",
        list(token_ids.shape),
        "Give a longer text or a smaller window.",
    )
    generator = _generator(seed, op)
    starts = torch.randint(
        0, token_ids.numel() - window, (samples,), generator=generator, device="cpu"
    )
    return torch.stack([token_ids[start : start + window] for start in starts.tolist()])


def side_by_side(token_ids, samples=None, window=2048, seed=0, twice=False):
    """Windows that do not overlap, in random order: the text is cut from its start, the rest of
    less than a window is left out.

    What calibration_windows draws overlaps: of a short text the held-out rows of a reconstruction
    would be rows that it is trained on, too.

    Args:
        token_ids: int64 [tokens], as for calibration_windows.
        samples: how many at most; None: all.      window: tokens in each.
        seed: of the order, and so of the choice.
        twice: where the text has fewer windows than `samples`, others follow that begin in the
            middle of one and end in that of the next: the same tokens in other places, behind other
            context. The last fifth of the windows shares no token with any other, and stays last.
    Returns:
        int64 [windows, window].
    Raises:
        ValueError: the text has fewer tokens than one window, or a count is not positive.
    """
    op = "sparsekern.side_by_side"
    check(samples is None or samples >= 1, op, "samples >= 1", samples)
    check(window >= 1, op, "window >= 1", window)
    token_ids = as_ids(op, "token_ids", token_ids)
    enough = token_ids.dim() == 1 and token_ids.numel() >= window
    remedy = "Give a longer text or a smaller window."
    check(enough, op, f"{window} tokens in one row", list(token_ids.shape), remedy)
    rows = token_ids[: token_ids.numel() // window * window].view(-1, window)
    generator = _generator(seed, op)
    order = torch.randperm(rows.shape[0], generator=generator, device="cpu")
    if not twice or samples is None or samples <= rows.shape[0]:
        return rows[order[:samples]]
    alone = -(-rows.shape[0] // 5)
    free = torch.ones(rows.shape[0], dtype=torch.bool, device="cpu")
    free[order[-alone:]] = False
    middles = (free[:-1] & free[1:]).nonzero().view(-1) * window + window // 2
    more = token_ids[middles[:, None] + torch.arange(window, device="cpu")]
    more = more[
        torch.randperm(more.shape[0], generator=generator, device="cpu")[: samples - rows.shape[0]]
    ]
    both = torch.cat([rows[order[:-alone]], more])
    both = both[torch.randperm(both.shape[0], generator=generator, device="cpu")]
    return torch.cat([both, rows[order[-alone:]]])


def language_reference():
    """The Python language reference from `pydoc_data.topics`, split into calibration and held-out
    paragraphs.

    Topics are split first, every fifth being held out. Some text is printed under several topics,
    so a paragraph that any held-out topic contains is then dropped from the calibration part.

    Returns:
        (calibration, held_out): lists of paragraphs, each ending in a blank line.
    Raises:
        ModuleNotFoundError: this Python was installed without pydoc_data.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sparsekern.language_reference: this Python has no pydoc_data.topics (a minimal "
            "installation). Give a text file instead."
        ) from error
    names = sorted(topics)
    held_out_names = names[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    held_out = _paragraphs(topics, held_out_names)
    seen = {" ".join(paragraph.split()) for paragraph in held_out}
    rest = _paragraphs(topics, sorted(set(names) - set(held_out_names)))
    return [p for p in rest if " ".join(p.split()) not in seen], held_out


def _paragraphs(topics, names):
    """Paragraphs of the named topics in order, each once, with the blank line that follows it."""
    paragraphs = (
        part.strip("\n") + "\n\n" for name in names for part in topics[name].split("\n\n")
    )
    return list(dict.fromkeys(paragraph for paragraph in paragraphs if paragraph.strip()))


def _hf_rows(name, split):
    """Rows of the "text" column of a Hugging Face data set, given as NAME[:CONFIG[:SPLIT]]."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"sparsekern.read_rows: hf:{name} needs the package 'datasets'. "
            "Run: pip install datasets, or give a text file."
        ) from error
    if name in HF_NAMES:
        repository, config, files = HF_NAMES[name]
        data = datasets.load_dataset(
            repository,
            config,
            split=split,
            **({"data_files": {split: files[split]}} if files else {}),
        )
    else:
        repository, config, wanted = (name.split(":") + ["", ""])[:3]
        data = datasets.load_dataset(repository, config or None, split=wanted or split)
    check(
        "text" in data.column_names,
        "sparsekern.read_rows",
        f"a column 'text' in {name}",
        data.column_names,
        "Save the text to a file and give that.",
    )
    return list(data["text"])
