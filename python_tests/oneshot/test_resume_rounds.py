"""A run that rotates, reconstructs and trains windows after the walk, stopped after each thing that
it stores: what resumes is the undisturbed run. fuzz/kill_resume.py kills it anywhere."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from python_tests.fuzz.kill_resume import KINDS, differences
from python_tests.oneshot.driver_models import build, tokens
from sparsekern.oneshot.prune_model import prune_model


def outcome(kind, folder):
    model = build(layers=3, tie_word_embeddings=kind != "windows")
    options = {"device": "cpu", "batch_size": 2, "progress": False, "resume": folder}
    report = prune_model(model, "sparsegpt", tokens(8, 12), **options, **KINDS[kind])
    return {
        "state": {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)},
        "masks": {a.name: model.get_submodule(a.name).weight.mask() for a in report.pruned},
        "rows": [(row.name, row.relative_error, row.note) for row in report.layers],
    }


@pytest.mark.parametrize("kind, stored", [("short", 5), ("windows", 11)])
def test_stopped_after_everything_that_is_stored(kind, stored, tmp_path):
    """A rotation, blocks, the windows of one and of two rounds, some of which move masks, and
    blocks that are trained through their levels."""
    expected = outcome(kind, tmp_path / "whole")
    files = sorted((tmp_path / "whole").glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    names = [path.name for path in files]
    assert len(names) == stored and names[0] == "rotation.safetensors"
    assert names[1:4] == [f"block-0000{i}.safetensors" for i in range(3)]
    for count in range(1, stored):
        if count == 2:
            continue  # as after one block
        folder = tmp_path / str(count)
        folder.mkdir()
        shutil.copy(tmp_path / "whole" / "manifest.json", folder)
        for path in files[:count]:
            shutil.copy(path, folder)
        assert differences(outcome(kind, folder), expected) == [], names[count - 1]


def test_killed_and_resumed():
    """As `python -m python_tests.fuzz.kill_resume` does it, with two kills instead of ten."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "python_tests.fuzz.kill_resume", "--kind", "best"]
    command += ["--kills", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "kill 2 at" in done.stdout, done.stdout + done.stderr
