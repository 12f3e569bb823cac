"""A run of distill in a process of its own.

python -m python_tests.finetune.distill_child killed FOLDER    dies by SIGKILL after step 5
torchrun -m python_tests.finetune.distill_child parallel FOLDER    saves the weights
"""

import os
import signal
import sys
from pathlib import Path

import torch

from python_tests.finetune.tiny import pair, run, weights

SAVING = dict(save_every=2, log_every=1)


def die_after(step):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    teacher, student = pair(attention_dropout=0.1)
    if kind == "killed":
        run(student, teacher, folder=folder, on_step=die_after, **SAVING)
    else:
        torch.set_num_threads(1)
        teacher, student = pair()
        report = run(student, teacher, folder=folder, log_every=1)
        if torch.distributed.get_rank() == 0:
            torch.save({"weights": weights(student), "loss": report.loss}, folder / "out.pt")
        torch.distributed.destroy_process_group()
