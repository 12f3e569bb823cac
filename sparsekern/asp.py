"""ASP: the calls of NVIDIA's apex.contrib.sparsity, so that a script changes one import.

    from sparsekern.asp import ASP

    ASP.prune_trained_model(model, optimizer)            # or, call by call:
    ASP.init_model_for_pruning(model, mask_calculator="m4n2_1d", ...)
    ASP.init_optimizer_for_pruning(optimizer)
    ASP.compute_sparse_masks()

Names, arguments, defaults, masks and the buffers in a state_dict (`__weight_mma_mask`,
`__weight_mma_pruned_p`) are those of ASP, so checkpoints go both ways. What differs, and why:

    one model a process      any number; calls without model= mean the model initialised last, and
                             init_optimizer_for_pruning finds all that the optimizer trains
    optimizer.step patched   hooks that torch provides (finetune.Masked); moments are masked, too
    .cuda() in restore       the weight's own device, whatever it is
    bfloat16 of any size     the size rule (dim 0 % 8, dim 1 % 16) covers it like the other dtypes
    m8n4_1d_pairs            added: of each four consecutive pairs the two with the largest sums of
                             |w|, in float64 (4:8 in pairs)
    m4n2_2d_best             works (there it raises TypeError)
    m4n2_2d_greedy           tiles that greedy cannot fill take the best pattern (there groups keep
                             fewer than 2, and is_sparsity_enabled then fails)
    allow_permutation        not applied: a warning says so. ASP permutes input channels after
                             tracing the model with torch.fx, which current Transformers models do
                             not survive; there, too, pruning then goes on without it
    a head tied to its       left dense with a warning, unless custom_layer_dict lists Embedding,
    embedding                too (there both are pruned); tied layers get one mask
    Conv1D of GPT-2          in custom_layer_dict: along in_features, its dimension 0 (there 1)
    frozen, computed, peft   left dense with a warning (there in silence; adapters pruned)
    already_init_asp_model   True or False at any verbosity (there None below 3)
    whitelist                never changed in place; subclasses of a listed type count as the type
    assert                   ValueError or RuntimeError with a text that names the remedy

Convolutions are pruned along the input channels, as ASP does; `finetune.Masked.compress`, reached
as `ASP.masked(model).compress()`, turns Linear layers into SparseLinear and says that the others
stay dense: there is no sparse convolution here.

Source: NVIDIA/apex, apex/contrib/sparsity, README and behaviour at 6424da3; Mishra et al. 2021
(arXiv:2104.08378).
"""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.errors import check, message
from sparsekern.finetune.entries import Entry
from sparsekern.finetune.masked import Masked
from sparsekern.finetune.schedule import Frozen, grouped
from sparsekern.finetune.tensors import unwrap_optimizer
from sparsekern.finetune.transposable import transposable_mask
from sparsekern.nn.replace import is_conv1d
from sparsekern.nn.tied import tied_outside
from sparsekern.nn.wrappers import named_modules, unwrapped
from sparsekern.oneshot.discovery import adapter_parts
from sparsekern.prune.masks import nm_mask
from sparsekern.utils.arguments import checked, shown

OP = "sparsekern.asp.ASP"
MULTIPLE = (8, 16)  # of dimensions 0 and 1, or a weight is left alone

# Kept columns of the six patterns in the order in which ASP's argmax meets them: that of a CPython
# set of the permutations of (1, 1, 0, 0) as floats. Of equal sums the first of these is taken.
PATTERN_ORDER = ((1, 3), (0, 1), (1, 2), (0, 2), (0, 3), (2, 3))

PARAMETERS: dict[type[nn.Module], list[str]] = {
    nn.Linear: ["weight"],
    nn.Conv1d: ["weight"],
    nn.Conv2d: ["weight"],
    nn.Conv3d: ["weight"],
    nn.MultiheadAttention: ["q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_weight"],
}


def m4n2_1d(matrix: Tensor) -> Tensor:
    """Of each 4 columns the pair with the largest float32 sum |w_i| + |w_j|, ASP's rule.

    Args:
        matrix: [rows, columns], columns a multiple of 4.
    Returns:
        bool of its shape. Sums that are equal after rounding to float32 go to the first pair in
        PATTERN_ORDER, so that a group may keep another pair than its two largest.
    """
    groups = matrix.detach().float().abs().reshape(-1, 4)
    sums = torch.stack([groups[:, i] + groups[:, j] for i, j in PATTERN_ORDER], dim=1)
    table = torch.zeros(len(PATTERN_ORDER), 4, dtype=torch.bool, device="cpu")
    for row, pair in enumerate(PATTERN_ORDER):
        table[row, list(pair)] = True
    return table.to(matrix.device)[sums.argmax(dim=1)].view(matrix.shape)


CALCULATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "m4n2_1d": m4n2_1d,
    "m8n4_1d_pairs": lambda w: nm_mask(w.detach().float().abs(), 4, 8, 2),
    "m4n2_2d_best": lambda w: transposable_mask(w.detach().float().abs(), "best"),
    "m4n2_2d_greedy": lambda w: transposable_mask(w.detach().float().abs(), "greedy"),
}


def create_mask(tensor: Tensor, pattern: str = "m4n2_1d") -> Tensor:
    """A bool mask of the tensor's shape, True = kept, along dimension 1 (input channels).

    Args:
        tensor: [K], [K, C], [K, C, R], [K, C, R, S] or [K, C, R, S, T]; a vector is one row.
        pattern: "m4n2_1d" | "m8n4_1d_pairs" | "m4n2_2d_best" | "m4n2_2d_greedy".
    Raises:
        ValueError: another pattern, or a size that the pattern does not divide.
    """
    op = "sparsekern.asp.create_mask"
    check(pattern in CALCULATORS, op, f"a pattern in {sorted(CALCULATORS)}", repr(pattern))
    check(tensor.dim() >= 1, op, "a tensor of 1 to 5 dimensions", list(tensor.shape))
    calculate = CALCULATORS[pattern]
    if tensor.dim() == 1:
        return create_mask(tensor.unsqueeze(0), pattern).squeeze(0)
    # Dimension 1 last; rows in the order that ASP has: [K, R] for one, [R, S, K] for more of them.
    dims = list(range(tensor.dim()))
    kernel = dims[2:]
    order = [0, *kernel, 1] if len(kernel) < 2 else [*kernel, 0, 1]
    moved = tensor.permute(order).contiguous()
    remedy = "Leave this layer out: disallowed_layer_names."
    width = 8 if pattern == "m8n4_1d_pairs" else 4
    expected = f"dimension 1 % {width} == 0"
    check(moved.shape[-1] % width == 0, op, expected, list(tensor.shape), remedy)
    mask = calculate(moved.reshape(-1, moved.shape[-1])).view(moved.shape)
    inverse = [order.index(dim) for dim in dims]
    return mask.permute(inverse).contiguous()


@dataclass
class _State:
    """What ASP knows of one model."""

    masked: Masked
    calculate: Callable[[Tensor], Tensor]
    verbosity: int
    recompute: bool
    permutation: bool


class ASP:
    """Automatic sparsity for 2:4, see the module. Every call takes model= to name the model; None
    is the one that was initialised last."""

    _states: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
    _last: weakref.ref[nn.Module] | None = None
    _permutation_params: dict[str, Any] = {}

    @classmethod
    @checked("sparsekern.asp.ASP.init_model_for_pruning")
    def init_model_for_pruning(
        cls,
        model: nn.Module,
        mask_calculator: str | Callable[[Tensor], Tensor] = "m4n2_1d",
        verbosity: int = 3,
        whitelist: Iterable[type[nn.Module]] = (
            nn.Linear,
            nn.Conv1d,
            nn.Conv2d,
            nn.Conv3d,
            nn.MultiheadAttention,
        ),
        allowed_layer_names: Iterable[str] | None = None,
        disallowed_layer_names: Iterable[str] = (),
        allow_recompute_mask: bool = False,
        custom_layer_dict: dict[type[nn.Module], list[str]] | None = None,
        allow_permutation: bool = True,
    ) -> None:
        """Find the weights to prune and register their mask buffers, all True: nothing is pruned
        before compute_sparse_masks.

        Args:
            model: any module; wrappers (DDP) are looked through.
            mask_calculator: "m4n2_1d" | "m8n4_1d_pairs" | "m4n2_2d_best" | "m4n2_2d_greedy", or
                a function of the weight that returns a bool mask of its shape, True = kept.
            verbosity: 0 errors, 1 warnings, 2 info, 3 debug (printed, as ASP does).
            whitelist: module types to prune; each must be known (PARAMETERS) or in
                custom_layer_dict.
            allowed_layer_names: if not None, only these.    disallowed_layer_names: never these.
            allow_recompute_mask: keep pruned values in host memory, so that masks can be computed
                again and weights restored.
            custom_layer_dict: {module type: names of its parameters} beyond the known ones.
            allow_permutation: see the module: True warns that no permutation is applied.
        Raises:
            ValueError: this model, or another that has a weight of it, was initialised already; an
                unknown pattern, type or parameter.   TypeError: arguments of another kind.
        Warns:
            UserWarning: a name that no layer has; weights that stay dense because they are shared
                with what is not to be pruned (a head with its embedding), frozen, of an adapter
                (peft), or computed in every forward (weight_norm).
        """
        op = f"{OP}.init_model_for_pruning"
        inner = unwrapped(model)
        known = inner not in cls._states
        check(
            known, op, "a model that is not initialised yet", type(inner).__name__, "Call it once."
        )
        calculate = _calculator(op, mask_calculator)
        custom = custom_layer_dict or {}
        table = {**PARAMETERS, **custom}
        kinds = (*whitelist, *custom)
        for kind in kinds:
            remedy = "Name its parameters in custom_layer_dict."
            known = isinstance(kind, type) and _row(table, kind) is not None
            check(known, op, "known types in whitelist", repr(kind), remedy)
        for kind, keys in custom.items():
            listed = isinstance(keys, (list, tuple))
            expected = f"custom_layer_dict[{kind.__name__}], a list of names"
            check(listed, op, expected, repr(keys), 'For example ["weight"].', TypeError)
        allowed = None if allowed_layer_names is None else frozenset(allowed_layer_names)
        disallowed = frozenset(disallowed_layer_names)
        names: dict[int, set[str]] = defaultdict(set)  # of each module, all
        for name, module in named_modules(inner, every=True):
            names[id(module)].add(name)
        unknown = sorted(disallowed.union(allowed or ()).difference(*names.values()))
        if unknown:
            text = f"{op}: expected names of layers, got {unknown[:4]}, which no layer has. "
            text += "Names are those of model.named_modules(), without the wrapper's prefix."
            warnings.warn(text, UserWarning, stacklevel=3)
        held = {
            (id(entry.module), entry.key)
            for state in cls._states.values()
            for entry in state.masked.entries
        }
        if allow_permutation and verbosity >= 1:
            text = (
                f"{op}: allow_permutation=True, but input channels are not permuted here; masks "
                "are those of ASP without permutation. Pass allow_permutation=False to say so."
            )
            warnings.warn(text, UserWarning, stacklevel=3)
        found: list[tuple[str, nn.Module, str, nn.Parameter]] = []
        adapters = adapter_parts(inner)
        left: dict[str, list[str]] = defaultdict(list)  # reason: weights that stay dense for it
        for name, module in named_modules(inner):
            if not isinstance(module, kinds) or names[id(module)] & disallowed:
                continue
            if allowed is not None and not names[id(module)] & allowed:
                continue
            chosen = _row(table, type(module)) or []
            if isinstance(module, tuple(custom)):
                missing = sorted(set(chosen) - set(module._parameters))
                expected = f"parameters of {type(module).__name__} in custom_layer_dict"
                remedy = f"It has {sorted(module._parameters)}."
                check(not missing, op, expected, missing, remedy)
            for key in sorted(set(chosen) - set(module._parameters)):
                if isinstance(getattr(module, key, None), Tensor):
                    left["computed in every forward"].append(f"{name}.{key}".lstrip("."))
            for key, parameter in module.named_parameters(recurse=False):
                path = f"{name}.{key}".lstrip(".")
                label = f"{name}::{key} of size={list(parameter.shape)}, {parameter.dtype}"
                if key not in chosen or not parameter.requires_grad:
                    _say(verbosity, 3, f"Not sparsifying {label}")
                    if key in chosen:
                        left["frozen (requires_grad=False)"].append(path)
                    continue
                if name in adapters:
                    left["part of an adapter"].append(path)
                    continue
                shape = grouped(parameter, _turned(module, key)).shape
                if parameter.dim() < 2 or any(shape[i] % size for i, size in enumerate(MULTIPLE)):
                    _say(verbosity, 0, f"Auto skipping pruning {label}")
                    continue
                remedy = "ASP.forget(that model), or prune it alone."
                free = (id(module), key) not in held
                check(free, op, f"{name} in one model", "another one that is initialised", remedy)
                remedy = "Load the model first."
                check(not parameter.is_meta, op, f"{path} in memory", "a meta tensor", remedy)
                _say(verbosity, 3, f"Sparsifying {label}")
                found.append((name, module, key, parameter))
        outside = tied_outside(inner, [(module, key) for _, module, key, _ in found])
        for name, module, key, _ in found:
            if (partner := outside.get((id(module), key))) is not None:
                left["shared with what is not pruned as one with it"].append(
                    f"{name}.{key} = {partner}"
                )
        remedy = "Look at whitelist, the layer names, and the size rule."
        if outside:
            remedy = (
                "To prune one with all who share it, let the names and types take in each, an "
                'Embedding by custom_layer_dict={nn.Embedding: ["weight"]}.'
            )
            found = [one for one in found if (id(one[1]), one[2]) not in outside]
        dense = "; ".join(
            f"{len(paths)} {reason}: {', '.join(paths[:4])}{', ...' * (len(paths) > 4)}"
            for reason, paths in left.items()
        )
        got = f"none in {type(inner).__name__}"
        check(found, op, "a weight to prune", f"{got} ({dense})" if dense else got, remedy)
        if dense:
            text = f"{op}: left dense: {dense}. {remedy if outside else ''}"
            warnings.warn(text.rstrip(), UserWarning, stacklevel=3)
        masks, buffers = {}, {}
        for name, module, key, parameter in found:
            ones = torch.ones_like(parameter, dtype=torch.bool)
            module.register_buffer(f"__{key}_mma_mask", ones)
            if allow_recompute_mask:
                zeros = torch.zeros_like(parameter.detach(), device="cpu")
                module.register_buffer(f"__{key}_mma_pruned_p", zeros)
            path = f"{name}.{key}".lstrip(".")
            masks[path], buffers[path] = ones, f"__{key}_mma_mask"
        masked = _AspMasked(inner, masks, buffers)
        state = _State(masked, calculate, verbosity, allow_recompute_mask, allow_permutation)
        cls._states[inner] = state
        cls._last = weakref.ref(inner)

    @classmethod
    def already_init_asp_model(cls, model: nn.Module | None = None) -> bool:
        """Whether the model (None: any that is alive) was initialised."""
        return bool(cls._states) if model is None else unwrapped(model) in cls._states

    @classmethod
    def init_optimizer_for_pruning(
        cls, optimizer: Optimizer, model: nn.Module | None = None
    ) -> None:
        """Make the optimizer's steps keep the masks of the model, or models, that it trains.

        Raises:
            ValueError: no initialised model has a parameter in it, or it was given before.
        """
        op = f"{OP}.init_optimizer_for_pruning"
        inner = _optimizer(op, optimizer)
        if model is not None:
            cls._state(model, op).masked.attach(optimizer)
            return
        owned = {id(p) for group in inner.param_groups for p in group["params"]}
        found = [
            state.masked
            for state in cls._states.values()
            if any(id(entry.parameter) in owned for entry in state.masked.entries)
        ]
        remedy = "Call init_model_for_pruning first, with the model that it trains."
        check(found, op, "an optimizer of an initialised model", "another", remedy)
        new = [one for one in found if all(inner is not known for known, _ in one._optimizers)]
        for masked in new or found:
            masked.attach(optimizer)

    @classmethod
    @torch.no_grad()
    def compute_sparse_masks(cls, model: nn.Module | None = None) -> None:
        """Compute the masks from the weights and enable sparsity: pruned weights become zero.

        When masks were computed before, dense weights are restored first.

        Raises:
            ValueError: that was not allowed (allow_recompute_mask=False).
        """
        op = f"{OP}.compute_sparse_masks"
        state = cls._state(model, op)
        if any(not bool(_buffer(entry).all()) for entry in state.masked.entries):
            cls.restore_pruned_weights(model)
        computed: dict[int, Tensor] = {}  # by Parameter, which several modules may share
        for entry in state.masked.entries:
            weight, mask = grouped(entry.weight(), entry.transposed), _buffer(entry)
            key = id(entry.parameter)
            if key not in computed:
                computed[key] = state.calculate(weight)
            found = computed[key]
            good = isinstance(found, Tensor) and found.dtype == torch.bool
            good = good and found.shape == weight.shape
            expected = f"a bool mask {list(weight.shape)} from mask_calculator"
            remedy = "Return True where a weight is kept: mask.bool()."
            check(good, op, expected, shown(found), remedy)
            mask.copy_(grouped(found, entry.transposed))
            if state.recompute:
                held = entry.module._buffers[_held_name(entry)]
                assert held is not None
                held.copy_(torch.where(mask, 0, entry.weight()))
            share = 100.0 * float((~mask).sum()) / mask.numel()
            text = f"Enabled {share:.2f}% sparsity for {entry.name} of size={list(weight.shape)}"
            _say(state.verbosity, 2, f"{text}, {weight.dtype}")
        state.masked.enable()

    @classmethod
    @torch.no_grad()
    def restore_pruned_weights(cls, model: nn.Module | None = None) -> None:
        """Bring pruned weights back and disable sparsity; needs allow_recompute_mask=True."""
        op = f"{OP}.restore_pruned_weights"
        state = cls._state(model, op)
        for entry in state.masked.entries:
            mask, weight = _buffer(entry), entry.weight()
            if bool(mask.all()):
                continue
            remedy = "Call init_model_for_pruning with allow_recompute_mask=True."
            check(state.recompute, op, "pruned values that were kept", "none", remedy)
            held = entry.module._buffers[_held_name(entry)]
            assert held is not None
            weight.copy_(torch.where(mask, weight, held.to(weight.device)))
            mask.fill_(True)
            held.zero_()
            _say(state.verbosity, 2, f"Disabled sparsity for {entry.name}, dense weights restored")

    @classmethod
    def is_sparsity_enabled(cls, model: nn.Module | None = None) -> bool:
        """True when every mask keeps half, False when every mask keeps all.

        Raises:
            RuntimeError: neither.
        """
        op = f"{OP}.is_sparsity_enabled"
        masks = [_buffer(entry) for entry in cls._state(model, op).masked.entries]
        kept = [2 * int(mask.sum()) for mask in masks]
        half = sum(k == mask.numel() for k, mask in zip(kept, masks))
        whole = sum(k == 2 * mask.numel() for k, mask in zip(kept, masks))
        if len(masks) not in (half, whole):
            got = f"{half} half and {whole} whole of {len(masks)}"
            remedy = "Call compute_sparse_masks."
            raise RuntimeError(message(op, "all masks half or all whole", got, remedy))
        return half == len(masks)

    @classmethod
    def prune_trained_model(cls, model: nn.Module, optimizer: Optimizer) -> None:
        """Initialise model and optimizer with ASP's recipe and compute the masks, once. A model is
        as it was where the optimizer does not fit."""
        _optimizer(f"{OP}.prune_trained_model", optimizer)
        cls.init_model_for_pruning(
            model,
            mask_calculator="m4n2_1d",
            verbosity=2,
            whitelist=[nn.Linear, nn.Conv2d, nn.MultiheadAttention],
            allow_recompute_mask=False,
        )
        try:
            cls.init_optimizer_for_pruning(optimizer, model)
        except ValueError:
            cls.forget(model)
            raise
        cls.compute_sparse_masks(model)

    @classmethod
    def set_permutation_saving_params(
        cls,
        allow_permutation: bool = True,
        save_permutation_graph: bool = False,
        permutation_output_dir: str = ".",
    ) -> None:
        """Accepted for scripts that call it; there is no permutation here, so nothing is saved."""
        if allow_permutation or save_permutation_graph:
            op = f"{OP}.set_permutation_saving_params"
            text = f"{op}: input channels are not permuted here, so no graph is saved."
            warnings.warn(text, UserWarning, stacklevel=2)

    # ------------------------------------------------------------------ beyond ASP

    @classmethod
    def masked(cls, model: nn.Module | None = None) -> Masked:
        """The finetune.Masked behind a model: `.check()`, `.compress()`, `.detach()`."""
        return cls._state(model, f"{OP}.masked").masked

    @classmethod
    def forget(cls, model: nn.Module | None = None) -> None:
        """Remove hooks and buffers; the weights stay as they are."""
        state = cls._state(model, f"{OP}.forget")
        owner = state.masked.model
        state.masked.detach()
        for entry in state.masked.entries:
            for name in (entry.buffer, _held_name(entry)):
                if name is not None and name in entry.module._buffers:
                    delattr(entry.module, name)
        del cls._states[owner]

    @classmethod
    def _state(cls, model: nn.Module | None, op: str) -> _State:
        chosen = unwrapped(model) if model is not None else (cls._last() if cls._last else None)
        remedy = "Call init_model_for_pruning first."
        known = chosen is not None and chosen in cls._states
        got = "another" if chosen is not None else "none"
        if not known or chosen is None:
            raise RuntimeError(message(op, "an initialised model", got, remedy))
        return cls._states[chosen]


class _AspMasked(Masked):
    """Masked whose masks are the modules' own buffers, whole until they are computed."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], buffers: dict[str, str]) -> None:
        self._buffers = buffers
        super().__init__(model, masks, schedule=Frozen())

    def _merged(self, entries: list[Entry]) -> list[Entry]:
        return entries  # each module has buffers of its own, with equal masks

    def _fill(self, entry: Entry, mask: Tensor) -> None:
        entry.buffer = self._buffers[entry.name]
        entry.transposed = _turned(entry.module, entry.key)
        entry.linear = entry.parameter.dim() == 2

    def check(self) -> int:
        """Weights outside their mask that are not zero."""
        return sum(int((entry.weight().ne(0) & entry.drop()).sum()) for entry in self.entries)


def _calculator(
    op: str, mask_calculator: str | Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    if callable(mask_calculator):
        return mask_calculator
    known = f"mask_calculator in {sorted(CALCULATORS)} or a function"
    check(mask_calculator in CALCULATORS, op, known, repr(mask_calculator))
    pattern = mask_calculator
    return lambda weight: create_mask(weight, pattern)


def _optimizer(op: str, optimizer: Any) -> Optimizer:
    """The torch optimizer that is meant, TypeError for none."""
    inner = unwrap_optimizer(optimizer)
    good, remedy = isinstance(inner, Optimizer), "Pass one of torch.optim."
    check(good, op, "optimizer: a torch optimizer", shown(optimizer), remedy, TypeError)
    return inner  # type: ignore[no-any-return]


def _row(table: dict[type[nn.Module], list[str]], kind: type) -> list[str] | None:
    """The parameters of a module type: those of the nearest class above it that is listed."""
    for base in kind.__mro__:
        if base in table:
            return table[base]
    return None


def _turned(module: nn.Module, key: str) -> bool:
    """Whether this is a weight [in_features, out_features]."""
    return key == "weight" and is_conv1d(module)


def _buffer(entry: Entry) -> Tensor:
    assert entry.buffer is not None
    mask = entry.module._buffers[entry.buffer]
    assert mask is not None
    return mask


def _held_name(entry: Entry) -> str:
    return f"__{entry.key}_mma_pruned_p"


def _say(verbosity: int, level: int, text: str) -> None:
    if verbosity >= level:
        print(f"[ASP] {text}")
