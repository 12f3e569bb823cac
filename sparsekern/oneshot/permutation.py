"""Permutations that fold away: an order of the channels inside each MLP, and inside each attention
head between v and o, in which 2:4 loses less.

Nothing but the layers themselves can see that order, so that it costs nothing at run time:

    gate, up, fc1:  rows, bias    ──►  P W, P b         what makes the channels
    down, fc2:      columns       ──►  W Pᵀ             what reads them
    v of a head:    rows, bias    ──►  P W, P b         the same P for all query heads that share
    o of that head: columns       ──►  W Pᵀ             a key-value head

Which four columns of down and o share a group decides what 2:4 drops. The search lowers the sum of
the importance dropped, w_ij²·Σ x_j² of the two smallest of each group: in a round the groups are
paired at random, and each pair takes the best of 16 exchanges of one column, if one helps. Rounds
never raise the sum.

Source: Zhang et al. 2024, "Plug-and-Play" (RIA, ICLR), for permuting the input channels of pruned
layers; that these two places fold: the forward pass.
"""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.backends import triton
from sparsekern.errors import FormatError, check
from sparsekern.nn.tied import check_untied
from sparsekern.nn.wrappers import taken_off, whole
from sparsekern.oneshot.calibration import Batch, make_batches
from sparsekern.oneshot.devices import check_changeable, looked, quiet, working_device
from sparsekern.oneshot.discovery import before_pruning, find_blocks
from sparsekern.oneshot.observe import observe
from sparsekern.utils.arguments import SEEDS, checked, folded

OP = "sparsekern.permute"
logger = logging.getLogger("sparsekern")
ROUNDS = 200
# Names of an MLP's layers in one module: what makes the channels, and what reads them.
MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"), (("w1", "w3"), "w2"))
OUTPUTS = ("o_proj", "out_proj")  # of an attention that has a v_proj
ROUNDING = 1e-6  # of a sum of importance in float32: smaller gains are none
_ELEMENTS = 2**26  # that a step of the search works on at a time
_LARGE = 2**21  # weights of a head, or of an MLP's reader, from which on a kernel searches
_STACKED = 2**28  # weights of the places that are searched together


@dataclass
class Site:
    """One place whose channels may change their order.

    name: of the layer that reads them.      makers: layers with one row per channel.
    reader: the layer whose in_features are `heads` x `repeat` x `size` channels; the makers have
    `heads` x `size` rows, and heads are permuted inside, each by itself.
    """

    name: str
    makers: list[nn.Linear]
    reader: nn.Linear
    heads: int = 1
    repeat: int = 1

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.reader.in_features // (self.heads * self.repeat)


@dataclass
class PermutationReport:
    """What `permute` did.

    sites: places whose channels have another order now.
    lost_before, lost_after: mean share of the importance w²·Σx² that 2:4 drops in their readers.
    logits_distance: largest difference of an output before and after, over the largest output.
    parts: seconds of: observe (forward passes), search, fold (into the weights), check (outputs).
    """

    sites: int
    rounds: int
    seconds: float
    lost_before: float
    lost_after: float
    logits_distance: float
    parts: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"permuted {self.sites} layers in {self.seconds:.1f} s, {self.rounds} rounds: "
        text += f"lost importance {self.lost_before:.4f} -> {self.lost_after:.4f}, "
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.parts.items())
        return f"{text}logits within {self.logits_distance:.1e} ({parts})"


@dataclass
class Permuted:
    """What `permute_on` did: its report, {name of a reader: order [heads, size]}, and how to take
    it back."""

    report: PermutationReport
    orders: dict[str, Tensor]
    undo: Callable[[], None]

    def tensors(self) -> dict[str, Tensor]:
        """What was found, as `permute_on(known=)` takes it."""
        return self.orders


@checked(OP)
@quiet
def permute(
    model: nn.Module,
    calibration: object,
    *,
    rounds: int = ROUNDS,
    heads: bool = True,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> PermutationReport:
    """Change the order of channels inside a dense model so that 2:4 loses less, in place.

    Run it before prune_model, and after `rotate`. The function does not change, up to rounding.

    Args:
        model: with MLPs of gate_proj, up_proj and down_proj (or fc1 and fc2, or w1, w3 and w2) in
            one module, or attention of v_proj and o_proj (out_proj), as nn.Linear.
        calibration: token ids [samples, tokens], or whatever prune_model takes.
        rounds: of the search, in every place; 0 changes nothing.
        heads: also between v and o.
        device: where it runs; None: CUDA if there is one, else where the model is.
        seed: of which groups a round pairs.
    Returns:
        PermutationReport.
    Raises:
        ValueError: the model has no such place, or a weight there is shared. Nothing is changed
            then.
        RuntimeError: the outputs differ by more than rounding. The model is as it was before.
    Warns:
        UserWarning: they did because of what the attention does between v and o (a gate); the order
            there is as before.
    """
    model = whole(OP, model)
    check_changeable(OP, model)
    target = working_device(OP, model, device)
    batches = make_batches(calibration, model, None, target, op=OP)
    with taken_off(model):
        return permute_on(model, batches, target, rounds=rounds, heads=heads, seed=seed).report


@checked(OP, rounds=(0, 10**6), seed=SEEDS)
@quiet
def permute_on(
    model: nn.Module,
    batches: list[Batch],
    target: torch.device,
    *,
    rounds: int = ROUNDS,
    heads: bool = True,
    seed: int = 0,
    known: Mapping[str, Tensor] | None = None,
    report: PermutationReport | None = None,
    energies: Energies | None = None,
) -> Permuted:
    """`permute` on batches. known: orders of an earlier search, which is then not made again; with
    its report, of the same model in another process, they are applied and nothing else. energies:
    of the readers' inputs, where the forward passes are done."""
    start = time.perf_counter()
    home = next(model.parameters()).device
    sites = find_sites(model, heads)
    expected = f"{type(model).__name__} with an MLP or attention of layers {MLPS[0]} or v_proj"
    remedy = before_pruning(model, "permutation")
    check(sites, OP, expected, "none", remedy)
    check_untied(OP, model, (m for site in sites for m in (*site.makers, site.reader)), remedy)
    if known is not None and report is not None:
        given = {site.name: _checked(known.get(site.name), site) for site in sites}
        for site in sites:
            apply(site, given[site.name], target)
        every = [(site, given[site.name]) for site in sites]
        return Permuted(report, given, functools.partial(_restore, every, target))
    probe = batches[0].probe()
    parts: dict[str, float] = {}
    before = _outputs(model, probe, home, target)
    _lap(parts, "check", start)
    if energies is None:
        energies = input_energies(model, batches, target, heads)
    else:
        start -= energies.seconds
    parts["observe"] = energies.seconds
    last = time.perf_counter()
    orders: dict[str, Tensor] = {}
    shares: dict[str, tuple[float, float]] = {}
    for number, stack in enumerate(_stacks(sites)):
        scores = torch.cat([_scores(site, energies.sums[site.name], target) for site in stack])
        if known is not None:
            order = torch.cat([_checked(known.get(site.name), site) for site in stack]).to(target)
        else:
            generator = torch.Generator().manual_seed(folded(seed * 7919 + number))
            order = search(scores, rounds, generator)
        shares |= zip((s.name for s in stack), _shares(scores, order, stack[0].heads))
        orders |= {s.name: o for s, o in zip(stack, order.cpu().split(stack[0].heads))}
    orders = {site.name: orders[site.name] for site in sites}
    last = _lap(parts, "search", last)
    done: list[tuple[Site, Tensor]] = []
    undo = functools.partial(_restore, done, target)
    try:
        for site in sites:
            apply(site, orders[site.name], target)
            done.append((site, orders[site.name]))
        last = _lap(parts, "fold", last)
        bound = max(1e-3, 20 * torch.finfo(before.dtype).eps)
        distance = _distance(before, _outputs(model, probe, home, target))
        mlps = {site.name for site in find_sites(model, False)}
        if not distance <= bound and 0 < len(mlps) < len(sites):
            between = [pair for pair in done if pair[0].name not in mlps]
            done[:] = [pair for pair in done if pair[0].name in mlps]
            for site, order in between:
                apply(site, order.argsort(1), target)
                orders[site.name] = torch.arange(site.size, device="cpu").repeat(site.heads, 1)
                shares[site.name] = (shares[site.name][0],) * 2
            distance = _distance(before, _outputs(model, probe, home, target))
            text = (
                f"{OP}: {type(model).__name__} does more between v and o than attend, as with a "
                "gate: the channels of heads keep their order, as with heads=False."
            )
            warnings.warn(text, stacklevel=5)
        _lap(parts, "check", last)
        if not distance <= bound:
            raise RuntimeError(
                f"{OP}: expected the outputs of {type(model).__name__} to stay within {bound:g}, "
                f"got a distance of {distance:.3g}. This architecture cannot be permuted."
            )
    except BaseException:
        undo()
        raise
    mean = torch.tensor(list(shares.values()), dtype=torch.float64, device="cpu").mean(0).tolist()
    moved = sum(
        not torch.equal(o, torch.arange(o.shape[1], device="cpu").expand_as(o))
        for o in orders.values()
    )
    took = time.perf_counter() - start
    report = PermutationReport(moved, rounds, took, mean[0], mean[1], distance, parts)
    logger.info("%s", report)
    return Permuted(report, orders, undo)


def _lap(parts: dict[str, float], name: str, since: float) -> float:
    """Add the seconds since then to a part; the time now."""
    now = time.perf_counter()
    parts[name] = parts.get(name, 0.0) + now - since
    return now


# -------------------------------------------------------------------------------------- the places


def find_sites(model: nn.Module, heads: bool = True) -> list[Site]:
    """Every place of the model whose channels may change their order, in tree order; those too
    small for two groups are left out."""
    config: Any = getattr(model, "config", None)
    count: Any = getattr(config, "num_attention_heads", None)
    kv: Any = getattr(config, "num_key_value_heads", None) or count
    found = []
    known = isinstance(kv, int) and isinstance(count, int) and kv and count % kv == 0
    for prefix, module in model.named_modules():
        for makers, reader in MLPS:
            layers = [_linear(module, name) for name in makers]
            down = _linear(module, reader)
            rows = [one for one in layers if one is not None]
            if down is None or len(rows) < len(makers):
                continue
            if all(one.out_features == down.in_features for one in rows):
                found.append(Site(f"{prefix}.{reader}".lstrip("."), rows, down))
        v = _linear(module, "v_proj") if heads and known else None
        for name in OUTPUTS:
            o = _linear(module, name)
            if v is None or o is None or v.out_features % kv:
                continue
            if v.out_features // kv * count == o.in_features:
                found.append(Site(f"{prefix}.{name}".lstrip("."), [v], o, kv, count // kv))
    return [site for site in found if site.size % 4 == 0 and site.size >= 8]


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    layer = module._modules.get(name)
    return layer if type(layer) is nn.Linear else None


def apply(site: Site, order: Tensor, device: torch.device | None = None) -> None:
    """Write an order [heads, size] into the rows of the makers and the columns of the reader.
    device: where they are put in order; None: where they are."""
    heads, size = order.cpu(), site.size
    rows = (heads + size * torch.arange(site.heads, device="cpu")[:, None]).view(-1)
    for layer in site.makers:
        _reorder(layer.weight, rows, 0, device)
        if layer.bias is not None:
            _reorder(layer.bias, rows, 0, device)
    starts = size * torch.arange(site.heads * site.repeat, device="cpu").view(
        site.heads, site.repeat, 1
    )
    _reorder(site.reader.weight, (heads[:, None] + starts).reshape(-1), 1, device)


def _reorder(parameter: Tensor, order: Tensor, dim: int, device: torch.device | None) -> None:
    there = parameter.to(device or parameter.device)
    parameter.copy_(there.index_select(dim, order.to(there.device)))


@torch.no_grad()
def _restore(done: list[tuple[Site, Tensor]], device: torch.device) -> None:
    """Put the channels back where they were: their bits have only moved."""
    while done:
        site, order = done.pop()
        apply(site, order.argsort(1), device)


def _outputs(model: nn.Module, probe: Batch, home: torch.device, target: torch.device) -> Tensor:
    _, blocks = find_blocks(model)
    output = looked(blocks, target, lambda: probe.run(model, home))
    if isinstance(output, Tensor):
        return output
    first: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return first


def _distance(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))


def _checked(order: Tensor | None, site: Site) -> Tensor:
    """A stored order, if it is one of this place; else FormatError."""
    if order is None or order.shape != (site.heads, site.size):
        order = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
    right = torch.equal(
        order.sort(1).values, torch.arange(site.size, device="cpu").expand(site.heads, -1)
    )
    expected = f"an order of {site.heads} x {site.size} channels for {site.name}"
    check(right, OP, expected, "none that fits", "Delete the directory.", FormatError)
    return order


# -------------------------------------------------------------------------------------- the search


@dataclass
class Energies:
    """Σ x_j² over the calibration of the input of each reader.

    sums: by the reader's name, float64 [in_features].      seconds: of the forward passes.
    """

    sums: dict[str, Tensor]
    seconds: float


def input_energies(
    model: nn.Module, batches: list[Batch], device: torch.device, heads: bool = True
) -> Energies:
    """The energies over some batches."""
    begin = time.perf_counter()
    seen = observed(model, batches, device, heads, calls=False)
    return Energies(added_up(model, [seen], heads), time.perf_counter() - begin)


def observed(
    model: nn.Module,
    batches: list[Batch],
    device: torch.device,
    heads: bool = True,
    calls: bool = True,
) -> dict[str, list[Tensor]]:
    """By the reader's name Σ x_j² of each call of it, float64 [in_features], in order; without
    `calls` their sum alone."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        found = x.square().sum(0).double()
        if calls or name not in seen:
            seen.setdefault(name, []).append(found)
        else:
            seen[name][0] += found

    sites = find_sites(model, heads)
    if batches and sites:
        observe(model, batches, device, {s.reader: functools.partial(hook, s.name) for s in sites})
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return seen


def added_up(
    model: nn.Module, parts: Sequence[Mapping[str, list[Tensor]]], heads: bool = True
) -> dict[str, Tensor]:
    """Sums of what was observed, by the reader's name. Of n parts the i-th is that of batches i,
    i + n, ...: the calls are added in the order in which one process would have made them."""
    sums = {}
    sites = find_sites(model, heads)
    for site in sites:
        calls = zip_longest(*(part.get(site.name, []) for part in parts))
        found = [x for turn in calls for x in turn if x is not None]
        if found:
            sums[site.name] = functools.reduce(torch.add, found)
    unread = [site.name for site in sites if site.name not in sums]
    check(not unread, OP, "calibration that reaches every layer", f"none for {unread[:3]}")
    return sums


def _scores(site: Site, energy: Tensor, device: torch.device) -> Tensor:
    """Importance [heads, repeat x out_features, size] of the reader's weights."""
    weight = site.reader.weight.detach().to(device).float()
    scores = weight.square() * (energy.to(device) / energy.max().clamp_min(1e-30)).float()
    apart = scores.view(-1, site.heads, site.repeat, site.size).permute(1, 2, 0, 3)
    return apart.reshape(site.heads, -1, site.size)


def _stacks(sites: list[Site]) -> list[list[Site]]:
    """The sites in lists that one search looks at together: of one shape, and of so many elements
    or alone."""
    stacks: list[list[Site]] = []
    open_: dict[tuple[int, ...], list[Site]] = {}
    for site in sites:
        shape = (site.heads, site.repeat, *site.reader.weight.shape)
        stack = open_.get(shape)
        if stack is None or (len(stack) + 1) * site.reader.weight.numel() > _STACKED:
            stack = open_[shape] = []
            stacks.append(stack)
        stack.append(site)
    return stacks


def _shares(scores: Tensor, order: Tensor, heads: int) -> list[tuple[float, float]]:
    """For each site of a stack, [sites x heads, rows, size], what of all importance is lost in the
    old and in the new order."""
    after = scores.gather(2, order[:, None].expand_as(scores))
    sums = [torch.stack([lost(part) for part in x]).view(-1, heads).sum(1) for x in (scores, after)]
    total = scores.sum((1, 2), dtype=torch.float64).view(-1, heads).sum(1).clamp_min(1e-30)
    rows: list[tuple[float, float]] = torch.stack([s / total for s in sums], 1).tolist()
    return rows


def lost(scores: Tensor) -> Tensor:
    """Sum of the two smallest of each four columns of [rows, columns], in float64."""
    return _two_least(scores.unflatten(1, (-1, 4)).unbind(2)).sum(dtype=torch.float64)


def search(scores: Tensor, rounds: int, generator: torch.Generator) -> Tensor:
    """An order of the columns of each head of scores [heads, rows, columns] with little lost; int64
    [heads, columns]. All pairs of a round, of all heads, are looked at together."""
    heads, rows, size = scores.shape
    columns = scores.transpose(1, 2).reshape(heads * size, rows).contiguous()
    order = torch.arange(heads * size, device=scores.device)
    groups = size // 4
    firsts = groups * torch.arange(heads, device="cpu")[:, None]
    costs = _costs_function(scores)
    least = max(1, _ELEMENTS // (16 * max(1, rows))) if costs is _costs else heads * groups
    for _ in range(rounds):
        mixed = (
            torch.rand(
                heads, groups, generator=generator, dtype=torch.float32, device="cpu"
            ).argsort(1)
            + firsts
        )
        pairs = mixed[:, : groups // 2 * 2].reshape(-1, 2).to(order.device, non_blocking=True)
        for part in pairs.split(least):
            eight = order.view(-1, 4)[part].view(-1, 8)
            exchanged = _exchange(*costs(columns, eight))
            order.view(-1, 4)[part] = eight.gather(1, exchanged).view(-1, 2, 4)
    return order.view(heads, size) - size * torch.arange(heads, device=order.device)[:, None]


def _costs_function(scores: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`_costs`, or its kernel for large scores [heads, rows, columns] on a GPU with Triton."""
    if scores.is_cuda and scores[0].numel() >= _LARGE and triton.available():
        from sparsekern.backends.triton import exchange

        return exchange.costs
    return _costs


def _costs(columns: Tensor, eight: Tensor) -> tuple[Tensor, Tensor]:
    """What pairs of groups of columns [columns, rows], eight [pairs, 8] of them, lose: as they are
    [pairs], and after the exchange of column i of the first by j of the second [pairs, 4, 4]."""
    values = columns[eight]
    first, second = values[:, :4], values[:, 4:]
    sums = [_two_least(half.unbind(1)).sum(1) for half in (first, second)]
    return sums[0] + sums[1], _replaced(first, second) + _replaced(second, first).transpose(1, 2)


def _exchange(now: Tensor, costs: Tensor) -> Tensor:
    """The order of the eight columns of each pair after the exchange that loses least; as they are
    where none lowers the sum by more than its rounding. int64 [pairs, 8]."""
    best, index = costs.flatten(1).min(1)
    i, j = index // 4, 4 + index % 4
    order = torch.arange(8, device=costs.device).repeat(len(costs), 1)
    better = best < now * (1 - ROUNDING)
    order.scatter_(1, torch.where(better, i, 0)[:, None], torch.where(better, j, 0)[:, None])
    return order.scatter_(1, j[:, None], torch.where(better, i, j)[:, None])


def _replaced(four: Tensor, others: Tensor) -> Tensor:
    """What four columns [pairs, 4, rows] lose with column i replaced by column j of the others:
    [pairs, 4, 4]. Of the three that stay only the two smallest, a <= b, matter: a + min(b, new)."""
    result = []
    for i in range(4):
        x, y, z = (four[:, k] for k in range(4) if k != i)
        low, high = torch.minimum(x, y), torch.maximum(x, y)
        a, b = torch.minimum(low, z), torch.minimum(torch.maximum(low, z), high)
        new = torch.minimum(b[:, None], others).sum(2)
        result.append(a.sum(1)[:, None] + new)
    return torch.stack(result, 1)


def _two_least(four: Any) -> Tensor:
    """The sum of the two smallest of four tensors, elementwise; faster than a sort."""
    a, b, c, d = four
    low, other = torch.minimum(a, b), torch.minimum(c, d)
    high = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    return torch.minimum(low, other) + torch.minimum(torch.maximum(low, other), high)
