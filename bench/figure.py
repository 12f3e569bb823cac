"""The README's figure: speed-up over the number of tokens, drawn from bench/records as SVG, once
for light and once for dark pages.

The drawn numbers are in the file itself, as JSON in its metadata, so that a test (and
`python -m bench table --check`) compares them with the records without drawing.
"""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

from . import headline, record, results

FOLDER = record.ROOT / "docs" / "figures"
THEMES = {
    "light": {"ink": "#1f2328", "grid": "#d1d9e0", "dense": "#0969da", "cusparselt": "#bc4c00"},
    "dark": {"ink": "#e6edf3", "grid": "#3d444d", "dense": "#58a6ff", "cusparselt": "#f0883e"},
}
DIGITS = 4


def data(records: list[dict]) -> dict:
    """What the figure shows: {"gpu", "dtype", "shapes", "peers": {peer: [[tokens, geometric mean,
    least, most], ...]}}, of the tokens at which every shape was timed; {} without records."""
    clean = [entry for entry in records if entry["dirty"] is False]
    gpu = headline.chosen_gpu(clean)
    if gpu is None:
        return {}
    cells = results.cells([entry for entry in clean if entry.get("gpu") == gpu])
    cells = [cell for cell in cells if cell.dtype == headline.DTYPE]
    shapes = len({cell.shape for cell in cells})
    peers: dict[str, list] = {}
    for peer in results.PEERS:
        for tokens in sorted({cell.tokens for cell in cells}):
            ratios = [cell.ratio(peer) for cell in cells if cell.tokens == tokens]
            ratios = [ratio for ratio in ratios if ratio is not None]
            if len(ratios) == shapes:
                values = results.geometric_mean(ratios), min(ratios), max(ratios)
                row = [tokens, *(round(value, DIGITS) for value in values)]
                peers.setdefault(peer, []).append(row)
    return {"gpu": gpu, "dtype": headline.DTYPE, "shapes": shapes, "peers": peers}


def path(theme: str, folder: Path = FOLDER) -> Path:
    return folder / f"speedup-{theme}.svg"


def drawn(file: Path) -> dict:
    """The data in the metadata of a drawn figure; {} where there is none."""
    if not file.is_file():
        return {}
    found = re.search(r"<dc:description>(.*?)</dc:description>", file.read_text("utf-8"), re.DOTALL)
    return json.loads(unescape(found[1])) if found else {}


def up_to_date(records: list[dict], folder: Path = FOLDER) -> bool:
    wanted = data(records)
    return all(drawn(path(theme, folder)) == wanted for theme in THEMES)


def draw(records: list[dict], folder: Path = FOLDER) -> None:
    """Write both files. Needs matplotlib (the extra `bench`)."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    shown = data(records)
    folder.mkdir(parents=True, exist_ok=True)
    for theme, colors in THEMES.items():
        settings = {"svg.hashsalt": "sparsekern", "svg.fonttype": "none", "font.size": 11}
        with matplotlib.rc_context(settings):
            figure = Figure(figsize=(8, 3.8), layout="constrained")
            figure.patch.set_alpha(0)
            axes = figure.subplots()
            axes.patch.set_alpha(0)
            for peer, rows in shown["peers"].items():
                tokens, mean, least, most = zip(*rows)
                color = colors[peer]
                axes.fill_between(tokens, least, most, color=color, alpha=0.18, linewidth=0)
                label = f"over {results.PEERS[peer]}"
                axes.plot(tokens, mean, color=color, marker="o", markersize=4, label=label)
            axes.axhline(1, color=colors["ink"], linewidth=1, linestyle="--")
            axes.set_xscale("log", base=2)
            ticks = [2**power for power in range(14)]
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set_ylim(bottom=0)
            axes.set_xlabel("tokens", color=colors["ink"])
            axes.set_ylabel("time of the peer / ours", color=colors["ink"])
            title = f"{shown['shapes']} layer shapes, {shown['dtype']}, {shown['gpu']}"
            axes.set_title(f"{title}: geometric mean and range", color=colors["ink"], fontsize=11)
            axes.grid(color=colors["grid"], linewidth=0.6)
            axes.tick_params(colors=colors["ink"])
            for spine in axes.spines.values():
                spine.set_color(colors["grid"])
            axes.legend(frameon=False, labelcolor=colors["ink"])
            metadata = {"Date": None, "Description": json.dumps(shown), "Creator": None}
            figure.savefig(path(theme, folder), format="svg", metadata=metadata)
