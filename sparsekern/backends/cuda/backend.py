"""The CUDA backend as sparsekern.linear asks it: supports, bind and explain over cuda/linear.py."""

from __future__ import annotations

import torch

from sparsekern.backends.cuda import configs, scaled_linear
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
    quantized = True

    def supports(self, problem: Problem) -> str | None:
        if problem.gated is not None:
            return kernels.why_not_gated(problem)
        if not problem.spec.element.plain:
            return scaled_linear.why_not(problem)
        return kernels.why_not(problem)

    def bind(self, problem: Problem) -> Launch:
        if problem.gated is not None:
            return kernels.bind_gated(problem)
        if not problem.spec.element.plain:
            return scaled_linear.bind(problem)
        return kernels.bind(problem)

    def explain(self, problem: Problem) -> Explained:
        if not problem.spec.element.plain:
            return _on_tile64(scaled_linear.explain(problem))
        dtype = dtypes.PLAIN[problem.dtype].name
        chosen = configs.choose(problem.tokens, *problem.sizes, dtype, problem.gpu)
        return Explained(chosen.variant, f"{_RUNS}; {chosen.why}", chosen.us)

    def prefers(self, spec: WeightSpec, device: torch.device) -> str | None:
        if spec.element.plain:
            return LAYOUT if kernels.packs(device, spec.dtype) else None
        return LAYOUT if scaled_linear.packs(spec, device) else None


class PreciseBackend:
    """Weights of e4m3 with sums in float32 (csrc/linear/mainloop_sm90.cuh); only on request."""

    name = "cuda-precise"
    quantized = True

    def supports(self, problem: Problem) -> str | None:
        if problem.spec.element.plain:
            return f"backend 'cuda-precise' is for quantised weights, got {problem.spec.storage}"
        return scaled_linear.why_not(problem, precise=True)

    def bind(self, problem: Problem) -> Launch:
        return scaled_linear.bind(problem, precise=True)

    def explain(self, problem: Problem) -> Explained:
        return _on_tile64(scaled_linear.explain(problem, precise=True))


class SixteenBitBackend:
    """Quantised weights widened for x as it is, whatever the tokens; only on request."""

    name = "cuda-a16"

    def supports(self, problem: Problem) -> str | None:
        if problem.spec.element.plain:
            return f"backend 'cuda-a16' is for quantised weights, got {problem.spec.storage}"
        return scaled_linear.why_not(problem, widened=True)

    def bind(self, problem: Problem) -> Launch:
        return scaled_linear.bind(problem, widened=True)

    def explain(self, problem: Problem) -> Explained:
        return _on_tile64(scaled_linear.explain(problem, widened=True))


class MmaBackend:
    """The same with the mma.sp kernel, whatever the GPU; weights of 8 bits with x of 8. Only on
    request."""

    name = "cuda-mma"
    quantized = True

    def supports(self, problem: Problem) -> str | None:
        if not problem.spec.element.plain:
            return scaled_linear.why_not(problem, mma=True)
        return kernels.why_not(problem)

    def bind(self, problem: Problem) -> Launch:
        if not problem.spec.element.plain:
            return scaled_linear.bind(problem, mma=True)
        return kernels.bind(problem, kernels._mma_plan)

    def explain(self, problem: Problem) -> Explained:
        if not problem.spec.element.plain:
            return _on_tile64(scaled_linear.explain(problem, mma=True))
        tile = configs.mma_tile(problem.tokens, *problem.sizes, problem.gpu)
        return Explained(f"mma {tile}", _RUNS)


def _on_tile64(explained: Explained) -> Explained:
    return explained._replace(why=f"the layout is 'tile64'; {explained.why}")
