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
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import check, message
from sparsekern.nn.optimize import JoinedLinear, PassesOn
from sparsekern.nn.replace import replace_module
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.nn.wrappers import taken_off, whole
from sparsekern.utils.arguments import checked, shown

_OP = "sparsekern.tensor_parallel"
COLWISE, ROWWISE = "colwise", "rowwise"
HEADS = ("num_attention_heads", "num_key_value_heads")  # of a config
# Where attention modules keep their own numbers of heads.
OWN_HEADS = (*HEADS, "num_heads", "n_heads", "n_head", "heads", "num_kv_heads")
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


class SplitLinear(nn.Module):
    """A rank's part of a linear layer; `weight` for code that reads its dtype or device."""

    def __init__(self, layer: nn.Module, group: Any) -> None:
        super().__init__()
        self.layer, self.group = layer, group

    @property
    def weight(self) -> Any:
        return self.layer.weight


class ColwiseLinear(SplitLinear, PassesOn):
    """A linear layer that has some rows of the weight: x whole in, its part of y out."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            x = cast(Tensor, _ToRanks.apply(x, self.group))  # type: ignore[no-untyped-call]
        return cast(Tensor, self.layer(x))


class RowwiseLinear(SplitLinear):
    """A linear layer that has some columns of the weight: its part of x in, y whole out."""

    def __init__(self, layer: nn.Module, group: Any, bias: nn.Parameter | None) -> None:
        super().__init__(layer, group)
        self.bias = bias

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
            "colwise" layer without a "rowwise" one beside it or the other way round, a "colwise"
            layer of more out_features than those take, which holds several matrices (q, k, v or
            gate, up in one), unless the model's own plan says it, two words for one layer.
            TypeError: no mesh.
            Nothing is split then.
    Notes:
        Attention layers are split by heads: the number of key-value heads has to be a multiple of
        the ranks, which is checked where the model's config names it; what their modules keep of it
        is divided. Call `sparsekern.optimize` afterwards, save the model before.
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
    inner = whole(_OP, model)
    with taken_off(inner):
        _split_layers(inner, plan, rank, ranks, group)
    return model


def _split_layers(
    model: nn.Module, plan: Mapping[str, str] | None, rank: int, ranks: int, group: Any
) -> None:
    own = _own_rules(model)
    rules = own or dict(DEFAULT_PLAN) if plan is None else _checked_rules(plan)
    places: dict[nn.Module, dict[str, str | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLinear | nn.Linear):
            places.setdefault(module, {})[name] = _style(name, rules)
    for styles in places.values():
        expected = f"plan: one word for {' and '.join(styles)}, which are one layer"
        words = list(styles.values())
        check(len(set(words)) == 1, _OP, expected, words, "Name all or none.")
    found = {n: style for styles in places.values() for n, style in styles.items() if style}
    expected = "a plan that names linear layers of the model"
    check(found, _OP, expected, f"{list(rules)[:4]}", 'Pass plan={"*.up_proj": "colwise", ...}.')
    for name, style in found.items():
        _check_sizes(name, model.get_submodule(name), style, ranks)
    for name, style in found.items():
        wide = style == COLWISE and _style(name, own) != COLWISE
        _check_beside(model, name, found, wide)
    attention = [name for name in found if re.search(r"att|mixer|\b[qkv]_proj$", name.lower())]
    homes = {model.get_submodule(name.rpartition(".")[0]) for name in attention}
    holders = [(getattr(model, "config", None), HEADS), *((home, OWN_HEADS) for home in homes)]
    _check_heads(holders if attention else [], ranks)
    for layer, styles in places.items():
        word = next(iter(styles.values()))
        if word is not None:
            replace_module(model, layer, _split(layer, word, rank, ranks, group))
    for home in homes:
        for key in OWN_HEADS:
            if type(heads := home.__dict__.get(key)) is int:  # no property
                setattr(home, key, heads // ranks)


def _own_rules(model: nn.Module) -> dict[str, str]:
    own = getattr(getattr(model, "config", None), "base_model_tp_plan", None) or {}
    prefix = getattr(model, "base_model_prefix", "")
    prefix = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    return {f"{prefix}{k}": v for k, v in own.items() if v in (COLWISE, ROWWISE)}


def _checked_rules(plan: Mapping[str, str]) -> dict[str, str]:
    for pattern, style in plan.items():
        known = isinstance(pattern, str) and style in (COLWISE, ROWWISE)
        expected = f"plan: a pattern of names with '{COLWISE}' or '{ROWWISE}'"
        check(known, _OP, expected, f"{pattern!r}: {style!r}", 'As in {"*.up_proj": "colwise"}.')
    return dict(plan)


def _style(name: str, rules: Mapping[str, str]) -> str | None:
    return next((s for pattern, s in rules.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _beside(name: str, other: str) -> bool:
    """In one module, or in modules of one: mlp.up and mlp.down, attention.self.q and
    attention.output.dense."""
    a, b = name.split("."), other.split(".")
    common = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return max(len(a), len(b)) - common <= 2


def _check_beside(model: nn.Module, name: str, found: Mapping[str, str], wide: bool) -> None:
    """That what a layer gives or takes, a part of the features, is taken or given by another."""
    others = [n for n, style in found.items() if style != found[name] and _beside(name, n)]
    missing = ROWWISE if found[name] == COLWISE else COLWISE
    expected = f"plan: a '{missing}' layer beside {name} ('{found[name]}')"
    check(others, _OP, expected, "none", "Pass plan= with both, or without both.")
    if wide:
        rows = cast(int, model.get_submodule(name).out_features)
        most = max(cast(int, model.get_submodule(n).in_features) for n in others)
        expected = f"plan: {name} with at most the {most} out_features that {others[0]} takes"
        remedy = "Several matrices in one cannot be cut in a row: leave both out of the plan."
        check(rows <= most, _OP, expected, rows, remedy)


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


def _check_heads(holders: list[tuple[Any, tuple[str, ...]]], ranks: int) -> None:
    remedy = "Use fewer ranks, or a plan without attention."
    for holder, keys in holders:
        for key in keys:
            heads = getattr(holder, key, None)
            good = not isinstance(heads, int) or heads % ranks == 0
            check(good, _OP, f"{key} a multiple of {ranks}", heads, remedy)


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
