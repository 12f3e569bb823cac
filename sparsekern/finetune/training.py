"""SparseTrainingLinear: a layer that trains on sparse tensor cores, forward and back.

    forward       y  = x · Wᵀ        W 2:4 along in_features, the kernel of sparsekern.linear
    backward      dx = dy · W        Wᵀ 2:4 along out_features: the same kernel with Wᵀ
                  dW = (dyᵀ · x)∘M   dense, then only what M keeps

Both directions are 2:4 under a transposable mask (transposable.py). What is trained is the kept
values alone, [out_features, in_features / 2]: an optimizer has half of the work and of the memory
for them, and no step, weight decay or clipping can leave the mask. After each step the forward's
weight and the backward's are made again from the values, one kernel each, without waiting; indices
for that take 4 bytes a kept value and direction.

Where a direction is measured to be slower than a dense matmul, it is dense, and `choices` says so.

Source: Hubara et al. 2021 (arXiv:2102.08124) for transposable masks in training.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports Triton
from torch.autograd.function import once_differentiable

from sparsekern.backends import registry
from sparsekern.backends import triton as triton_kernels
from sparsekern.errors import check, message
from sparsekern.finetune.entries import stacks
from sparsekern.finetune.transposable import transposable_mask
from sparsekern.formats import dtypes
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn import replace
from sparsekern.nn.own_forward import computed_weight, lost_forward
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.nn.tied import Place, tied_places
from sparsekern.nn.wrappers import named_modules, whole
from sparsekern.ops.compress import compress
from sparsekern.ops.linear_op import autocast, linear
from sparsekern.profiling.timer import StopRule, compare
from sparsekern.utils.arguments import checked

OP = "sparsekern.finetune.SparseTrainingLinear"
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Choice:
    """How one direction runs for one number of tokens.

    direction: "forward" | "backward".      sparse: whether it runs on the 2:4 weight.
    sparse_us, dense_us: what was measured, microseconds a matmul; nan without a measurement.
    """

    direction: str
    tokens: int
    sparse: bool
    sparse_us: float = float("nan")
    dense_us: float = float("nan")

    def __str__(self) -> str:
        how = "sparse" if self.sparse else "dense"
        times = f"{self.sparse_us:.1f} us sparse, {self.dense_us:.1f} us dense"
        return f"{self.direction} of {self.tokens} tokens is {how}: {times}"


class SparseTrainingLinear(nn.Module):
    """y = x · Wᵀ + b with a transposable 2:4 weight whose kept values are trained.

    Args:
        weight: [out_features, in_features], both multiples of 4.
        mask: bool of that shape, True = kept, exactly 2 of 4 in rows and in columns of each 4 x 4
            tile; None: transposable_mask(|weight|).
        bias: [out_features] or None.
        dtype: of the matmuls, float32 | float16 | bfloat16; None: the weight's where it is of 16
            bits, else bfloat16 on a GPU and float32 on a CPU. The values keep the weight's dtype;
            .to(another) sets both.
        when: "measured" times both directions against dense matmuls when a number of tokens is
            first met on a GPU, and takes what is faster; "always" is sparse without that.
    Attributes:
        values: Parameter [out_features, in_features / 2] in ascending columns, as Sparse24's.
        metadata: buffer uint8 [out_features, ceil(in_features / 8)], row-major.
        bias: Parameter or None.
        choices: (direction, tokens) -> Choice.
    Raises:
        ValueError: shapes; a mask that is not transposable.   TypeError: dtypes.
    Notes:
        Eager only: torch.compile leaves it out of its graphs. Under autocast x is cast to the dtype
        of the matmuls. Changes of `values` are noticed by their version: after a write through
        `.data` call `refresh()`. The mask is fixed. torch refuses second derivatives.
    """

    values: nn.Parameter
    metadata: Tensor
    bias: nn.Parameter | None

    @checked("sparsekern.finetune.SparseTrainingLinear")
    def __init__(
        self,
        weight: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        when: str = "measured",
    ) -> None:
        super().__init__()
        shape = list(weight.shape)
        fits = len(shape) == 2 and shape[0] % 4 == 0 and shape[1] % 4 == 0 and weight.numel() > 0
        check(fits, OP, "weight [out, in], both multiples of 4", shape, "Leave this layer dense.")
        check(when in ("measured", "always"), OP, 'when "measured" or "always"', repr(when))
        if dtype is None:
            wide = dtypes.DEFAULT_16_BIT if weight.is_cuda else torch.float32
            dtype = weight.dtype if weight.dtype in dtypes.NATIVE else wide
        known = tuple(dtypes.PLAIN)
        check(dtype in known, OP, f"dtype in {known}", dtype, exc=TypeError)
        kept = transposable_mask(weight.detach().abs()) if mask is None else mask
        check(kept.dtype == torch.bool, OP, "mask of bool", kept.dtype, exc=TypeError)
        check(list(kept.shape) == shape, OP, f"mask {shape}", list(kept.shape))
        kept = kept.to(weight.device)
        tiles = kept.view(shape[0] // 4, 4, shape[1] // 4, 4)
        both = bool((tiles.sum(1) == 2).all() and (tiles.sum(3) == 2).all())
        remedy = "Use sparsekern.finetune.transposable_mask."
        check(both, OP, "a mask with 2 kept in rows and columns of every tile", "another", remedy)
        self.out_features, self.in_features = shape
        self.dtype, self.when = dtype, when
        self.values = nn.Parameter(weight.detach()[kept].view(shape[0], -1).clone())
        metadata = compress(kept.float(), layout="rowmajor").metadata
        self.register_buffer("metadata", metadata)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias.detach().clone())
        self.choices: dict[tuple[str, int], Choice] = {}
        self._made: _Made | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Module, mask: Tensor | None = None, **options: Any
    ) -> SparseTrainingLinear:
        """From nn.Linear or Conv1D, with copies and their requires_grad; options as for the
        class."""
        fits = isinstance(getattr(linear, "weight", None), Tensor) and replace.is_linear(linear)
        got = type(linear).__name__
        check(fits, f"{OP}.from_linear", "nn.Linear or Conv1D", got, exc=TypeError)
        reason = computed_weight(linear) or lost_forward(linear)
        expected = "a layer that computes x·Wᵀ + b alone"
        remedy = "Leave it dense."
        check(reason is None, f"{OP}.from_linear", expected, reason, remedy, TypeError)
        bias: Any = getattr(linear, "bias", None)
        made = cls(replace.dense_weight(linear), mask, bias, **options).train(linear.training)
        made.values.requires_grad_(cast(Tensor, linear.weight).requires_grad)
        if made.bias is not None:
            made.bias.requires_grad_(bias.requires_grad)
        return made

    # ------------------------------------------------------------------ what it is

    @property
    def weight(self) -> Sparse24:
        """W of the dtype of the matmuls, as the kernels read it: for code that asks a layer's
        weight for dtype, shape or device."""
        return self._ready().sparse["forward"]

    def weight24(self) -> Sparse24:
        """W as a row-major Sparse24 of the values' dtype; shares their memory."""
        shape = (self.out_features, self.in_features)
        return Sparse24(self.values.detach(), self.metadata, shape)

    def to_linear(self) -> nn.Linear:
        """A dense nn.Linear with the same weight, zeros included; new memory."""
        bias = self.bias is not None
        dense = nn.Linear(self.in_features, self.out_features, bias, device="meta")
        dense.weight = nn.Parameter(self._dense(self.values.dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    def to_sparse_linear(self, dtype: torch.dtype | None = None) -> SparseLinear:
        """The compressed layer for inference; dtype None: that of the matmuls."""
        w24 = self.weight24().to(dtype=dtype or self.dtype)
        layer = SparseLinear.from_sparse24(Sparse24(w24.values.clone(), w24.metadata, w24.shape))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(w24.values.dtype, copy=True))
        return layer.train(self.training)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{text}, bias={self.bias is not None}, dtype={self.dtype}, when={self.when!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseTrainingLinear:
        """.to() and its kin: another dtype of the values is that of the matmuls, too."""
        before = self.values.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.values.dtype != before and self.values.dtype in dtypes.PLAIN:
            self.dtype = self.values.dtype
        return self

    # ------------------------------------------------------------------ the weights of the kernels

    def refresh(self) -> None:
        """Make the kernels' weights from the values again; forward does it when they changed."""
        with torch.inference_mode(False):  # an evaluation in it comes before later steps
            if self._made is None or not self._made.fits(self):
                self._made = _Made(self)
            self._made.refresh(self.values.detach())

    def _ready(self) -> _Made:
        made = self._made
        if made is None or made.stale(self):
            self.refresh()
            made = self._made
        assert made is not None
        return made

    def _dense(self, dtype: torch.dtype) -> Tensor:
        from sparsekern.ops.compress import decompress

        return decompress(Sparse24(self.values.detach().to(dtype), self.metadata, self._shape))

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    # ------------------------------------------------------------------ forward

    @_disable_dynamo
    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] of the dtype of the matmuls."""
        if autocast(x) is not None:
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.to(self.dtype))
        remedy = f"Run it under torch.autocast, or make it with dtype={x.dtype}."
        check(x.dtype == self.dtype, OP, f"x of {self.dtype}", x.dtype, remedy, TypeError)
        got = list(x.shape)
        check(x.shape[-1] == self.in_features, OP, f"x [..., {self.in_features}]", got)
        made = self._ready()
        rows = x.reshape(-1, self.in_features)
        y: Tensor = _Product.apply(rows, self.values, self.bias, self, made)  # type: ignore[no-untyped-call, unused-ignore]
        return y.view(*x.shape[:-1], self.out_features)

    def _choose(self, direction: str, rows: Tensor, made: _Made) -> bool:
        """Whether this direction runs on the sparse weight, measured once per number of tokens."""
        key = (direction, rows.shape[0])
        known = self.choices.get(key)
        if known is not None:
            return known.sparse
        if self.when == "always" or not rows.is_cuda or rows.shape[0] == 0:
            choice = Choice(direction, rows.shape[0], True)
        elif torch.cuda.is_current_stream_capturing():
            return True  # nothing can be measured now
        else:
            w24, dense = made.sparse[direction], made.dense(self, direction)
            calls = {
                "sparse": [lambda: linear(rows, w24)],
                "dense": [lambda: nn.functional.linear(rows, dense)],
            }
            stop = StopRule(0.02, min_rounds=5, max_rounds=50, budget_s=0.5)
            with torch.no_grad():
                times = compare(calls, "events", stop, warm_s=0.02)
            sparse_us, dense_us = times["sparse"].median, times["dense"].median
            choice = Choice(direction, rows.shape[0], sparse_us < dense_us, sparse_us, dense_us)
            if not choice.sparse:
                warnings.warn(f"{OP} {self._shape}: {choice}.", UserWarning, stacklevel=4)
        self.choices[key] = choice
        made.wants_dense = made.wants_dense or not choice.sparse
        return choice.sparse


class _Made:
    """The weights that kernels read, made from values: W and Wᵀ in 2:4 form, and W dense where a
    direction wants that."""

    def __init__(self, layer: SparseTrainingLinear) -> None:
        device, dtype = layer.values.device, layer.dtype
        self.device, self.dtype = device, dtype
        self.metadata, self.metadata_version = layer.metadata, layer.metadata._version
        self.version = -1
        self.source: Tensor | None = None
        self.wants_dense = False
        self._dense: Tensor | None = None
        out_features, in_features = layer._shape
        count = layer.values.numel()
        check(count < 2**31, OP, "less than 2^31 kept values", count)
        with torch.no_grad():
            rows = Sparse24(torch.ones_like(layer.values), layer.metadata, layer._shape)
            order = torch.arange(count, dtype=torch.int32, device=device)
            forward = order.view(out_features, -1)
            # Where each kept value is in a dense matrix, and from there its place in the transpose.
            mask = _dense_of(Sparse24(rows.values.float(), layer.metadata, layer._shape)) != 0
            dense = torch.zeros(out_features, in_features, dtype=torch.int32, device=device)
            dense[mask] = order
            turned = mask.t().contiguous()
            backward = dense.t().contiguous()[turned].view(in_features, -1)
            other = compress(turned.float(), layout="rowmajor").metadata
            places = {
                "forward": (forward, layer.metadata, (out_features, in_features)),
                "backward": (backward, other, (in_features, out_features)),
            }
            self.sparse: dict[str, Sparse24] = {}
            self.index: dict[str, Tensor] = {}
            for name, (index, metadata, shape) in places.items():
                ones = Sparse24(torch.ones_like(index, dtype=dtype), metadata, shape)
                layout = registry.best_layout(ones.spec, device)
                self.index[name] = _permuted(index, metadata, shape, layout)
                # Padding holds zeros: the index says -1 there.
                packed = ones.to_layout(layout)
                tensors = {n: t.clone() for n, t in packed.tensors.items()}
                self.sparse[name] = Sparse24.from_tensors(packed.spec, tensors)

    def fits(self, layer: SparseTrainingLinear) -> bool:
        """Whether mask, device and dtype are still those of the layer."""
        same = self.metadata is layer.metadata and self.metadata_version == layer.metadata._version
        return same and self.device == layer.values.device and self.dtype == layer.dtype

    def stale(self, layer: SparseTrainingLinear) -> bool:
        values = layer.values
        same = self.source is not None and self.source.data_ptr() == values.data_ptr()
        return not same or values._version != self.version or not self.fits(layer)

    @torch.no_grad()
    def refresh(self, values: Tensor) -> None:
        for name in DIRECTIONS:
            _gather(values, self.index[name], self.sparse[name].values)
        if values.is_cuda:
            # A kernel between the writes and the linear kernels, which may read their weight while
            # the kernel queued just before them still runs (see tile64.pack).
            torch.zeros(1, device=values.device, dtype=torch.float32)
        self.source, self.version = values, values._version
        self._dense = None

    def dense(self, layer: SparseTrainingLinear, direction: str) -> Tensor:
        """W, or Wᵀ for "backward", as F.linear takes it."""
        if self._dense is None:
            self._dense = layer._dense(self.dtype)
        return self._dense if direction == "forward" else self._dense.t()


def _dense_of(w24: Sparse24) -> Tensor:
    from sparsekern.ops.compress import decompress

    return decompress(w24)


def _permuted(index: Tensor, metadata: Tensor, shape: tuple[int, int], layout: str) -> Tensor:
    """int32 `index` in the order in which the layout holds values, -1 where it pads them.

    Layouts permute values whatever they mean: each half of a number goes through as 16 bits.
    """
    stored = dtypes.DEFAULT_16_BIT
    halves = (index + 1).view(torch.int16).view(*index.shape, 2)
    moved = [
        Sparse24(half.contiguous().view(stored), metadata, shape).to_layout(layout).values
        for half in halves.unbind(-1)
    ]
    bits = torch.stack([half.contiguous().view(torch.int16) for half in moved], dim=-1)
    found: Tensor = bits.view(torch.int32).squeeze(-1) - 1
    whole = found[found >= 0].sort().values
    complete = torch.equal(whole, torch.arange(index.numel(), device=whole.device).int())
    if not complete:
        expected = "a layout that permutes values"
        raise NotImplementedError(message(OP, expected, layout, "Unregister its backend."))
    return found


@torch.no_grad()
def _gather(values: Tensor, index: Tensor, out: Tensor) -> None:
    """out = values[index] in out's dtype, in place, 0 where the index is -1."""
    if values.is_cuda and triton_kernels.available():
        from sparsekern.backends.triton import training

        training.gather(values, index, out)
        return
    found = values.flatten()[index.flatten().clamp(min=0).long()].to(out.dtype)
    out.copy_(found.masked_fill_(index.flatten() < 0, 0).view(out.shape))


def _kept(dense: Tensor, metadata: Tensor, dtype: torch.dtype) -> Tensor:
    """dense [out, in] at the places of row-major metadata, [out, in / 2] of a dtype."""
    if dense.is_cuda and triton_kernels.available():
        from sparsekern.backends.triton import training

        return training.kept(dense.contiguous(), metadata, dtype)
    from sparsekern.finetune.lora import _columns

    return dense.gather(1, _columns(metadata, dense.shape[1] // 4)).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        layer: SparseTrainingLinear,
        made: _Made,
    ) -> Tensor:
        low = None if bias is None else bias.detach().to(layer.dtype)
        x = x.contiguous()
        if layer._choose("forward", x, made):
            y = linear(x, made.sparse["forward"], low)
        else:
            y = nn.functional.linear(x, made.dense(layer, "forward"), low)
        ctx.save_for_backward(x)
        ctx.layer, ctx.made, ctx.version = layer, made, values._version
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), layer, made = ctx.saved_tensors, ctx.layer, ctx.made
        grad = grads[0].contiguous()
        same = ctx.version == layer.values._version
        remedy = "Call backward before the optimizer's step."
        check(same, OP, "values as in forward", "values that were changed", remedy, RuntimeError)
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            if layer._choose("backward", grad, made):
                grad_x = linear(grad, made.sparse["backward"])
            else:
                grad_x = nn.functional.linear(grad, made.dense(layer, "backward"))
        if ctx.needs_input_grad[1]:
            grad_values = _kept(grad.t() @ x, layer.metadata, layer.values.dtype)
        if layer.bias is not None and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(layer.bias.dtype)
        return grad_x, grad_values, grad_bias, None, None


# ---------------------------------------------------------------------- whole models


@checked("sparsekern.finetune.sparse_training")
@torch.inference_mode(False)  # whose tensors could not be trained
def sparse_training(
    model: nn.Module, masks: Mapping[str, Tensor] | None = None, **options: Any
) -> list[str]:
    """Replace Linear layers of a model by SparseTrainingLinear, in place.

    Args:
        model: any nn.Module; make the optimizer afterwards.
        masks: layer name -> transposable mask. None: transposable_mask(|weight|) for every Linear
            whose sizes are multiples of 4 and whose weight is a Parameter of its own.
        options: dtype and when, as for SparseTrainingLinear.
    Returns:
        Names of the layers.
    Raises:
        ValueError: a name that is no Linear; no layer that fits; a mask that is not transposable;
            masks of a layer whose weight or bias another module shares, or whose weight is
            computed (weight_norm), no floating point, or on meta.
    Warns:
        UserWarning: Linears and experts that are left dense, with the reason.
    """
    from sparsekern.oneshot.devices import check_data
    from sparsekern.oneshot.discovery import Places

    op = "sparsekern.finetune.sparse_training"
    inner = whole(op, model)
    check_data(op, inner)
    modules = dict(named_modules(inner))
    tied, places = tied_places(inner), Places(inner)
    why = {name: _why_dense(m, tied) for name, m in modules.items() if replace.is_linear(m)}
    other = {name: places.why_no_other(modules[name]) for name, reason in why.items() if not reason}
    if masks is None:
        found = {n: w or other[n] or _why_no_tiles(modules[n]) for n, w in why.items()}
        found |= dict.fromkeys(stacks(inner), "experts in one Parameter: train them with Masked")
        left = [f"{name} ({reason})" for name, reason in found.items() if reason]
        if left:
            warnings.warn(f"{op}: left dense: {', '.join(left)}.", UserWarning, stacklevel=3)
        names = [name for name, reason in found.items() if not reason]
    else:
        names = list(masks)
        for name in names:
            fits = name in modules and replace.is_linear(modules[name])
            check(fits, op, f"a Linear named {name!r}", "none")
            expected, remedy = f"{name} to have a weight of its own", "Leave it out of masks=."
            check(not why[name], op, expected, why[name], remedy)
            expected = f"a layer that may be replaced, {name}"
            check(not other[name], op, expected, other[name], remedy)
    remedy = "Masked trains layers of any size; decompress_model makes a SparseLinear dense."
    done = sum(isinstance(module, SparseTrainingLinear) for module in modules.values())
    got = f"none, and {done} SparseTrainingLinear" if done else "none"
    check(names, op, "a model with Linear layers whose sizes are multiples of 4", got, remedy)
    for name in names:
        mask = None if masks is None else masks[name]
        layer = SparseTrainingLinear.from_linear(modules[name], mask, **options)
        replace.replace_module(model, modules[name], layer)
    return names


@checked("sparsekern.finetune.finish_training")
@torch.inference_mode(False)  # whose tensors could not be trained
def finish_training(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Replace every SparseTrainingLinear by a SparseLinear of its weight, in place; their names."""
    found = [(n, m) for n, m in named_modules(model) if isinstance(m, SparseTrainingLinear)]
    for _, module in found:
        replace.replace_module(model, module, module.to_sparse_linear(dtype))
    return [name for name, _ in found]


def _why_dense(module: nn.Module, tied: Mapping[tuple[int, str], list[Place]]) -> str | None:
    for key in ("weight", "bias"):
        if partners := tied.get((id(module), key)):
            return f"{key} tied to {partners[0].name}"
    weight = replace.dense_weight(module)
    if weight.is_meta or not weight.is_floating_point():
        return "weight is on meta" if weight.is_meta else f"weight is of {weight.dtype}"
    return computed_weight(module)


def _why_no_tiles(module: nn.Module) -> str | None:
    rows, columns = replace.dense_weight(module).shape
    whole = rows % 4 == 0 and columns % 4 == 0
    return None if whole else f"{rows}x{columns} is no multiple of 4"
