"""Clocks, power and temperature of the GPU while something runs, as nvidia-smi prints them.

    with Monitor() as monitor:
        monitor.clear()
        ... measure ...
        fields = monitor.medians()      {"clock_sm_mhz": 1755.0, "power_draw_w": 640.2, ...}

One nvidia-smi prints a line every 200 ms, and a thread reads it: nothing is started or waited for
between two samples of a measurement.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading

import torch

from . import record

FIELDS = {
    "clock_sm_mhz": "clocks.sm",
    "clock_mem_mhz": "clocks.mem",
    "power_draw_w": "power.draw",
    "temperature_c": "temperature.gpu",
}
PERIOD_MS = 200


class Monitor:
    """Context manager; without a GPU or nvidia-smi it reports nothing."""

    def __init__(self):
        self._lines: list[list[float]] = []
        self._last: list[float] | None = None
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Monitor:
        if torch.cuda.is_available() and shutil.which("nvidia-smi"):
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            self._start(
                [
                    "nvidia-smi",
                    f"--query-gpu={','.join(FIELDS.values())}",
                    f"--id=GPU-{uuid}",
                    "--format=csv,noheader,nounits",
                    f"--loop-ms={PERIOD_MS}",
                ]
            )
        return self

    def __exit__(self, *exception) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._thread.join(10)
            self._process.stdout.close()

    def _start(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            try:
                values = [float(part) for part in line.split(",")]
            except ValueError:
                continue  # "[N/A]"
            if len(values) == len(FIELDS):
                with self._lock:
                    self._lines.append(values)
                    self._last = values

    def clear(self) -> None:
        """Forget what was read so far."""
        with self._lock:
            self._lines.clear()

    def medians(self) -> dict[str, float]:
        """The median of every field since `clear`; when no line came since, the last one before, or
        what holds right now."""
        with self._lock:
            lines = list(self._lines) or ([self._last] if self._last else [])
        if not lines:
            now = record.gpu_state()
            return {name: now[name] for name in FIELDS if now.get(name) is not None}
        columns = zip(*lines)
        return {name: statistics.median(values) for name, values in zip(FIELDS, columns)}
