"""Keeps and judges what ptxas says about every kernel: registers, spills, frames, wgmma notes.

Two uses. CMakeLists.txt runs nvcc through `ptxas_log.py run LOG -- nvcc ...`, which writes nvcc's
messages to LOG and to the terminal. `ptxas_log.py check LOG_DIR SOURCE_DIR` (make test, and
python_tests/test_build.py) prints one line per kernel and architecture and fails when a kernel

- spills registers, or uses a stack frame that STACK_FRAMES does not allow;
- draws a note C75xx: ptxas serialised a wgmma pipeline or injected a wait. ptxas calls these
  "info", so no warning flag catches them, and they cost up to half the speed;
- left no log: a gate that saw nothing has not passed.

Only the standard library is used: this runs before anything is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Kernels that may use local memory: substring of the (mangled) name -> bytes of stack frame.
# An entry needs a reason beside it.
STACK_FRAMES: dict[str, int] = {}

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '(sm_\w+)'")
_PROPERTIES = re.compile(r"Function properties for '?([^\s']+)'?")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")
_NOTE = re.compile(r"\bC75\d\d\b")


@dataclass
class KernelReport:
    """What ptxas reported about one function on one architecture (bytes; -1 = not reported)."""

    source: str
    name: str
    arch: str
    registers: int = -1
    smem: int = 0
    stack_frame: int = -1
    spill_stores: int = -1
    spill_loads: int = -1

    def problems(self, stack_frames: dict[str, int] | None = None) -> list[str]:
        """Reasons to reject this kernel; empty when there is none."""
        allowed = STACK_FRAMES if stack_frames is None else stack_frames
        limit = max((size for part, size in allowed.items() if part in self.name), default=0)
        where = f"{self.source}: {self.name} ({self.arch})"
        found = []
        if self.spill_stores > 0 or self.spill_loads > 0:
            found.append(
                f"{where}: spills {self.spill_stores} bytes (stores), {self.spill_loads} (loads)"
            )
        if self.stack_frame > limit:
            found.append(f"{where}: stack frame of {self.stack_frame} bytes, allowed {limit}")
        if self.stack_frame < 0 or self.registers < 0:
            found.append(f"{where}: ptxas reported no resources; compile with -Xptxas -v")
        return found


def parse(text: str, source: str = "?") -> tuple[list[KernelReport], list[str]]:
    """Reads one log of `nvcc -Xptxas -v`.

    Args:
        text: the log; several architectures may follow each other.
        source: name of the .cu file, for messages.
    Returns:
        (reports of the kernels, notes C75xx). A note names its kernel but not the architecture,
        and stands before the paragraphs of the kernels.
    """
    reports: dict[tuple[str, str], KernelReport] = {}
    notes: list[str] = []
    arch, kernel, described = "?", None, None
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            name, arch = match.groups()
            kernel = described = reports.setdefault((name, arch), KernelReport(source, name, arch))
        elif match := _PROPERTIES.search(line):
            # A device function that was not inlined gets its own paragraph, without "Used".
            name = match.group(1)
            described = reports.get((name, arch))
            if described is None:
                described = KernelReport(source, name, arch, registers=0)
                reports[name, arch] = described
        elif match := _FRAME.search(line):
            if described is not None:
                numbers = map(int, match.groups())
                described.stack_frame, described.spill_stores, described.spill_loads = numbers
        elif match := _USED.search(line):
            if kernel is not None:
                kernel.registers = int(match.group(1))
                smem = _SMEM.search(line)
                kernel.smem = int(smem.group(1)) if smem else 0
        elif _NOTE.search(line):
            notes.append(line.strip())
    return list(reports.values()), notes


def check(log_dir: Path, source_dir: Path) -> tuple[list[KernelReport], list[str]]:
    """Judges the logs of all kernels.

    Args:
        log_dir: holds <name>.log for every <name>.cu (the build writes them to build/ptxas).
        source_dir: holds the .cu files.
    Returns:
        (all reports, all problems).
    """
    reports: list[KernelReport] = []
    problems: list[str] = []
    for source in sorted(Path(source_dir).rglob("*.cu")):
        log = Path(log_dir) / f"{source.stem}.log"
        if not log.is_file():
            problems.append(f"{source.name}: no log {log}; build the module first")
            continue
        found, notes = parse(log.read_text(encoding="utf-8", errors="replace"), source.name)
        if not found:
            problems.append(f"{source.name}: the log names no kernel")
        problems += [f"{source.name}: {note}" for note in notes]
        problems += [problem for report in found for problem in report.problems()]
        reports += found
    return reports, problems


def table(reports: list[KernelReport]) -> str:
    """One line per kernel and architecture."""
    names = "\n".join(report.name for report in reports)
    if reports and shutil.which("c++filt"):
        names = subprocess.run(
            ["c++filt", "-p"], input=names, capture_output=True, text=True, check=True
        ).stdout
    lines = [f"{'arch':8} {'regs':>4} {'smem':>6} {'stack':>5} {'spill':>5}  kernel"]
    for report, name in zip(reports, names.splitlines(), strict=True):
        lines.append(
            f"{report.arch:8} {report.registers:4} {report.smem:6} {report.stack_frame:5} "
            f"{report.spill_stores:5}  {report.source}: {name}"
        )
    return "\n".join(lines)


def run(log: Path, command: list[str]) -> int:
    """Runs the compiler, copying its messages to the log; returns its exit status.

    The log appears only when the compiler succeeded, so that a failed build leaves none behind.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    sys.stdout.buffer.write(done.stdout)
    sys.stdout.buffer.flush()
    if done.returncode == 0:
        log.write_bytes(done.stdout)
    return done.returncode


def main(arguments: list[str]) -> int:
    if len(arguments) > 3 and arguments[0] == "run" and arguments[2] == "--":
        return run(Path(arguments[1]), arguments[3:])
    if len(arguments) == 3 and arguments[0] == "check":
        reports, problems = check(Path(arguments[1]), Path(arguments[2]))
        print(table(reports))
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        print(f"ptxas: {len(reports)} kernels compiled, {len(problems)} problems")
        return 1 if problems else 0
    print("usage: ptxas_log.py run LOG -- COMMAND ... | check LOG_DIR SOURCE_DIR", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
