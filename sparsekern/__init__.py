"""sparsekern: 2:4 structured sparsity for PyTorch on NVIDIA GPUs.

    calibration text -> Hessians -> SparseGPT / Wanda / magnitude -> mask + repaired weights
                                                                       | compress
    safetensors on disk <------ Sparse24 (values + 2-bit metadata) -----> SparseLinear

The map of the code is in docs/map.md; `reference.py` is the specification of every op in float64.
"""

__version__ = "0.1.0"

from sparsekern import _moved, finetune, prune
from sparsekern.backends.registry import register_backend
from sparsekern.checkpoint import (
    decompress_model,
    from_pretrained,
    load_into,
    save_pretrained,
)
from sparsekern.errors import FormatError
from sparsekern.eval.mix import Mix, calibration_mix
from sparsekern.eval.perplexity import perplexity
from sparsekern.eval.sensitivity import SensitivityReport, sensitivity
from sparsekern.formats.dtypes import ElementType, register_dtype
from sparsekern.formats.layouts import Layout, WeightSpec, register_layout
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.integrations.peft_errors import install_when_imported
from sparsekern.integrations.transformers import register_when_imported
from sparsekern.nn.count import ParameterCount, num_parameters
from sparsekern.nn.optimize import OptimizeReport, optimize
from sparsekern.nn.parallel import tensor_parallel
from sparsekern.nn.sparse_experts import SparseExperts
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot.compress_model import compress_model
from sparsekern.oneshot.executor import calibrate
from sparsekern.oneshot.permutation import PermutationReport, permute
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.oneshot.reconstruct import reconstruct
from sparsekern.oneshot.report import PruneReport
from sparsekern.oneshot.rotation import RotationReport, rotate
from sparsekern.oneshot.rounds import Fit, Reconstruction
from sparsekern.ops.compress import compress, decompress, prune_compress, verify
from sparsekern.ops.gated_op import gated_linear
from sparsekern.ops.linear_op import Explanation, explain, linear
from sparsekern.ops.quantize import dequantize, quantize
from sparsekern.ops.quantize_rows import quantize_rows, rms_norm_quantize, silu_mul_quantize
from sparsekern.ops.quantized_linear import linear_quantized

_moved.install()
register_when_imported()
install_when_imported()

__all__ = [
    "ElementType",
    "Explanation",
    "Fit",
    "FormatError",
    "Layout",
    "Mix",
    "OptimizeReport",
    "ParameterCount",
    "PermutationReport",
    "PruneReport",
    "Reconstruction",
    "RotationReport",
    "SensitivityReport",
    "Sparse24",
    "SparseExperts",
    "SparseLinear",
    "WeightSpec",
    "__version__",
    "calibrate",
    "calibration_mix",
    "compress",
    "compress_model",
    "decompress",
    "decompress_model",
    "dequantize",
    "explain",
    "finetune",
    "from_pretrained",
    "gated_linear",
    "linear",
    "linear_quantized",
    "load_into",
    "num_parameters",
    "optimize",
    "perplexity",
    "permute",
    "prune",
    "prune_compress",
    "prune_model",
    "quantize",
    "quantize_rows",
    "reconstruct",
    "register_backend",
    "register_dtype",
    "register_layout",
    "rms_norm_quantize",
    "rotate",
    "save_pretrained",
    "sensitivity",
    "silu_mul_quantize",
    "tensor_parallel",
    "verify",
]
