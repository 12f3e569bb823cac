"""The cuSPARSELt backend of sparsekern.linear: NVIDIA's 2:4 library, on weights in "cusparselt".

    weight   Sparse24 in layout "cusparselt": values = the library's opaque blob, viewed in the
             weight's dtype [blob bytes / 2]; metadata = uint8 [0]. Made at load by `pack`, never
             saved; `unpack` recovers the row-major weight by multiplying with the identity.
    library  loaded at run time, versions 0.6 to 0.10; refusals and why: backends/cusparselt/library.py
    call     shapes and addresses -> id of a cached plan -> one call of the binding; for calls like
             one before, ops.linear takes this way at once (linear_again)

It is a choice of the user (SparseLinear(packed="cusparselt"), or `pack`): nothing prefers it by
default. The library's own algorithm is used unless `search` has found a better one; a search result
is stored in the user's cache folder (utils/json_store.py), per GPU and version.

Rules of the library that show: out_features and in_features are multiples of 16, tokens are padded
to a multiple of 8 here. It fuses bias and relu; "gelu" and "silu" are applied here to the rounded
pre-activation, so with these two the result is rounded twice.

Source: cusparseLt.h of 0.6.3 to 0.8.1; NVIDIA's cuSPARSELt documentation.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from sparsekern import _native
from sparsekern.backends.cpu import activate
from sparsekern.backends.cusparselt.library import (
    DTYPES,
    SPARSE_MULTIPLE,
    library,
    refusal,
    shape_refusal,
)
from sparsekern.errors import check, message
from sparsekern.formats.sparse24 import Sparse24, compress, decompress
from sparsekern.utils import json_store
from sparsekern.utils.torch_raw import current_device, current_stream, empty_strided

LAYOUT = "cusparselt"
_DENSE_MULTIPLE, _ALIGNMENT = 8, 16  # as in csrc/cusparselt/cusparselt.h
_KEPT_BYTES = 2**25  # of a workspace that is kept for later calls
_UNPACK_ELEMENTS = 2**25  # of the dense slices that unpack has in memory at a time
_RUNS = "the layout is 'cusparselt' and the library takes this problem"


# ---- what can run --------------------------------------------------------------------------------


def packs(device):
    """True where packed="cusparselt" means this layout: on a GPU. Elsewhere weights stay row-major,
    so that a module can be moved to the CPU, saved and loaded there."""
    return device.type == "cuda"


def why_not(x, w24):
    """Why this backend cannot compute linear(x, w24), as text; empty when it can."""
    if w24.layout != LAYOUT:
        return (
            f"backend 'cusparselt' needs layout 'cusparselt', got {w24.layout!r}; make one with "
            "SparseLinear(packed='cusparselt') or cusparselt_backend.pack(weight)"
        )
    return refusal(x.get_device(), x.dtype)


def supported(x, w24):
    """(True, why) for x on a GPU, a weight in layout "cusparselt", and no refusal."""
    reason = why_not(x, w24)
    return not reason, reason or _RUNS


# ---- the algorithm of a problem ------------------------------------------------------------------


class Algorithm(NamedTuple):
    """As the library counts them; the fields are those of csrc/cusparselt/cusparselt.h: Problem."""

    algorithm: int = -1  # the library's choice
    split_k: int = 1
    split_k_mode: int = 0

    def __str__(self):
        if self.algorithm < 0:
            return "default algorithm"
        split = f", split_k {self.split_k}" if self.split_k != 1 else ""
        mode = f" mode {self.split_k_mode}" if self.split_k_mode else ""
        return f"algorithm {self.algorithm}{split}{mode}"


_DEFAULT = Algorithm()
_searched = {}  # {key: Algorithm} found by this process, before what the file says


def store_path():
    """The user's file of search results."""
    return json_store.cache_folder() / "cusparselt.json"


@cache
def _stored():
    return json_store.load(store_path())


@cache
def _gpu_name(index):
    return torch.cuda.get_device_name(index) if index >= 0 else "cpu"


def algorithm_key(index, dtype, out_features, in_features, tokens):
    """The key of a search result: "NVIDIA H100|0.8.1|bfloat16|4096x14336|16"; tokens padded."""
    version = ".".join(map(str, library()[0].version))
    name = str(dtype).removeprefix("torch.")
    return f"{_gpu_name(index)}|{version}|{name}|{out_features}x{in_features}|{tokens}"


def algorithm_for(index, dtype, out_features, in_features, tokens):
    """The Algorithm that `search` found for this problem, here or in the user's file, or the
    library's default."""
    key = algorithm_key(index, dtype, out_features, in_features, tokens)
    if key in _searched:
        return _searched[key]
    entry = _stored().get(key)
    fields = [entry.get(name) for name in Algorithm._fields] if isinstance(entry, dict) else []
    if len(fields) == 3 and all(type(value) is int for value in fields):
        return Algorithm(*fields)
    return _DEFAULT


def remember(key, algorithm, us, store=True):
    """Makes `algorithm` the one of a problem: for this process and, with store, for the user."""
    _searched[key] = algorithm
    _plans.clear()
    if store:
        entry = {**algorithm._asdict(), "us": round(us, 2)}
        json_store.update(store_path(), lambda entries: entries.update({key: entry}))


def config(x, w24):
    """What sparsekern.explain shows: "cuSPARSELt 0.8.1, algorithm 12, split_k 4 mode 1"."""
    tokens = padded_tokens(x.numel() // w24.shape[1])
    chosen = algorithm_for(x.get_device(), x.dtype, *w24.shape, tokens)
    return f"{library()[0].name}, {chosen}"


# ---- running it ----------------------------------------------------------------------------------

# {what a call depends on: (id of the plan, workspace bytes, sizes and strides of y, native module)
# or _COPIED where x must be copied first}. The native cache owns the plans; an id that has left it
# is noticed by the call.
_plans = {}
_COPIED = ()

# {(GPU, stream): tensor}: what is lent to the native module
_workspaces = {}


def padded_tokens(tokens):
    return -(-tokens // _DENSE_MULTIPLE) * _DENSE_MULTIPLE


def linear(x, w24, bias, activation):
    """y = activation(x · Wᵀ + bias), summed in float32; rounded once, with "gelu" and "silu" twice.

    Args:
        x: [..., in_features] on a GPU, any strides. It is copied when tokens are not a multiple of
            8, or its rows are not 16-byte aligned and evenly spaced.
        w24: in layout "cusparselt".
    Returns:
        [..., out_features], new and contiguous.
    Notes:
        The library stores the bias' address in its plan: a bias that stays where it is, such as a
        layer's, costs nothing; a new one at every call costs a plan whenever its address is new.
    """
    index = x.get_device()
    if index != current_device():
        with torch.cuda.device(index):
            return linear(x, w24, bias, activation)
    if bias is not None and (bias.data_ptr() % _ALIGNMENT or not bias.is_contiguous()):
        bias = bias.clone(memory_format=torch.contiguous_format)
    return linear_again(x, w24, bias, activation, True)


def linear_again(x, w24, bias, activation, checked=False):
    """`linear` without the checks, for a call like one before; None, and nothing done, for others.

    So that a call is quick on the host: one look-up finds the plan, and stands for `why_not` and
    for those checks of ops.check_linear that the earlier call has passed. The others are here.

    Args:
        x, w24, bias: as in `linear`, not checked; w24 in layout "cusparselt".
        activation: checked.
        checked: all are, x is on the current GPU, and the bias is aligned and contiguous. Then
            the plan is made where there is none, and the result is never None.
    """
    values, dtype, index = w24.values, x.dtype, x.get_device()
    if not checked and (
        values.dtype is not dtype or values.get_device() != index or values.requires_grad
    ):
        return None
    bias_address = 0
    if bias is not None:
        if not checked and (
            bias.dtype is not dtype
            or bias.get_device() != index
            or bias.shape != (w24.shape[0],)
            or not bias.is_contiguous()
        ):
            return None
        bias_address = bias.data_ptr()
    strides = None if x.is_contiguous() else x.stride()
    key = x.shape, strides, dtype, index, w24.shape, bias_address, activation
    known = _plans.get(key)
    if known is None:
        if not checked:
            return None
        known = _make_plan(*key) if _fits(x) else _COPIED
        if len(_plans) >= _native.module().CUSPARSELT_MAX_PLANS:
            _plans.clear()
        _plans[key] = known
    if not checked and current_device() != index:  # not before: only a known one is on a GPU
        return None
    address = x.data_ptr()
    if known is _COPIED or address % _ALIGNMENT:
        return _linear_of_a_copy(x, w24, bias, activation)
    plan, workspace_bytes, sizes, y_strides, native = known
    y = empty_strided(sizes, y_strides, dtype)
    blob, y_address, stream = values.data_ptr(), y.data_ptr(), current_stream(index)
    missing = native.cusparselt_matmul(plan, blob, address, y_address, 0, stream)
    if missing:
        if missing == native.CUSPARSELT_NO_WORKSPACE:
            missing = _matmul_with_workspace(
                native, index, workspace_bytes, not checked, plan, blob, address, y_address, stream
            )
        if missing:
            _plans.pop(key, None)  # the plan has left the native cache
            return linear_again(x, w24, bias, activation, True)
    if activation is None or activation == "relu":
        return y
    return activate(y.float(), activation).to(dtype)


def _matmul_with_workspace(native, index, size, lend, plan, blob, x, y, stream):
    """The native call with memory of its own, where it found none that was lent for its stream.

    Calls that may overlap must not share a workspace, so each stream has its own. What a graph
    captures gets new memory in every call, from the pool of the graph, because a graph may be
    replayed on any stream. Within the custom op nothing is lent: torch.compile counts the tensors
    that stay in its pool.
    """
    space = empty_strided((size,), (1,), torch.uint8)
    address = space.data_ptr()
    missing = native.cusparselt_matmul(plan, blob, x, y, address, stream)
    if lend and size <= _KEPT_BYTES and not native.capture_id(stream):
        native.cusparselt_lend_workspace(index, stream, address, size)
        _workspaces[index, stream] = space
    return missing


def _fits(x):
    """True when the library takes x as it is; its address is another matter."""
    in_features = x.shape[-1]
    tokens = x.numel() // in_features
    if not tokens or tokens % _DENSE_MULTIPLE:
        return False
    if x.is_contiguous():
        return True
    if x.dim() != 2:
        return False
    stride, step = x.stride()
    return step == 1 and stride >= in_features and stride % _DENSE_MULTIPLE == 0


def _linear_of_a_copy(x, w24, bias, activation):
    """`linear` of rows that fit. What is in those that only fill them up reaches no other row."""
    out_features, in_features = w24.shape
    tokens = x.numel() // in_features
    if not tokens:
        return x.new_empty(*x.shape[:-1], out_features)
    rows = empty_strided((padded_tokens(tokens), in_features), (in_features, 1), x.dtype)
    folded = x.dim() == 2
    rows.narrow(0, 0, tokens).copy_(x if folded else x.reshape(tokens, in_features))
    y = linear_again(rows, w24, bias, activation, True).narrow(0, 0, tokens)
    return y if folded else y.view(*x.shape[:-1], out_features)


def _make_plan(shape, strides, dtype, index, weight_shape, bias_address, activation):
    out_features, in_features = weight_shape
    tokens = shape.numel() // in_features
    algorithm = algorithm_for(index, dtype, out_features, in_features, tokens)
    native = _native.module()
    plan, workspace_bytes, _ = native.cusparselt_plan(
        index,
        DTYPES[dtype],
        out_features,
        tokens,
        in_features,
        strides[0] if strides else in_features,
        out_features,
        bias_address,
        activation == "relu",
        *algorithm,
    )
    sizes = (*shape[:-1], out_features)
    y_strides = tuple(math.prod(sizes[place + 1 :]) for place in range(len(sizes)))
    return plan, workspace_bytes, sizes, y_strides, native


# ---- the weight ----------------------------------------------------------------------------------


def pack(w24):
    """The same weight in layout "cusparselt"; w24 itself when it has it already.

    Args:
        w24: Sparse24 float16 | bfloat16 on a GPU, both sizes multiples of 16.
    Returns:
        Sparse24 with one new tensor, of about 0.56 of the dense bytes. It has been multiplied with
        the identity and compared: what it stands for is w24, bit for bit.
    Raises:
        TypeError: dtype.   ValueError: shape.   NotImplementedError: no library, or a combination
        that it or this module refuses; the message says why.   RuntimeError: the library fails, or
        gives back another weight.
    Notes:
        Needs the dense weight for a moment, twice.
    """
    if w24.layout == LAYOUT:
        return w24
    op = "sparsekern.cusparselt_backend.pack"
    remedy = "Use packed=None for this layer."
    check(
        w24.dtype in DTYPES,
        op,
        "a weight of dtype float16 or bfloat16",
        w24.dtype,
        "Call weight.to(torch.bfloat16).",
        TypeError,
    )
    why = shape_refusal(*w24.shape)
    check(not why, op, "a weight that the library takes", why, remedy)
    index, code = w24.values.get_device(), DTYPES[w24.dtype]
    why = refusal(index, w24.dtype)
    check(not why, op, "a usable cuSPARSELt", why, remedy, NotImplementedError)
    native = _native.module()
    with torch.cuda.device(index):
        dense = decompress(w24)
        blob_bytes, buffer_bytes = native.cusparselt_compressed_bytes(index, code, *w24.shape)
        values = dense.new_empty(-(-blob_bytes // dense.element_size()))
        buffer = dense.new_empty(max(1, buffer_bytes), dtype=torch.uint8)
        native.cusparselt_compress(
            index,
            code,
            *w24.shape,
            dense.data_ptr(),
            values.data_ptr(),
            buffer.data_ptr(),
            current_stream(index),
        )
        metadata = w24.metadata.new_empty(0)
        packed = Sparse24(values, metadata, w24.shape, LAYOUT)
        for start, columns in _dense_columns(packed):
            if not torch.equal(columns, dense[:, start : start + columns.shape[1]]):
                got = f"another one from {library()[0].name}, from column {start} on"
                raise RuntimeError(message(op, "the weight back from its blob", got, remedy))
    return packed


def unpack(w24):
    """The weight in layout "rowmajor", bit for bit as `compress` makes it from the dense one.

    By multiplying with the identity: each sum has one product that is not zero, so it is exact. In
    slices of columns, so that no dense copy exists as a whole.
    """
    out_features, in_features = w24.shape
    values = w24.values.new_empty(out_features, in_features // 2)
    metadata = w24.metadata.new_empty(out_features, in_features // 8)
    for start, columns in _dense_columns(w24):
        part, stop = compress(columns), start + columns.shape[1]
        values[:, start // 2 : stop // 2] = part.values
        metadata[:, start // 8 : stop // 8] = part.metadata
    return Sparse24(values, metadata, w24.shape)


def _dense_columns(w24):
    """Yields (start, W[:, start:stop]) over the columns of a weight in layout "cusparselt"."""
    out_features, in_features = w24.shape
    size = _UNPACK_ELEMENTS // (out_features + in_features)
    size = max(1, size // SPARSE_MULTIPLE) * SPARSE_MULTIPLE
    for start in range(0, in_features, size):
        count = min(size, in_features - start)
        identity = w24.values.new_zeros(count, in_features)
        identity.diagonal(start).fill_(1)
        yield start, linear(identity, w24, None, None).t()
