"""optimize: layers of a model that read the same x become one launch.

In a decoder, q, k and v read one x, and so do gate and up. One launch over their weights laid side
by side costs one launch instead of three or two, fills the chip better (k and v alone have few
rows) and reads x once. The model's own code does not change, and neither do the modules' names,
weights or state_dict:

    before    y_q = q_proj(x)        three SparseLinear, three launches
              y_k = k_proj(x)
              y_v = v_proj(x)

    after     y_q = q_proj(x)        launches [q; k; v], keeps y_k and y_v
              y_k = k_proj(x)        the same tensor x: takes its part
              y_v = v_proj(x)        the last part; nothing is kept any longer

Each member's tensors are views of one, so that no memory is added. A layer that is called with
another x launches anew; after `_GIVEN_UP` such rounds in a row (cross-attention, whose k and v
read something else) a group goes back to single launches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from sparsekern.errors import message
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.layouts import layout as layout_named
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.formats.tile64 import LAYOUT as TILE64
from sparsekern.formats.tile64 import PANELS, TILE
from sparsekern.nn import gated_mlp
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.ops import linear_op as ops
from sparsekern.utils.arguments import checked

_OP = "sparsekern.optimize"
# Names of sibling layers that read one x in the models of Transformers, each in the order in which
# their outputs are used.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, Whisper, BART, ...
    ("query", "key", "value"),  # BERT, RoBERTa, ViT, ...
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),  # T5 v1.1
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek
)
_GATED = ["gate_proj", "up_proj"]
_GIVEN_UP = 3  # rounds in a row in which a member had another x
_log = logging.getLogger("sparsekern")
_is_compiling = torch.compiler.is_compiling


class Group:
    """Weights side by side, and what one launch over them has left for the members.

    `kept` is one tuple, replaced as a whole: a thread that finds another's launches anew. It holds
    for the x of that launch as it was then, and not for the member that launched: its next call
    begins another round, whatever has been written into x meanwhile.
    """

    def __init__(self, weight: Sparse24, bias: Tensor | None, rows: list[int]) -> None:
        self.weight, self.bias, self.rows = weight, bias, rows
        self.biases: list[Tensor | None] = []  # the members' own, views of `bias`
        self.addresses: list[int] = []
        # x, its version, parts, by whom
        self.kept: tuple[Tensor, int, tuple[Tensor, ...], int] | None = None
        self.missed = 0

    @property
    def given_up(self) -> bool:
        return self.missed >= _GIVEN_UP

    def has_bias(self, index: int, bias: Tensor | None) -> bool:
        """Whether `bias` is still the one that member `index` came with, in the group's memory."""
        if bias is None or bias is not self.biases[index]:
            return bias is self.biases[index]
        return _is_compiling() or bias.data_ptr() == self.addresses[index]

    def output(self, index: int, x: Tensor) -> Tensor:
        """The output of member `index` for x."""
        kept = self.kept
        version = 0 if _is_compiling() or x.is_inference() else x._version
        if kept is not None and kept[0] is x and kept[1] == version and kept[3] != index:
            y = kept[2][index]
            if index == len(self.rows) - 1:
                self.kept = None
                if kept[3] == 0:
                    self.missed = 0
            return y
        if kept is not None and kept[0] is not x:
            self.missed += 1
            if self.given_up:
                _log.info("%s: layers that were joined read different inputs: parted again", _OP)
        together: Tensor = ops.linear(x, self.weight, self.bias)
        # Parts that do not overlap and whose whole nobody else has: no views to autograd, so that
        # each can be changed in place.
        parts = tuple(torch.unsafe_split_with_sizes(together, self.rows, -1))
        last = index == len(self.rows) - 1
        self.kept = None if self.given_up or last else (x, version, parts, index)
        return parts[index]


class PassesOn(nn.Module):
    """A module that gives its own x, unless gradients are wanted, to the linear layer `layer`."""

    layer: nn.Module


class JoinedLinear(SparseLinear):
    """A SparseLinear whose weight is a part of a group's. Made by `optimize` of a SparseLinear in
    place; whatever gives it other tensors (`.to()`, load_state_dict, an assigned weight), and a
    copy, ends that and leaves a SparseLinear that launches alone. So does, while it lasts, a bias
    in other memory (an assigned Parameter or `.data`)."""

    _group: Group | None = None
    _index: int = 0

    def forward(self, x: Tensor) -> Tensor:
        group = self._group
        if group is None or group.given_up or self._view.values is not self._buffers["values"]:
            return super().forward(x)
        bias = self._parameters.get("bias")
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return super().forward(x)  # the group's bias has no gradient
        if not group.has_bias(self._index, bias):
            return super().forward(x)
        return group.output(self._index, x)

    def _hold(self, w24: Sparse24) -> None:
        self._group = None
        super()._hold(w24)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_group": None}


@dataclass
class OptimizeReport:
    """What `optimize` did.

    Args:
        groups: names of the layers that are one launch now, one tuple a launch.
        skipped: {names: why they stay single launches}.
        gated: names of the MLPs whose silu(gate) · up is one launch at few tokens.
    """

    groups: list[tuple[str, ...]]
    skipped: dict[tuple[str, ...], str]
    gated: list[str] = field(default_factory=list)
    _members: list[JoinedLinear] = field(default_factory=list, repr=False)
    _mlps: list[nn.Module] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Every layer launches alone again, with the same weights."""
        for mlp in self._mlps:
            gated_mlp.part(mlp)
        self._mlps, self.gated = [], []
        for member in self._members:
            member._group = None
            member.__class__ = SparseLinear  # type: ignore[assignment]
        self._members, self.groups = [], []

    def __str__(self) -> str:
        layers = sum(map(len, self.groups))
        text = f"{layers} layers in {len(self.groups)} launches"
        if self.gated:
            text += f", {len(self.gated)} of them with silu(gate) * up"
        reasons = sorted(set(self.skipped.values()))
        return text + "".join(f"\n  not joined: {reason}" for reason in reasons)


@checked("sparsekern.optimize")
def optimize(model: nn.Module, *, gated: bool = False) -> OptimizeReport:
    """Join the layers of a model that read the same x (q, k, v; gate, up) into one launch each.

    Args:
        model: any module with SparseLinear layers; changed in place. Siblings are found by name
            (`SIBLINGS`) and checked at every call by the identity of x, and of what is in it.
        gated: also compute silu(gate) · up in the launch of gate and up, at up to 32 tokens where
            a kernel does it (`sparsekern.gated_linear`), in MLPs whose forward is, by its source,
            down_proj(act_fn(gate_proj(x)) * up_proj(x)) with silu and no bias. That is rounded
            once, not three times: results differ from those of single layers in the last bits.
    Returns:
        OptimizeReport: names of what was joined, why the rest was not, and `undo()`.
    Raises:
        TypeError: model is no nn.Module.
        ValueError: the model has no SparseLinear.
    Notes:
        Weights, names and state_dict stay; no memory is added. Results are those of the single
        layers; on a GPU a launch over more rows may take another variant, which sums in another
        order. A layer whose bias is trained launches alone while gradients are on. Under
        torch.compile, x must not be written into between the calls of two joined layers.
        In layout "tile64" all but the last of a group need out_features % 256 == 0, where its row
        groups end.
        Works under torch.compile (without breaks) and in CUDA graphs; compile after this call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message(_OP, "model to be an nn.Module", type(model).__name__))
    if not any(isinstance(module, SparseLinear) for module in model.modules()):
        got = f"{type(model).__name__} without one"
        remedy = "Call sparsekern.prune_model or from_pretrained first."
        raise ValueError(message(_OP, "a model with SparseLinear layers", got, remedy))
    report = OptimizeReport([], {})
    for prefix, parent in list(model.named_modules()):
        for names in _siblings(parent):
            full = tuple(f"{prefix}.{name}" if prefix else name for name in names)
            layers = [cast(SparseLinear, _linear(parent, name)) for name in names]
            reason = _why_not(layers)
            if reason is not None:
                report.skipped[full] = reason
                continue
            report._members += _join(layers)
            report.groups.append(full)
            if gated and names == _GATED:
                reason = gated_mlp.why_not(parent)
                if reason is not None:
                    report.skipped[(*full, "silu")] = reason
                    continue
                gated_mlp.fuse(parent)
                report._mlps.append(parent)
                report.gated.append(prefix)
    return report


def _siblings(parent: nn.Module) -> Iterator[list[str]]:
    """Names of the SparseLinear children of one parent that read one x, two or more at a time."""
    for names in SIBLINGS:
        found = [n for n in names if type(_linear(parent, n)) in (SparseLinear, JoinedLinear)]
        if len(found) > 1:
            yield found


def _linear(parent: nn.Module, name: str) -> nn.Module | None:
    child = parent._modules.get(name)
    return child.layer if isinstance(child, PassesOn) else child


def _why_not(layers: list[SparseLinear]) -> str | None:
    if any(isinstance(layer, JoinedLinear) and layer._group is not None for layer in layers):
        return "joined already"
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return "a layer has hooks"
    first = layers[0].weight
    for layer in layers[1:]:
        w24 = layer.weight
        if _of_rows(w24.spec, first.out_features) is not first.spec or w24.device != first.device:
            return "in_features, dtype, layout or device differ"
        if (layer.bias is None) != (layers[0].bias is None):
            return "some have a bias and some have none"
    if first.device.type == "meta":
        return "weights without data (meta)"
    if first.layout == TILE64:
        rows = TILE * PANELS
        if any(layer.out_features % rows for layer in layers[:-1]):
            return f"out_features is no multiple of {rows} (layout {TILE64!r})"
    elif first.layout != ROWMAJOR:
        return f"layout {first.layout!r} cannot be laid side by side"
    return None


def _of_rows(spec: WeightSpec, rows: int) -> WeightSpec:
    """The spec with another number of out_features; equal specs are one object."""
    size = rows, spec.shape[1]
    return WeightSpec.of(size, spec.storage, spec.layout, spec.dtype, spec.scale, spec.group)


@torch.inference_mode(False)  # whose tensors could not be trained around
@torch.no_grad()
def _join(layers: list[SparseLinear]) -> list[JoinedLinear]:
    weights = [layer.weight for layer in layers]
    spec = weights[0].spec
    rows = [w24.out_features for w24 in weights]
    tensors = {name: torch.cat([w24.tensors[name] for w24 in weights]) for name in spec.tensors}
    joined = Sparse24.from_tensors(_of_rows(spec, sum(rows)), tensors)
    joined.keeps_twin = False
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([cast(Tensor, layer.bias).detach() for layer in layers])
    group = Group(joined, bias, rows)
    sizes = {name: [w24.tensors[name].shape[0] for w24 in weights] for name in tensors}
    parts = {name: tensors[name].split(sizes[name]) for name in tensors}
    members = []
    for i, (layer, w24) in enumerate(zip(layers, weights)):
        views = {name: parts[name][i] for name in tensors}
        layer._hold(Sparse24.from_tensors(w24.spec, views))
        if bias is not None:
            cast(nn.Parameter, layer.bias).data = bias.split(rows)[i]
        group.biases.append(layer.bias)
        group.addresses.append(0 if layer.bias is None else layer.bias.data_ptr())
        layer.__class__ = JoinedLinear
        member = cast(JoinedLinear, layer)
        member._group, member._index = group, i
        members.append(member)
    complete = layout_named(spec.layout).complete
    if complete is not None:
        complete(joined.values)
    return members
