"""Options that every benchmark has, its time budget, and where its records go."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import record

BEGAN: float | None = None  # of time.monotonic(): when the process did; None: with each Run


def process_began() -> float:
    """When this process began, as time.monotonic() counts; now where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError, IndexError):
        age = 0.0
    return time.monotonic() - max(0.0, age)


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
        self._begin = time.monotonic() if BEGAN is None else BEGAN
        self._budget = args.budget
        self.phases: dict[str, float] = {}  # seconds of each
        self.now = ""  # the phase that runs
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

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block, and says how long it took when it ends, however it does."""
        begin, outer, self.now = time.monotonic(), self.now, name
        try:
            yield
        finally:
            took, self.now = time.monotonic() - begin, outer
            self.phases[name] = round(self.phases.get(name, 0.0) + took, 2)
            self.say(f"phase {name}: {took:.1f} s")

    def close(self) -> None:
        self.say(f"{len(self.records)} records in {self.path}, campaign {self.campaign}")


class Watch:
    """The end of a process that has a limit, or that is asked to end.

    A thread of its own waits for it, as the main one may be in a compiler or a kernel: at `limit`
    seconds of the run, or `GRACE` after SIGTERM, it calls `rescue(why)` and ends the process with
    code 3. From SIGTERM on `asked` is true; `rescue` is called at once, too.

    Args:
        run: whose clock counts.      limit: seconds, None for none.
        rescue: writes what is known. Called from the thread.
    """

    GRACE, POLL = 10.0, 1.0
    CODE = 3

    def __init__(self, run: Run, limit: float | None, rescue: Callable[[str], None]):
        self.run, self.limit, self.rescue = run, limit, rescue
        self.asked = False
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._done = threading.Event()

    def __enter__(self) -> Watch:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._fd = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
            self._before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._thread = threading.Thread(target=self._wait, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        with contextlib.suppress(OSError):
            self._theirs.send(b"\0")
        self._thread.join(5)
        if self._main:
            signal.set_wakeup_fd(self._fd)
            signal.signal(signal.SIGTERM, self._before)
        self._ours.close()
        self._theirs.close()

    def _wait(self) -> None:
        while not self._done.is_set():
            left = None if self.limit is None else self.limit - self.run.elapsed
            if left is not None and left <= 0:
                self._end("the limit is reached")
            pause = self.POLL if left is None else min(left, self.POLL)
            ready, _, _ = select.select([self._ours], [], [], pause)
            if ready and signal.SIGTERM in self._ours.recv(64) and not self.asked:
                self.asked = True
                self._call("SIGTERM")
                end = self.run.elapsed + self.GRACE
                self.limit = end if self.limit is None else min(self.limit, end)

    def _call(self, why: str) -> None:
        try:
            self.rescue(why)
        except Exception as error:
            self.run.say(f"{why}: nothing could be recorded: {type(error).__name__}: {error}")

    def _end(self, why: str) -> None:
        self._call(why)
        self.run.say(f"{why} in phase {self.run.now or 'none'}: ended")
        sys.stderr.flush()
        os._exit(self.CODE)


class Told(logging.Handler):
    """What the package logs, as progress of a run; lines closer than `pause` seconds to the one
    before are left out."""

    def __init__(self, run: Run, pause: float = 5.0):
        super().__init__(logging.INFO)
        self.run, self.pause, self.last = run, pause, -pause

    def emit(self, entry: logging.LogRecord) -> None:
        if self.run.elapsed - self.last >= self.pause:
            self.last = self.run.elapsed
            self.run.say(f"  {entry.getMessage().splitlines()[0][:160]}")


def timed(rounds: Sequence[Any], rotate: bool, seconds: float) -> dict[str, Any]:
    """Options of prune_model: these rounds, and a rotation, in so many seconds together. Rounds
    after the walk get three parts, the one inside it two, the rotation one."""
    parts = [2 if r.span == 1 else 3 for r in rounds]
    each = max(0.1, seconds) / max(1, sum(parts) + rotate)
    made = [dataclasses.replace(r, seconds=n * each) for r, n in zip(rounds, parts)]
    found: dict[str, Any] = {"reconstruct": made} if made else {}
    return found | ({"rotate": {"seconds": each}} if rotate else {})


@contextlib.contextmanager
def told(run: Run) -> Iterator[None]:
    """The package's log as progress of the run, in the block."""
    logger, handler = logging.getLogger("sparsekern"), Told(run)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


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
