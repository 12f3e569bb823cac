"""sparsekern: 2:4 structured sparsity for PyTorch on NVIDIA GPUs.

    calibration text -> Hessians -> SparseGPT / Wanda / magnitude -> mask + repaired weights
                                                                       | compress
    safetensors on disk <------ Sparse24 (values + 2-bit metadata) -----> SparseLinear

The map of the code is in docs/map.md; `reference.py` is the specification of every op in float64.
"""

__version__ = "0.1.0"

from sparsekern import _moved, prune
from sparsekern.checkpoint import from_pretrained, load_into, save_pretrained
from sparsekern.errors import FormatError
from sparsekern.eval.perplexity import perplexity
from sparsekern.formats.sparse24 import Sparse24, compress, decompress, prune_compress, verify
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.oneshot.report import PruneReport
from sparsekern.ops.gated_op import gated_linear
from sparsekern.ops.linear_op import Explanation, explain, linear

_moved.install()

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
