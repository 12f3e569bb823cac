"""A tiny Llama, its pruned copy, and runs of distill on them, as tests and child processes use."""

import copy

import torch

from python_tests.oneshot.driver_models import build, run_prune, tokens
from sparsekern.finetune import distill

WINDOW = 16
OPTIONS = dict(steps=8, batch=4, lr=2e-3, window=WINDOW, device="cpu", progress=False)


def pair(seed=0, **overrides):
    """(dense teacher, magnitude-pruned student with zeros)."""
    teacher = build("llama", seed=seed, **overrides)
    student = copy.deepcopy(teacher)
    run_prune(student, "magnitude", compress=False)
    return teacher, student


def rows(count=24, seed=3):
    return tokens(count, WINDOW, seed)


def run(student, teacher, data=None, **options):
    options = OPTIONS | ({"eval_window": WINDOW} if "evaluate" in options else {}) | options
    return distill(student, teacher, rows() if data is None else data, **options)


def weights(model):
    return torch.cat([p.detach().reshape(-1).float() for p in model.parameters()])
