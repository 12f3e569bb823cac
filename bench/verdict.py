"""What linear layers have to show, and what the records say: random shapes against cuBLAS
(bench_random.py), and the layers of Llama-3 8B and 70B against cuSPARSELt (bench_linear.py).

Random shapes: as many as unseen.py has by default; fewer than SHARE of the cells below BELOW times
the speed of cuBLAS, and none below FAR but where the dense 16-bit weight is smaller than SMALL
bytes; the regret of the cost model's pick at most MEAN on average and WORST in the worst cell. Only
the newest campaign with so many shapes counts, or the newest where none has.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import results
from .results import markdown
from .shapes import SHAPES
from .unseen import CLASSES, SHAPES_WANTED

OP, PICK = "linear_random", "linear_pick"
BELOW, SHARE, FAR, SMALL = 0.98, 0.01, 0.90, 256 * 1024
MEAN, WORST = 0.04, 0.15
LISTED = 40  # losses in the table, the worst first; the rest is counted
# Against cuSPARSELt: first and last number of tokens, least geometric mean or None, least ratio.
PEER = ((1024, 8192, 1.05, 0.97), (65, 512, None, 0.97))
NOTHING = "No cell of a random shape is recorded yet: `python -m bench random` measures them."


class Promise(NamedTuple):
    """What has to be shown, what was found, and whether that is enough; None: not measured."""

    text: str
    found: str
    met: bool | None


class Class(NamedTuple):
    """Cells with a number of tokens from first to last: ratios of cuBLAS's time to ours."""

    first: int
    last: int
    ratios: list[float]


@dataclass(frozen=True)
class Verdict:
    """Cells of random shapes with their ratio to dense, the worst first, and the picks' regrets."""

    campaign: str
    cells: list[tuple[results.Cell, float]]
    picks: list[dict]
    ours: str

    @property
    def shapes(self) -> int:
        return len({cell.shape for cell, _ in self.cells})

    @property
    def lost(self) -> list[tuple[results.Cell, float]]:
        return [item for item in self.cells if item[1] < BELOW]

    @property
    def far(self) -> list[tuple[results.Cell, float]]:
        """Those below FAR whose weight is not small."""
        return [item for item in self.cells if item[1] < FAR and weight_bytes(item[0]) >= SMALL]

    @property
    def classes(self) -> list[Class]:
        found = []
        for first, last in CLASSES:
            ratios = [ratio for cell, ratio in self.cells if first <= cell.tokens <= last]
            found += [Class(first, last, ratios)] if ratios else []
        return found

    @property
    def regrets(self) -> list[float]:
        return [entry["metrics"]["regret"] for entry in self.picks]

    def promises(self) -> list[Promise]:
        count, lost, far = len(self.cells), len(self.lost), self.far
        small = sum(ratio < FAR for _, ratio in self.cells) - len(far)
        worst = f", at worst {far[0][1]:.2f}" if far else ""
        found = [
            Promise(
                f"{SHAPES_WANTED} shapes",
                f"{self.shapes}, {count} cells",
                self.shapes >= SHAPES_WANTED,
            ),
            Promise(
                f"below {BELOW} x cuBLAS in fewer than {SHARE:.0%} of the cells",
                f"{lost} of {count} ({lost / count:.1%})",
                lost < SHARE * count,
            ),
            Promise(
                f"below {FAR:.2f} in none but where the weight has less than 256 KiB",
                f"{len(far)}{worst}; and {small} with small weights",
                not far,
            ),
        ]
        mean, most, text = f"at most {MEAN:.0%}", f"at most {WORST:.0%}", "the pick's regret"
        if not self.regrets:
            return [*found, Promise(f"{text} {mean} on average, {most} in a cell", "", None)]
        average, worst_of = statistics.fmean(self.regrets), max(self.regrets)
        cells = f"in {len(self.regrets)} cells"
        return [
            *found,
            Promise(f"{text} {mean} on average", f"{average:.1%} {cells}", average <= MEAN),
            Promise(f"{text} {most} in a cell", f"{worst_of:.1%} {cells}", worst_of <= WORST),
        ]

    def lines(self) -> list[str]:
        """The verdict in lines of text, losses first."""
        text = [
            f"  {ratio:.3f} x cuBLAS: {cell}, {_config(cell, self.ours)}"
            for cell, ratio in self.lost
        ]
        text += [
            f"tokens {c.first}-{c.last}: {results.geometric_mean(c.ratios):.3f} x cuBLAS in the "
            f"geometric mean of {len(c.ratios)} cells, worst {min(c.ratios):.3f}"
            for c in self.classes
        ]
        text += [f"{word(p.met)}: {p.text}: {p.found or 'not measured'}" for p in self.promises()]
        return [f"{len(self.lost)} of {len(self.cells)} cells below {BELOW} x cuBLAS", *text]


def word(met: bool | None) -> str:
    return {True: "met", False: "NOT MET", None: "open"}[met]


def weight_bytes(cell: results.Cell) -> int:
    """Of the dense 16-bit weight."""
    return 2 * cell.out_features * cell.in_features


def judge(records: Iterable[dict], ours: str = results.OURS) -> Verdict | None:
    """The verdict on random shapes by one campaign of records of one GPU; None without."""
    of = [entry for entry in records if entry["op"] in (OP, PICK)]
    shapes: dict[str, set] = {}  # the newest campaign last
    for entry in of:
        if entry["op"] == OP:
            name = entry.get("campaign", entry["id"])
            shapes[name] = shapes.pop(name, set()) | {(entry["out_features"], entry["in_features"])}
    if not shapes:
        return None
    whole = [name for name, found in shapes.items() if len(found) >= SHAPES_WANTED]
    campaign = (whole or [*shapes])[-1]
    of = [entry for entry in of if entry.get("campaign", entry["id"]) == campaign]
    ratios = [(cell, cell.ratio("dense", ours)) for cell in results.cells(of, OP)]
    cells = [(cell, ratio) for cell, ratio in ratios if ratio is not None]
    if not cells:
        return None
    cells.sort(key=lambda item: item[1])
    return Verdict(campaign, cells, [entry for entry in of if entry["op"] == PICK], ours)


def against_cusparselt(found: Iterable[results.Cell]) -> list[Promise]:
    """The promises about the bfloat16 layers of Llama-3 8B and 70B; of what was not timed none."""
    large = {(s.out_features, s.in_features) for s in SHAPES if s.model in ("8b", "70b")}
    cells = [c for c in found if (c.out_features, c.in_features) in large and c.dtype == "bfloat16"]
    promises = []
    for first, last, mean, least in PEER:
        members = [c for c in cells if first <= c.tokens <= last]
        ratios = [(r, c) for c in members if (r := c.ratio("cusparselt")) is not None]
        if not ratios:
            continue
        average = results.geometric_mean(r for r, _ in ratios)
        worst, where = min(ratios, key=lambda item: item[0])
        what = f"{first} to {last} tokens: "
        what += "" if mean is None else f"at least {mean} on average, "
        enough = worst >= least and (mean is None or average >= mean)
        text = f"{average:.3f} in {len(ratios)} cells, worst {worst:.3f} ({where.shape}, "
        below = sum(r < least for r, _ in ratios)
        text += f"{where.tokens}), {below} below {least}"
        promises.append(Promise(f"{what}no cell below {least}", text, enough))
    return promises


# ---- in bench/RESULTS.md -------------------------------------------------------------------------


def section(records: Sequence[dict]) -> str:
    """The part of RESULTS.md on these promises; says so where nothing was measured."""
    clean = [entry for entry in records if entry["dirty"] is False]
    parts, peers = [], []
    for gpu in sorted({entry["gpu"] for entry in clean if entry.get("gpu")}):
        mine = [entry for entry in clean if entry.get("gpu") == gpu]
        if found := judge(mine):
            sources = {str(e.get("git"))[:10] for e in mine if e.get("campaign") == found.campaign}
            parts.append(_text(found, gpu, ", ".join(sorted(sources))))
        for promise in against_cusparselt(results.cells(mine)):
            peers.append([gpu, promise.text, promise.found, word(promise.met)])
    if not parts:
        parts = [f"**Linear layers of random shapes**\n\n{NOTHING}"]
    if peers:
        title = "**Layers of Llama-3 8B and 70B against cuSPARSELt**, bfloat16, its time over ours"
        lines = markdown(["GPU", "promise", "found", "so"], peers)
        parts.append(f"{title}\n\n{lines}")
    return "\n\n".join(parts)


def _text(found: Verdict, gpu: str, sources: str) -> str:
    rows = [
        [cell.shape, str(cell.tokens), _kib(cell), _config(cell, found.ours), f"{ratio:.3f}"]
        for cell, ratio in found.lost[:LISTED]
    ]
    more = f", the worst {LISTED}" if len(found.lost) > LISTED else ""
    head = (
        f"**Linear layers of random shapes**, {gpu}, git {sources}: {len(found.cells)} cells of "
        f"{found.shapes} shapes that no table has, campaign {found.campaign}\n\n"
        f"Below {BELOW} x cuBLAS: {len(found.lost)} cells{more}"
    )
    lost = markdown(["out x in", "tokens", "KiB dense", "picked", "cuBLAS / ours"], rows)
    classes = [
        [
            f"{c.first} to {c.last}",
            str(len(c.ratios)),
            f"{results.geometric_mean(c.ratios):.2f}",
            f"{min(c.ratios):.2f}",
            str(sum(ratio < 1 for ratio in c.ratios)),
            str(sum(ratio < BELOW for ratio in c.ratios)),
        ]
        for c in found.classes
    ]
    header = ["tokens", "cells", "geometric mean", "worst", "below 1", f"below {BELOW}"]
    promises = [[p.text, p.found or "not measured", word(p.met)] for p in found.promises()]
    parts = [head, *([lost] if rows else []), markdown(header, classes)]
    return "\n\n".join([*parts, markdown(["promise", "found", "so"], promises)])


def _kib(cell: results.Cell) -> str:
    return f"{weight_bytes(cell) / 1024:.0f}"


def _config(cell: results.Cell, ours: str) -> str:
    return cell.found[ours].get("config") or ours
