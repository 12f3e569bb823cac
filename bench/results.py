"""Reads timings of linear layers out of records: ratios to the peers, and where we lose.

A cell is one shape, dtype and number of tokens with everything that one campaign timed there.
Ratio = time of the peer / time of "cuda": above 1 sparsekern is faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

OURS = "cuda"
PEERS = {"dense": "cuBLAS", "cusparselt": "cuSPARSELt"}
# Classes of numbers of tokens that are summarised together: name, first, last.
CLASSES = (
    ("tokens 1-16", 1, 16),
    ("tokens 17-32", 17, 32),
    ("tokens 33-64", 33, 64),
    ("tokens 65-512", 65, 512),
    ("tokens > 512", 513, math.inf),
)


@dataclass(frozen=True)
class Cell:
    """One shape, dtype and number of tokens of one campaign: {backend: record}."""

    out_features: int
    in_features: int
    tokens: int
    dtype: str
    campaign: str
    found: dict[str, dict]

    @property
    def shape(self) -> str:
        return f"{self.out_features}x{self.in_features}"

    def __str__(self) -> str:
        return f"{self.shape}, {self.tokens} tokens, {self.dtype}"

    def us(self, backend: str = OURS) -> float | None:
        return self.found[backend]["us"]["p50"] if backend in self.found else None

    def ratio(self, peer: str, ours: str = OURS) -> float | None:
        """Time of the peer / our time; None when one of them was not timed."""
        mine, other = self.us(ours), self.us(peer)
        return None if mine is None or other is None else other / mine

    def tflops(self, backend: str = OURS) -> float | None:
        """Dense-equivalent TFLOPS: 2 · tokens · out_features · in_features / time."""
        us = self.us(backend)
        return us and 2e-6 * self.tokens * self.out_features * self.in_features / us

    def tb_s(self, backend: str = OURS) -> float | None:
        """Bytes of weights, x and y / time; None when the record does not say the bytes."""
        moved = self.found.get(backend, {}).get("bytes")
        return moved and moved / self.us(backend) / 1e6


def cells(records: Iterable[dict], op: str = "linear", timed: str = OURS) -> list[Cell]:
    """The cells of records with this op, in order of size; each of the newest campaign that timed
    the backend `timed` there, or of the newest where none did."""
    groups: dict[tuple, dict[str, dict]] = {}
    for entry in records:
        if entry["op"] != op or "us" not in entry:
            continue
        key = tuple(entry[n] for n in ("out_features", "in_features", "tokens", "dtype"))
        campaign = entry.get("campaign", entry["id"])
        groups.setdefault(key, {}).setdefault(campaign, {})[entry["backend"]] = entry
    found = []
    for key, campaigns in groups.items():
        having = [name for name, entries in campaigns.items() if timed in entries]
        newest = (having or list(campaigns))[-1]
        found.append(Cell(*key, newest, campaigns[newest]))
    return sorted(found, key=lambda c: (c.dtype, c.out_features * c.in_features, c.shape, c.tokens))


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def losses(found: list[Cell], below: float = 1.0) -> list[tuple[Cell, str, float]]:
    """(cell, peer, ratio) wherever a peer is faster than us, the worst first."""
    lost = [
        (cell, peer, cell.ratio(peer))
        for cell in found
        for peer in PEERS
        if (cell.ratio(peer) or math.inf) < below
    ]
    return sorted(lost, key=lambda item: item[2])


def summary(found: list[Cell], read_tb_s: float | None = None) -> list[str]:
    """Lines about these cells: means and worst cases by class and dtype, extremes, losses."""
    lines = []
    for dtype in dict.fromkeys(cell.dtype for cell in found):
        for name, first, last in CLASSES:
            members = [c for c in found if c.dtype == dtype and first <= c.tokens <= last]
            for peer, title in PEERS.items():
                ratios = [(c.ratio(peer), c) for c in members if c.ratio(peer) is not None]
                if ratios:
                    worst, where = min(ratios, key=lambda item: item[0])
                    mean = geometric_mean(ratio for ratio, _ in ratios)
                    lines.append(
                        f"{dtype}, {name}: {mean:.3f} x {title} in the geometric mean of "
                        f"{len(ratios)} cells, worst {worst:.3f} ({where.shape}, {where.tokens})"
                    )
    timed = [cell for cell in found if cell.us() is not None]
    if timed:
        best = max(timed, key=lambda cell: cell.tflops())
        lines.append(f"most dense-equivalent TFLOPS: {best.tflops():.0f} ({best})")
    streaming = [cell for cell in timed if cell.tokens <= 64 and cell.tb_s()]
    if streaming:
        best = max(streaming, key=lambda cell: cell.tb_s())
        share = f", {best.tb_s() / read_tb_s:.0%} of the measured read" if read_tb_s else ""
        lines.append(f"most bytes per second: {best.tb_s():.2f} TB/s{share} ({best})")
    lost = losses(found)
    lines.append(f"slower than a peer in {len(lost)} of {sum(map(compared, found))} comparisons")
    lines += [f"  {ratio:.3f} x {PEERS[peer]}: {cell}" for cell, peer, ratio in lost]
    return lines


def compared(cell: Cell) -> int:
    """With how many peers this cell compares."""
    return sum(cell.ratio(peer) is not None for peer in PEERS)


def ratio_cell(cell: Cell | None, with_tflops: bool = False, ours: str = OURS) -> str:
    """ "1.72 / 1.98": ratios to cuBLAS and cuSPARSELt, "-" where the peer was not timed."""
    if cell is None or cell.us(ours) is None:
        return ""
    parts = [cell.ratio(peer, ours) for peer in PEERS]
    text = " / ".join("-" if part is None else f"{part:.2f}" for part in parts)
    return f"{text} ({cell.tflops(ours):.0f})" if with_tflops else text


def grid(
    found: list[Cell], with_tflops: bool = False, ours: str = OURS
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of ratio_cell: shapes down, numbers of tokens across. One dtype."""
    tokens = sorted({cell.tokens for cell in found})
    table = {(cell.shape, cell.tokens): cell for cell in found}
    header = ["out x in", *(f"{n} token{'s' * (n > 1)}" for n in tokens[:1]), *map(str, tokens[1:])]
    rows = [
        [shape, *(ratio_cell(table.get((shape, n)), with_tflops, ours) for n in tokens)]
        for shape in dict.fromkeys(cell.shape for cell in found)
    ]
    return header, rows


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is aligned left, all others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
