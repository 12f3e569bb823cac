"""The file that `sparsekern tune` writes: whose measurement each cell is, and how one file is added
to another, say to a shipped one.

Beside the entry of a GPU (backends/cuda/tuned_tables.py) stands one of the runs that made it:

    {"NVIDIA H200, 132 multiprocessors, runs":
      {"2026-11-29T22:15:00Z, shard 1/2": {"git": ..., "dirty": false, "torch": ..., "cuda": ...,
        "driver": ..., "clock_sm_mhz": ..., "power_limit_w": ...,
        "cells": {"bfloat16": {"6144x4096": "1024,2048"}}}}}

clock_sm_mhz and power_draw_w are medians of the run. A cell belongs to one run, the newest that
measured it. Cells of older tables belong to none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.errors import check
from sparsekern.profiling import provenance
from sparsekern.utils import json_store

OP = "sparsekern tune --merge"
_RUNS = ", runs"


def runs_key(gpu: str) -> str:
    """The entry of a table file that says which runs made that of this GPU."""
    return gpu + _RUNS


class Run:
    """One run of `sparsekern tune`: stores cells in a file, with where they come from.

    Args:
        path: of the table file.      gpu: from tuned_tables.gpu_name.
        index: of the GPU.            shard: (number, of how many).
    """

    def __init__(self, path: str | Path, gpu: str, index: int, shard: tuple[int, int] = (1, 1)):
        self.path, self.gpu = path, gpu
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.name = stamp if shard == (1, 1) else f"{stamp}, shard {shard[0]}/{shard[1]}"
        self.about: dict[str, Any] = {
            **provenance.git_state(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **provenance.gpu_state(index),
        }

    def store(
        self,
        dtype: str,
        shape: tuple[int, int],
        cells: dict[int, tuple[str, float]],
        dense: dict[int, float],
        during: dict[str, float] | None = None,
    ) -> None:
        """tuned_tables.store, and the run's name on these cells; during: clock and power so far."""
        tuning.store(self.path, self.gpu, dtype, shape, cells, dense)
        self.about |= during or {}
        _claim(self.path, self.gpu, self.name, self.about, {dtype: {_size(shape): _text(cells)}})


def merge(
    sources: Iterable[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    say: Callable[[str], None] = print,
) -> int:
    """Adds the cells of some table files to another one; returns how many. Its other cells stay.

    Args:
        sources: files that `sparsekern tune --out` wrote; of a cell in several the last one counts.
        target: the file that is added to; made when missing.
        say: gets one line per source and GPU.
    Raises:
        ValueError: a source has no cells, or is no table.
    """
    found = []
    for source in sources:
        entries = json_store.load(source, tuning.VERSION)
        gpus = [gpu for gpu in entries if not gpu.endswith(_RUNS)]
        check(gpus, OP, "a table that sparsekern tune wrote", str(source))
        try:
            tables = {gpu: tuning._parse(entries[gpu]) for gpu in gpus}
        except ValueError as error:
            check(False, OP, "a table that sparsekern tune wrote", f"{source}: {error}")
        found.append((source, tables, entries))
    total = 0
    for source, tables, entries in found:
        for gpu, table in tables.items():
            count = 0
            for dtype, shapes in table.items():
                if dtype.endswith(tuning.dense_key("")):
                    continue
                beside = table.get(tuning.dense_key(dtype), {})
                for shape, cells in shapes.items():
                    times = {n: cell[1] for n, cell in beside.get(shape, {}).items() if n in cells}
                    tuning.store(target, gpu, dtype, shape, cells, times)
                    count += len(cells)
            for name, about in sorted(entries.get(runs_key(gpu), {}).items()):
                rest = {key: value for key, value in about.items() if key != "cells"}
                _claim(target, gpu, name, rest, about["cells"])
            say(f"{source}: {count} cells of {gpu} into {target}")
            total += count
    return total


def run_of(
    path: str | os.PathLike[str], gpu: str, dtype: str, shape: tuple[int, int], tokens: int
) -> tuple[str, dict[str, Any]] | None:
    """(name, what is known) of the run that measured a cell; None: the file does not say."""
    for name, about in json_store.load(path, tuning.VERSION).get(runs_key(gpu), {}).items():
        if tokens in _counts(about["cells"].get(dtype, {}).get(_size(shape), "")):
            return name, about
    return None


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _text(counts: Iterable[int]) -> str:
    return ",".join(map(str, sorted(counts)))


def _counts(text: str) -> set[int]:
    return {int(part) for part in text.split(",") if part}


def _claim(
    path: str | os.PathLike[str],
    gpu: str,
    name: str,
    about: dict[str, Any],
    cells: dict[str, dict[str, str]],
) -> None:
    """Gives these cells to a run, which is made when missing, and takes them from all others."""

    def change(entries: dict[str, Any]) -> None:
        runs = entries.setdefault(runs_key(gpu), {})
        mine = runs[name] = {**about, "cells": runs.get(name, {}).get("cells", {})}
        for dtype, sizes in cells.items():
            for size, counts in sizes.items():
                for run in runs.values():
                    row = run["cells"].get(dtype, {})
                    left = _counts(row.pop(size, "")) - _counts(counts)
                    if run is mine:
                        left |= _counts(counts)
                        row = run["cells"].setdefault(dtype, {})
                    if left:
                        row[size] = _text(left)
                    elif not row:
                        run["cells"].pop(dtype, None)
        for other in [key for key, run in runs.items() if not run["cells"]]:
            del runs[other]

    json_store.update(path, change, tuning.VERSION)
