"""Where the time of a walk goes, and what needs the most memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch

SHOWN = 5e-4  # seconds of a phase that a line has


class Timed:
    """Attributes:
    device: where the work is.
    phases: seconds by phase: capture, hessian, forward and what the caller adds; "other" is what a
        stage took beside them.
    parts: seconds by part of a phase, as "prune: refine".
    peak: (bytes of GPU memory, phase that needed them first).
    """

    device: torch.device

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.parts: dict[str, float] = {}
        self.peak = (0, "")

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time a phase; on a GPU it ends when its kernels have, once per phase and block."""
        return self._timed(name, self.phases, True)

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time a part of a phase, likewise."""
        return self._timed(name, self.parts, False)

    @contextlib.contextmanager
    def _timed(self, name: str, seconds: dict[str, float], whole: bool) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                if whole:
                    size = torch.cuda.max_memory_allocated(self.device)
                    self.peak = max(self.peak, (size, name), key=lambda peak: peak[0])
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def times(self) -> dict[str, float]:
        """Seconds by phase and part, now."""
        return {**self.phases, **self.parts}

    def spent(self, before: Mapping[str, float], total: float) -> str:
        """The seconds of each phase and part since `times` was that, of `total` seconds, in words,
        and the peak."""
        known = sum(seconds - before.get(name, 0.0) for name, seconds in self.phases.items())
        self.phases["other"] = self.phases.get("other", 0.0) + max(0.0, total - known)
        found = {name: seconds - before.get(name, 0.0) for name, seconds in self.times().items()}
        text = "".join(
            f"; {name} {seconds:.3f} s" for name, seconds in found.items() if seconds > SHOWN
        )
        size, phase = self.peak
        return text + (f"; peak {size / 2**30:.2f} GiB in {phase}" if size else "")
