"""The ops that users call: checks, registration with torch, autograd, dispatch."""

from sparsekern.ops import flops
from sparsekern.ops.compress import decompress, prune_compress, verify
from sparsekern.ops.gated_op import gated_linear
from sparsekern.ops.linear_op import Explanation, explain, linear
from sparsekern.ops.quantize import dequantize
from sparsekern.ops.quantize_rows import rms_norm_quantize, silu_mul_quantize
from sparsekern.ops.quantized_linear import linear_quantized

flops.register_when_imported()

__all__ = [
    "Explanation",
    "decompress",
    "dequantize",
    "explain",
    "gated_linear",
    "linear",
    "linear_quantized",
    "prune_compress",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "verify",
]
