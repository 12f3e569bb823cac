"""A prune_model run for test_resume.py to kill: it stops inside block 2, says so through a file,
and waits."""

import sys
import time
from pathlib import Path

from python_tests.oneshot.driver_models import build, tokens
from sparsekern.oneshot import sequential
from sparsekern.oneshot.prune_model import prune_model

folder, family, compress = sys.argv[1:]
model = build(family, layers=4)
target = next(m for name, m in model.named_modules() if name.endswith(("layers.2", "h.2")))
calls = []
call_block = sequential.call_block


def wait(block, call, hidden):
    if block is target:
        calls.append(hidden.shape)
        if len(calls) == 2:  # after the check of the chain: the first calibration batch of block 2
            Path(folder, "inside-block-2").touch()
            time.sleep(300)
    return call_block(block, call, hidden)


sequential.call_block = wait
options = {"device": "cpu", "batch_size": 2, "progress": False, "resume": folder, "skip": ()}
prune_model(model, "sparsegpt", tokens(), compress=compress == "True", **options)
