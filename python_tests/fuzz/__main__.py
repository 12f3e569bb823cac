"""python -m python_tests.fuzz [cases] [seed]: damaged checkpoints (3500 by default), with counts.

Exit code 1 when there was a fault; each is named by target, seed and case, which make it again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from python_tests.fuzz.targets import TARGETS, Outcome, run


def main(arguments: list[str]) -> int:
    cases = int(arguments[0]) if arguments else 3500
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as work:
        for target in TARGETS:
            run(target, -(-cases // len(TARGETS)), seed, Path(work), outcome)
    for name, count in sorted(outcome.counts.items()):
        print(f"{count:6} {name}")
    print(f"{sum(outcome.counts.values())} damaged checkpoints, {len(outcome.faults)} faults")
    print(f"slowest {outcome.slowest:.2f} s, largest growth of memory {outcome.peak_kib} KiB")
    for fault in outcome.faults[:50]:
        print(f"FAULT {fault}")
    return bool(outcome.faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
