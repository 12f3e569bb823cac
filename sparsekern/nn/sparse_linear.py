"""SparseLinear: torch.nn.Linear with 2:4-compressed weights, and no dense copy of them.

The module owns a Sparse24 (as one buffer per tensor, so that .to(), deepcopy and pickle work as for
any module) and a bias; shapes, dtypes and backends are the business of ops/linear_op.py. What it
writes to a state_dict is the published sparse-24-bitmask form, whatever layout the buffers have on
the device (see `layout`):

    compressed   [out_features, in_features / 2]          float32 | float16 | bfloat16
    bitmask      [out_features, ceil(in_features / 8)]    uint8, bit b of byte j = column 8j + b
    shape        [2, 1]                                   int64: out_features, in_features
    bias         [out_features]                           only with a bias

A coded element type (formats/dtypes.py) adds its tensors by their names, and "storage", its name as
uint8 text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from sparsekern.backends import registry
from sparsekern.errors import FormatError, check, message
from sparsekern.formats import dtypes
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.layouts import layout as layout_named
from sparsekern.formats.sparse24 import (
    Sparse24,
    check_is_sparse24,
    for_pickle,
    from_pickle,
    verify,
)
from sparsekern.nn.own_forward import lost_forward
from sparsekern.nn.replace import dense_weight, is_linear
from sparsekern.ops import linear_op as ops
from sparsekern.ops.compress import compress
from sparsekern.utils.arguments import check_initialised, checked, shown

_OP = "sparsekern.SparseLinear"
_WEIGHT_KEYS = ("compressed", "bitmask", "shape")
_STORAGE_KEY = "storage"
_MOST = 2**40  # features, far above any and within what torch can say
_DAMAGED = "The file is damaged or of another model."
# `packed=` of earlier versions, in layouts.
_LAYOUT_OF_PACKED = {None: None, True: "tile64", False: ROWMAJOR, "cusparselt": "cusparselt"}
# What compress stores for all-zero groups: nibble 0xE (columns 2 and 3), 0x4 in the padding nibble.
_ZERO_GROUPS, _ZERO_GROUP_AND_PADDING = 0xEE, 0x4E


class SparseLinear(nn.Module):
    """y = x · Wᵀ + bias with a frozen 2:4-sparse W [out_features, in_features].

    Specification: reference.linear (float64). A new module computes zero: fill it with
    `load_state_dict` or by assigning `weight`, or build it with `from_linear` or `from_sparse24`.

    Args:
        in_features: a multiple of 4. out_features: any.
        bias: whether to add a bias; it is the only parameter, and the only one that can be trained.
        dtype: float32 | float16 | bfloat16; None means torch's default.
        device: as for nn.Linear; "meta" holds no memory and waits for load_state_dict(assign=True)
            or for a weight to be assigned.
        layout: the weight's layout on the device. None is the one that the device's kernels read
            best ("tile64" on a GPU with the CUDA kernels, "rowmajor" elsewhere) and changes as the
            module moves; the name of a registered layout stays: "tile64" on the CPU, too, where it
            is only slower; "cusparselt" holds the vendor library's blob on a GPU and is "rowmajor"
            elsewhere. The attribute can be assigned.
        packed: an older spelling of `layout`: None, True ("tile64"), False ("rowmajor") or
            "cusparselt". The attribute can be assigned.
    Raises:
        ValueError: in_features is not a multiple of 4, a size is negative, no such layout, layout
            and packed together, or a shape that the layout does not take.
        TypeError: another dtype; a layout that has none of this dtype.
        NotImplementedError: layout="cusparselt" where there is no usable library; it says why.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    _version = 2  # of state_dicts; the first one had no coded types

    @checked(_OP, meta=True)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        layout: str | None = None,
        packed: bool | str | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        known = 0 <= in_features <= _MOST and 0 <= out_features <= _MOST
        if not known or in_features % 4 != 0:
            expected = "out_features >= 0 and in_features >= 0, a multiple of 4"
            got = f"in_features {in_features}, out_features {out_features}"
            raise ValueError(message(_OP, expected, got, "Keep this layer dense."))
        if dtype not in dtypes.PLAIN:
            expected = f"dtype {dtypes.names()}"
            raise TypeError(message(_OP, expected, str(dtype), "Pass dtype=torch.bfloat16."))
        self.in_features, self.out_features = in_features, out_features
        values = torch.zeros(out_features, in_features // 2, dtype=dtype, device=device)
        size = (out_features, (in_features + 7) // 8)
        metadata = torch.full(size, _ZERO_GROUPS, dtype=torch.uint8, device=device)
        if in_features % 8 != 0:
            metadata[:, -1] = _ZERO_GROUP_AND_PADDING
        self._wanted = _wanted_layout(layout, packed)
        self._arrange(Sparse24(values, metadata, (out_features, in_features)))
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)

    # ------------------------------------------------------------------ construction from weights

    @classmethod
    def from_sparse24(
        cls,
        w24: Sparse24,
        bias: Tensor | None = None,
        *,
        layout: str | None = None,
        packed: bool | str | None = None,
    ) -> SparseLinear:
        """A module around w24, sharing its tensors when it is in the layout that is asked for.

        Args:
            w24: Sparse24 [out_features, in_features], any layout.
            bias: Tensor or Parameter [out_features], or None. A Parameter keeps its requires_grad,
                a Tensor becomes a trainable Parameter. dtype and device of w24.
            layout, packed: see SparseLinear.
        Raises:
            TypeError: w24 is no Sparse24, or the bias has another dtype.
            ValueError: the bias has another shape or device.   And what `layout` raises.
        """
        check_is_sparse24(_OP, w24)
        out_features, in_features = w24.shape
        module = cls(in_features, out_features, bias=False, dtype=w24.dtype, device="meta")
        module._wanted = _wanted_layout(layout, packed)
        module.weight = w24
        if bias is not None:
            module.bias = _bias_parameter(bias, w24)
        return module

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        mask: Tensor | None = None,
        *,
        layout: str | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> SparseLinear:
        """Compresses a dense layer.

        Args:
            linear: nn.Linear, or transformers' Conv1D, whose weight is [in_features, out_features].
            mask: bool [out_features, in_features], True = kept; None for a weight that is 2:4.
            layout: see SparseLinear.   dtype: see sparsekern.compress; "fp8", "int8" and "int4"
                quantise.
        Returns:
            SparseLinear with copies of weight and bias, the bias' requires_grad, and
            linear.training. Hooks stay with `linear`.
        Raises:
            TypeError: another kind of module, or one whose forward computes more than x·Wᵀ + b.
            ValueError: the weight is not 2:4 (see compress).
        """
        if not isinstance(getattr(linear, "weight", None), Tensor) or not is_linear(linear):
            got = type(linear).__name__
            remedy = "Compress the weight and call from_sparse24."
            raise TypeError(message(f"{_OP}.from_linear", "nn.Linear or Conv1D", got, remedy))
        if (reason := lost_forward(linear)) is not None:
            expected, remedy = "a layer that computes x·Wᵀ + b alone", "Leave it dense."
            raise TypeError(message(f"{_OP}.from_linear", expected, reason, remedy))
        check_initialised(f"{_OP}.from_linear", linear)
        for hook in linear._forward_pre_hooks.values():
            # What weight_norm or torch's prune makes before each forward may be out of date.
            if type(hook).__module__.startswith("torch.nn.utils."):
                hook(linear, ())
        w24 = compress(dense_weight(linear), mask, dtype=dtype)
        module = cls.from_sparse24(w24, layout=layout)
        bias = linear.bias
        if isinstance(bias, Tensor):
            copied = bias.detach().clone()
            module.bias = nn.Parameter(copied, requires_grad=bias.requires_grad)
        return module.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The same layer as torch.nn.Linear, dense and trainable, with the zeros in its weight.

        Returns:
            nn.Linear with copies of weight and bias, the bias' requires_grad, and self.training;
            out_features * in_features numbers of `weight.dtype` on its device.
        """
        dense = self.weight.to_dense()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dense)
        if self.bias is not None:
            copied = self.bias.detach().clone()
            linear.bias = nn.Parameter(copied, requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    # ------------------------------------------------------------------ the weight

    @property
    def weight(self) -> Sparse24:
        """The Sparse24 made of this module's buffers, in its present layout. It can be assigned."""
        view, buffers = self._view, self._buffers
        for name, tensor in view.tensors.items():
            if tensor is not buffers[name]:
                return self._make_view()  # somebody replaced a buffer by hand
        return view

    @weight.setter
    def weight(self, w24: Sparse24) -> None:
        check_is_sparse24(_OP, w24)
        if tuple(w24.shape) != (self.out_features, self.in_features):
            expected = f"a weight of shape [{self.out_features}, {self.in_features}]"
            remedy = "Build a new module with from_sparse24."
            raise ValueError(message(_OP, expected, str(list(w24.shape)), remedy))
        self._arrange(w24)

    def __setattr__(self, name: str, value: Any) -> None:
        """As of nn.Module, which would take a Parameter or a layer as weight beside the property:
        what is no Sparse24 is a TypeError that says what to do."""
        if name == "weight":
            check_is_sparse24(_OP, value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of nn.Module; torch.nn.utils.prune comes here with the weight, which is pruned."""
        got, remedy = f"the 2:4 weight as {name!r}", "Change the layer before it is compressed."
        check(not isinstance(param, Sparse24), _OP, "a Parameter", got, remedy, TypeError)
        super().register_parameter(name, param)

    @property
    def layout(self) -> str | None:
        """What decides the weight's layout: None (the device) or a name. It can be assigned;
        `weight.layout` is the present one."""
        return self._wanted

    @layout.setter
    def layout(self, layout: str | None) -> None:
        previous, self._wanted = self._wanted, _wanted_layout(layout, None)
        try:
            self._arrange()
        except Exception:
            self._wanted = previous
            raise

    @property
    def packed(self) -> bool | str | None:
        """`layout` in the words of earlier versions: None | True | False | a layout's name."""
        return {"tile64": True, ROWMAJOR: False}.get(self._wanted or "", self._wanted)

    @packed.setter
    def packed(self, packed: bool | str | None) -> None:
        self.layout = _wanted_layout(None, packed)

    def _arrange(self, w24: Sparse24 | None = None) -> None:
        """Makes w24, or the present buffers, the weight, in the layout that `layout` asks for."""
        w24 = self._make_view() if w24 is None else w24
        wanted = self._wanted
        if wanted is None:
            wanted = registry.best_layout(w24.spec, w24.device)
        elif not layout_named(wanted).lives_on(w24.device):
            wanted = ROWMAJOR
        w24 = w24.to_layout(wanted)
        self._hold(w24)
        complete = layout_named(wanted).complete
        if complete is not None:
            complete(w24.values)

    def _hold(self, w24: Sparse24) -> None:
        """Makes w24 the weight, in the layout that it has."""
        for name in self._weight_buffers() - set(w24.spec.tensors):
            delattr(self, name)
        for name, tensor in w24.tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self._spec = w24.spec
        self._view = self._make_view()

    def _weight_buffers(self) -> set[str]:
        spec = self.__dict__.get("_spec")
        return set() if spec is None else set(spec.tensors)

    def _tensor(self, name: str) -> Tensor:
        return cast(Tensor, self._buffers[name])

    def _make_view(self) -> Sparse24:
        # Without checks, which these tensors have passed, some of them on meta or in a state
        # between two calls of _apply.
        tensors = {name: self._tensor(name) for name in self._spec.tensors}
        spec = self._spec
        if spec.element.plain and tensors["values"].dtype is not spec.dtype:
            spec = self._spec = spec.with_(dtype=tensors["values"].dtype)
        view = Sparse24.unchecked(spec, tensors)
        view.keeps_twin = False
        return view

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] -> [..., out_features]; see sparsekern.linear."""
        view, buffers, parameters = self._view, self._buffers, self._parameters
        tensors = view.tensors
        if (
            tensors["values"] is not buffers["values"]
            or tensors["metadata"] is not buffers["metadata"]
        ):
            view = self.weight  # which says what this means; asking it always would be a call more
        # self.bias would first search the wrong places, in 0.5 µs.
        bias = parameters["bias"] if "bias" in parameters else self.bias
        try:
            return ops.linear(input, view, bias)
        except TypeError:
            if type(input).__name__ != "Proxy" or not hasattr(input, "tracer"):
                raise
            leaf: Tensor = self._as_leaf(input)
            return leaf

    def _as_leaf(self, x: Any) -> Any:
        """The node of this module in a graph that torch.fx traces: one call, as of nn.Linear."""
        path = x.tracer.path_of_module(self)
        if not path:
            got, remedy = "the layer alone", "Put it into nn.Sequential."
            raise TypeError(message(_OP, "a model to trace, with this layer in it", got, remedy))
        return x.tracer.create_proxy("call_module", path, (x,), {})

    def __prepare_scriptable__(self) -> NoReturn:
        expected, got = "a dense model for torch.jit.script", "one with compressed layers"
        remedy = (
            "Use torch.export or torch.jit.trace, or script sparsekern.decompress_model(model)."
        )
        raise NotImplementedError(message(_OP, expected, got, remedy))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """.to() and its kin; values that a narrower dtype rounds to -0.0 become +0.0.

        Raises:
            TypeError: a dtype that a 2:4 weight cannot have, before this module changes.
        Warns:
            UserWarning: numbers that were finite are beyond the new dtype; it counts them.
        """
        spec = self._spec
        dtype = fn(torch.empty(0, dtype=spec.dtype, device=self._tensor("values").device)).dtype
        if dtype not in dtypes.PLAIN:
            expected = f"a dtype in {dtypes.names()}"
            remedy = "Call sparsekern.decompress_model(model), or to_linear(), first. "
            remedy += f"model.to({spec.dtype}) takes back modules before this one."
            raise TypeError(message(f"{_OP}.to", expected, str(dtype), remedy))
        if not layout_named(spec.layout).converts:
            self._hold(self.weight.rowmajor())  # what it holds is no numbers that fn could convert
            spec = self._spec
        before = {name: self._tensor(name) for name in spec.tensors}
        bias = None if self.bias is None else self.bias.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._tensor(name)
            if new.dtype == old.dtype:
                continue
            if spec.element.plain and name == "values":
                self._buffers[name] = new.masked_fill(new.eq(0), 0)
                _warn_overflow("weight", old, new)
            else:  # stored as it is, whatever the numbers' dtype
                self._buffers[name] = old.to(new.device)
        self._spec = spec.with_(dtype=dtype)
        if bias is not None and self.bias is not None and bias.dtype != self.bias.dtype:
            _warn_overflow("bias", bias, self.bias.detach())
        self._arrange()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles; what one GPU alone can read is never part of them."""
        state = {key: value for key, value in self.__dict__.items() if key != "_view"}
        spec = self._spec
        if not layout_named(spec.layout).converts:
            w24 = self.weight.rowmajor()
            spec, state["_buffers"] = w24.spec, {**self._buffers, **w24.tensors}
        if not spec.element.plain:
            own = {name: state["_buffers"][name] for name in spec.tensors}
            state["_buffers"] = {**state["_buffers"], **for_pickle(own)}
        state["_spec"] = spec.text
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles; torch.load(map_location=...) may have moved the buffers."""
        state = dict(state)
        if "_packed" in state:  # of 0.1, where _layout was the present layout
            present, shape = state.pop("_layout"), (state["out_features"], state["in_features"])
            state["_wanted"] = _LAYOUT_OF_PACKED[state.pop("_packed")]
            spec = WeightSpec.of(shape, state["_buffers"]["values"].dtype, present)
        else:
            spec = WeightSpec.parse(state["_spec"])
            state["_buffers"] = from_pickle(spec, state["_buffers"])
        state["_spec"] = spec
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._arrange()

    def extra_repr(self) -> str:
        spec = self._spec
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}, dtype={spec.dtype}"
        text += "" if spec.element.plain else f", stored as {spec.storage}"
        text += f", group={spec.group}" if spec.group else ""
        return text if spec.layout == ROWMAJOR else f"{text}, layout={spec.layout}"

    # ------------------------------------------------------------------ state_dict

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self._entries().items():
            destination[prefix + key] = tensor

    def _entries(self) -> dict[str, Tensor]:
        """What a state_dict has of the weight."""
        w24 = self.weight.rowmajor()
        shape = torch.tensor([[self.out_features], [self.in_features]], device=w24.device)
        tensors = {"compressed": w24.values, "bitmask": w24.bitmask(), "shape": shape}
        if not w24.spec.element.plain:
            tensors |= {name: w24.tensors[name] for name in w24.spec.element.tensors}
            stored = f"{w24.spec.storage} {w24.spec.group}".encode()
            tensors[_STORAGE_KEY] = torch.tensor(list(stored), dtype=torch.uint8, device="cpu")
        return tensors

    @torch.inference_mode(False)  # whose tensors could not be trained around
    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads the weight here and leaves the bias to nn.Module.

        Without assign=True values are cast to this module's dtype and device, as nn.Linear does; a
        coded weight keeps its stored tensors. The loaded weight is then in the layout that `layout`
        asks for. Raises FormatError for a weight that breaks a rule of the format, or a state_dict
        of a later version.
        """
        version = local_metadata.get("version") or 1
        if version > self._version:
            expected, got = f"a state_dict of version {self._version} or older", f"{version}"
            raise FormatError(message(_OP, expected, got, "Read it with a newer sparsekern."))
        found = self._stored(state_dict, prefix)
        bias = state_dict.get(f"{prefix}bias")
        if not found:
            missing_keys.extend(prefix + key for key in _WEIGHT_KEYS)
        elif self.bias is None or bias is None or getattr(bias, "shape", None) == self.bias.shape:
            assign = local_metadata.get("assign_to_params_buffers", False)
            self.weight = self._checked_weight(found, prefix, assign)
        # else the bias does not fit, which nn.Module says: then the weight stays, too
        rest = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        for key in found:
            del rest[prefix + key]
        frozen = self.bias is not None and self.bias.is_inference()
        with torch.inference_mode(frozen):  # which alone may write to such a bias
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    @staticmethod
    def _stored(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """What a state_dict has of the weight of the module at `prefix`."""
        present = [key for key in _WEIGHT_KEYS if prefix + key in state_dict]
        found = {key: state_dict[prefix + key] for key in present}
        if found and prefix + _STORAGE_KEY in state_dict:
            start = len(prefix)
            own = {k[start:] for k in state_dict if k.startswith(prefix)} - {"bias"}
            found |= {key: state_dict[prefix + key] for key in own}
        return found

    def _checked_weight(self, found: dict[str, Any], prefix: str, assign: bool) -> Sparse24:
        """The weight that a state_dict describes; FormatError for one that breaks a rule."""
        op = f"{_OP}.load_state_dict({prefix.rstrip('.')!r})"

        def require(condition: bool, expected: str, got: object) -> None:
            if not condition:
                raise FormatError(message(op, expected, str(got), _DAMAGED))

        out_features, in_features = self.out_features, self.in_features
        for key in _WEIGHT_KEYS:
            require(key in found, f"the keys {', '.join(_WEIGHT_KEYS)}", f"no {key!r}")
            got = type(found[key]).__name__
            require(isinstance(found[key], Tensor), f"{key!r} to be a Tensor", got)
        values, bitmask, shape = (found[key].detach() for key in _WEIGHT_KEYS)
        require(shape.dtype == torch.int64, "'shape' of dtype int64", shape.dtype)
        require(shape.numel() == 2, "'shape' with 2 numbers", list(shape.shape))
        if not shape.is_meta:
            expected = f"'shape' == [{out_features}, {in_features}]"
            numbers = shape.flatten().tolist()
            require(numbers == [out_features, in_features], expected, numbers)
        storage, group = _stored_as(found.get(_STORAGE_KEY), require)
        kind = dtypes.PLAIN.get(values.dtype) if storage is None else dtypes.element(storage)
        if kind is None:
            raise FormatError(message(op, f"'compressed' in {dtypes.names()}", str(values.dtype)))
        for key, tensor, columns in (
            ("compressed", values, kind.columns(in_features)),
            ("bitmask", bitmask, (in_features + 7) // 8),
        ):
            expected = f"{key!r} of shape [{out_features}, {columns}]"
            size_got = list(tensor.shape)
            require(size_got == [out_features, columns], expected, size_got)
        require(bitmask.dtype == torch.uint8, "'bitmask' of dtype uint8", bitmask.dtype)
        if values.is_meta or bitmask.is_meta or (self.values.is_meta and not assign):
            got = "a meta tensor on one side"
            remedy = "Call load_state_dict(..., assign=True) on a meta module."
            raise ValueError(message(op, "weights with data, and memory for them", got, remedy))
        size = (out_features, in_features)
        try:
            slots = bitmask.to(values.device)
            if storage is None:
                loaded = Sparse24.from_bitmask(values, slots, size)
            else:
                numbers = values.new_zeros(out_features, in_features // 2, dtype=self._spec.dtype)
                metadata = Sparse24.from_bitmask(numbers, slots, size).metadata
                spec = WeightSpec.of(size, storage, ROWMAJOR, self._spec.dtype, None, group)
                stored = {name: found[name] for name in kind.tensors if name in found}
                for name, tensor in stored.items():
                    got = type(tensor).__name__
                    require(isinstance(tensor, Tensor), f"{name!r} to be a Tensor", got)
                    stored[name] = tensor.detach()
                loaded = Sparse24.from_tensors(
                    spec, {"values": values, "metadata": metadata, **stored}
                )
            if not assign:
                w24 = loaded.to(self.values.device, self._spec.dtype)
                loaded = w24.clone() if w24 is loaded else w24
            verify(loaded)
        except FormatError as error:
            raise FormatError(f"{op}: {error}") from error
        return loaded


def _entry(key: str) -> property:
    def read(module: SparseLinear) -> Tensor:
        entries = module._entries()
        if key not in entries:
            raise AttributeError(key)
        return entries[key]

    def write(module: SparseLinear, value: Tensor) -> NoReturn:
        expected, remedy = "a weight that is assigned whole", "Assign layer.weight, or give "
        remedy += "functional_call dict(model.named_buffers()) in place of a state_dict."
        raise AttributeError(message(_OP, expected, f"{key} alone", remedy))

    return property(read, write, doc=f"{key!r} of the state_dict.")


# torch.distributed.checkpoint looks every key of a state_dict up as an attribute.
for _key in (*_WEIGHT_KEYS, _STORAGE_KEY):
    setattr(SparseLinear, _key, _entry(_key))


def check_before_loading(model: nn.Module) -> None:
    """Let model.load_state_dict look at every compressed layer of a state_dict before it changes
    anything, so that a damaged one leaves the whole model as it was. Once per model is enough."""
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", hook) is _check_state_dict for hook in hooks):
        model.register_load_state_dict_pre_hook(_check_state_dict)


def _check_state_dict(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, *_: Any
) -> None:
    assign = bool((metadata or {}).get("assign_to_params_buffers", False))
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear) and module is not model:
            own = f"{prefix}{name}."
            found = module._stored(state_dict, own)
            if found:
                module._checked_weight(found, own, assign)
            bias = state_dict.get(f"{own}bias")
            if module.bias is not None and isinstance(bias, Tensor):
                expected = f"'bias' of shape {list(module.bias.shape)}"
                got = list(bias.shape)
                op = f"{_OP}.load_state_dict({own.rstrip('.')!r})"
                check(list(module.bias.shape) == got, op, expected, got, _DAMAGED, FormatError)


def _warn_overflow(name: str, old: Tensor, new: Tensor) -> None:
    """Say how many finite numbers a narrower dtype has made infinite."""
    wider = torch.finfo(old.dtype).max > torch.finfo(new.dtype).max
    if not wider or new.is_meta or old.is_meta:
        return
    lost = int((new.isinf() & old.to(new.device).isfinite()).sum())
    if lost:
        warnings.warn(
            f"{_OP}.to: {lost} of {old.numel()} numbers of a {name} are beyond {new.dtype} and "
            "became Inf. Use torch.bfloat16, or scale the weight.",
            UserWarning,
            stacklevel=5,
        )


def _stored_as(stored: Any, require: Callable[[bool, str, object], None]) -> tuple[str | None, int]:
    """(name of a coded element type, columns of a group) of a state_dict; (None, 0) for others."""
    if stored is None:
        return None, 0
    text = isinstance(stored, Tensor) and stored.dtype == torch.uint8 and stored.dim() == 1
    require(text and stored.numel() < 100, f"{_STORAGE_KEY!r}, text as uint8", shown(stored))
    require(not stored.is_meta, f"{_STORAGE_KEY!r} with data", "a meta tensor")
    name, _, group = bytes(stored.tolist()).decode("ascii", "replace").partition(" ")
    known = {kind.name for kind in dtypes.elements() if kind.storable and not kind.plain}
    require(name in known and group.isdecimal(), "an element type with a codec", repr(name))
    return name, int(group)


def _wanted_layout(layout: str | None, packed: bool | str | None) -> str | None:
    """What `layout` and `packed` of earlier versions ask for together."""
    if packed is not None:
        known = isinstance(packed, (bool, str)) and packed in _LAYOUT_OF_PACKED
        if not known or isinstance(packed, int) and not isinstance(packed, bool):
            expected = "packed in None, True, False, 'cusparselt'"
            raise ValueError(message(_OP, expected, repr(packed), "Use layout= instead."))
        if layout is not None:
            got = f"layout={layout!r} and packed={packed!r}"
            raise ValueError(message(_OP, "one of layout and packed", got, "Leave packed None."))
        layout = _LAYOUT_OF_PACKED[packed]
    if layout is not None:
        layout_named(layout, _OP)
    return layout


def _bias_parameter(bias: Tensor, w24: Sparse24) -> nn.Parameter:
    ops.check_bias_type(_OP, bias)
    if tuple(bias.shape) != (w24.shape[0],):
        expected = f"bias of shape [{w24.shape[0]}]"
        raise ValueError(message(_OP, expected, str(list(bias.shape)), "Reshape the bias."))
    if bias.dtype != w24.dtype:
        expected = f"bias.dtype == weight.dtype ({w24.dtype})"
        raise TypeError(message(_OP, expected, str(bias.dtype), "Call bias.to(weight.dtype)."))
    if bias.device != w24.device:
        expected = f"bias on the weight's device ({w24.device})"
        raise ValueError(message(_OP, expected, str(bias.device), "Call bias.to(weight.device)."))
    return bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
