"""prune_model killed at random moments and resumed each time: masks and weights are those of an
undisturbed run.

python -m python_tests.fuzz.kill_resume [--kills 10] [--seed 0] [--kind best|short|windows]

Every attempt is a fork that kills itself (SIGKILL) at the n-th call of a function of sparsekern, n
drawn from the calls of an undisturbed run; the next one resumes in its folder. One that comes to
its end is compared, and the next begins in a new folder, until there were enough kills.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

import torch

from python_tests.oneshot.driver_models import build, tokens
from sparsekern.oneshot.prune_model import prune_model

# A kill comes at the latest after this share of the calls of a whole run, so that most attempts
# are killed and a run takes several of them.
SHARE = 0.9
KINDS = {
    "best": {"preset": "best", "untie": True},
    "short": {
        "untie": True,
        "rotate": {"steps": 4},
        "reconstruct": [
            {"span": 1, "epochs": 1},
            {"span": None, "epochs": 2, "between": 1.0, "recut": True, "batch": 2},
        ],
    },
    "windows": {
        "rotate": {"steps": 2},
        "quantize": "int8",
        "reconstruct": [
            {"span": 1, "epochs": 1, "parts": "sublayers"},
            {"span": 2, "epochs": 3, "reselect": 0.9, "lr": 3e-3, "held_out": 0.0},
            {"span": 2, "epochs": 1, "target": "pruned", "seed": 1},
        ],
    },
}


def work(kind: str, folder: Path, out: Path, after: int | None) -> None:
    """One attempt, to its end or to its `after`-th call; writes what came out of it."""
    calls = 0

    counted: dict[str, bool] = {}

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        if event != "call":
            return
        file = frame.f_code.co_filename
        if file not in counted:
            counted[file] = "sparsekern" in file and "fingerprint" not in file
        if counted[file]:
            calls += 1
            if calls == after:
                os.kill(os.getpid(), signal.SIGKILL)

    model = build(layers=3, tie_word_embeddings=kind != "windows")
    options = {"device": "cpu", "batch_size": 2, "progress": False, "resume": folder}
    sys.setprofile(count)
    report = prune_model(model, "sparsegpt", tokens(8, 16), **options, **KINDS[kind])
    sys.setprofile(None)
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    masks = {layer.name: model.get_submodule(layer.name).weight.mask() for layer in report.pruned}
    rows = [(layer.name, layer.relative_error, layer.note) for layer in report.layers]
    torch.save({"state": tensors, "masks": masks, "rows": rows, "calls": calls}, out)


def fork(*arguments: object) -> int:
    """work(...) in a fork; its exit code, negative for a signal."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work(*arguments)  # type: ignore[arg-type]
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(got: dict, expected: dict) -> list[str]:
    """Names of what is not the same."""
    found = [] if got["rows"] == expected["rows"] else ["the report"]
    for part in ("state", "masks"):
        a, b = got[part], expected[part]
        found += [] if a.keys() == b.keys() and a else [part]
        found += [f"{part} {k}" for k in a if k in b and not torch.equal(a[k], b[k])]
    return found


def run(kind: str, kills: int, seed: int) -> int:
    """Prints a line for each attempt; the number of differences."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        out = home / "out.pt"
        assert fork(kind, home / "straight", out, None) == 0
        expected = torch.load(out, weights_only=False)
        total = expected["calls"]
        print(f"{kind}: {total} calls undisturbed, {len(expected['masks'])} masks")
        killed, wrong, number, going = 0, 0, 0, True
        while killed < kills or going:
            after = draw.randint(1, int(SHARE * total)) if killed < kills else None
            code = fork(kind, home / f"run-{number}", out, after)
            stages = sorted(p.name for p in (home / f"run-{number}").glob("*.safetensors"))
            if code == -signal.SIGKILL:
                killed, going = killed + 1, True
                print(f"kill {killed} at call {after}: {len(stages)} files are there")
                continue
            assert code == 0, f"an attempt ended with {code}"
            found = differences(torch.load(out, weights_only=False), expected)
            print(f"run {number} ended after {killed} kills in all: {found or 'the same'}")
            wrong, number, going = wrong + len(found), number + 1, False
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=tuple(KINDS), default="best")
    given = parser.parse_args()
    sys.exit(run(given.kind, given.kills, given.seed) > 0)
