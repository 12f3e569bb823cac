"""The CUDA backend as sparsekern.linear asks it: supports, bind and explain over cuda/linear.py."""

from __future__ import annotations

import torch

from sparsekern.backends.cuda import configs
from sparsekern.backends.cuda import linear as kernels
from sparsekern.backends.protocol import Explained, Launch, Problem
from sparsekern.formats import dtypes
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.tile64 import LAYOUT

_RUNS = "the layout is 'tile64' and the GPU has compute capability 8.0 or newer"


class CudaBackend:
    """The native kernels on weights in "tile64"; the variant is that of configs.choose."""

    name = "cuda"
    layout = LAYOUT
    gated = True

    def supports(self, problem: Problem) -> str | None:
        if problem.gated is not None:
            return kernels.why_not_gated(problem)
        return kernels.why_not(problem)

    def bind(self, problem: Problem) -> Launch:
        return kernels.bind(problem) if problem.gated is None else kernels.bind_gated(problem)

    def explain(self, problem: Problem) -> Explained:
        dtype = dtypes.PLAIN[problem.dtype].name
        chosen = configs.choose(problem.tokens, *problem.sizes, dtype, problem.gpu)
        return Explained(chosen.variant, f"{_RUNS}; {chosen.why}", chosen.us)

    def prefers(self, spec: WeightSpec, device: torch.device) -> str | None:
        return LAYOUT if spec.element.plain and kernels.packs(device, spec.dtype) else None


class MmaBackend:
    """The same with the mma.sp kernel, whatever the GPU; only on request."""

    name = "cuda-mma"

    def supports(self, problem: Problem) -> str | None:
        return kernels.why_not(problem)

    def bind(self, problem: Problem) -> Launch:
        return kernels.bind(problem, kernels._mma_plan)

    def explain(self, problem: Problem) -> Explained:
        tile = configs.mma_tile(problem.tokens, *problem.sizes, problem.gpu)
        return Explained(f"mma {tile}", _RUNS)
