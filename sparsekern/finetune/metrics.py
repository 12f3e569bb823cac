"""metrics.jsonl of a run: written line by line, read back, cut at a checkpoint, drawn."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from sparsekern.utils.files import write_atomic

METRICS, PLOT = "metrics.jsonl", "plot.png"


def append(folder: Path, row: dict[str, Any]) -> None:
    """One line more."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(row), allow_nan=False) + "\n")


def truncate(folder: Path, step: int) -> None:
    """Drop lines of steps that an interrupted process had made after its checkpoint of `step`."""
    kept = [row for row in read_metrics(folder) if row["step"] <= step and step > 0]
    write_atomic(folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept).encode())


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; [] when there is none. A last line that was cut off by
    a crash is left out."""
    file = Path(folder) / METRICS
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def plot(folder: str | Path) -> Path:
    """Draw loss and evaluations over the tokens into plot.png.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "sparsekern.finetune.plot: matplotlib is missing, so there is no plot. "
            "pip install matplotlib."
        ) from error
    rows = read_metrics(folder)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    left.set(xlabel="step", ylabel="loss")
    left.grid(alpha=0.3)
    if losses:
        left.plot(*zip(*losses), linewidth=1, color="tab:gray", label="loss")
    names = sorted({name for row in rows for name in row.get("evaluation", {})})
    if names:
        right = left.twinx()
        right.set_ylabel("evaluation")
        for name in names:
            points = [
                (row["step"], row["evaluation"][name])
                for row in rows
                if row.get("evaluation", {}).get(name) is not None
            ]
            right.plot(*zip(*points), marker="o", label=name)
        right.legend(fontsize="small")
    path = Path(folder) / PLOT
    figure.savefig(os.fspath(path))
    return path


def finite(value: Any) -> Any:
    """The value as JSON has it: NaN and infinities become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
