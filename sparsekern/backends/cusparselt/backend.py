"""The cuSPARSELt backend as sparsekern.linear asks it: supports, bind and explain."""

from __future__ import annotations

from sparsekern.backends.cusparselt import layout
from sparsekern.backends.cusparselt import linear as library_calls
from sparsekern.backends.protocol import Explained, Launch, Problem

_RUNS = "the layout is 'cusparselt' and the library takes this problem"


class CusparseltBackend:
    """NVIDIA's library, on weights in its own layout."""

    name = "cusparselt"
    layout = layout.NAME
    quantized = True

    def supports(self, problem: Problem) -> str | None:
        return library_calls.why_not(problem)

    def bind(self, problem: Problem) -> Launch:
        return library_calls.bind(problem)

    def explain(self, problem: Problem) -> Explained:
        return Explained(library_calls.config_of(problem), _RUNS)
