"""The first numbers of the README, from the records: how much faster on average, from where to
where, and what a whole model gains. Losses are in the same ranges; they are listed one by one in
the results further down.
"""

from __future__ import annotations

from . import results

RANGES = ((1, 16), (17, 64), (65, 512), (513, 10**9))
DTYPE = "bfloat16"
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"


def render(records: list[dict]) -> str:
    """A table of ratios by number of tokens and a sentence about decoding; "" without records."""
    clean = [entry for entry in records if entry["dirty"] is False and entry.get("gpu")]
    gpus = [entry["gpu"] for entry in clean if entry["op"] == "linear"]
    if not gpus:
        return ""
    gpu = max(sorted(set(gpus)), key=gpus.count)
    mine = [entry for entry in clean if entry["gpu"] == gpu]
    found = [cell for cell in results.cells(mine) if cell.dtype == DTYPE]
    lines = [
        f"Measured on one {gpu} in {DTYPE}: time of the peer over ours,",
        "all layers of Llama-3 that were timed, geometric mean and extremes.",
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
    lines += ["", _decoding(mine)]
    return "\n".join(lines).rstrip()


def _ratios(cells: list[results.Cell], peer: str) -> str:
    values = [cell.ratio(peer) for cell in cells if cell.ratio(peer) is not None]
    if not values:
        return "-"
    mean = results.geometric_mean(values)
    return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def _decoding(records: list[dict]) -> str:
    """The newest decode_model records of the smallest batch, the best sparse form against dense."""
    entries = [entry for entry in records if entry["op"] == "decode_model"]
    if not entries:
        return ""
    campaign = entries[-1]["campaign"]
    entries = [entry for entry in entries if entry["campaign"] == campaign]
    case = min((entry["case"] for entry in entries), key=_batch)
    metrics = {entry["backend"]: entry["metrics"] for entry in entries if entry["case"] == case}
    dense = metrics.pop("dense")
    best = max(metrics.values(), key=lambda m: m["tokens_s"])
    return (
        f"Decoding with a whole model ({case}):\n"
        f"{best['tokens_s']:.0f} instead of {dense['tokens_s']:.0f} tokens/s, "
        f"{best['speedup']:.2f} times as fast, with {best['weights_gb']:.1f} instead of "
        f"{dense['weights_gb']:.1f} GB of weights."
    )


def _batch(case: str) -> int:
    return int(case.partition("batch ")[2].partition(",")[0])
