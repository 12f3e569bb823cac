"""sparsekern: 2:4 structured sparsity for PyTorch on NVIDIA GPUs.

    calibration text -> Hessians -> SparseGPT / Wanda / magnitude -> mask + repaired weights
                                                                       | compress
    safetensors on disk <------ Sparse24 (values + 2-bit metadata) -----> SparseLinear

The map of the code is in README.md; `reference.py` is the specification of every op in float64.
"""

__version__ = "0.1.0"

from sparsekern import prune
from sparsekern.checkpoint import from_pretrained, load_into, save_pretrained
from sparsekern.driver import prune_model
from sparsekern.errors import FormatError
from sparsekern.evaluate import perplexity
from sparsekern.gated import gated_linear
from sparsekern.linear import SparseLinear
from sparsekern.ops import Explanation, explain, linear
from sparsekern.report import PruneReport
from sparsekern.sparse24 import Sparse24, compress, decompress, prune_compress, verify

__all__ = [
    "Explanation",
    "FormatError",
    "PruneReport",
    "Sparse24",
    "SparseLinear",
    "__version__",
    "compress",
    "decompress",
    "explain",
    "from_pretrained",
    "gated_linear",
    "linear",
    "load_into",
    "perplexity",
    "prune",
    "prune_compress",
    "prune_model",
    "save_pretrained",
    "verify",
]
