"""One function for each parser of what strangers write: damage a folder, read it, say what came of
it.

A folder is damaged by one to three edits of one of its files: bits, bytes, runs of bytes, and for
JSON (the header of a safetensors file, its index, config.json, a manifest, a cache) values, keys and
sizes at any depth. What may come of it: refused (FormatError; ValueError for a run that another
manifest describes), loaded with the same contents, or loaded with others, which only a checksum can
find, where the form has one. Anything else is a fault: another exception, more than 10 s of the CPU,
more memory than twice the file and 1 GB, a difference that a checksum of the form does not show.
`python -m python_tests.fuzz` runs each target in a process of its own, so that a crash or a hang is
a fault, too, and not the end.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern.checkpoint import from_pretrained, load_into, verify_checkpoint
from sparsekern.errors import FormatError

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 10.0
SPARE_KIB = 2**20
ODD = (0, -1, 1, 2, 3, 7, 8, 255, 256, 2**16, 2**31 - 1, 2**31, 2**53, 2**63, 10**18, 10**400)
VALUES = (*ODD, 0.0, -1.5, 1e400, None, True, False, "", "x", "../x", [], {}, [[[]]], {"": None})
TOKENS = torch.arange(3, 15).view(1, 12)


class Plain(torch.nn.Module):
    """What corpus/plain holds: two compressed layers, one with a bias, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(12, 16)
        self.second = torch.nn.Linear(16, 12, bias=False)
        self.table = torch.nn.Embedding(10, 16)


@dataclass
class Outcome:
    """Counts of a run; `faults` says file, seed and what happened."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds of the CPU
    peak_kib: int = 0

    def add(self, other: dict[str, Any]) -> None:
        """Take in what another process has counted, as `vars` gives it."""
        self.counts.update(other["counts"])
        self.faults += other["faults"]
        self.slowest = max(self.slowest, other["slowest"])
        self.peak_kib = max(self.peak_kib, other["peak_kib"])


def contents(model: torch.nn.Module) -> dict[str, bytes]:
    """Bytes of every tensor by name."""
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
        if tensor.numel()
    }


def read_plain(folder: Path) -> Any:
    return contents(load_into(Plain(), folder))


def read_model(folder: Path) -> Any:
    """Tensors, and what the model makes of some tokens: a config can change only that."""
    model = from_pretrained(folder)
    with torch.no_grad():
        logits = model(TOKENS).logits  # type: ignore[operator]
    return contents(model), logits.numpy().tobytes()


def read_tokenizer(folder: Path) -> Any:
    from sparsekern.integrations.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    return sorted(tokenizer.get_vocab().items()), tokenizer("and the 12 others")["input_ids"]


def read_gguf(folder: Path) -> Any:
    """Tensors, and what model and tokenizer make of a text."""
    from sparsekern.integrations.gguf.model import load_gguf

    model, tokenizer = load_gguf(folder / "tiny.gguf")
    ids = tokenizer("and the 12 others")["input_ids"]
    with torch.no_grad():
        logits = model(torch.arange(3, 9).view(1, 6)).logits
    return contents(model), ids, logits.float().numpy().tobytes()


def read_resume(folder: Path) -> Any:
    """The model that a run gives which continues in the folder."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 16) for _ in range(2)]
    model = torch.nn.Sequential(*layers)
    data = [torch.randn(8, 16)]
    sparsekern.prune_model(model, "wanda", data, resume=folder / "run", progress=False)
    return contents(model)


def read_tuning(folder: Path) -> Any:
    """What the table says of some problems, after which a cell is added to it."""
    from sparsekern.backends.cuda import tuned_tables
    from sparsekern.utils import json_store

    gpu, known = "NVIDIA H200, 132 multiprocessors", {"decode 256 rows, split 4", "naive"}
    before = os.environ.get("SPARSEKERN_CACHE")
    os.environ["SPARSEKERN_CACHE"] = str(folder)
    json_store._warned.clear()
    try:
        tuned_tables.forget()
        found = [
            tuned_tables.lookup(gpu, dtype, 4096, 4096, tokens, known)
            for dtype in ("bfloat16", "float16")
            for tokens in (1, 16, 100, 10**6)
        ]
        assert all(cell is None or cell.variant in known for cell in found)
        tuned_tables.summary(gpu)
        cell = {16: ("naive", 2.0)}
        tuned_tables.store(folder / "tuning.json", gpu, "bfloat16", (64, 64), cell)
        assert tuned_tables.lookup(gpu, "bfloat16", 64, 64, 16, known) is not None
        return found
    finally:
        os.environ.pop("SPARSEKERN_CACHE")
        if before is not None:
            os.environ["SPARSEKERN_CACHE"] = before
        tuned_tables.forget()


@dataclass(frozen=True)
class Target:
    """A parser: `read` is called on a copy of the folder `source` whose file `name` is damaged.

    kind: what the cases are counted as. sums: whether a damaged file that is read shows in
    verify_checkpoint. changes: whether a file may be read with another outcome.
    """

    source: str
    name: str
    read: Callable[[Path], Any]
    kind: str = "checkpoint"
    sums: bool = True
    changes: bool = True


TARGETS: dict[str, Target] = {
    "header": Target("plain", "model.safetensors", read_plain),
    "index": Target("sharded", "model.safetensors.index.json", read_plain),
    "shard": Target("sharded", "model-00002-of-00003.safetensors", read_plain),
    "config": Target("llama", "config.json", read_model),
    "model": Target("llama", "model.safetensors", read_model),
    "generation": Target("llama", "generation_config.json", read_model),
    "sums": Target("plain", "SHA256SUMS", read_plain),
    "tokenizer": Target("tokenizer", "tokenizer.json", read_tokenizer, "tokenizer", False),
    "tokenizer config": Target(
        "tokenizer", "tokenizer_config.json", read_tokenizer, "tokenizer", False
    ),
    "gguf": Target("gguf", "tiny.gguf", read_gguf, "GGUF", False),
    "stage": Target("", "run/whole.safetensors", read_resume, "resume folder", False, False),
    "manifest": Target("", "run/manifest.json", read_resume, "resume folder", False, False),
    "tuning": Target("tuning", "tuning.json", read_tuning, "cache file", False),
}


def prepare(target: str, folder: Path) -> None:
    """Put the undamaged folder of a target there."""
    source = TARGETS[target].source
    if source:
        shutil.copytree(CORPUS / source, folder)
    else:
        folder.mkdir()
        read_resume(folder)


def damage(data: bytes, name: str, rng: random.Random) -> bytes:
    """One to three edits of a file; different from `data`."""
    changed = data
    while changed == data:
        for _ in range(rng.randint(1, 3)):
            if name.endswith(".json") and rng.random() < 0.7:
                changed = _edit_json(changed, rng)
            elif name.endswith(".safetensors") and rng.random() < 0.5:
                changed = _edit_header(changed, rng)
            elif name.endswith(".gguf") and rng.random() < 0.5:
                changed = _edit_word(changed, rng)
            else:
                changed = _edit_bytes(changed, rng)
    return changed


def _edit_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\0"
    out = bytearray(data)
    at = rng.randrange(rng.choice([min(8, len(out)), min(512, len(out)), len(out)]))
    kind = rng.randrange(6)
    if kind < 2:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        out[at] = rng.randrange(256)
    elif kind == 3:
        del out[at : at + rng.choice([1, 1, 8, len(out)])]
    elif kind == 4:
        out[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 64])))
    else:
        out[at : at + 8] = rng.choice(ODD[:-2]).to_bytes(9, "little", signed=True)[:8]
    return bytes(out)


def _edit_json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _edit_bytes(data, rng)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, item in items:
            places.append((node, key))
            if isinstance(item, (dict, list)):
                walk(item)

    if isinstance(value, (dict, list)):
        walk(value)
    if not places:
        return _edit_bytes(data, rng)
    node, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[key + rng.choice(["", "x", ".weight"])] = node.pop(key)
    elif kind == 2:
        other, name = rng.choice(places)
        node[key] = json.loads(json.dumps(other[name]))
    elif kind < 6 and isinstance(node[key], int) and abs(node[key]) < 2**60:
        node[key] = rng.choice([node[key] + 1, node[key] - 1, 2 * node[key], node[key] * 10**6])
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(value).encode()


def _edit_word(data: bytes, rng: random.Random) -> bytes:
    """Another number in one of the aligned or unaligned words of the first half: counts, types,
    lengths, shapes and offsets of a GGUF file, most of which are small."""
    small = [at for at in range(0, max(0, len(data) // 2 - 8)) if data[at] and not any(data[at + 1 : at + 4])]
    if not small:
        return _edit_bytes(data, rng)
    at, out = rng.choice(small), bytearray(data)
    size = rng.choice([4, 8])
    value = int.from_bytes(out[at : at + size], "little")
    value = rng.choice([value + 1, value - 1, 2 * value, *ODD[:-2]]) % 2 ** (8 * size)
    out[at : at + size] = value.to_bytes(size, "little")
    return bytes(out)


def _edit_header(data: bytes, rng: random.Random) -> bytes:
    if len(data) < 8:
        return _edit_bytes(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    if length > len(data) - 8:
        return _edit_bytes(data, rng)
    text = _edit_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def run(
    target: str,
    cases: range | int,
    seed: int,
    work: Path,
    outcome: Outcome,
    begin: Callable[[int], None] = lambda case: None,
) -> None:
    """Damage the target's file once per case below the folder `work`, and count; `begin` is called
    with the number of each case before it."""
    chosen = TARGETS[target]
    folder, whole = work / target, work / f"{target} whole"
    prepare(target, whole)
    shutil.copytree(whole, folder)
    good = (folder / chosen.name).read_bytes()
    expected = chosen.read(folder)
    for case in range(cases) if isinstance(cases, int) else cases:
        begin(case)
        bad = damage(good, chosen.name, random.Random(f"{target}-{seed}-{case}"))
        if chosen.kind in ("resume folder", "cache file"):  # reading writes there
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
        (folder / chosen.name).write_bytes(bad)
        start, before = time.process_time(), _peak_kib()
        where = f"{target} {seed} {case}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = "same" if chosen.read(folder) == expected else "differs"
        except (FormatError, ValueError) as error:
            result = "refused"
            if not isinstance(error, FormatError) and chosen.kind != "resume folder":
                result = "error"
                outcome.faults.append(f"{where}: {type(error).__name__}: {str(error)[:200]}")
        except Exception as error:
            result = "error"
            outcome.faults.append(f"{where}: {type(error).__name__}: {str(error)[:200]}")
        if result == "differs" and not chosen.changes:
            outcome.faults.append(f"{where}: another result")
        if chosen.sums:
            try:
                problems = verify_checkpoint(folder).problems
                if result in ("same", "differs") and "sha256" not in problems:
                    outcome.faults.append(f"{where}: {result}, and the checksum does not say so")
            except Exception as error:  # damage is reported, never raised
                outcome.faults.append(f"{where}: verify: {type(error).__name__}: {error}"[:300])
        seconds, grown = time.process_time() - start, _peak_kib() - before
        outcome.counts[f"{target}: {result}"] += 1
        outcome.slowest = max(outcome.slowest, seconds)
        outcome.peak_kib = max(outcome.peak_kib, grown)
        if seconds > SECONDS:
            outcome.faults.append(f"{where}: {seconds:.1f} s")
        if grown > SPARE_KIB + 2 * len(bad) // 1024:
            outcome.faults.append(f"{where}: {grown} KiB more")
    shutil.rmtree(folder)
    shutil.rmtree(whole)


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_corpus() -> None:
    """Write python_tests/fuzz/corpus anew: small pruned models of fixed numbers."""
    import transformers

    from python_tests.checkpoint.checkpoint_cases import sparsify
    from python_tests.integrations import gguf_cases
    from sparsekern.backends.cuda import tuned_tables
    from sparsekern.checkpoint import save_pretrained
    from sparsekern.integrations.gguf.model import load_gguf

    torch.manual_seed(0)
    plain = sparsify(Plain(), keep=())
    save_pretrained(plain, CORPUS / "plain")
    save_pretrained(plain, CORPUS / "sharded", max_shard_size=600)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    save_pretrained(sparsify(transformers.LlamaForCausalLM(config).eval()), CORPUS / "llama")
    gguf = CORPUS / "gguf" / "tiny.gguf"
    gguf.parent.mkdir(exist_ok=True)
    tensors = gguf_cases.gguf_tensors(gguf_cases.tiny_llama())
    gguf_cases.write_gguf(gguf, tensors, gguf_cases.metadata(), quantise=True)
    load_gguf(gguf)[1].save_pretrained(CORPUS / "tokenizer")
    for shape in ((4096, 4096), (1024, 4096)):
        for dtype, us in (("bfloat16", 3.9), ("float16", 4.1)):
            cells = {n: ("decode 256 rows, split 4", us + n / 16) for n in (1, 16, 128, 4096)}
            path = CORPUS / "tuning" / "tuning.json"
            tuned_tables.store(path, "NVIDIA H200, 132 multiprocessors", dtype, shape, cells)
    (CORPUS / "tuning" / "tuning.json.lock").unlink()
