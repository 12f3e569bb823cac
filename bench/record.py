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
import time
from pathlib import Path
from typing import NoReturn

import torch

from sparsekern.profiling import provenance

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent

# What every record must have beside the environment: what was run, by what, and how its output was
# checked in the same process. A timing has "us" and "timer"; any other result has "metrics".
REQUIRED = ("op", "backend", "check")


def git_state() -> dict:
    """{"git": sha or None, "dirty": bool} of the sources: see provenance.git_state."""
    return provenance.git_state(ROOT)


gpu_state = provenance.gpu_state


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


class Fields(dict):
    """A record, or a dict in one, whose KeyError says where it was read."""

    def __init__(self, where: str, fields: dict) -> None:
        super().__init__(fields)
        self.where = where

    def __missing__(self, key: object) -> NoReturn:
        raise KeyError(f"{self.where}: expected a field {key!r}, got {sorted(self)}")


def read(*paths: str | Path) -> list[dict]:
    """All records of these files, or of bench/records/*.jsonl without an argument, oldest first.

    Raises:
        ValueError: a line is not a record of this schema; the message names file and line.
    """
    records = []
    for path in paths or sorted((ROOT / "bench" / "records").glob("*.jsonl")):
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            try:
                record = json.loads(line)
                if record["schema"] != SCHEMA:
                    raise ValueError(f"schema {record['schema']}, expected {SCHEMA}")
                missing = {"id", "time", "dirty", *REQUIRED} - set(record)
                if missing or ("us" in record) == ("metrics" in record):
                    lacking = ", ".join(sorted(missing)) or "either us or metrics"
                    raise ValueError(f"fields missing: {lacking}")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a record: {error!r}") from error
            where = f"{path}, line {number}"
            inner = {k: Fields(where, v) for k, v in record.items() if isinstance(v, dict)}
            records.append(Fields(where, record | inner))
    return sorted(records, key=lambda record: record["time"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
