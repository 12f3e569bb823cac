"""The cuSPARSELt backend of sparsekern.linear: NVIDIA's 2:4 library, on weights in "cusparselt".

    weight   layout "cusparselt": backends/cusparselt/layout.py
    library  loaded at run time, versions 0.6 to 0.10; refusals and why: library.py
    call     shapes -> a launch (`bind`); the bias' address -> id of a cached plan -> one call of
             the binding

It is a choice of the user (layout="cusparselt"): nothing prefers it by default. The library's own
algorithm is used unless `search` has found a better one; a search result is stored in the user's
cache folder (utils/json_store.py), per GPU and version.

Rules of the library that show: out_features and in_features are multiples of 16 (32 at 8 bits),
tokens are padded to a multiple of 8 (16) here. It fuses bias and relu; "gelu" and "silu" are
applied here to the rounded pre-activation, so with these two the result is rounded twice.

Weights of 8 bits (float8_e4m3fn, int8) are multiplied with x of the same type, to 16 bits. At int8
the library multiplies with one vector, the scales of the channels; it has none for tokens beside
it, and with e4m3 none at all. What it has not, bias and activation are applied here to the rounded
product, which is rounded again; that of e4m3 is bfloat16, whose range holds sums without a scale. A
16-bit x is quantised first, by token (backends/quantize_rows.py).

Source: cusparseLt.h of 0.6.3 to 0.8.1; NVIDIA's cuSPARSELt documentation.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern import _native
from sparsekern.backends import memory, quantize_rows
from sparsekern.backends.cpu import activate
from sparsekern.backends.cusparselt.library import (
    DTYPES,
    Library,
    dense_multiple,
    library,
    refusal,
    scales_channels,
)
from sparsekern.backends.protocol import ALIGNMENT, Launch, Problem, problem_of
from sparsekern.errors import message
from sparsekern.formats import dtypes
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.utils import json_store
from sparsekern.utils.torch_raw import current_device, current_stream, empty_strided

LAYOUT = "cusparselt"
_KEPT_BYTES = 2**25  # of a workspace that is kept for later calls


# ---- what can run --------------------------------------------------------------------------------


def why_not(problem: Problem) -> str | None:
    """Why this backend cannot compute a problem, as text; None when it can."""
    if problem.spec.layout != LAYOUT:
        return (
            f"backend 'cusparselt' needs layout 'cusparselt', got {problem.spec.layout!r}; make "
            "one with SparseLinear(layout='cusparselt') or weight.to_layout('cusparselt')"
        )
    if problem.dtype not in dtypes.NATIVE:
        return f"backend 'cusparselt' computes {dtypes.native_names()}, got {problem.dtype}"
    return refusal(problem.gpu, problem.spec.element.storage) or None


def pack(w24: Sparse24) -> Sparse24:
    """The same weight in layout "cusparselt"; see backends/cusparselt/layout.py."""
    return w24.to_layout(LAYOUT)


# ---- the algorithm of a problem ------------------------------------------------------------------


class Algorithm(NamedTuple):
    """As the library counts them; the fields are those of csrc/cusparselt/cusparselt.h: Problem."""

    algorithm: int = -1  # the library's choice
    split_k: int = 1
    split_k_mode: int = 0

    def __str__(self) -> str:
        if self.algorithm < 0:
            return "default algorithm"
        split = f", split_k {self.split_k}" if self.split_k != 1 else ""
        mode = f" mode {self.split_k_mode}" if self.split_k_mode else ""
        return f"algorithm {self.algorithm}{split}{mode}"


_DEFAULT = Algorithm()
_searched: dict[
    str, Algorithm
] = {}  # {key: Algorithm} found by this process, before what the file says


def store_path() -> Path:
    """The user's file of search results."""
    return json_store.cache_folder() / "cusparselt.json"


@cache
def _stored() -> dict[str, Any]:
    return json_store.load(store_path())


@cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index) if index >= 0 else "cpu"


def types_of(spec: WeightSpec) -> torch.dtype | str:
    """What `algorithm_key` calls the types: the dtype, or "int8-bfloat16" of a weight of 8 bits."""
    if spec.element.plain:
        return spec.dtype
    return f"{spec.storage}-{dtypes.PLAIN[spec.dtype].name}"


def algorithm_key(
    index: int, dtype: torch.dtype | str, out_features: int, in_features: int, tokens: int
) -> str:
    """The key of a search result: "NVIDIA H100|0.8.1|bfloat16|4096x14336|16"; tokens padded."""
    version = ".".join(map(str, _found().version))
    name = str(dtype).removeprefix("torch.")
    return f"{_gpu_name(index)}|{version}|{name}|{out_features}x{in_features}|{tokens}"


def algorithm_for(
    index: int, dtype: torch.dtype | str, out_features: int, in_features: int, tokens: int
) -> Algorithm:
    """The Algorithm that `search` found for this problem, here or in the user's file, or the
    library's default."""
    key = algorithm_key(index, dtype, out_features, in_features, tokens)
    if key in _searched:
        return _searched[key]
    entry = _stored().get(key)
    fields: list[Any] = (
        [entry.get(name) for name in Algorithm._fields] if isinstance(entry, dict) else []
    )
    if len(fields) == 3 and all(type(v) is int and abs(v) < 2**31 for v in fields):
        return Algorithm(*fields)
    return _DEFAULT


def remember(key: str, algorithm: Algorithm, us: float, store: bool = True) -> None:
    """Makes `algorithm` the one of a problem: for this process and, with store, for the user."""
    _searched[key] = algorithm
    forget_plans()
    if store:
        entry = {**algorithm._asdict(), "us": round(us, 2)}
        json_store.update(store_path(), lambda entries: entries.update({key: entry}))


def _found() -> Library:
    """The library of a weight that was packed for it."""
    found, why = library()
    if found is None:
        raise RuntimeError(message("sparsekern.cusparselt", "the library", why))
    return found


def config(x: Tensor, w24: Sparse24) -> str:
    """What sparsekern.explain shows: "cuSPARSELt 0.8.1, algorithm 12, split_k 4 mode 1"."""
    return config_of(problem_of(x, w24.spec))


def config_of(problem: Problem) -> str:
    """The same for a problem."""
    spec = problem.spec
    tokens = padded_tokens(problem.tokens, spec.element.storage)
    chosen = algorithm_for(problem.gpu, types_of(spec), *problem.sizes, tokens)
    dynamic = not spec.element.plain and problem.quantized is None
    return f"{_found().name}, {chosen}" + (", x quantised by token" if dynamic else "")


# ---- running it ----------------------------------------------------------------------------------


class _Signature:
    """What a plan depends on apart from the address of a bias; one object per problem."""

    def __init__(
        self,
        tokens: int,
        x_row_stride: int,
        dtype: torch.dtype,
        index: int,
        spec: WeightSpec,
        relu: bool,
    ) -> None:
        self.tokens, self.x_row_stride, self.dtype = tokens, x_row_stride, dtype
        self.index, self.spec, self.relu = index, spec, relu


_signature = lru_cache(maxsize=4096)(_Signature)

# {signature: {address of the bias or 0: (id of the plan, its workspace bytes)}}. Launches hold the
# inner dicts. The native cache owns the plans; an id that has left it is noticed by the call.
_plans: dict[_Signature, dict[int, tuple[int, int]]] = {}


def forget_plans() -> None:
    """Ask the native module for every plan anew."""
    for of_signature in _plans.values():
        of_signature.clear()


# {(GPU, stream): tensor}: what is lent to the native module
_workspaces: dict[tuple[int, int], Tensor] = {}


def padded_tokens(tokens: int, storage: torch.dtype = dtypes.DEFAULT_16_BIT) -> int:
    multiple = dense_multiple(storage)
    return -(-tokens // multiple) * multiple


def bind(problem: Problem) -> Launch:
    """The launch of a problem: y = activation(x · Wᵀ + bias), summed in float32; rounded once, with
    "gelu" and "silu" twice.

    x is copied when tokens are not a multiple of 8, or its rows are not 16-byte aligned and evenly
    spaced. The library stores the bias' address in its plan: a bias that stays where it is, such as
    a layer's, costs nothing; a new one at every call costs a plan whenever its address is new.
    """
    if not problem.tokens:
        sizes, dtype = (*problem.x_shape[:-1], problem.out_features), problem.dtype
        return lambda x, w24, bias=None, x_scale=None: x.new_empty(sizes, dtype=dtype)
    if problem.spec.element.plain:
        return _bind_product(problem)
    return _bind_dynamic(problem) if problem.quantized is None else _bind_scaled(problem)


def _bind_product(problem: Problem) -> Launch:
    """What the library computes: with x as it is, or a copy of it."""
    if not (problem.aligned and _fits(problem)):
        return _bind_copy(problem)
    return _bind_in_place(problem)


def _bind_scaled(problem: Problem) -> Launch:
    """For x of 8 bits: the library's product with the scales of the channels, and the rest."""
    activation, dtype = problem.activation, problem.dtype
    inner = _bind_product(_raw(problem._replace(activation=None, bias=False)))
    vector = scales_channels(problem.spec.element.storage)

    def launch(x: Tensor, w24: Sparse24, bias: Tensor | None, x_scale: Tensor) -> Tensor | None:
        y = inner(x, w24, None)
        if y is None:
            return None
        z = y.float()
        if not vector:
            z *= w24.tensors[SCALE].view(-1)
        z *= x_scale.view(*y.shape[:-1], 1)
        if bias is not None:
            z += bias
        return activate(z, activation).to(dtype)

    return launch


def _bind_dynamic(problem: Problem) -> Launch:
    """For x of 16 bits on a weight of 8: it is quantised by token."""
    kind, rows, features = problem.spec.element, problem.tokens, problem.in_features
    shape = torch.Size((rows, features))
    inner = _bind_scaled(
        problem._replace(x_shape=shape, x_stride=None, aligned=True, quantized=kind.storage)
    )

    def launch(x: Tensor, w24: Sparse24, bias: Tensor | None = None) -> Tensor | None:
        flat = x.reshape(shape)
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        x8, x_scale = quantize_rows.quantize(flat, kind.name)
        y = inner(x8, w24, bias, x_scale)
        return None if y is None else y.view(*x.shape[:-1], problem.out_features)

    return launch


def product_dtype(spec: WeightSpec) -> torch.dtype:
    """Of what the library computes."""
    whole = spec.element.plain or scales_channels(spec.element.storage)
    return spec.dtype if whole else dtypes.DEFAULT_16_BIT


def _raw(problem: Problem) -> Problem:
    """The problem of the library's product."""
    return problem._replace(dtype=product_dtype(problem.spec))


def product(x: Tensor, w24: Sparse24) -> Tensor:
    """All that the library computes for x of 8 bits: x · Wᵀ, at int8 with the scales of the
    channels and rounded to w24.dtype, with e4m3 of the levels alone and rounded to bfloat16.

    x [tokens, in_features] of the storage type of w24, a weight in layout "cusparselt".
    """
    y = _bind_product(_raw(problem_of(x, w24.spec)))(x, w24, None)
    assert y is not None  # the problem is that of x
    return y


def _bind_in_place(problem: Problem, copies: bool = True) -> Launch:
    """For an x that the library takes as it is, and copies of it where its address is no good."""
    index, dtype, activation = problem.gpu, problem.dtype, problem.activation
    row_stride = problem.x_stride[0] if problem.x_stride else problem.in_features
    relu = activation == "relu"
    signature = _signature(problem.tokens, row_stride, dtype, index, problem.spec, relu)
    plans = _plans.setdefault(signature, {})
    sizes = (*problem.x_shape[:-1], problem.out_features)
    strides = tuple(math.prod(sizes[place + 1 :]) for place in range(len(sizes)))
    native: Any = _native.module()
    matmul, vector = native.cusparselt_matmul, scales_channels(problem.spec.element.storage)
    later = None if relu else activation
    anywhere = _bind_copy(problem) if copies else None

    def launch(x: Tensor, w24: Sparse24, bias: Tensor | None = None) -> Tensor | None:
        address = x.data_ptr()
        if index != current_device():
            with torch.cuda.device(index):
                return launch(x, w24, bias)
        if address % ALIGNMENT:
            return None if anywhere is None else anywhere(x, w24, bias)
        bias_address = 0
        if bias is not None:
            bias_address = bias.data_ptr()
            if bias_address % ALIGNMENT:
                bias = bias.clone()
                bias_address = bias.data_ptr()
        known = plans.get(bias_address)
        if known is None:
            known = _make_plan(signature, bias_address)
        y = empty_strided(sizes, strides, dtype)
        blob, y_address, stream = (
            w24.tensors["values"].data_ptr(),
            y.data_ptr(),
            current_stream(index),
        )
        addresses, scale = (blob, address, y_address), 0
        if vector:
            scale = w24.tensors[SCALE].data_ptr()
            missing = multiply(native, known[0], addresses, 0, scale, stream)
        else:
            missing = matmul(known[0], blob, address, y_address, 0, stream)
        if missing:
            if missing == native.CUSPARSELT_NO_WORKSPACE:
                missing = _matmul_with_workspace(native, index, known, addresses, scale, stream)
            if missing:  # the plan has left the native cache
                plans.pop(bias_address, None)
                return launch(x, w24, bias)
        return y if later is None else activate(y.float(), later).to(dtype)

    return launch


def multiply(
    native: Any, plan: int, addresses: tuple[int, int, int], workspace: int, scale: int, stream: int
) -> int:
    """The native call; scale: address of the factors of the channels, 0 without."""
    blob, x, y = addresses
    missing: int
    if scale:
        missing = native.cusparselt_matmul_scaled(
            plan=plan,
            blob=blob,
            x=x,
            y=y,
            workspace=workspace,
            channel_scale=scale,
            stream=stream,
        )
    else:
        missing = native.cusparselt_matmul(plan, blob, x, y, workspace, stream)
    return missing


def _matmul_with_workspace(
    native: Any,
    index: int,
    plan: tuple[int, int],
    addresses: tuple[int, int, int],
    scale: int,
    stream: int,
) -> int:
    """The native call with memory of its own, where it found none that was lent for its stream.

    Calls that may overlap must not share a workspace, so each stream has its own. What a graph
    captures gets new memory in every call, from the pool of the graph, because a graph may be
    replayed on any stream. Within a registered op nothing is lent: torch.compile counts the tensors
    that stay in its pool.
    """
    number, size = plan
    space = empty_strided((size,), (1,), torch.uint8)
    address = space.data_ptr()
    missing = multiply(native, number, addresses, address, scale, stream)
    if not memory.depth and size <= _KEPT_BYTES and not native.capture_id(stream):
        native.cusparselt_lend_workspace(index, stream, address, size)
        _workspaces[index, stream] = space
    return missing


def _fits(problem: Problem) -> bool:
    """True when the library takes x as it is; its address is another matter."""
    multiple = dense_multiple(problem.spec.element.storage)
    if problem.tokens % multiple:
        return False
    if problem.x_stride is None:
        return True
    if len(problem.x_shape) != 2:
        return False
    stride, step = problem.x_stride
    return step == 1 and stride >= problem.in_features and stride % multiple == 0


def _bind_copy(problem: Problem) -> Launch:
    """For rows that must be copied. What is in those that only fill up reaches no other row."""
    tokens, (out_features, in_features) = problem.tokens, problem.spec.shape
    dtype, index = problem.spec.element.storage, problem.gpu
    padded = padded_tokens(tokens, dtype)
    inner = _bind_in_place(
        problem._replace(x_shape=torch.Size((padded, in_features)), x_stride=None, aligned=True),
        copies=False,
    )
    folded = len(problem.x_shape) == 2

    def launch(x: Tensor, w24: Sparse24, bias: Tensor | None = None) -> Tensor | None:
        if index != current_device():
            with torch.cuda.device(index):
                return launch(x, w24, bias)
        rows = empty_strided((padded, in_features), (in_features, 1), dtype)
        rows.narrow(0, 0, tokens).copy_(x if folded else x.reshape(tokens, in_features))
        whole = inner(rows, w24, bias)
        assert whole is not None  # new memory is aligned
        y = whole.narrow(0, 0, tokens)
        return y if folded else y.view(*x.shape[:-1], out_features)

    return launch


def _make_plan(of: _Signature, bias_address: int) -> tuple[int, int]:
    out_features, in_features = of.spec.shape
    algorithm = algorithm_for(of.index, types_of(of.spec), out_features, in_features, of.tokens)
    native: Any = _native.module()
    plan, workspace_bytes, _ = native.cusparselt_plan(
        device=of.index,
        dtype=DTYPES[of.spec.element.storage],
        y_dtype=DTYPES[of.dtype],
        out_features=out_features,
        tokens=of.tokens,
        in_features=in_features,
        x_stride=of.x_row_stride,
        y_stride=out_features,
        bias=bias_address,
        relu=of.relu,
        channel_scale=scales_channels(of.spec.element.storage),
        **algorithm._asdict(),
    )
    if sum(map(len, _plans.values())) >= native.CUSPARSELT_MAX_PLANS:
        forget_plans()
    _plans.setdefault(of, {})[bias_address] = plan, workspace_bytes
    return plan, workspace_bytes


def linear(
    x: Tensor, w24: Sparse24, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`bind` for these arguments, and the call: [..., out_features], new and contiguous."""
    bias = None if bias is None else bias.contiguous()
    y = bind(problem_of(x, w24.spec, activation, bias is not None))(x, w24, bias)
    assert y is not None  # the problem is that of x
    return y
