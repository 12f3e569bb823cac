"""The ops that users call: checks, registration with torch, autograd, dispatch."""

from sparsekern.ops.compress import decompress, prune_compress, verify
from sparsekern.ops.gated_op import gated_linear
from sparsekern.ops.linear_op import Explanation, explain, linear
from sparsekern.ops.quantize import dequantize

__all__ = [
    "Explanation",
    "decompress",
    "dequantize",
    "explain",
    "gated_linear",
    "linear",
    "prune_compress",
    "verify",
]
