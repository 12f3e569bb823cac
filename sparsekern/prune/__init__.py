"""Pruners as pure functions on tensors: weights and statistics in, a mask and repaired weights out.

Nothing here walks a module, moves a tensor or prints. A mask is bool [out_features, in_features],
True = kept; every rule is deterministic and keeps the higher column of a tie, on any device.

    pattern.py     Pattern: 2:4, n:m, 4:8 in pairs
    masks.py       nm_mask, magnitude_mask, wanda_mask
    by_score.py    those two as methods
    hessian.py     Hessian (running calibration statistics), relative_error
    sparsegpt.py   sparsegpt, SparseGPTReport
    admm.py        admm (masks and weights in turn)
    retarget.py    retarget (aim at the dense model's outputs)
    refine.py      refine (least squares for the weights that a mask keeps)
    quantize.py    gptq, rtn (the kept weights as fp8, int8 or int4)
    team.py        several processes that solve one layer
    methods.py     Method, register_method: the registry that prune_model and the command line read
"""

from sparsekern.prune.admm import METHOD as ADMM
from sparsekern.prune.admm import admm
from sparsekern.prune.by_score import MAGNITUDE, WANDA
from sparsekern.prune.hessian import Hessian, relative_error
from sparsekern.prune.masks import magnitude_mask, nm_mask, wanda_mask
from sparsekern.prune.methods import (
    Details,
    Method,
    Option,
    PruneError,
    methods,
    register_method,
    unregister_method,
)
from sparsekern.prune.pattern import Pattern
from sparsekern.prune.quantize import QuantizeReport, gptq, rtn
from sparsekern.prune.refine import refine
from sparsekern.prune.retarget import retarget
from sparsekern.prune.sparsegpt import METHOD as SPARSEGPT
from sparsekern.prune.sparsegpt import SparseGPTReport, sparsegpt

register_method(SPARSEGPT)
register_method(WANDA)
register_method(MAGNITUDE)
register_method(ADMM)

__all__ = [
    "Details",
    "Hessian",
    "Method",
    "Option",
    "Pattern",
    "PruneError",
    "QuantizeReport",
    "SparseGPTReport",
    "admm",
    "gptq",
    "magnitude_mask",
    "methods",
    "nm_mask",
    "refine",
    "register_method",
    "relative_error",
    "retarget",
    "rtn",
    "sparsegpt",
    "unregister_method",
    "wanda_mask",
]
