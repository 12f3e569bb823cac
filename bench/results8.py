"""Reads timings of quantised 2:4 layers out of records (op "linear8"): ratios, and where we lose.

Ratio = time of the peer / our time. Ours is "w8a8" (x given in 8 bits, as to the dense 8-bit peers)
and also "w8a16"; the dense 8-bit and the dense int4 peer are the faster one of those timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from .results import CLASSES, Cell, geometric_mean

DENSE8 = ("scaled_mm", "scaled_mm fast", "int_mm")
DENSE4 = ("marlin", "machete")
# What is compared: name, ours (the fastest of these that was timed), the peers.
PEERS = {
    "dense 8-bit": DENSE8,
    "dense int4": DENSE4,
    "cuSPARSELt": ("cusparselt",),
    "cuBLAS 16-bit": ("dense",),
    "2:4 16-bit": ("cuda",),
}
OURS = {
    "W8A8": ("w8a8",),
    "W8A8 with quantisation": ("w8a8+quantize",),
    "W8A8 precise": ("w8a8 precise",),
    "W8A16": ("w8a16",),
    "W4A16": ("w4a16",),
}
MAX_LOSSES = 30


def cells(records: Iterable[dict]) -> list[Cell]:
    """The cells of these records, of the newest campaign for each, in order of size."""
    groups: dict[tuple, tuple[str, dict]] = {}
    for entry in records:
        if entry["op"] != "linear8" or "us" not in entry:
            continue
        key = tuple(entry[n] for n in ("out_features", "in_features", "tokens", "dtype"))
        campaign = entry.get("campaign", entry["id"])
        if key not in groups or groups[key][0] != campaign:
            groups[key] = (campaign, {})
        groups[key][1][entry["backend"]] = entry
    found = [Cell(*key, campaign, entries) for key, (campaign, entries) in groups.items()]
    return sorted(found, key=lambda c: (c.dtype, c.out_features * c.in_features, c.shape, c.tokens))


def fastest(cell: Cell, names: tuple[str, ...]) -> float | None:
    """Microseconds of the fastest of these providers; None when none was timed."""
    timed = [us for us in map(cell.us, names) if us is not None]
    return min(timed) if timed else None


def ratio(cell: Cell, ours: str, peer: str) -> float | None:
    mine, other = fastest(cell, OURS[ours]), fastest(cell, PEERS[peer])
    return None if mine is None or other is None else other / mine


def losses(found: list[Cell], below: float = 1.0) -> list[tuple[Cell, str, str, float]]:
    """(cell, ours, peer, ratio) where a peer is faster, the worst first: W8A8 and W8A16."""
    lost = [
        (cell, ours, peer, value)
        for cell in found
        for ours in ("W8A8", "W8A16", "W4A16")
        for peer in PEERS
        if (value := ratio(cell, ours, peer)) is not None and value < below
    ]
    return sorted(lost, key=lambda item: item[3])


def compared(found: list[Cell]) -> int:
    names = ("W8A8", "W8A16", "W4A16")
    return sum(ratio(cell, o, p) is not None for cell in found for o in names for p in PEERS)


def summary(records: Iterable[dict]) -> list[str]:
    """Lines about these records: geometric means and worst cells by class, then losses."""
    found, lines = cells(records), []
    for dtype in dict.fromkeys(cell.dtype for cell in found):
        for name, first, last in CLASSES:
            members = [c for c in found if c.dtype == dtype and first <= c.tokens <= last]
            for ours in OURS:
                for peer in PEERS:
                    ratios = [(value, c) for c in members if (value := ratio(c, ours, peer))]
                    if ratios:
                        worst, where = min(ratios, key=lambda item: item[0])
                        mean = geometric_mean(value for value, _ in ratios)
                        lines.append(
                            f"{dtype} {ours}, {name}: {mean:.3f} x {peer} in the geometric mean of "
                            f"{len(ratios)} cells, worst {worst:.3f} "
                            f"({where.shape}, {where.tokens})"
                        )
    lost = losses(found)
    lines.append(f"slower than a peer in {len(lost)} of {compared(found)} comparisons")
    lines += [f"  {value:.3f} x {peer}: {ours}, {cell}" for cell, ours, peer, value in lost]
    return lines


def losses_table(records: Iterable[dict]) -> tuple[str, list[str], list[list[str]]] | None:
    """(sentence, header, rows) of where we lose; None without such records."""
    found = cells(records)
    if not found:
        return None
    lost = losses(found)
    more = f", of which the worst {MAX_LOSSES}" if len(lost) > MAX_LOSSES else ""
    text = f"Quantised layers: in {len(lost)} of {compared(found)} comparisons{more}"
    rows = [
        [cell.shape, str(cell.tokens), cell.dtype, ours, peer, f"{value:.3f}"]
        for cell, ours, peer, value in lost[:MAX_LOSSES]
    ]
    return text, ["out x in", "tokens", "dtype", "ours", "faster", "its time / ours"], rows


def more_losses(records: Iterable[dict]) -> list[str]:
    """Sentences on the ways to compute that the list leaves out: sums in float32, which are for
    accuracy, and the time with the quantisation of x."""
    found, texts = cells(records), []
    for ours in ("W8A8 precise", "W8A8 with quantisation"):
        for peer in PEERS:
            ratios = [v for cell in found if (v := ratio(cell, ours, peer)) is not None]
            lost = sum(value < 1 for value in ratios)
            if lost:
                texts.append(
                    f"{ours} is slower than {peer} in {lost} of {len(ratios)} comparisons, "
                    f"{min(ratios):.2f} to {max(ratios):.2f}."
                )
    return ["\n".join(texts)] if texts else []


def grids(records: Iterable[dict]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows): for each type and each of ours, shapes down and tokens across, the
    ratios to PEERS in their order."""
    found, tables = cells(records), []
    for dtype in dict.fromkeys(cell.dtype for cell in found):
        for ours in OURS:
            members = [c for c in found if c.dtype == dtype and fastest(c, OURS[ours]) is not None]
            if not members:
                continue
            peers = [p for p in PEERS if any(ratio(c, ours, p) is not None for c in members)]
            tokens = sorted({cell.tokens for cell in members})
            table = {(cell.shape, cell.tokens): cell for cell in members}
            rows = [
                [shape, *(_text(table.get((shape, n)), ours, peers) for n in tokens)]
                for shape in dict.fromkeys(cell.shape for cell in members)
            ]
            header = ["out x in", *(_tokens(n) if n == tokens[0] else str(n) for n in tokens)]
            title = f"{ours}, {dtype}: time of {' / '.join(peers)} over ours, and (microseconds)"
            tables.append((title, header, rows))
    return tables


def _tokens(number: int) -> str:
    return f"{number} token{'s' * (number > 1)}"


def _text(cell: Cell | None, ours: str, peers: list[str]) -> str:
    if cell is None:
        return ""
    values = [ratio(cell, ours, peer) for peer in peers]
    text = " / ".join("-" if value is None else f"{value:.2f}" for value in values)
    us = fastest(cell, OURS[ours])
    return f"{text} ({us:.1f})" if us is not None and math.isfinite(us) else text
