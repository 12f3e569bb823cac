"""Masked: training that keeps 2:4, for any model, optimizer and way of running them.

    before optimizer.step    gradients outside the mask become zero
    after  optimizer.step    weights outside the mask become zero

Weights stay the ordinary Parameters that they were, and the masks stay outside the module tree, in
this object: so no optimizer, autocast, torch.compile, checkpoint format, DDP or FSDP2 has to know
about them, no state_dict gains keys, an average of weights (EMA) does not average masks, and a cast
of the model cannot touch them. Weight decay, momentum and clipping cannot move a dropped weight,
because what an optimizer keeps for it is zero from the first step on. The masks have a state of
their own (`state_dict`, one bit a weight).

With a moving schedule (schedule.py) that trains dropped weights straight-through, a dropped weight
lives in a `residue` beside the parameter; the parameter holds M·w whenever forward can see it.

Source: Mishra et al. 2021 (arXiv:2104.08378) for the recipe; Zhou et al. 2021 (arXiv:2102.04010).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.errors import FormatError, check, message
from sparsekern.finetune.entries import (
    OP,
    Entry,
    check_whole,
    checked_drop,
    find,
    groups_whole,
    kept,
    merged,
    stacks,
    why_dense,
)
from sparsekern.finetune.schedule import Frozen, Schedule, grouped, make
from sparsekern.finetune.tensors import (
    local,
    pack_bits,
    shard,
    unpack_bits,
    unshard,
    unwrap_optimizer,
)
from sparsekern.nn import replace
from sparsekern.nn.sparse_experts import unfuse_experts
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.nn.tied import tied_places
from sparsekern.nn.wrappers import is_dtensor, named_modules, unwrapped
from sparsekern.oneshot import discovery
from sparsekern.oneshot.experts import put_together
from sparsekern.oneshot.report import PruneReport
from sparsekern.prune.pattern import Pattern
from sparsekern.utils.arguments import Given, Uses, checked, shown

VERSION = 1


def _keeps(given: Given) -> bool:
    schedule = given["schedule"]
    return given["keep_dense"] or (schedule is not None and schedule.trains_dropped(1))


USES: Uses = {"dense_device": ("keep_dense=True or a schedule that trains dropped weights", _keeps)}


class Masked:
    """Keeps chosen weights of a model at zero while it is trained.

    Args:
        model: any nn.Module, alone or already wrapped (DDP, torch.compile, AveragedModel).
        masks: layer name -> bool [out_features, in_features], True = kept; or the name of a
            Parameter of any shape -> bool of its shape (of experts in a 3-D Parameter: [experts,
            out_features, in_features]). None: every Linear, and every such Parameter of experts,
            that is n:m sparse already, and not all zero, gets the mask that its zeros imply
            (`zeros_mask`), as after prune_model(..., compress=False).
        pattern: (n, m), "n:m" or "4:8 in pairs", checked on every Linear's mask: at most n of m
            kept, pairs whole.
        schedule: how masks move, see schedule.py; None: they do not.
        keep_dense: keep the values that the masks drop, so that `restore` can bring them back.
        dense_device: where those are kept; None: on the weight's device.
    Raises:
        ValueError: a mask that names nothing or does not fit; a weight that is masked under some
            of its names alone; no layer that is sparse.   TypeError: a mask that is not bool.
    Notes:
        A Parameter that several modules share (a head and its embedding, two tied Linears) is
        masked as one when masks has the same mask under each of its names, or, with None, when all
        of them are Linears. It stays tied, so `compress` leaves it dense.
        Dropped weights become zero at once. Any number of these may live in a process, one per
        weight. The model is held weakly. Deterministic: every process of a DDP or FSDP2 run moves
        its masks alike. It is part of its model and optimizers, so that copies and pickles of it
        are refused: state_dict() is what to keep.
    """

    @checked("sparsekern.finetune.Masked", leave=("pattern",), uses=USES)
    def __init__(
        self,
        model: nn.Module,
        masks: dict[str, Tensor] | None = None,
        *,
        pattern: tuple[int, int] | str = (2, 4),
        schedule: Schedule | None = None,
        keep_dense: bool = False,
        dense_device: torch.device | str | None = None,
    ) -> None:
        inner = unwrapped(model)
        self._model = weakref.ref(inner)
        self.pattern = Pattern.of(pattern, OP)
        self.schedule = schedule or Frozen()
        self.keep_dense = keep_dense
        self.dense_device = None if dense_device is None else torch.device(dense_device)
        self.step = 0
        self.enabled = True
        self.entries: list[Entry] = []
        self._optimizers: list[tuple[Optimizer, list[Any]]] = []
        self._unmasked: set[Optimizer] = set()  # whose moments the next step masks first
        found = list(find(inner, masks, self.pattern))
        check_whole(inner, [entry for entry, _ in found])
        for entry, mask in found:
            self._fill(entry, mask)
        self.entries = self._merged([entry for entry, _ in found])
        self._apply()

    @classmethod
    @checked("sparsekern.finetune.Masked.from_report")
    def from_report(cls, model: nn.Module, report: PruneReport, **options: Any) -> Masked:
        """The masks of a model that prune_model(..., compress=False) has pruned.

        Args:
            model: the pruned model, its weights dense with zeros.
            report: what prune_model returned; layers that it skipped stay unmasked.
            options: as for Masked, without masks. pattern comes from the report.
        Raises:
            ValueError: a layer of the report is not in the model, is compressed, or not n:m; some
                experts of a mixture were pruned and others not.
        """
        op, pattern = f"{OP}.from_report", report.pattern
        inner = unwrapped(model)
        modules = dict(named_modules(inner))
        fused = stacks(inner)
        masks: dict[str, Tensor] = {}
        experts: dict[str, int] = {}
        for row in report.pruned:
            owner, _, key = row.name.rpartition(".")
            stack = f"{owner.rpartition('.')[0]}.{key}"
            if stack in fused:
                experts[stack] = experts.get(stack, 0) + 1
                continue
            module = modules.get(row.name)
            fits = module is not None and replace.is_linear(module)
            got = type(module).__name__ if module is not None else "no such layer"
            remedy = "Prune with compress=False."
            check(fits, op, f"a dense Linear named {row.name}", got, remedy)
            assert module is not None
            masks[row.name] = kept(replace.dense_weight(module), pattern)
        for name, pruned in experts.items():
            module, key, transposed = fused[name]
            rows = grouped(cast(Tensor, getattr(module, key)).detach(), transposed)
            expected = f"all {len(rows)} experts of {name} pruned"
            remedy = "Pass masks= for the weights that are to be masked."
            check(pruned == len(rows), op, expected, pruned, remedy)
            masks[name] = kept(rows, pattern)
        remedy = "Its options say which layers it skipped, and why."
        check(masks, op, "a report with pruned layers", "none", remedy)
        return cls(model, masks, pattern=pattern, **options)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        remedy = "Make Masked(copy_of_the_model, masked.masks), or keep masked.state_dict()."
        got = "a copy or pickle of the object"
        raise TypeError(message(OP, "its state_dict, which stands alone", got, remedy))

    # ------------------------------------------------------------------ what is masked

    def _merged(self, entries: list[Entry]) -> list[Entry]:
        return merged(entries)

    def _fill(self, entry: Entry, mask: Any) -> None:
        """Check a weight and its mask, and keep what the mask drops."""
        shape, m = list(entry.parameter.shape), self.pattern[1]
        moving = self.schedule.live(1)
        remedy = "Its mask cannot move: use schedule=None."
        check(entry.linear or not moving, OP, f"{entry.name} to be a matrix", shape, remedy)
        if entry.linear:
            columns = grouped(entry.parameter, entry.transposed).shape[-1]
            expected, remedy = f"{entry.name} with in_features % {m} == 0", "Leave it unmasked."
            check(columns % m == 0, OP, expected, columns, remedy)
        entry.dropped = checked_drop(OP, entry, mask, self.pattern)

    @property
    def model(self) -> nn.Module:
        """The model; RuntimeError when it no longer exists."""
        model = self._model()
        if model is None:
            raise RuntimeError(message(OP, "the model to exist", "a model that was deleted"))
        return model

    @property
    def masks(self) -> dict[str, Tensor]:
        """name -> bool, True = kept, in the shape that __init__ takes. Copies."""
        return {
            name: mask.clone() if entry.also else mask
            for entry in self.entries
            for mask in (entry.mask(),)
            for name in (entry.name, *entry.also)
        }

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        state = "on" if self.enabled else "off"
        text = f"{len(self)} weights, {self.pattern}, {self.schedule}, step {self.step}, {state}"
        return f"Masked({text})"

    # ------------------------------------------------------------------ optimizers

    def attach(self, optimizer: Optimizer) -> Optimizer:
        """Make every later step of this optimizer keep the masks.

        Args:
            optimizer: any torch.optim.Optimizer over (some of) the masked weights; one that steps
                through another (accelerate's, SAM) will do. Make it after fully_shard.
        Returns:
            What was passed.
        Raises:
            ValueError: it holds none of the masked weights, or is attached already; from a later
                step, when the model's Parameters are no longer those that it has.
        Notes:
            What it holds is asked at each step, so that add_param_group may come later.
            Steps are counted by the optimizer that was attached first. Moments that exist already
            are masked by the next step, and so are those that load_state_dict brings; those that
            are not in floating point, as in 8-bit optimizers, are left to fade.
        """
        given, optimizer = optimizer, unwrap_optimizer(optimizer)
        op = f"{OP}.attach"
        got = type(optimizer).__name__
        remedy = "Pass one torch.optim.Optimizer; attach several one by one."
        good = isinstance(optimizer, Optimizer)
        check(good, op, "optimizer: a torch optimizer", got, remedy, TypeError)
        known = any(optimizer is one for one, _ in self._optimizers)
        check(not known, op, "an optimizer that is not attached yet", got, "Attach it once.")
        self._entries_of(optimizer)
        handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._unmasked.add),
        ]
        if given is not optimizer and hasattr(given, "_optimizer_step_pre_hooks"):
            # What SAM does with gradients before the step is for the kept weights alone. A wrapper
            # without hooks (accelerate's) does nothing with them.
            handles.append(given.register_step_pre_hook(lambda *_: self.mask_gradients()))
        self._optimizers.append((optimizer, handles))
        self._unmasked.add(optimizer)
        return given

    def detach(self) -> None:
        """Remove the hooks from all optimizers: masks are kept no longer."""
        for _, handles in self._optimizers:
            for handle in handles:
                handle.remove()
        self._optimizers.clear()
        self._unmasked.clear()

    def _entries_of(self, optimizer: Optimizer) -> list[Entry]:
        """The masked weights that an optimizer trains now."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        entries = [entry for entry in self.entries if id(entry.parameter) in owned]
        expected, got = "an optimizer over the masked weights", "none of them in it"
        remedy = "Make the optimizer from the model's parameters, after fully_shard "
        remedy += "and load_state_dict(assign=True)."
        check(entries, f"{OP}.attach", expected, got, remedy)
        return entries

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of dropped weights now; `attach` does so before each step anyway.

        Call it before clip_grad_norm_, so that the norm is that of the kept weights. A schedule
        that uses the other gradients sees them first, and one that trains dropped weights keeps
        them.
        """
        if self.enabled:
            for entry in self.entries:
                self._mask_gradient(entry)

    def _mask_gradient(self, entry: Entry) -> None:
        step = self.step + 1
        grad = entry.parameter.grad
        if grad is None or self.schedule.trains_dropped(step):
            return
        grad = local(grad)
        if self.schedule.reads_gradients(step) and entry.gradient is None:
            entry.gradient = grad.abs()
        grad.masked_fill_(entry.drop(), 0)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.enabled:
            return
        step = self.step + 1
        straight = self.schedule.trains_dropped(step)
        rate = self.schedule.decay(step)
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales by itself
        entries = self._entries_of(optimizer)
        if optimizer in self._unmasked:
            self._unmasked.discard(optimizer)
            if not straight:
                self._mask_moments(optimizer, entries)
        for entry in entries:
            if not straight:
                self._mask_gradient(entry)
                continue
            weight, drop = entry.weight(), entry.drop()
            if entry.residue is None:
                entry.residue = torch.zeros_like(weight)
            residue = entry.held()
            weight.copy_(torch.where(drop, residue, weight))
            grad = entry.parameter.grad
            if rate and grad is not None:
                pull = torch.where(drop, weight, 0).to(grad.dtype) * rate
                local(grad).add_(pull if scale is None else pull * scale)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.enabled:
            return
        leader = self._optimizers[0][0] is optimizer
        found_inf = getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf)
        step = self.step + 1
        straight, moves = self.schedule.trains_dropped(step), self.schedule.moves(step)
        frozen_now = straight and not self.schedule.trains_dropped(step + 1)
        entries = self._entries_of(optimizer)
        for entry in entries:
            weight = entry.weight()
            if moves and not skipped:
                self._move(entry, weight, step)
            drop = entry.drop()
            if straight:
                residue = torch.where(drop, weight, 0)
                entry.residue = None if frozen_now and not self.keep_dense else residue
            weight.masked_fill_(drop, 0)
            entry.gradient = None
        unseen = bool(args) or kwargs.get("closure") is not None  # its gradients passed no hook
        if not straight and (moves or unseen) or frozen_now:
            self._mask_moments(optimizer, entries)
        if leader and not skipped:
            self.step = step

    def _move(self, entry: Entry, weight: Tensor, step: int) -> None:
        pattern, drop = self.pattern, entry.drop()
        self._check_aligned(entry)
        if self.schedule.reads_gradients(step) and entry.gradient is None:
            return  # no gradient this time
        gradient = None if entry.gradient is None else grouped(entry.gradient, entry.transposed)
        rows, mask = grouped(weight, entry.transposed), grouped(~drop, entry.transposed)
        if not rows.numel():
            return  # a shard without rows
        shape = rows.shape
        rows, mask = rows.flatten(0, -2), mask.flatten(0, -2)
        gradient = None if gradient is None else gradient.flatten(0, -2)
        if pattern.unit > 1:

            def norms(apart: Tensor) -> Tensor:
                norm: Tensor = apart.float().norm(dim=-1)
                return norm

            rows, mask = pattern.folded(rows, norms), pattern.folded(mask, lambda a: a.any(-1))
            gradient = None if gradient is None else pattern.folded(gradient, norms)
        chosen = self.schedule.reselect(rows, mask, gradient, step, *pattern.in_units())
        chosen = pattern.unfolded(chosen).view(shape)
        entry.set_drop((~grouped(chosen, entry.transposed)).contiguous())

    def _check_aligned(self, entry: Entry) -> None:
        """A shard that cuts groups apart would be chosen wrongly: ValueError."""
        parameter: Any = entry.parameter
        if not is_dtensor(parameter):
            return
        group_dim = parameter.dim() - (2 if entry.transposed else 1)
        m = self.pattern[1]
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements):
            if placement.is_shard(group_dim):
                chunk = -(-parameter.shape[group_dim] // size)
                remedy = "Shard the other dimension, or use masks that do not move."
                check(chunk % m == 0, OP, f"shards of {entry.name} in groups of {m}", chunk, remedy)

    @torch.no_grad()
    def _mask_moments(self, optimizer: Optimizer, entries: Iterable[Entry]) -> None:
        """Zero what the optimizer has stored elementwise, as numbers and not as codes, for dropped
        weights."""
        for entry in entries:
            parameter = entry.parameter
            for value in optimizer.state.get(parameter, {}).values():
                whole = isinstance(value, Tensor) and value.shape == parameter.shape
                if whole and value.is_floating_point():
                    local(value).masked_fill_(entry.drop(), 0)

    # ------------------------------------------------------------------ on and off

    @torch.no_grad()
    def _apply(self) -> None:
        """Drop what the masks drop, keeping its values where that was asked for."""
        for entry in self.entries:
            weight, drop = entry.weight(), entry.drop()
            if self.keep_dense or self.schedule.trains_dropped(self.step + 1):
                entry.residue = torch.where(drop, weight, 0).to(self.dense_device or weight.device)
            weight.masked_fill_(drop, 0)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the dropped values back and stop masking; `enable` starts again.

        Kept weights stay as training left them. Needs keep_dense=True, or a schedule that trains
        dropped weights.

        Raises:
            ValueError: the values were not kept.
        """
        remedy = "Pass keep_dense=True."
        for entry in self.entries:
            held = entry.residue is not None or not self.enabled
            check(held, f"{OP}.restore", f"kept values of {entry.name}", "none", remedy)
        if self.enabled:
            for entry in self.entries:
                weight = entry.weight()
                weight.copy_(torch.where(entry.drop(), entry.held(), weight))
        self.enabled = False

    @checked("sparsekern.finetune.Masked.enable")
    def enable(self, masks: dict[str, Tensor] | None = None) -> None:
        """Mask again, with the same masks or with new ones for some of the layers (of the same
        shapes as before). What is dropped now is kept for the next `restore` as keep_dense says.

        Raises:
            ValueError, TypeError: as in __init__; nothing changes.
        """
        op = f"{OP}.enable"
        by_name = {name: e for e in self.entries for name in (e.name, *e.also)}
        for name in masks or {}:
            remedy = f"Names are such as {next(iter(by_name), None)!r}."
            check(name in by_name, op, f"a masked weight named {name!r}", "none", remedy)
        made = {
            k: checked_drop(op, by_name[k], mask, self.pattern) for k, mask in (masks or {}).items()
        }
        for name, dropped in made.items():
            for other in (by_name[name].name, *by_name[name].also):
                same = torch.equal(made.get(other, dropped), dropped)
                expected = f"one mask for {name} and {other}, which share their weight"
                check(same, op, expected, "two that differ", "Pass the same mask for both.")
        for name, dropped in made.items():
            self._set_drop(by_name[name], dropped)
        self.enabled = True
        self._apply()
        self._unmasked.update(optimizer for optimizer, _ in self._optimizers)

    def _set_drop(self, entry: Entry, dropped: Tensor) -> None:
        """`dropped` as `checked_drop` returns it."""
        parameter = entry.parameter
        entry.drop()
        entry.set_drop(shard(dropped, parameter).to(local(parameter).device))

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> None:
        """Zero the dropped weights of another model of the same layers: an average (EMA) of
        weights whose masks moved is not 2:4 until then; one under fixed masks is anyway.

        Raises:
            ValueError: a layer that it has not, or of another shape; nothing changes.
        """
        op, remedy = f"{OP}.apply_to", "Pass a copy of the model that is masked."
        modules, weights = dict(named_modules(model)), []
        for entry in self.entries:
            owner = entry.name if entry.key == "weight" else entry.name.rpartition(".")[0]
            module = modules.get(owner) or modules.get(entry.name.rpartition(".")[0])
            known = module is not None and isinstance(getattr(module, entry.key, None), Tensor)
            check(known, op, f"a layer named {entry.name}", "none", remedy)
            weight, shape = local(getattr(module, entry.key).detach()), list(entry.drop().shape)
            expected = f"{entry.name} of shape {shape}"
            check(list(weight.shape) == shape, op, expected, list(weight.shape), remedy)
            weights.append(weight)
        for weight, entry in zip(weights, self.entries):
            weight.masked_fill_(entry.drop().to(weight.device), 0)

    # ------------------------------------------------------------------ checks and the end

    @torch.no_grad()
    def check(self) -> int:
        """Violations in the model: groups with a non-zero weight outside the mask, or with more
        than n non-zeros; 0 is what training keeps. Of weights that are no matrices, single weights
        are counted. Of shards, those of all processes: every process has to ask."""
        m, total = self.pattern[1], 0
        mesh: Any = None
        for entry in self.entries:
            nonzero = entry.weight() != 0
            outside = nonzero & entry.drop()
            parameter: Any = entry.parameter
            if is_dtensor(parameter):
                mesh = parameter.device_mesh
            if entry.linear and nonzero.numel() and groups_whole(entry, m):
                rows = self.pattern.broken(grouped(nonzero, entry.transposed))
                wrong = grouped(outside, entry.transposed).reshape(-1, m).any(1)
                total += int((rows | wrong).sum())
            else:
                total += int(outside.sum())
        if mesh is not None:
            count = torch.tensor(total, device=mesh.device_type)
            torch.distributed.all_reduce(count)
            total = int(count)
        return total

    @torch.inference_mode(False)  # whose tensors could not be trained
    def compress(self) -> dict[str, str]:
        """Replace every masked Linear by a SparseLinear of its weight and mask, in place, and
        masked experts by SparseExperts.

        Returns:
            name -> reason of the masked weights that stay dense with zeros (convolutions, layers
            whose module reads the weight itself); {} when all are compressed.
        Raises:
            ValueError: a sharded weight; violations; another pattern than 2:4.
        Notes:
            The hooks are removed: this is the end of training.
        """
        op, model = f"{OP}.compress", self.model
        remedy = "No kernel here runs another one: keep the dense weights with zeros."
        check(self.pattern == (2, 4), op, "pattern (2, 4)", repr(self.pattern), remedy)
        remedy = "Gather the weights first (full_tensor), then build Masked on that model."
        sharded = any(is_dtensor(entry.parameter) for entry in self.entries)
        check(not sharded, op, "whole weights", "shards of FSDP", remedy)
        remedy = "Attach the optimizer before training."
        check(not (count := self.check()), op, "no violations of 2:4", count, remedy)
        places = discovery.Places(model)
        tied = tied_places(model)
        dense: dict[str, str] = {}
        fused: list[tuple[str, str, Tensor]] = []
        for entry in self.entries:
            reason = why_dense(entry, model)
            if reason is None and (others := tied.get((id(entry.module), entry.key))):
                reason = f"weight tied to {others[0].name}"
            if reason is None and not entry.stacked:
                reason = places.why_no_other(entry.module)
            if reason:
                dense[entry.name] = reason
                continue
            mask = entry.mask()
            if entry.stacked:
                fused.append((*entry.name.rpartition(".")[::2], mask))
                continue
            replace.replace_module(
                model, entry.module, SparseLinear.from_linear(entry.module, mask)
            )
        made = unfuse_experts(model, {owner for owner, _, _ in fused})
        for owner, key, mask in fused:
            experts = made[owner][1]
            for layer, own in zip(experts.layers(key), mask):
                replace.replace_module(experts, layer, SparseLinear.from_linear(layer, own))
        put_together(model, made)
        self.detach()
        self.entries = [entry for entry in self.entries if entry.name in dense]
        return dense

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the model's and the optimizer's state.

        Returns:
            {"version", "step", "enabled", "pattern", "schedule", "shapes": name -> list,
            "masks": name -> uint8 [ceil(elements / 8)] on the CPU, bit b of byte j = element
            8j + b of the mask, "residue": name -> tensor}; torch.load(weights_only=True) reads it.
            Of shards, gathered: every process has to ask.
        """
        masks = {entry.name: entry.mask() for entry in self.entries}
        residue = {}
        for entry in self.entries:
            if entry.residue is not None:
                entry.drop()
                residue[entry.name] = unshard(entry.residue, entry.parameter).cpu()
        return {
            "version": VERSION,
            "step": self.step,
            "enabled": self.enabled,
            "pattern": self.pattern.described(),
            "schedule": self.schedule.describe(),
            "shapes": {name: list(mask.shape) for name, mask in masks.items()},
            "masks": {name: pack_bits(mask).cpu() for name, mask in masks.items()},
            "residue": residue,
        }

    @torch.no_grad()
    @checked("sparsekern.finetune.Masked.load_state_dict")
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`: load the model's and the optimizer's state as well, in any
        order. Weights outside the loaded masks become zero.

        Raises:
            FormatError: another version, other layers, or masks that do not fit; nothing changes.
        """
        op = f"{OP}.load_state_dict"

        def require(good: object, expected: str, got: object) -> None:
            check(good, op, expected, got, "The state is of another run.", FormatError)

        require(state.get("version") == VERSION, f"version {VERSION}", state.get("version"))
        kinds = {"step": int, "enabled": bool, "schedule": dict, "shapes": dict, "masks": dict}
        kinds["residue"] = dict
        keys = {*kinds, "pattern"}
        require(keys <= set(state), f"the keys {sorted(keys)}", sorted(state))
        for key, kind in kinds.items():
            right = type(state[key]) is kind
            require(right, f"{key!r}, of type {kind.__name__}", shown(state[key]))
        require(state["step"] >= 0, "step >= 0", state["step"])
        names = {entry.name for entry in self.entries}
        for key in ("shapes", "masks"):
            found = set(state[key])
            require(found == names, f"the {key} of {len(names)} weights", _differ(names, found))
        pattern, schedule = Pattern.of(state["pattern"], op), make(state["schedule"])
        loaded = {}
        for entry in self.entries:
            shape = list(
                grouped(
                    torch.empty(entry.parameter.shape, device="meta", dtype=torch.float32),
                    entry.transposed,
                ).shape
            )
            found = state["shapes"][entry.name]
            require(found == shape, f"mask {entry.name!r} of shape {shape}", found)
            packed = state["masks"][entry.name]
            bits = isinstance(packed, Tensor) and packed.dtype == torch.uint8
            require(bits, f"mask {entry.name!r} of uint8", shown(packed))
            size = -(-math.prod(shape) // 8)
            require(packed.numel() == size, f"{size} bytes of mask {entry.name!r}", packed.numel())
            mask = unpack_bits(packed, shape)
            if entry.linear and entry.buffer is None:
                most = pattern.most(mask) if shape[-1] % pattern[1] == 0 else shape[-1]
                require(most <= pattern[0], f"a {pattern} mask {entry.name!r}", f"{most} kept")
            loaded[entry.name] = ~grouped(mask, entry.transposed).contiguous()
            residue = state["residue"].get(entry.name)
            own = list(entry.parameter.shape)
            fits = residue is None or isinstance(residue, Tensor) and list(residue.shape) == own
            require(fits, f"residue {entry.name!r} of shape {own}", shown(residue))
        self.pattern, self.schedule = pattern, schedule
        self.step, self.enabled = int(state["step"]), bool(state["enabled"])
        for entry in self.entries:
            self._set_drop(entry, loaded[entry.name])
            residue = state["residue"].get(entry.name)
            weight = entry.weight()
            place = self.dense_device or weight.device
            entry.residue = None
            if residue is not None:
                entry.residue = shard(residue.to(weight.dtype), entry.parameter).to(place)
            if self.enabled:
                weight.masked_fill_(entry.drop(), 0)
        self._unmasked.update(optimizer for optimizer, _ in self._optimizers)


# ---------------------------------------------------------------------- helpers


def _differ(wanted: set[str], found: set[str]) -> str:
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    return f"{len(missing)} missing {missing[:2]}, {len(extra)} unknown {extra[:2]}"
