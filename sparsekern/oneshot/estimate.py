"""What a long run will take: memory before it starts, time from the first block on, and ticks
inside a block.

Nothing is guessed from a table of machines. Memory is counted from the calibration and the first
block; time is that of the first batches, then of the first whole block, times what is left.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from sparsekern.oneshot.discovery import input_embedding
from sparsekern.oneshot.executor import Calibration
from sparsekern.oneshot.stages import Stage

# A run that is expected to take longer says so on stderr, beside the progress bar.
LONG_SECONDS = 60.0
# The share of a forward with Hessians that one without takes.
PLAIN_FORWARD = 0.6
logger = logging.getLogger("sparsekern")


def free_host_bytes() -> int | None:
    """Bytes of memory that the host has free; None where it does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def available_host_bytes() -> int | None:
    """Bytes that a process may still take: free memory, with what the system would give up for it,
    within the limit of its control group; None where nothing says."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        free = free_host_bytes()
        found += [] if free is None else [free]
    with contextlib.suppress(OSError, ValueError):
        limit, used = (
            int(Path("/sys/fs/cgroup", name).read_text())
            for name in ("memory.max", "memory.current")
        )
        found.append(max(0, limit - used))
    return min(found, default=None)


def memory(walk: Calibration, stages: list[Stage]) -> dict[str, int]:
    """Bytes that a walk keeps beside the model.

    Returns:
        {"hidden_states": inputs of the next block, of all samples (twice beside the dense model),
        "hessians": float32 [in_features, in_features] of the largest stage, at most}; {} without
        calibration.
    """
    if not walk.batches or walk.hessians is not None:
        return {}
    hidden = 0
    weight = getattr(input_embedding(walk.model), "weight", None)
    if walk.chained and weight is not None:
        tokens = sum(batch.tokens for batch in walk.batches)
        dense = 2 if walk.beside_dense else 0  # its inputs and its outputs
        hidden = (1 + dense) * tokens * int(weight.shape[-1]) * weight.element_size()
    hessians = [sum(4 * layer.shape[1] ** 2 for layer in stage.layers) for stage in stages]
    return {"hidden_states": hidden, "hessians": max(hessians, default=0)}


class Progress:
    """Ticks of a run, and the estimates that follow from them.

    Attributes:
        estimate: {"seconds": of the whole run, "from": "the first batches" or "the first block",
            **memory}; what is known so far.
    """

    def __init__(self, walk: Calibration, stages: list[Stage], bar: Any, op: str) -> None:
        self.walk, self.bar, self.op = walk, bar, op
        self.blocks = [stage.key for stage in stages if stage.layers]
        self.start = self._stage_start = time.perf_counter()
        self.estimate: dict[str, Any] = dict(memory(walk, stages))
        self._stage = ""
        self._first: tuple[float, int] | None = None  # time and batch of the first tick
        self._said = self._early = False
        walk.on_tick = self.tick
        self._check_memory()

    def _check_memory(self) -> None:
        hidden, free = self.estimate.get("hidden_states", 0), free_host_bytes()
        on_host = self.walk.device.type == "cpu" or self.walk.offload
        if hidden and on_host and free is not None and hidden > free:
            warnings.warn(
                f"{self.op}: the hidden states of {len(self.walk.batches)} batches need "
                f"{size(hidden)}, and the host has {size(free)} free. Use fewer samples or shorter "
                "windows.",
                stacklevel=5,
            )

    def tick(self, stage: str, what: str, done: int, total: int) -> None:
        """`done` of `total` batches (or layers) of a stage are through a phase."""
        if stage != self._stage:
            self._stage, self._stage_start, self._first = stage, time.perf_counter(), None
        self.bar.set_postfix_str(f"{stage} {what} {done}/{total}", refresh=True)
        if self._early or what != "hessian" or stage not in self.blocks or total < 3:
            return
        now = time.perf_counter()
        if self._first is None:
            self._first = now, done
        elif done >= min(total, self._first[1] + 2):
            batch = (now - self._first[0]) / (done - self._first[1])
            forwards = 1 + PLAIN_FORWARD * (2 if self.walk.beside_dense else 1)
            self._say(batch * total * forwards * len(self.blocks), "the first batches")
            self._early = True

    def done(self, stage: str) -> None:
        """A stage is finished, calibrated and pruned."""
        if stage not in self.blocks or self._said or not self.walk.batches:
            return
        index = self.blocks.index(stage)
        if len(self.blocks) - index < 3 or self._stage != stage:
            return
        self._said = self._early = True
        seconds = time.perf_counter() - self._stage_start
        passed = time.perf_counter() - self.start
        self._say(passed + seconds * (len(self.blocks) - 1 - index), "the first block")

    def _say(self, seconds: float, source: str) -> None:
        self.estimate |= {"seconds": seconds, "from": source}
        tokens = sum(batch.tokens for batch in self.walk.batches)
        least = "at least " if source == "the first batches" else "about "
        text = (
            f"{self.op}: {least}{duration(seconds)} for {len(self.blocks)} stages and {tokens} "
            f"tokens on {self.walk.device}, by {source}"
        )
        kept = [f"{size(self.estimate[k])} of {k.replace('_', ' ')}" for k in _kept(self.estimate)]
        text += f"; it holds {' and '.join(kept)}" if kept else ""
        logger.info("%s", text)
        if seconds >= LONG_SECONDS and not self.bar.disable:
            self.bar.write(text, file=sys.stderr)


def _kept(estimate: dict[str, Any]) -> list[str]:
    return [key for key in ("hidden_states", "hessians") if estimate.get(key)]


def duration(seconds: float) -> str:
    """ "40 s", "12 min" or "3 h 20 min"."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes in the unit that suits: "512 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"
