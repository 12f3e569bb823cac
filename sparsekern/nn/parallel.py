"""tensor_parallel: a model's linear layers split over the ranks of a torch.distributed mesh.

    colwise    rows of the weight: x whole -> y[..., out/ranks] of a rank        (q, k, v, gate, up)
    rowwise    columns of the weight: x[..., in/ranks] -> sums, added up         (o, down)

2:4 weights are cut as they are stored (`Sparse24.narrow`), never dense. A bias of "colwise" is cut,
one of "rowwise" is added once, after the sum. What travels is one all-reduce of y for every
"rowwise" layer, and one of the gradient of x for every "colwise" one, as in Megatron-LM (Shoeybi et
al. 2019, arXiv:1909.08053); both go through functional collectives, which torch.compile traces.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import check, message
from sparsekern.nn.optimize import JoinedLinear, PassesOn
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.utils.arguments import checked, shown

_OP = "sparsekern.tensor_parallel"
COLWISE, ROWWISE = "colwise", "rowwise"
# Where a model says nothing itself: the names of Llama and its kin.
DEFAULT_PLAN = {
    **dict.fromkeys(("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"), COLWISE),
    **dict.fromkeys(("*.o_proj", "*.down_proj"), ROWWISE),
}


class _ToRanks(torch.autograd.Function):
    """x as it is; its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_reduce(grad, ctx.group), None


class _SumOfRanks(torch.autograd.Function):
    """The sum of y over the ranks; every rank's gradient is the whole one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        return _all_reduce(y, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _all_reduce(tensor: Tensor, group: Any) -> Tensor:
    import torch.distributed._functional_collectives as collectives

    return cast(Tensor, collectives.all_reduce(tensor.contiguous(), "sum", group))


class ColwiseLinear(PassesOn):
    """A linear layer that has some rows of the weight: x whole in, its part of y out."""

    def __init__(self, layer: nn.Module, group: Any) -> None:
        super().__init__()
        self.layer, self.group = layer, group

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            x = cast(Tensor, _ToRanks.apply(x, self.group))  # type: ignore[no-untyped-call]
        return cast(Tensor, self.layer(x))


class RowwiseLinear(nn.Module):
    """A linear layer that has some columns of the weight: its part of x in, y whole out."""

    def __init__(self, layer: nn.Module, group: Any, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.layer, self.group, self.bias = layer, group, bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _SumOfRanks.apply(self.layer(x), self.group)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


@checked("sparsekern.tensor_parallel")
def tensor_parallel(
    model: nn.Module, mesh: Any = None, plan: Mapping[str, str] | None = None
) -> nn.Module:
    """Split a model's linear layers over the ranks of a mesh; every rank calls this alike.

    Args:
        model: the same on every rank, with SparseLinear and nn.Linear layers; changed in place.
        mesh: 1-D torch.distributed DeviceMesh, or a process group; None for the default group.
        plan: {pattern of names: "colwise" | "rowwise"}, shell patterns; the first that matches
            counts. None: what the model's config says (Transformers' `base_model_tp_plan`, of which
            the entries with these two words are taken), else the names of Llama's layers.
    Returns:
        model. Every rank computes the whole output.
    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: a word in the plan, out_features or in_features that the ranks do not divide
            (columns: in multiples of 8, and of the group of scales), a plan that matches nothing, a
            model whose own plan has one kind of layer alone.   TypeError: no mesh.
            Nothing is split then.
    Notes:
        Attention layers are split by heads: the number of key-value heads has to be a multiple of
        the ranks, which is checked where the model's config names it. Call `sparsekern.optimize`
        afterwards, save the model before.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        remedy = "Start with torchrun and call torch.distributed.init_process_group."
        raise RuntimeError(message(_OP, "an initialised torch.distributed", "none", remedy))
    is_mesh = hasattr(mesh, "get_group")
    known = mesh is None or (mesh.ndim == 1 if is_mesh else isinstance(mesh, dist.ProcessGroup))
    got = f"one of {mesh.ndim} dimensions" if is_mesh else shown(mesh)
    expected, remedy = (
        "mesh: a DeviceMesh of one dimension or a process group",
        'mesh["tp"] is one.',
    )
    check(known, _OP, expected, got, remedy, ValueError if is_mesh else TypeError)
    group = mesh.get_group() if is_mesh else mesh
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    group = dist.group.WORLD if group is None else group
    rules = _rules(model, plan)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear | nn.Linear):
            style = next((s for p, s in rules.items() if fnmatch.fnmatchcase(name, p)), None)
            if style is not None:
                found[name] = style
    expected = "a plan that names linear layers of the model"
    check(found, _OP, expected, f"{list(rules)[:4]}", 'Pass plan={"*.up_proj": "colwise", ...}.')
    for name, style in found.items():
        _check_sizes(name, model.get_submodule(name), style, ranks)
    _check_heads(model, ranks)
    styles = set(found.values())
    expected = "plan: 'colwise' and 'rowwise' layers, as this model's names do not say them"
    check(plan or len(styles) == 2, _OP, expected, f"{styles.pop()} alone", "Pass plan=.")
    for name, style in found.items():
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, _split(layer, style, rank, ranks, group))
    return model


def _rules(model: nn.Module, plan: Mapping[str, str] | None) -> dict[str, str]:
    if plan is None:
        config = getattr(model, "config", None)
        own = getattr(config, "base_model_tp_plan", None) or {}
        prefix = getattr(model, "base_model_prefix", "")
        prefix = f"{prefix}." if prefix and hasattr(model, prefix) else ""
        rules = {f"{prefix}{k}": v for k, v in own.items() if v in (COLWISE, ROWWISE)}
        return rules or dict(DEFAULT_PLAN)
    for pattern, style in plan.items():
        known = style in (COLWISE, ROWWISE)
        check(known, _OP, f"'{COLWISE}' or '{ROWWISE}' for {pattern!r}", repr(style))
    return dict(plan)


def _check_sizes(name: str, layer: nn.Module, style: str, ranks: int) -> None:
    out_features, in_features = cast(int, layer.out_features), cast(int, layer.in_features)
    remedy = "Use fewer ranks, or leave the layer out of the plan."
    if isinstance(layer, JoinedLinear) and layer._group is not None:
        expected = f"{name} before sparsekern.optimize"
        raise ValueError(message(_OP, expected, "joined layers", "Call optimize afterwards."))
    if style == COLWISE:
        good = out_features % ranks == 0
        check(good, _OP, f"out_features of {name} a multiple of {ranks}", out_features, remedy)
        return
    unit = ranks
    if isinstance(layer, SparseLinear):
        spec = layer.weight.spec
        grouped = spec.scale == "group" and spec.group < in_features
        unit *= max(8, spec.group) if grouped else 8
        whole = not (spec.scale == "group" and not grouped)  # one scale a row stays one
        check(whole or ranks == 1, _OP, f"{name} with scales of groups", "one scale a row", remedy)
    good = in_features % unit == 0
    check(good, _OP, f"in_features of {name} a multiple of {unit}", in_features, remedy)


def _check_heads(model: nn.Module, ranks: int) -> None:
    config = getattr(model, "config", None)
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if isinstance(heads, int):
            check(
                heads % ranks == 0, _OP, f"{key} a multiple of {ranks}", heads, "Use fewer ranks."
            )


@torch.no_grad()
def _split(layer: nn.Module, style: str, rank: int, ranks: int, group: Any) -> nn.Module:
    dim = 0 if style == COLWISE else 1
    size = (cast(int, layer.out_features), cast(int, layer.in_features))[dim] // ranks
    bias = cast("nn.Parameter | None", layer.bias)
    own = bias
    if dim == 0 and bias is not None:
        part = bias.detach().narrow(0, rank * size, size).clone()
        own = nn.Parameter(part, requires_grad=bias.requires_grad)
    new: nn.Module
    if isinstance(layer, SparseLinear):
        w24 = layer.weight.narrow(dim, rank * size, size)
        new = SparseLinear.from_sparse24(w24, own if dim == 0 else None, layout=layer.layout)
    else:
        linear = cast(nn.Linear, layer)
        weight = linear.weight.detach().narrow(dim, rank * size, size).clone()
        rows, columns = weight.shape
        new = nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype)
        new.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        if dim == 0 and own is not None:
            new.bias = own
    new.train(layer.training)
    return ColwiseLinear(new, group) if dim == 0 else RowwiseLinear(new, group, own)
