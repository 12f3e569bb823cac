"""How many numbers a model has, those of compressed layers included."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sparsekern.errors import check
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.utils.arguments import check_initialised


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of a model.

    dense: as many as the dense model has, pruned ones included. stored: those that are kept.
    trainable: those that an optimizer can move. nbytes: of all weights as they are in memory,
    the positions of the kept ones included.
    """

    dense: int
    stored: int
    trainable: int
    nbytes: int

    def __str__(self) -> str:
        share = self.stored / self.dense if self.dense else 1.0
        return (
            f"{self.dense:,} parameters, {self.stored:,} of them stored ({share:.1%}), "
            f"{self.trainable:,} trainable, {self.nbytes:,} bytes"
        )


def num_parameters(model: nn.Module) -> ParameterCount:
    """Parameters of a model, those of compressed layers included, which are no nn.Parameter and
    which `model.num_parameters()` of Transformers therefore leaves out, and of experts
    (SparseExperts). Shared ones count once.

    Raises:
        TypeError: no nn.Module.   ValueError: a lazy layer without weights.
    """
    op = "sparsekern.num_parameters"
    got, remedy = type(model).__name__, "Pass the model, or one layer of it."
    check(isinstance(model, nn.Module), op, "model: an nn.Module", got, remedy, TypeError)
    check_initialised(op, model)
    parameters = list(model.parameters())
    dense = stored = sum(p.numel() for p in parameters)
    nbytes = sum(p.nbytes for p in parameters)
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, SparseLinear) and id(module.weight.values) not in seen:
            seen.add(id(module.weight.values))
            count = module.out_features * module.in_features
            dense, stored = dense + count, stored + count // 2
            nbytes += module.weight.nbytes
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return ParameterCount(dense, stored, trainable, nbytes)
