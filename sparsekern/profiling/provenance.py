"""Where a measurement comes from: the sources and the state of the GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
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


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # "[N/A]", "[Not Supported]"
