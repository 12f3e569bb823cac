"""Recovery: training that keeps 2:4, and the distillation that wins back what pruning costs.

masked.py         Masked: masks held through any optimizer and wrapper
tensors.py        wrappers, shards and bits of the weights and masks
schedule.py       how masks move: Frozen, Magnitude, SRSTE, RigL
transposable.py   4 x 4 tiles that are 2:4 in both directions
training.py       SparseTrainingLinear: forward and input gradient on sparse tensor cores
losses.py         KL to the teacher and cross-entropy, token chunk by token chunk
teacher.py        the dense model: live, on the host, or a top-k cache on disk
sampler.py        many rows of text at once from the teacher, by CUDA graphs
attention.py      attention functions that training and sampling put in a model's place
data.py           packed rows of tokens, text made by the teacher, overlap with a test text
trainer.py        distill: its arguments, and what is opened in which order
inputs.py         what a run is given: rows, teacher, evaluations
student.py        the model in training: float32 weights, masks, optimizer
loop.py           the steps, and what is logged
files.py          a run's folder: checkpoint, resume; metrics.py: its lines and plot
recipe.py         Recipe, DistillReport; world.py: the processes of a run
callback.py       MaskedCallback, for scripts around Transformers' Trainer
lora.py           low-rank products under a mask; the peft layer is in integrations/peft.py
"""

from __future__ import annotations

from typing import Any

from sparsekern.finetune import data
from sparsekern.finetune.masked import Masked
from sparsekern.finetune.recipe import DistillReport, Recipe
from sparsekern.finetune.schedule import SRSTE, Frozen, Magnitude, RigL, Schedule, zeros_mask
from sparsekern.finetune.teacher import build_cache
from sparsekern.finetune.trainer import distill
from sparsekern.finetune.training import (
    SparseTrainingLinear,
    finish_training,
    sparse_training,
)
from sparsekern.finetune.transposable import transposable_mask

__all__ = [
    "DistillReport",
    "Frozen",
    "Magnitude",
    "Masked",
    "MaskedCallback",
    "Recipe",
    "RigL",
    "SRSTE",
    "Schedule",
    "SparseTrainingLinear",
    "build_cache",
    "data",
    "distill",
    "finish_training",
    "sparse_training",
    "transposable_mask",
    "zeros_mask",
]


def __getattr__(name: str) -> Any:
    """MaskedCallback needs Transformers, which is imported only when it is asked for."""
    if name == "MaskedCallback":
        from sparsekern.finetune.callback import MaskedCallback

        return MaskedCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
