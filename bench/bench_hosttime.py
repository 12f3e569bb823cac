"""Host time of eager calls in an older checkout and in this one, in child processes by turns.

    python -m bench hosttime --old OTHER_CHECKOUT

Two packages of one name do not fit in a process, so each sample is a child process with one of the
checkouts first on its path (hosttime_child.py); old and new alternate, and the one that begins
changes from round to round. What is compared are the medians over the children. Every child checks
its outputs. The old checkout must be built (its sparsekern/_C*.so in place).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import record
from .options import Run, parser

CHILD = Path(__file__).with_name("hosttime_child.py")
TIMEOUT_S = 180.0
TOKENS = "1,256"


def child(checkout: Path, device: str, size: int, batches: int, tokens: str) -> dict[str, float]:
    """{case: us} of one child process.

    Raises:
        RuntimeError: it failed, or imported another package than the checkout's.
    """
    env = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": ""}
    command = [sys.executable, "-", device, str(size), tokens, str(batches)]
    done = subprocess.run(
        command,
        cwd=checkout,
        env=env,
        input=CHILD.read_text(encoding="utf-8"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"bench hosttime: the child in {checkout} failed: {last}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if not Path(answer["file"]).resolve().is_relative_to(checkout.resolve()):
        raise RuntimeError(f"bench hosttime: {checkout} gave the package in {answer['file']}.")
    return {case: float(us) for case, us in answer["us"].items()}


def main(path: str | Path, arguments: Sequence[str] = ()) -> int:
    options = parser("hosttime", "Host time of eager calls, old and new checkout.", budget=180)
    options.add_argument("--old", required=True, type=Path, metavar="DIR", help="another checkout")
    options.add_argument("--new", default=record.ROOT, type=Path, metavar="DIR")
    options.add_argument("--rounds", type=int, default=7, help="children of each (default 7)")
    options.add_argument("--size", type=int, default=4096, help="of the square layer")
    options.add_argument("--tokens", default=TOKENS, help=f"default {TOKENS}")
    args = options.parse_args(list(arguments))
    for checkout in (args.old, args.new):
        if not (checkout / "sparsekern" / "__init__.py").is_file():
            raise FileNotFoundError(f"bench hosttime: no sparsekern/__init__.py in {checkout}.")
    run = Run(path, args)
    taken: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    rounds, batches = (min(args.rounds, 2), 20) if args.quick else (args.rounds, 200)
    checkouts = {"old": args.old.resolve(), "new": args.new.resolve()}
    for number in range(rounds):
        if run.left <= 0 and number:
            run.say(f"no time for more than {number} rounds")
            break
        for name in ("old", "new") if number % 2 == 0 else ("new", "old"):
            checkout = checkouts[name]
            taken[name].append(child(checkout, args.device, args.size, batches, args.tokens))
    for case in taken["new"][0]:
        us = {
            name: statistics.median(t[case] for t in children) for name, children in taken.items()
        }
        ratio = us["new"] / us["old"]
        metrics = {"old_us": round(us["old"], 3), "new_us": round(us["new"], 3)}
        run.add(
            op="hosttime",
            backend=case.split(",")[0],
            check="bounded",
            case=f"{args.size}x{args.size}, {case}, {args.device}",
            metrics={**metrics, "ratio": round(ratio, 4), "children": len(taken["new"])},
        )
        run.say(f"{case}: old {us['old']:.2f}, new {us['new']:.2f} us, {ratio - 1:+.1%}")
    run.close()
    return 0
