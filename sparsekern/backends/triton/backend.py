"""The Triton backend of sparsekern.linear: row-major weights of every dtype, plain or quantised,
on GPUs of 8.0 or newer. The kernels are in backends/triton/linear.py, imported when one is
wanted."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor

from sparsekern.backends import triton
from sparsekern.backends.protocol import Explained, Launch, Problem, folded
from sparsekern.backends.triton.configs import (
    FASTER_TOKENS,
    SMALLEST_GROUP,
    LinearConfig,
    MmaSp,
    pick_config,
)
from sparsekern.formats.layouts import ROWMAJOR
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24


def _kernels() -> ModuleType:
    return importlib.import_module("sparsekern.backends.triton.linear")


class TritonBackend:
    """Weights that are read compressed; which kernel: backends/triton/configs.py."""

    name = "triton"
    quantized = True

    def supports(self, problem: Problem) -> str | None:
        if not triton.available():
            return triton.reason()
        if problem.device.type != "cuda":
            return f"backend 'triton' needs x on a GPU, got {problem.device}"
        if problem.spec.layout != ROWMAJOR:
            return f"backend 'triton' needs layout 'rowmajor', got {problem.spec.layout!r}"
        if not (problem.spec.element.plain or problem.spec.element.scaled):
            return f"backend 'triton' has no kernel for {problem.spec.storage}"
        spec, step = problem.spec, SMALLEST_GROUP
        if spec.group and spec.group < problem.in_features and spec.group % step:
            return f"backend 'triton' needs groups of a multiple of {step}, got {spec.group}"
        return None

    def bind(self, problem: Problem) -> Launch:
        linear, activation, spec = _kernels().linear, problem.activation, problem.spec
        in_features = problem.in_features

        def compute(
            x: Tensor, w24: Sparse24, bias: Tensor | None, x_scale: Tensor | None = None
        ) -> Tensor:
            tensors = w24.tensors
            y: Tensor = linear(
                x if x_scale is None else x.to(spec.dtype),  # levels fit every plain dtype
                tensors["values"],
                tensors["metadata"],
                in_features,
                bias,
                activation,
                scale=tensors.get(SCALE),
                group=spec.group,
                x_scale=x_scale,
            )
            return y

        return folded(compute)

    def explain(self, problem: Problem) -> Explained:
        spec = problem.spec
        plain = spec.element.plain
        missing = triton.mma_sp_reason()
        bits = None if plain else spec.element.bits
        group = spec.group if spec.group < problem.in_features else 0
        of = problem.tokens, *problem.sizes, problem.dtype, bits, group
        config = pick_config(*of, mma_sp=not missing)
        why = "x is on a GPU and the layout is 'rowmajor'"
        if missing and isinstance(pick_config(*of, mma_sp=True), MmaSp):
            why += f"; not on the sparse tensor cores: {missing}"
        if not plain:
            why += "; levels are widened, and multiplied as numbers of the dtype of x"
        if isinstance(config, LinearConfig) or problem.tokens > FASTER_TOKENS:
            why += "; this kernel was slower than dense wherever it was timed"
        return Explained(str(config), why)
