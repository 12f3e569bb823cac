"""A gated MLP whose silu(gate) · up is one launch at few tokens: what optimize(gated=True) makes.

The module keeps its weights and submodules and gets a subclass of its own class, whose forward is

    up to 32 tokens    down_proj(sparsekern.gated_linear(x, gate, up))
    more               the class' own, with gate and up in one launch

A copy, and what is loaded from a pickle, has the class of before.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.backends import registry
from sparsekern.backends.protocol import problem_of
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.ops.gated_op import gated_linear

FEW_TOKENS = 32  # for which there is a kernel
_FORMULA = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
_NAMES = ("gate_proj", "up_proj", "down_proj", "act_fn")
_SILU = ("SiLU", "SiLUActivation")
_made: dict[type[nn.Module], type[nn.Module]] = {}


class GatedMLP(nn.Module):
    """Goes before a class of MLPs whose forward is `_FORMULA`."""

    gate_proj: SparseLinear
    up_proj: SparseLinear
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        joined = getattr(gate, "_group", None)
        few = x.numel() <= FEW_TOKENS * x.shape[-1]
        if not few or joined is None or joined is not getattr(up, "_group", None):
            own: Tensor = super().forward(x)
            return own
        y: Tensor = self.down_proj(gated_linear(x, gate.weight, up.weight))
        return y

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(2))
        return _empty, (plain_class(self),), *reduced[2:]


def _empty(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a GatedMLP had before; that of another module."""
    kind = type(module)
    return cast("type[nn.Module]", kind.__bases__[1]) if kind in _made.values() else kind


def fuse(mlp: nn.Module) -> None:
    """Makes `mlp`, for which `why_not` is None, a GatedMLP, in place."""
    plain = type(mlp)
    if plain not in _made:
        body = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        _made[plain] = type(plain.__name__, (GatedMLP, plain), body)
    mlp.__class__ = _made[plain]


def part(mlp: nn.Module) -> None:
    """Takes `fuse` back."""
    mlp.__class__ = plain_class(mlp)


def why_not(mlp: nn.Module) -> str | None:
    """Why gate and up of this module, which are joined, cannot be fused with their product."""
    if "forward" in mlp.__dict__ or not _computes_formula(type(mlp)):
        return f"the forward of {type(mlp).__name__} is not known to be down(act(gate) * up)"
    gate, up, _, act = (getattr(mlp, name, None) for name in _NAMES)
    if not isinstance(gate, SparseLinear) or not isinstance(up, SparseLinear):
        return "gate_proj or up_proj is no SparseLinear"
    if not isinstance(act, nn.Module) or type(act).__name__ not in _SILU:
        return f"the activation is {type(act).__name__}, not SiLU"
    if act._forward_hooks or act._forward_pre_hooks:
        return "the activation has hooks"
    if gate.bias is not None or up.bias is not None:
        return "gate or up has a bias"
    return _no_kernel(gate, up)


def _no_kernel(gate: SparseLinear, up: SparseLinear) -> str | None:
    spec = gate.weight.spec
    x = torch.empty(1, gate.in_features, dtype=spec.dtype, device=gate.weight.device)
    found, _ = registry.find(problem_of(x, spec, gated=up.weight.spec))
    return "no kernel for a gated pair of these weights here" if found is None else None


def _computes_formula(kind: type[nn.Module]) -> bool:
    """True when the source of the class' forward is `_FORMULA`, returned, and nothing else."""
    try:
        source = textwrap.dedent(inspect.getsource(kind.forward))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return False
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2:
        return False
    if function.decorator_list:
        return False
    body = list(function.body)
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]  # a docstring
    if not body or not isinstance(body[-1], ast.Return):
        return False
    value: ast.expr | None = body[-1].value
    if len(body) == 2 and isinstance(body[0], ast.Assign) and isinstance(value, ast.Name):
        (target, *others) = body[0].targets
        if others or not isinstance(target, ast.Name) or target.id != value.id:
            return False
        value = body[0].value
    elif len(body) != 1:
        return False
    own, x = (argument.arg for argument in function.args.args)
    wanted = ast.parse(_FORMULA, mode="eval").body
    for node in ast.walk(wanted):
        if isinstance(node, ast.Name):
            node.id = {"self": own, "x": x}[node.id]
    return value is not None and ast.dump(value) == ast.dump(wanted)
