"""Where a measurement comes from: the sources and the state of the GPU."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]

_SMI = {
    "driver": "driver_version",
    "clock_sm_mhz": "clocks.sm",
    "clock_sm_max_mhz": "clocks.max.sm",
    "clock_mem_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "power_draw_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def git_state(root: Path = ROOT) -> dict[str, Any]:
    """{"git": sha or None, "dirty": bool} of the sources in `root`.

    SPARSEKERN_GIT_SHA stands in where the sources were copied without .git; a sha that ends in
    "-dirty" says that there were changes. New records do not make a tree dirty. Sources of unknown
    origin count as dirty.
    """
    if sha := os.environ.get("SPARSEKERN_GIT_SHA"):
        return {"git": sha.removesuffix("-dirty"), "dirty": sha.endswith("-dirty")}
    if not (root / ".git").exists():
        return {"git": None, "dirty": True}
    try:
        sha = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
        pathspec = ["--", ".", ":!bench/records"]
        changes = _output(["git", "-C", str(root), "status", "--porcelain", *pathspec])
    except (OSError, subprocess.CalledProcessError):
        return {"git": None, "dirty": True}
    return {"git": sha, "dirty": bool(changes)}


def gpu_state(device: int | None = None) -> dict[str, Any]:
    """Driver, clocks (now and maximal), power and temperature of the GPU, as nvidia-smi has them.

    Call it before and after a measurement. Empty without a GPU or without nvidia-smi; a value that
    the GPU does not report is None.
    """
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return {}
    index = torch.cuda.current_device() if device is None else device
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    fields = ",".join(_SMI.values())
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", uuid]
    try:
        values = _output(command).split(",")
    except (OSError, subprocess.SubprocessError):
        return {}
    state: dict[str, Any] = dict(zip(_SMI, (value.strip() for value in values), strict=False))
    return {name: v if name == "driver" else _number(v) for name, v in state.items()}


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], dict[str, float]]]:
    """Clock and power of the current GPU while the block runs; what it yields says the medians."""
    lines: list[list[float]] = []
    process = None
    if torch.cuda.is_available() and shutil.which("nvidia-smi"):
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", f"--id=GPU-{uuid}"]
        command += ["--format=csv,noheader,nounits", "--loop-ms=100"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        def read() -> None:
            assert process is not None and process.stdout is not None
            for line in process.stdout:
                with contextlib.suppress(ValueError):
                    lines.append([float(part) for part in line.split(",")])

        threading.Thread(target=read, daemon=True).start()

    def medians() -> dict[str, float]:
        whole = [line for line in lines if len(line) == 2]
        names = ("clock_sm_mhz", "power_draw_w")
        return {n: statistics.median(column) for n, column in zip(names, zip(*whole))}

    try:
        yield medians
    finally:
        if process is not None:
            process.terminate()
            process.wait(10)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # "[N/A]", "[Not Supported]"
