"""One function for each parser of stored models: damage a folder, read it, say what came of it.

A folder is damaged by one to three edits of one of its files: bits, bytes, runs of bytes, and for
JSON (the header of a safetensors file, its index, config.json) values, keys and sizes at any depth.
What may come of it: refused (FormatError), loaded with the same contents, or loaded with others,
which only a checksum can find. Anything else is a fault: another exception, more than 10 s, more
memory than twice the file and 1 GB.
"""

from __future__ import annotations

import json
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
    slowest: float = 0.0
    peak_kib: int = 0


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


# target: (folder of the corpus, file that is damaged, reader)
TARGETS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "header": ("plain", "model.safetensors", read_plain),
    "index": ("sharded", "model.safetensors.index.json", read_plain),
    "shard": ("sharded", "model-00002-of-00003.safetensors", read_plain),
    "config": ("llama", "config.json", read_model),
    "model": ("llama", "model.safetensors", read_model),
    "generation": ("llama", "generation_config.json", read_model),
    "sums": ("plain", "SHA256SUMS", read_plain),
}


def damage(data: bytes, name: str, rng: random.Random) -> bytes:
    """One to three edits of a file; different from `data`."""
    changed = data
    while changed == data:
        for _ in range(rng.randint(1, 3)):
            if name.endswith(".json") and rng.random() < 0.7:
                changed = _edit_json(changed, rng)
            elif name.endswith(".safetensors") and rng.random() < 0.5:
                changed = _edit_header(changed, rng)
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


def _edit_header(data: bytes, rng: random.Random) -> bytes:
    if len(data) < 8:
        return _edit_bytes(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    if length > len(data) - 8:
        return _edit_bytes(data, rng)
    text = _edit_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def run(target: str, cases: int, seed: int, work: Path, outcome: Outcome) -> None:
    """Damage the target's file `cases` times below the folder `work`, and count."""
    source, name, read = TARGETS[target]
    folder = work / target
    shutil.copytree(CORPUS / source, folder)
    good = (folder / name).read_bytes()
    expected = read(folder)
    for case in range(cases):
        bad = damage(good, name, random.Random(f"{target}-{seed}-{case}"))
        (folder / name).write_bytes(bad)
        start, before = time.monotonic(), _peak_kib()
        where = f"{target} {seed} {case}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = "same" if read(folder) == expected else "differs"
        except FormatError:
            result = "refused"
        except Exception as error:
            result = "error"
            outcome.faults.append(f"{where}: {type(error).__name__}: {str(error)[:200]}")
        try:
            problems = verify_checkpoint(folder).problems
            if result in ("same", "differs") and "sha256" not in problems:
                outcome.faults.append(f"{where}: {result}, and the checksum does not say so")
        except Exception as error:  # damage is reported, never raised
            outcome.faults.append(f"{where}: verify: {type(error).__name__}: {str(error)[:200]}")
        seconds, grown = time.monotonic() - start, _peak_kib() - before
        outcome.counts[f"{target}: {result}"] += 1
        outcome.slowest = max(outcome.slowest, seconds)
        outcome.peak_kib = max(outcome.peak_kib, grown)
        if seconds > SECONDS:
            outcome.faults.append(f"{where}: {seconds:.1f} s")
        if grown > SPARE_KIB + 2 * len(bad) // 1024:
            outcome.faults.append(f"{where}: {grown} KiB more")
    shutil.rmtree(folder)


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_corpus() -> None:
    """Write python_tests/fuzz/corpus anew: small pruned models of fixed numbers."""
    import transformers

    from python_tests.checkpoint.checkpoint_cases import sparsify
    from sparsekern.checkpoint import save_pretrained

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
