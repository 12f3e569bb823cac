"""Which weights of a model are masked, and by what: the parts of finetune.Masked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.finetune.schedule import grouped, zeros_mask
from sparsekern.finetune.tensors import local, shard, unshard
from sparsekern.nn import replace
from sparsekern.nn.sparse_experts import find_experts
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.nn.tied import tied_outside
from sparsekern.nn.wrappers import is_dtensor, named_modules
from sparsekern.oneshot import discovery
from sparsekern.prune.pattern import TWO_OF_FOUR, Pattern
from sparsekern.utils.arguments import shown

OP = "sparsekern.finetune.Masked"


@dataclass
class Entry:
    """One masked weight.

    name: layer or parameter name, without the prefixes of wrappers.
    module, key: where the Parameter is; it is looked up at every use, because FSDP replaces it.
    transposed: the weight is [..., in_features, out_features] (Conv1D, some experts).
    linear: groups of m along in_features; False for other shapes, whose masks cannot move.
    dropped: bool in the weight's own shape, True = zero; of the local shard once the weight is one.
    buffer: name of a module buffer that holds the mask instead (True = kept), or None.
    residue: values of the dropped weights, zero elsewhere, or None.
    gradient: |gradient| kept for the schedule between the two hooks.
    also: other names of the same Parameter, which the mask was given for, too.
    """

    name: str
    module: nn.Module
    key: str
    transposed: bool
    linear: bool
    dropped: Tensor | None = None
    buffer: str | None = None
    residue: Tensor | None = None
    gradient: Tensor | None = None
    sharded: bool = False
    also: tuple[str, ...] = ()

    @property
    def parameter(self) -> Tensor:
        """The Parameter (a DTensor under FSDP2)."""
        found: Tensor = getattr(self.module, self.key)
        return found

    def weight(self) -> Tensor:
        """The Parameter's data, of this process: in-place changes are changes of the model."""
        return local(self.parameter.detach())

    def drop(self) -> Tensor:
        """True where the weight of this process is dropped, on its device."""
        parameter = self.parameter
        if self.buffer is not None:
            mask = self.module._buffers[self.buffer]
            assert mask is not None
            return shard(~mask, parameter)
        assert self.dropped is not None
        if is_dtensor(parameter) and not self.sharded:
            self.dropped = shard(self.dropped, parameter)
            if self.residue is not None:
                self.residue = shard(self.residue, parameter)
            self.sharded = True
        device = local(parameter).device
        if self.dropped.device != device:
            self.dropped = self.dropped.to(device)
        return self.dropped

    def set_drop(self, dropped: Tensor) -> None:
        """Replace the mask; `dropped` as `drop` returns it."""
        if self.buffer is not None:
            mask = self.module._buffers[self.buffer]
            assert mask is not None
            mask.copy_(~dropped)
        else:
            self.dropped = dropped

    def mask(self) -> Tensor:
        """The whole mask as bool [..., out_features, in_features] (or the weight's shape), True =
        kept.

        Of a sharded weight it is gathered: every process has to ask.
        """
        kept = ~unshard(self.drop(), self.parameter)
        return grouped(kept, self.transposed).contiguous()

    @property
    def stacked(self) -> bool:
        """Whether these are the matrices of all experts of a mixture."""
        return self.linear and self.parameter.dim() == 3

    def held(self) -> Tensor:
        """The residue on the weight's device."""
        assert self.residue is not None
        self.drop()  # which shards it
        return self.residue.to(self.weight().device)


def find(
    model: nn.Module, masks: Mapping[str, Tensor] | None, pattern: Pattern
) -> Iterator[tuple[Entry, Any]]:
    """Weights, and the mask of each as Masked takes it."""
    modules = dict(named_modules(model))
    experts = stacks(model)
    if masks is None:
        entries = [
            Entry(name, module, "weight", replace.is_conv1d(module), True)
            for name, module in modules.items()
            if replace.is_linear(module)
        ]
        entries += [Entry(name, *place, True) for name, place in experts.items()]
        found = [
            entry
            for entry in entries
            if not is_dtensor(entry.parameter) and _sparse(entry, pattern)
        ]
        remedy = "Prune it first, with compress=False, or pass masks=."
        if any(isinstance(module, SparseLinear) for module in modules.values()):
            remedy = "Call sparsekern.decompress_model(model) first: a SparseLinear is frozen."
        if any(is_dtensor(entry.parameter) for entry in entries):
            remedy = "Make it before fully_shard, where the zeros can be read, or pass masks=."
        expected = f"a model with {pattern} sparse Linear layers"
        check(found, OP, expected, "none", remedy)
        for entry in found:
            rows = grouped(entry.parameter.detach(), entry.transposed)
            yield entry, kept(rows, pattern)
        return
    check(masks, OP, "masks of at least one layer", "an empty dict", "Pass None for the zeros.")
    modules = dict(named_modules(model, every=True))
    for name, mask in masks.items():
        place: Any = modules.get(name)
        key = "weight"
        if place is None or not isinstance(getattr(place, "weight", None), Tensor):
            owner, _, key = name.rpartition(".")
            place = modules.get(owner)
        parameter = getattr(place, key, None)
        known = place is not None and isinstance(parameter, nn.Parameter)
        remedy = "Names are those of model.named_modules() or model.named_parameters()."
        made = isinstance(parameter, Tensor) and not isinstance(parameter, nn.Parameter)
        got = "no match" if not made else f"a {key} that its module computes, or a plain tensor"
        check(known, OP, f"mask {name!r} to name a layer or Parameter", got, remedy)
        transposed = key == "weight" and replace.is_conv1d(place)
        if name in experts:
            transposed = experts[name][2]
        linear = name in experts or cast(Tensor, parameter).dim() == 2
        yield Entry(name, place, key, transposed, linear), mask


def _sparse(entry: Entry, pattern: Pattern) -> bool:
    """Whether the zeros of a weight, of all experts of a mixture, make it n:m sparse."""
    n, m = pattern
    rows = grouped(entry.parameter.detach(), entry.transposed)
    if not rows.numel() or rows.shape[-1] % m:
        return False
    remedy = "Load the weights first, or pass masks=."
    check(not rows.is_meta, OP, f"{entry.name} with data", "a meta tensor", remedy)
    if not rows.any():
        return False  # a zero start, as of an adapter, is no pruning
    matrices = rows if entry.stacked else rows.unsqueeze(0)
    count = sum(pattern.most(matrix) <= n for matrix in matrices)
    if 0 < count < len(matrices):
        text = f"{count} of {len(matrices)} experts of {entry.name} are {pattern} sparse"
        warnings.warn(f"{OP}: {text}: none is masked. Prune all of them.", stacklevel=5)
    return count == len(matrices)


def checked_drop(op: str, entry: Entry, mask: Any, pattern: Pattern) -> Tensor:
    """What a mask as Masked takes it drops, whole and in the weight's own shape."""
    name = f"mask {entry.name!r}"
    got = shown(mask)
    good = isinstance(mask, Tensor) and mask.dtype == torch.bool
    remedy = "True = kept: mask.bool(), or torch.as_tensor(mask, dtype=torch.bool)."
    check(good, op, f"{name}, a tensor of bool", got, remedy, TypeError)
    shape = list(grouped(entry.parameter, entry.transposed).shape)
    remedy = "A mask is [out_features, in_features], or as its Parameter."
    check(list(mask.shape) == shape, op, f"{name} of shape {shape}", list(mask.shape), remedy)
    if entry.linear:
        n, m = pattern
        whole = ", pairs whole," if pattern.unit > 1 else ""
        expected = f"at most {n} kept per group of {m}{whole} in {name}"
        most = pattern.most(mask)
        remedy = "sparsekern.prune.magnitude_mask(weight) is such a mask."
        check(most <= n, op, expected, most, remedy)
    return ~grouped(mask, entry.transposed).contiguous()


def stacks(model: nn.Module) -> dict[str, tuple[nn.Module, str, bool]]:
    """name of a Parameter that holds all experts of a mixture -> (module, key, whether it is
    [experts, in_features, out_features])."""
    return {
        f"{name}.{key}": (module, key, transposed)
        for name, (module, recipe) in find_experts(model).items()
        for key, transposed in recipe.matrices
    }


def kept(rows: Tensor, pattern: Pattern) -> Tensor:
    """zeros_mask of [..., rows, in_features]."""
    return zeros_mask(rows.flatten(0, -2), *pattern, pattern.unit).view(rows.shape)


def groups_whole(entry: Entry, m: int) -> bool:
    """Whether the groups of this process' part of the weight are complete."""
    return grouped(entry.weight(), entry.transposed).shape[-1] % m == 0


def check_whole(model: nn.Module, entries: list[Entry]) -> None:
    """ValueError for a weight that is masked under some of its names alone (nn/tied.py)."""
    outside = tied_outside(model, [(entry.module, entry.key) for entry in entries])
    for entry in entries:
        partner = outside.get((id(entry.module), entry.key))
        expected = f"{entry.name} to have a weight of its own"
        remedy = "Leave it unmasked, or pass masks= with one mask under each name of the Parameter."
        check(partner is None, OP, expected, f"tied to {partner}", remedy)


def merged(entries: list[Entry]) -> list[Entry]:
    """One entry a Parameter, which knows its other names. ValueError for two masks of one."""
    made: dict[int, Entry] = {}
    for entry in entries:
        first = made.setdefault(id(entry.parameter), entry)
        if first is not entry:
            same = torch.equal(first.drop(), entry.drop())
            expected = f"one mask for {first.name} and {entry.name}, which share their weight"
            check(same, OP, expected, "two that differ", "Pass the same mask for both.")
            first.also += (entry.name,)
    return list(made.values())


def why_dense(entry: Entry, model: nn.Module) -> str | None:
    """Why `compress` leaves this weight dense, or None."""
    if entry.module is model:
        return "the model itself is the layer and cannot be replaced in place"
    if not entry.stacked and (entry.key != "weight" or not replace.is_linear(entry.module)):
        return f"{type(entry.module).__name__}.{entry.key} is no Linear weight"
    if TWO_OF_FOUR.most(entry.mask()) > 2:
        return "its mask is not 2:4"
    if entry.weight().dtype not in discovery.PRUNABLE_DTYPES:
        return f"dtype {entry.weight().dtype} has no compressed form"
    return None
