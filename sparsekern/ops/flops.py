"""What torch.utils.flop_counter.FlopCounterMode counts for the ops with a 2:4 weight.

Counted is the dense-equivalent work, as for nn.Linear: one product of tokens rows with a weight
[out_features, in_features] is

    2 · tokens · out_features · in_features

so that a pruned model counts what the dense one does, and flops over time are dense-equivalent
TFLOPS. The tensor cores do half of it. Bias, activation and scales count nothing, as in torch.

Registered through torch's own `register_flop_formula`, once torch.utils.flop_counter is imported:
it imports Triton, which sparsekern by itself does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sparsekern.formats.layouts import WeightSpec
from sparsekern.utils.when_imported import when_imported


def _product(rows: Sequence[int], spec: str) -> int:
    """Of rows [..., in_features or out_features] with the weight, or with its transpose."""
    return 2 * math.prod(rows[:-1]) * math.prod(WeightSpec.parse(spec).shape)


def linear(x: Sequence[int], tensors: Any, spec: str, *more: Any, **output: Any) -> int:
    """Of sparsekern::linear and sparsekern::linear_input_grad."""
    return _product(x, spec)


def linear_quantized(
    x: Sequence[int], x_scale: Any, tensors: Any, spec: str, *more: Any, **output: Any
) -> int:
    """Of sparsekern::linear_quantized."""
    return _product(x, spec)


def gated_linear(
    x: Sequence[int], gate: Any, gate_spec: str, up: Any, up_spec: str, **output: Any
) -> int:
    """Of sparsekern::gated_linear: both halves."""
    return _product(x, gate_spec) + _product(x, up_spec)


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    ops = torch.ops.sparsekern
    for target, formula in (
        (ops.linear, linear),
        (ops.linear_input_grad, linear),
        (ops.linear_quantized, linear_quantized),
        (ops.gated_linear, gated_linear),
    ):
        if target not in flop_registry:
            register_flop_formula(target)(formula)


def register_when_imported() -> None:
    """Register the formulas now where the counter is imported already, else when it is."""
    when_imported("torch.utils.flop_counter", _register)
