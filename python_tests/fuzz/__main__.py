"""python -m python_tests.fuzz [checkpoints] [seed]: damaged files by the thousand, with counts.

3500 damaged checkpoints by default, half as many GGUFs, and for each tenth of a checkpoint a resume
folder, a tokenizer and a cache file. Every target runs in a process of its own: one that dies, or
says nothing for STUCK seconds, is a fault, and the next case goes on. Exit code 1 when there was a
fault; each is named by target, seed and case, which make it again:

    python -m python_tests.fuzz --one TARGET SEED CASE
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from python_tests.fuzz.targets import TARGETS, Outcome, run

STUCK = 60.0  # seconds without a word; those of the CPU are counted in targets.py
STARTUP = 300.0


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        return _child(arguments[1], int(arguments[2]), int(arguments[3]), int(arguments[4]))
    if arguments[:1] == ["--one"]:
        return _child(arguments[1], int(arguments[2]), int(arguments[3]), int(arguments[3]) + 1)
    cases = int(arguments[0]) if arguments else 3500
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    outcome, start = Outcome(), time.monotonic()
    kinds = Counter(target.kind for target in TARGETS.values())
    of_kind = {"checkpoint": cases, "GGUF": -(-cases // 2)}
    for target, chosen in TARGETS.items():
        count = -(-of_kind.get(chosen.kind, -(-cases // 10)) // kinds[chosen.kind])
        _guarded(target, count, seed, outcome)
        print(f"{target}: {count} cases, {len(outcome.faults)} faults so far", flush=True)
    for name, count in sorted(outcome.counts.items()):
        print(f"{count:6} {name}")
    for kind in kinds:
        names = tuple(f"{name}:" for name, target in TARGETS.items() if target.kind == kind)
        total = sum(count for name, count in outcome.counts.items() if name.startswith(names))
        print(f"{total:6} damaged: {kind}")
    print(f"{sum(outcome.counts.values())} cases, {len(outcome.faults)} faults")
    print(
        f"slowest {outcome.slowest:.2f} s of the CPU, largest growth of memory "
        f"{outcome.peak_kib} KiB, {time.monotonic() - start:.0f} s in all"
    )
    for fault in outcome.faults[:50]:
        print(f"FAULT {fault}")
    return bool(outcome.faults)


def _guarded(target: str, count: int, seed: int, outcome: Outcome) -> None:
    """Run the cases of a target in child processes, one after the other."""
    first = 0
    while first < count:
        command = [sys.executable, "-m", "python_tests.fuzz", "--child", target]
        command += [str(seed), str(first), str(count)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()

        def pump(child: subprocess.Popen[str] = child, lines: queue.Queue = lines) -> None:
            for line in child.stdout or ():
                lines.put(line)
            lines.put(None)

        threading.Thread(target=pump, daemon=True).start()
        case, patience, why, said = first, STARTUP, "", False
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                why = f"nothing for {patience:.0f} s"
                child.kill()
                break
            if line is None:
                break
            if line.startswith("case "):
                case, patience = int(line.split()[1]), STUCK
            elif line.startswith("{"):
                outcome.add(json.loads(line))
                said = True
        code = child.wait()
        if said and code == 0:
            return
        outcome.faults.append(f"{target} {seed} {case}: {why or f'the process ended with {code}'}")
        outcome.counts[f"{target}: crash"] += 1
        first = case + 1


def _child(target: str, seed: int, first: int, end: int) -> int:
    """The cases [first, end): a line before each, and what came of them as JSON after every 20."""
    pending = Outcome()

    def begin(case: int) -> None:
        if (case - first) % 20 == 0:
            flush()
        print(f"case {case}", flush=True)

    def flush() -> None:
        print(json.dumps(vars(pending)), flush=True)
        pending.counts, pending.faults = Counter(), []
        pending.slowest, pending.peak_kib = 0.0, 0

    with tempfile.TemporaryDirectory() as work:
        run(target, range(first, end), seed, Path(work), pending, begin)
    flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
