"""The numbers of the README, from the records: size, speed and quality in three facts, and a table
of how much faster on average, from where to where. Losses are in the same ranges, and counted; one
by one they are in bench/RESULTS.md.
"""

from __future__ import annotations

from . import results

RANGES = ((1, 16), (17, 64), (65, 512), (513, 10**9))
DTYPE = "bfloat16"
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"


def render(records: list[dict]) -> str:
    """Three facts and a table of ratios by number of tokens; "" without records of a GPU."""
    clean = [entry for entry in records if entry["dirty"] is False]
    gpu = chosen_gpu(clean)
    if gpu is None:
        return ""
    mine = [entry for entry in clean if entry.get("gpu") == gpu]
    found = [cell for cell in results.cells(mine) if cell.dtype == DTYPE]
    facts = [_size(mine), _speed(mine, clean), _quality(mine)]
    lines = [
        *(fact for fact in facts if fact),
        "",
        f"Linear layers of Llama-3 shapes on one {gpu} in {DTYPE}: time of the peer over ours,",
        "geometric mean and extremes of all that were timed.",
        "",
        "| linear layers | over cuBLAS | over cuSPARSELt, searched |",
        "| --- | ---: | ---: |",
    ]
    for first, last in RANGES:
        cells = [cell for cell in found if first <= cell.tokens <= last]
        if not cells:
            continue
        most = max(cell.tokens for cell in cells)
        ratios = [_ratios(cells, peer) for peer in results.PEERS]
        lines.append(f"| {first} to {most} tokens | {ratios[0]} | {ratios[1]} |")
    return "\n".join([*lines, "", _lost(found)]).strip()


def chosen_gpu(clean: list[dict]) -> str | None:
    """The GPU with the most records of linear layers; None without any."""
    gpus = [entry["gpu"] for entry in clean if entry["op"] == "linear" and entry.get("gpu")]
    return max(sorted(set(gpus)), key=gpus.count) if gpus else None


def _ratios(cells: list[results.Cell], peer: str) -> str:
    values = [cell.ratio(peer) for cell in cells if cell.ratio(peer) is not None]
    if not values:
        return "-"
    mean = results.geometric_mean(values)
    return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def _lost(found: list[results.Cell]) -> str:
    """How often each peer is faster, and the worst of it."""
    parts, losses = [], results.losses(found)
    for peer, name in results.PEERS.items():
        of = sum(cell.ratio(peer) is not None for cell in found)
        ratios = [ratio for _, loser, ratio in losses if loser == peer]
        text = f"{name} is faster in {len(ratios)} of {of} cells"
        parts.append(f"{text}, at worst {min(ratios):.2f}" if ratios else text)
    return f"**Lost**: {'; '.join(parts)}."


def _newest(records: list[dict], op: str) -> list[dict]:
    """The records of the newest campaign of an op, oldest first."""
    entries = [entry for entry in records if entry["op"] == op]
    return [entry for entry in entries if entry["campaign"] == entries[-1]["campaign"]]


def _models(records: list[dict]) -> tuple[str, dict, dict] | None:
    """(case, dense, best sparse form): the newest decode_model records of the smallest batch."""
    entries = _newest(records, "decode_model")
    if not entries:
        return None
    case = min((entry["case"] for entry in entries), key=_batch)
    metrics = {entry["backend"]: entry["metrics"] for entry in entries if entry["case"] == case}
    dense = metrics.pop("dense")
    return case, dense, max(metrics.values(), key=lambda m: m["tokens_s"])


def _size(records: list[dict]) -> str:
    models = _models(records)
    if models is None:
        return ""
    case, dense, best = models
    return (
        f"- **Size**: 9/16 of the 16-bit bytes of every pruned layer, on disk and on the GPU. "
        f"A model ({case.partition(', batch')[0]}) with dense embeddings: "
        f"{best['weights_gb']:.1f} instead of {dense['weights_gb']:.1f} GB of weights."
    )


def _speed(records: list[dict], everywhere: list[dict]) -> str:
    models = _models(records)
    if models is None:
        return ""
    case, dense, best = models
    rates = f"{best['tokens_s']:.0f} instead of {dense['tokens_s']:.0f} tokens/s"
    return (
        f"- **Speed**: decoding with that model ({case.partition('layers, ')[2]}): {rates}, "
        f"{best['tokens_s'] / dense['tokens_s']:.2f} times as fast.{_engine(everywhere)}"
    )


def _engine(records: list[dict]) -> str:
    """What the newest records of a real vLLM say, and what they do not."""
    entries = [entry for entry in _newest(records, "vllm") if entry["backend"] == "sparse"]
    gains = {
        entry["case"].rpartition(", ")[2]: entry["metrics"]["speedup"]
        for entry in entries
        if "speedup" in entry["metrics"]
    }
    if not gains:
        return " No record compares an inference engine, or fp8."
    parts = ", ".join(f"{gain:.2f} at {case}" for case, gain in gains.items())
    fp8 = any(entry["backend"] == "fp8" for entry in _newest(records, "vllm"))
    text = f" In vLLM on one {entries[0]['gpu']}, over bfloat16: {parts}."
    return text if fp8 else f"{text} No record compares dense fp8."


def _quality(records: list[dict]) -> str:
    """Perplexity of the newest record of each method, and of the dense model."""
    found = {}
    for entry in records:
        if entry["op"] != "prune_model":
            continue
        details = entry.get("details") or {}
        name = entry["backend"]
        if name == "sparsegpt":
            name += _variant(details)
        found[name] = entry["metrics"]["perplexity"]
    wanted = {
        "sparsegpt default": "with the default (SparseGPT, refined, matched to dense)",
        "sparsegpt published": "with SparseGPT as published",
        "wanda": "with Wanda",
        "magnitude": "with magnitude",
    }
    parts = [f"{found[name]:.1f} {text}" for name, text in wanted.items() if name in found]
    if "dense" not in found or not parts:
        return ""
    return (
        f"- **Quality**: one-shot pruning costs much, and a small model pays most. SmolLM2-135M, "
        f"perplexity on WikiText-2: dense {found['dense']:.1f}; {', '.join(parts)}."
    )


def _variant(details: dict) -> str:
    refine, share = details.get("refine"), details.get("match_dense")
    if refine == 16 and share == 0.25:
        return " default"
    return " published" if refine == 0 and not share else " other"


def _batch(case: str) -> int:
    return int(case.partition("batch ")[2].partition(",")[0])
