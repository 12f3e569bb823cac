"""python -m python_tests.fuzz [checkpoints] [seed]: damaged files by the thousand, with counts.

3500 damaged checkpoints by default, half as many GGUFs, and for each tenth of a checkpoint a resume
folder, a tokenizer and a cache file. They run in a child process: when it dies, or says nothing for
STUCK seconds, that is a fault, and another one goes on after that case. Exit code 1 when there was a
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
        return _child(int(arguments[1]), json.loads(arguments[2]))
    if arguments[:1] == ["--one"]:
        case = int(arguments[3])
        return _child(int(arguments[2]), [(arguments[1], case, case + 1)])
    cases = int(arguments[0]) if arguments else 3500
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    outcome, start = Outcome(), time.monotonic()
    kinds = Counter(target.kind for target in TARGETS.values())
    of_kind = {"checkpoint": cases, "GGUF": -(-cases // 2)}
    work = [
        (name, 0, -(-of_kind.get(target.kind, -(-cases // 10)) // kinds[target.kind]))
        for name, target in TARGETS.items()
    ]
    while work:
        work = _guarded(work, seed, outcome)
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


Work = list[tuple[str, int, int]]  # target, first case, end


def _guarded(work: Work, seed: int, outcome: Outcome) -> Work:
    """Run the cases in one child process; what is left when it dies or hangs."""
    command = [sys.executable, "-m", "python_tests.fuzz", "--child", str(seed), json.dumps(work)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        for line in child.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    at, patience, why = work[0][:2], STARTUP, ""
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
            name, _, number = line[5:].rstrip().rpartition(" ")
            if name != at[0]:
                print(f"{at[0]} done, {len(outcome.faults)} faults so far", flush=True)
            at, patience = (name, int(number)), STUCK
        elif line.startswith("{"):
            outcome.add(json.loads(line))
    code = child.wait()
    if code == 0:
        return []
    name, case = at
    outcome.faults.append(f"{name} {seed} {case}: {why or f'the process ended with {code}'}")
    outcome.counts[f"{name}: crash"] += 1
    place = [entry[0] for entry in work].index(name)
    left = [(name, case + 1, work[place][2]), *work[place + 1 :]]
    return [entry for entry in left if entry[1] < entry[2]]


def _child(seed: int, work: Work) -> int:
    """A line before each case, and after it what came of it as JSON."""
    pending = Outcome()

    def flush() -> None:
        if pending.counts:
            print(json.dumps(vars(pending)), flush=True)
        pending.counts, pending.faults = Counter(), []
        pending.slowest, pending.peak_kib = 0.0, 0

    for name, first, end in work:

        def begin(case: int, name: str = name) -> None:
            flush()
            print(f"case {name} {case}", flush=True)

        with tempfile.TemporaryDirectory() as folder:
            run(name, range(first, end), seed, Path(folder), pending, begin)
        flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
