"""Records of measurements: append-only JSON lines that say where, when and from which sources.

A record is one JSON object on one line of bench/records/*.jsonl: `environment()`, the fields of the
measurement, and an id. bench/README.md lists the fields. Nothing edits or removes a record; a later
one supersedes it in the tables (bench/table.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent

# What every record must have beside the environment: what was run, by what, and how its output was
# checked in the same process. A timing has "us" and "timer"; any other result has "metrics".
REQUIRED = ("op", "backend", "check")

_SMI = {
    "driver": "driver_version",
    "clock_sm_mhz": "clocks.sm",
    "clock_sm_max_mhz": "clocks.max.sm",
    "clock_mem_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "power_draw_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def git_state() -> dict:
    """{"git": sha or None, "dirty": bool}.

    SPARSEKERN_GIT_SHA stands in where the sources were copied without .git; a sha that ends in
    "-dirty" says that there were changes. New records do not make a tree dirty. Sources of unknown
    origin count as dirty.
    """
    if sha := os.environ.get("SPARSEKERN_GIT_SHA"):
        return {"git": sha.removesuffix("-dirty"), "dirty": sha.endswith("-dirty")}
    if not (ROOT / ".git").exists():
        return {"git": None, "dirty": True}
    try:
        sha = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
        pathspec = ["--", ".", ":!bench/records"]
        changes = _output(["git", "-C", str(ROOT), "status", "--porcelain", *pathspec])
    except (OSError, subprocess.CalledProcessError):
        return {"git": None, "dirty": True}
    return {"git": sha, "dirty": bool(changes)}


def gpu_state(device: int | None = None) -> dict:
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
    except (OSError, subprocess.CalledProcessError):
        return {}
    state: dict = dict(zip(_SMI, (value.strip() for value in values), strict=False))
    return {name: v if name == "driver" else _number(v) for name, v in state.items()}


def versions() -> dict:
    """Versions of sparsekern and of the libraries underneath; None for what is not there."""
    try:
        cusparselt = torch.backends.cusparselt.version()
    except (AttributeError, RuntimeError):
        cusparselt = None
    return {
        "sparsekern": _version("sparsekern") or sparsekern_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cusparselt": cusparselt,
    }


def sparsekern_version() -> str | None:
    """That of the sources beside this folder, for a run that has them on PYTHONPATH alone."""
    text = (ROOT / "sparsekern" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found and found[1]


def environment(device: int | None = None) -> dict:
    """Everything about this process and machine that a record states."""
    gpu = torch.cuda.get_device_name(device) if torch.cuda.is_available() else None
    return {
        "schema": SCHEMA,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **git_state(),
        "gpu": gpu,
        **versions(),
        **gpu_state(device),
    }


def append(path: str | Path, measurement: dict, env: dict | None = None) -> dict:
    """Adds one record to the file, whole or not at all, also with several writers.

    Args:
        path: the .jsonl file; made when missing.
        measurement: fields of bench/README.md; `REQUIRED` ones must be there and not be empty.
        env: what `environment()` returned, when it is shared by many records.
    Returns:
        The record as written, with its id.
    Raises:
        ValueError: a required field is missing or empty, or a value is not finite JSON.
    """
    for name in REQUIRED:
        if not measurement.get(name):
            raise ValueError(
                f"bench.record.append: expected a field {name!r}, got {measurement.get(name)!r}. "
                "A result is recorded only after its output was checked in the same process."
            )
    if ("us" in measurement) == ("metrics" in measurement):
        raise ValueError(
            "bench.record.append: expected either 'us' (a timing) or 'metrics', "
            f"got the fields {sorted(measurement)}."
        )
    record = {**(environment() if env is None else env), **measurement}
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    record["id"] = hashlib.sha256(text.encode()).hexdigest()[:10]
    line = json.dumps({"id": record["id"], **record}, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        data, size = line.encode(), os.fstat(file).st_size
        if os.write(file, data) != len(data):
            os.ftruncate(file, size)
            raise OSError(f"bench.record.append: no room to write a record to {path}.")
        os.fsync(file)
    finally:
        os.close(file)
    return record


def read(*paths: str | Path) -> list[dict]:
    """All records of these files, or of bench/records/*.jsonl without an argument, oldest first.

    Raises:
        ValueError: a line is not a record of this schema; the message names file and line.
    """
    records = []
    for path in paths or sorted((ROOT / "bench" / "records").glob("*.jsonl")):
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                if record["schema"] != SCHEMA:
                    raise ValueError(f"schema {record['schema']}, expected {SCHEMA}")
                missing = {"id", "time", "dirty", *REQUIRED} - set(record)
                if missing:
                    raise ValueError(f"fields missing: {', '.join(sorted(missing))}")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a record: {error!r}") from error
            records.append(record)
    return sorted(records, key=lambda record: record["time"])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # "[N/A]", "[Not Supported]"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
