"""Options that every benchmark has, its time budget, and where its records go."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from . import record


def parser(name: str, text: str, budget: float) -> argparse.ArgumentParser:
    """An argument parser with the common options; a benchmark adds its own.

    Args:
        name: of the benchmark.      text: what it does.
        budget: default of --budget, seconds.
    """
    result = argparse.ArgumentParser(prog=f"python -m bench {name}", description=text)
    result.add_argument("--quick", action="store_true", help="fewer cases, shorter sampling")
    result.add_argument(
        "--budget",
        type=float,
        default=budget,
        metavar="SECONDS",
        help=f"start no further case after this time (default {budget:g})",
    )
    result.add_argument(
        "--out", type=Path, metavar="FILE", help="append records to FILE, not to bench/records"
    )
    result.add_argument(
        "--campaign",
        help="name of the run (default: the UTC time); cases that FILE already has "
        "under this name are not measured again",
    )
    result.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="cpu is a dry run: everything but the GPU's own code and timers",
    )
    return result


class Run:
    """What a benchmark needs while it runs: time left, campaign, and a file for its records.

    Args:
        path: file for the records where --out is not given.
        args: parsed options of `parser`.
    """

    def __init__(self, path: str | Path, args: argparse.Namespace):
        self.device = torch.device(args.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("bench: expected a CUDA GPU, got none that torch can use.")
        self.path = Path(args.out or path)
        self.campaign = args.campaign or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.quick = args.quick
        self.timer = "graph" if self.device.type == "cuda" else "wall"
        self.records: list[dict] = []  # of this run
        self._begin, self._budget = time.monotonic(), args.budget
        self._env = record.environment()
        known = record.read(self.path) if self.path.exists() else []
        self._done = {case_key(entry) for entry in known if entry.get("campaign") == self.campaign}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    @property
    def left(self) -> float:
        """Seconds of the budget that are left; negative when it is spent."""
        return self._budget - self.elapsed

    def has(self, **case) -> bool:
        """True when the file already holds this case of this campaign."""
        return case_key(case) in self._done

    def add(self, **measurement) -> dict:
        """Append a record now. Fields as in record.append; campaign and time are added."""
        measurement = {"campaign": self.campaign, "seed": 0, **measurement}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = record.append(self.path, measurement, {**self._env, "time": stamp})
        self._done.add(case_key(entry))
        self.records.append(entry)
        return entry

    def say(self, text: str) -> None:
        """Progress: one line with the seconds since the start, not held back in a buffer."""
        print(f"{self.elapsed:6.1f} s  {text}", flush=True)

    def close(self) -> None:
        self.say(f"{len(self.records)} records in {self.path}, campaign {self.campaign}")


def case_key(entry: dict) -> tuple:
    """What tells the cases of a benchmark apart, whoever computed them."""
    names = ("op", "out_features", "in_features", "tokens", "dtype", "case")
    return tuple(entry.get(name) for name in names)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Ends the process, with a traceback on stderr, when the block takes longer than this.

    A kernel that never returns blocks Python inside the driver, where no exception can reach it.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
