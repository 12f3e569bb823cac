"""The CUDA backend of sparsekern.linear: the native kernels, on weights in "tile64".

    Hopper, up to 64 tokens   decode: streams the weights once   csrc/linear/decode_sm90.cuh
    Hopper, any number        prefill: wgmma.sp                  csrc/linear/prefill_sm90.cuh
    Hopper, few tiles         split: the same, K is shared       csrc/linear/splitk_sm90.cuh
    Ampere, Ada, newer GPUs   mma: mma.sp, any number            csrc/linear/mma_sm80.cuh

The last one runs on Hopper, too: where it is the fastest, for few tokens, and when asked for as
backend "cuda-mma" (`mma_linear`). Weights of 8 bits: scaled_linear.py.

A variant is chosen in configs.py. Which one a problem gets is bound once (`bind`); a call at one
token takes a few microseconds on the GPU, so what is left for a call is little work on the host: no
object is built, and torch is asked through its raw functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern import _native
from sparsekern.backends import memory, registry
from sparsekern.backends.cpu import activate
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.backends.cuda.configs import (  # the tools' names for them
    _PLAIN,
    Choice,
    Types,
    _mma_tiles,
    _tiles,
    built,
    choose,
    has_code,
    heuristic,
    hopper_refusal,
    in_halves,
    mma_tile,
    refusal,
    runnable,
    variants,
)
from sparsekern.backends.cuda.native import gated_config
from sparsekern.backends.memory import nothing_kept
from sparsekern.backends.protocol import ALIGNMENT, Launch, Problem, problem_of
from sparsekern.errors import message
from sparsekern.formats import dtypes
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.formats.tile64 import LAYOUT, scale_group
from sparsekern.utils.torch_raw import current_device as _current_device
from sparsekern.utils.torch_raw import current_stream as _current_stream
from sparsekern.utils.torch_raw import empty_strided as _empty_strided

__all__ = [
    "Choice",
    "Types",
    "built",
    "_mma_tiles",
    "_tiles",
    "bind",
    "bind_gated",
    "choose",
    "config",
    "forget_plans",
    "gated_linear",
    "has_code",
    "heuristic",
    "hopper_refusal",
    "launcher",
    "linear",
    "mma_config",
    "mma_linear",
    "nothing_kept",
    "packs",
    "refusal",
    "runnable",
    "variants",
]

_MOST = 2**31 - 1024  # of any size: the kernels count in 32 bits, and up to the end of a tile
# Bytes that every row of x begins at a multiple of: what the copy engine needs; what the mma.sp
# kernel does, of x of 16 bits.
_ROW, _MMA_ROW = 16, 8

# (tokens, out_features, in_features, name of the dtype, GPU) -> (kernel, its config)
Plan = Callable[[int, int, int, str, int], tuple[str, int]]


# ---- what can run, and how -----------------------------------------------------------------------


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """True where weights of this dtype are best kept in layout "tile64", because kernels run it."""
    if device.type != "cuda" or dtype not in dtypes.NATIVE:
        return False
    return not refusal(torch.cuda.current_device() if device.index is None else device.index)


def layout_refusal(problem: Problem) -> str:
    """Why the weight's layout is not "tile64": the GPU has no kernels for it, or nobody packed it;
    empty when it is."""
    layout = problem.spec.layout
    if layout == LAYOUT:
        return ""
    why = refusal(problem.gpu) if problem.device.type == "cuda" else ""
    return why or f"backend 'cuda' needs layout 'tile64' (SparseLinear), got {layout!r}"


def why_not(problem: Problem) -> str | None:
    """Why the kernels cannot compute a problem; None when they can."""
    if why := layout_refusal(problem):
        return why
    if problem.device.type != "cuda":
        return f"backend 'cuda' needs x on a GPU, got {problem.device}"
    if problem.dtype not in dtypes.NATIVE or not problem.spec.element.plain:
        got = problem.spec.storage
        return f"backend 'cuda' needs {dtypes.native_names()}, got {got}"
    return refusal(problem.gpu) or None


def why_not_gated(problem: Problem) -> str | None:
    """Why one launch cannot compute a gated pair: Hopper, few tokens, both weights "tile64"."""
    most, gated = heuristics.GATED_TOKENS, problem.gated
    if gated is None or gated.layout != LAYOUT:
        return "a gated pair needs both weights in layout 'tile64'"
    if problem.tokens > most:
        return f"the gated kernel takes up to {most} tokens, got {problem.tokens}"
    return why_not(problem) or hopper_refusal(problem.gpu) or None


@lru_cache(maxsize=4096)
def _plan(
    tokens: int, out_features: int, in_features: int, dtype: str, index: int
) -> tuple[str, int]:
    """(kernel, its config) for a problem on GPU `index`."""
    _check_sizes(tokens, out_features, in_features)
    return variants()[choose(tokens, out_features, in_features, dtype, index).variant]


@lru_cache(maxsize=4096)
def _mma_plan(
    tokens: int, out_features: int, in_features: int, dtype: str, index: int
) -> tuple[str, int]:
    """As `_plan`, with the mma.sp kernel and its tile by the cost model, whatever the GPU."""
    _check_sizes(tokens, out_features, in_features)
    return "mma", _mma_tiles()[mma_tile(tokens, out_features, in_features, index)]


def _check_sizes(*sizes: int) -> None:
    """ValueError for a number of tokens or features that the kernels cannot count."""
    if max(sizes) > _MOST:
        expected = f"tokens, out_features and in_features up to {_MOST}"
        raise ValueError(message("sparsekern.linear", expected, str(max(sizes)), "Split x."))


def forget_plans() -> None:
    """Choose anew for every problem, from the tables as they are now."""
    tuning.forget()
    _plan.cache_clear()
    registry.changed()


@lru_cache(maxsize=4096)
def _native_linear(
    kernel: str,
    config: int,
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    residual_stride: int,
    dtype: str | Types,
    activation: str | None,
    scale_group: int = 0,
    stored: str = "",
    y_step: int = 1,
) -> Any:
    """The native module's Linear for a problem; it holds no memory of the GPU. dtype: the name of
    all types, or they. scale_group: of int4, see tile64.scale_group. stored: of a weight that is
    widened to the type of the weight first. y_step: rows of y from a token to the next."""
    types = Types.of(dtype) if isinstance(dtype, str) else dtype
    return _native.module().Linear(
        kernel=kernel,
        config=config,
        tokens=tokens,
        out_features=out_features,
        in_features=in_features,
        x_stride=x_stride,
        y_stride=y_step * out_features,
        residual_stride=residual_stride,
        dtype=types.y,
        weight_dtype=types.weight,
        x_dtype=types.x,
        activation=activation,
        **({"scale_group": scale_group} if scale_group else {}),
        **({"stored_dtype": stored} if stored else {}),
    )


# ---- workspaces ----------------------------------------------------------------------------------

# {(GPU, stream, captured): (number of the capture or 0, address, tensor)} for the launches that
# need one: of the prefill kernel, and of the split kernel across clusters.
_workspaces: dict[tuple[int, int, bool], tuple[int, int, Tensor]] = {}


def _workspace(index: int, stream: int) -> tuple[int, int, Tensor]:
    """(number, address, tensor) of the workspace for the next such launch on this stream of the
    current GPU. The caller holds it until the launch.

    Launches that may overlap must not share one: so each stream has its own, and so has each graph
    capture, because a graph may be replayed on any stream. A captured one lives in the graph's
    memory pool, and every replay clears its counters first.
    """
    native = _native.module()
    if memory.depth:
        return _new_workspace(native, index, 0)
    capture = native.capture_id(stream)
    known = _workspaces.get((index, stream, capture > 0))
    if known is None or known[0] != capture:
        known = _new_workspace(native, index, capture)
        _workspaces[index, stream, capture > 0] = known
    return known


def _new_workspace(native: Any, index: int, number: int) -> tuple[int, int, Tensor]:
    size = native.prefill_workspace_bytes()
    space = torch.empty(size, dtype=torch.uint8, device=index)
    space[: native.PREFILL_COUNTER_BYTES].zero_()
    return number, space.data_ptr(), space


# ---- what explain shows --------------------------------------------------------------------------


def _choice(x: Tensor, w24: Sparse24) -> Choice:
    out_features, in_features = w24.shape
    return choose(x.shape[0], out_features, in_features, _name(x.dtype), x.get_device())


def _name(dtype: torch.dtype) -> str:
    return dtypes.PLAIN[dtype].name


def config(x: Tensor, w24: Sparse24) -> str:
    """What sparsekern.explain shows: "decode 256 rows, split 4", "prefill 256x192 cluster 2x1"."""
    return _choice(x, w24).variant


def mma_config(x: Tensor, w24: Sparse24) -> str:
    """The config of the mma.sp kernel in words: "mma 64x8, 2x1x4 warps"."""
    out_features, in_features = w24.shape
    return f"mma {mma_tile(x.shape[0], out_features, in_features, x.get_device())}"


# ---- running it ----------------------------------------------------------------------------------


def bind(problem: Problem, plan: Plan = _plan) -> Launch:
    """The launch of a problem: y = activation(x · Wᵀ + bias), summed in float32, rounded once.

    x is read where it lies when its rows are 16-byte aligned and evenly spaced, or 8-byte aligned
    ahead of the mma.sp kernel; else it is copied. Of rows of which every other one is aligned, as
    with in_features % 8 == 4, the others alone are copied, and there are two launches, where that
    is expected to be faster (cost_model.in_halves). The weight's tensors must be complete: the
    decode kernel reads them before the work queued ahead of it has finished (see tile64.pack).
    """
    (out_features, in_features), tokens = problem.spec.shape, problem.tokens
    if not (tokens and out_features and in_features):
        return _bind_degenerate(problem)
    dtype, index = problem.dtype, problem.gpu
    kernel, config = plan(tokens, out_features, in_features, _name(dtype), index)
    anywhere = _bind_any(problem, kernel, config)
    row = _row(kernel)
    whole_rows = in_features * dtype.itemsize % row == 0
    if not (problem.aligned and problem.x_stride is None and whole_rows):
        return anywhere
    size = tokens, out_features, in_features
    run = _native_linear(kernel, config, *size, in_features, 0, _name(dtype), problem.activation)
    sizes = (*problem.x_shape[:-1], out_features)
    strides = _contiguous_strides(sizes)
    if run.needs_workspace:
        return _with_workspace(run, index, sizes, strides, dtype, anywhere)

    def launch(x: Tensor, w24: Sparse24, bias: Tensor | None = None) -> Tensor | None:
        address = x.data_ptr()
        if address % row or index != _current_device():
            return anywhere(x, w24, bias)
        tensors = w24.tensors
        y = _empty_strided(sizes, strides, dtype)
        run(
            x=address,
            values=tensors["values"].data_ptr(),
            metadata=tensors["metadata"].data_ptr(),
            y=y.data_ptr(),
            stream=_current_stream(index),
            bias=0 if bias is None else bias.data_ptr(),
        )
        return y

    return launch


def _with_workspace(
    run: Any,
    index: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    anywhere: Launch,
) -> Launch:
    def launch(x: Tensor, w24: Sparse24, bias: Tensor | None = None) -> Tensor | None:
        address = x.data_ptr()
        if address % ALIGNMENT or index != _current_device():
            return anywhere(x, w24, bias)
        tensors = w24.tensors
        y = _empty_strided(sizes, strides, dtype)
        stream = _current_stream(index)
        space = _workspace(index, stream)
        run(
            x=address,
            values=tensors["values"].data_ptr(),
            metadata=tensors["metadata"].data_ptr(),
            y=y.data_ptr(),
            stream=stream,
            bias=0 if bias is None else bias.data_ptr(),
            workspace=space[1],
        )
        return y

    return launch


def _bind_any(problem: Problem, kernel: str, config: int) -> Callable[..., Tensor | None]:
    """The launch for any strides, address and GPU of x, and a residual [tokens, out_features]."""
    dtype, index, activation = problem.dtype, problem.gpu, problem.activation
    sizes = (*problem.x_shape[:-1], problem.out_features)
    strides = _contiguous_strides(sizes)
    types = Types.of(_name(dtype))

    def launch(
        x: Tensor, w24: Sparse24, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor | None:
        if index != _current_device():
            with torch.cuda.device(index):
                return launch(x, w24, bias, residual)
        parts = _parts(x, w24, kernel, config, types, index)
        _copy(parts)
        y = _empty_strided(sizes, strides, dtype)
        runs = [*_runs(parts, w24, kernel, config, types, y, residual, activation)]
        stream = _current_stream(index)
        space = _workspace(index, stream) if runs[0][0].needs_workspace else (0, 0, None)
        for run, of_part in runs:
            run(
                **of_part,
                values=w24.tensors["values"].data_ptr(),
                metadata=w24.tensors["metadata"].data_ptr(),
                stream=stream,
                bias=0 if bias is None else bias.data_ptr(),
                workspace=space[1],
            )
        return y

    return launch


def _bind_degenerate(problem: Problem) -> Launch:
    """The launch of an empty sum."""
    sizes, activation = (*problem.x_shape[:-1], problem.out_features), problem.activation

    def launch(
        x: Tensor, w24: Sparse24, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return _degenerate(x.new_empty(sizes), bias, activation, residual)

    return launch


def linear(
    x: Tensor,
    w24: Sparse24,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    plan: Plan = _plan,
) -> Tensor:
    """y = activation(x · Wᵀ + bias) + residual, summed in float32 and rounded once; bound anew.

    Args:
        x: [..., in_features] on a GPU of 8.0 or newer, any strides.
        w24: in layout "tile64", complete in memory.
        residual: [..., out_features], dtype and device of x, any strides, or None.
        plan: chooses the kernel and its variant.
    Returns:
        [..., out_features], new and contiguous.
    """
    problem = problem_of(x, w24.spec, activation, bias is not None)
    bias = None if bias is None else bias.contiguous()
    if residual is None:
        y = bind(problem, plan)(x, w24, bias)
    else:
        out_features = w24.shape[0]
        residual = residual.reshape(problem.tokens, out_features)
        if residual.stride(1) != 1:
            residual = residual.contiguous()
        if not (problem.tokens and out_features and w24.shape[1]):
            residual = residual.view(*x.shape[:-1], out_features)
            y = _bind_degenerate(problem)(x, w24, bias, residual)
        else:
            kernel = plan(problem.tokens, *problem.sizes, _name(x.dtype), problem.gpu)
            y = _bind_any(problem, *kernel)(x, w24, bias, residual)
    assert y is not None  # the problem is that of x
    return y


def mma_linear(
    x: Tensor, w24: Sparse24, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`linear` by the mma.sp kernel, whatever the GPU."""
    return linear(x, w24, bias, activation, plan=_mma_plan)


def launcher(
    variant: str,
    x: Tensor,
    w24: Sparse24,
    y: Tensor,
    workspace: Tensor,
    x_scale: Tensor | None = None,
) -> Callable[[], None]:
    """A function without arguments that computes y = x · Wᵀ by one variant, on the current stream.

    For measuring: nothing is checked or allocated in a call, so a CUDA graph can hold many. Rows of
    x that the kernel cannot fetch are copied in every call, as in `bind`.

    Args:
        variant: a key of `variants` for these types.
        x: [tokens, in_features], y: [tokens, out_features], both contiguous, on the current GPU.
        workspace: uint8 [prefill_workspace_bytes], zero, for launches that follow each other.
        x_scale: float32 [tokens], of an x of 8 bits.
    """
    spec, device = w24.spec, x.get_device()
    of_x = _name(x.dtype) if x.dtype in dtypes.PLAIN else spec.storage
    types = Types(spec.storage, of_x, _name(y.dtype))
    kernel, number = variants(_PLAIN if spec.element.plain else types)[variant]
    parts = _parts(x, w24, kernel, number, types, device)
    group = 0 if spec.element.plain else scale_group(spec)
    runs = [*_runs(parts, w24, kernel, number, types, y, group=group)]
    channel_scale = None if group else w24.tensors.get(SCALE)
    addresses = dict(
        values=w24.values.data_ptr(),
        metadata=w24.metadata.data_ptr(),
        workspace=workspace.data_ptr() if runs[0][0].needs_workspace else 0,
        channel_scale=0 if channel_scale is None else channel_scale.data_ptr(),
        token_scale=0 if x_scale is None else x_scale.data_ptr(),
    )
    keep = w24, y, workspace, x_scale

    def launch(keep: object = keep) -> None:
        _copy(parts)
        for run, of_part in runs:
            run(**of_part, **addresses, stream=_current_stream(device))

    return launch


def bind_gated(problem: Problem) -> Launch:
    """The launch of a gated pair: silu(x · Gᵀ) · (x · Uᵀ), rounded once; at most 32 tokens."""
    (out_features, in_features), tokens = problem.spec.shape, problem.tokens
    dtype, index = problem.dtype, problem.gpu
    sizes = (*problem.x_shape[:-1], out_features)
    if not (tokens and out_features and in_features):
        return lambda x, gate24, up24: x.new_zeros(sizes)
    strides, number = _contiguous_strides(sizes), gated_config(out_features, in_features)

    def launch(x: Tensor, gate24: Sparse24, up24: Sparse24) -> Tensor | None:
        if index != _current_device():
            with torch.cuda.device(index):
                return launch(x, gate24, up24)
        rows, x_stride = _aligned_rows(x, tokens, in_features)
        size = tokens, out_features, in_features
        run = _native_linear("decode_gated", number, *size, x_stride, 0, _name(dtype), None)
        gate, up = gate24.tensors, up24.tensors
        y = _empty_strided(sizes, strides, dtype)
        run(
            x=rows.data_ptr(),
            values=gate["values"].data_ptr(),
            metadata=gate["metadata"].data_ptr(),
            up_values=up["values"].data_ptr(),
            up_metadata=up["metadata"].data_ptr(),
            y=y.data_ptr(),
            stream=_current_stream(index),
        )
        return y

    return launch


def gated_linear(x: Tensor, gate24: Sparse24, up24: Sparse24) -> Tensor:
    """silu(x · Gᵀ) · (x · Uᵀ) in one launch, rounded once; x as in `linear`, at most 32 tokens."""
    y = bind_gated(problem_of(x, gate24.spec, gated=up24.spec))(x, gate24, up24)
    assert y is not None
    return y


def _contiguous_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[place + 1 :]) for place in range(len(sizes)))


def _row(kernel: str, itemsize: int = 2) -> int:
    """Bytes that every row of x must begin at a multiple of for this kernel."""
    return _MMA_ROW if kernel == "mma" and itemsize == 2 else _ROW


class _Part(NamedTuple):
    """Tokens of x that one launch takes: first, first + step, ..."""

    rows: Tensor  # what it reads: these tokens of x where they lie, or memory for a copy of them
    stride: int  # of the rows, in elements
    tokens: int
    first: int = 0
    step: int = 1
    source: Tensor | None = None  # what is copied to rows before the launch: these tokens of x


def _parts(
    x: Tensor, w24: Sparse24, kernel: str, config: int, types: Types, index: int
) -> list[_Part]:
    """What the launches of a kernel read."""
    out_features, in_features = w24.shape
    tokens, row = x.numel() // in_features, _row(kernel, x.dtype.itemsize)
    halves = in_halves(kernel, config, tokens, out_features, in_features, index, types)
    return _rows(x, tokens, in_features, row, halves)


def _runs(
    parts: Sequence[_Part],
    w24: Sparse24,
    kernel: str,
    config: int,
    types: Types,
    y: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    group: int = 0,
) -> Iterator[tuple[Any, dict[str, int]]]:
    """(native Linear, its addresses of x, y and the residual) of each part; y is contiguous."""
    out_features = w24.shape[0]
    row, stride = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    for part in parts:
        size, step = (part.tokens, *w24.shape), part.step
        fixed = (kernel, config, *size, part.stride, step * stride, types, activation, group)
        of_part = dict(
            x=part.rows.data_ptr(), y=y.data_ptr() + part.first * out_features * y.dtype.itemsize
        )
        if residual is not None:
            of_part["residual"] = row + part.first * stride * residual.dtype.itemsize
        yield _native_linear(*fixed, y_step=step), of_part


def _aligned_rows(x: Tensor, tokens: int, in_features: int) -> tuple[Tensor, int]:
    """Rows that begin at a multiple of 16 bytes, and their stride in elements: x or a copy."""
    parts = _rows(x, tokens, in_features)
    _copy(parts)
    return parts[0].rows, parts[0].stride


def _rows(
    x: Tensor, tokens: int, in_features: int, row: int = _ROW, halves: bool = False
) -> list[_Part]:
    """Rows that begin at a multiple of `row` bytes: x itself, or memory for a copy, of rows that 16
    bytes divide.

    halves: where every other token of x begins there, these are a part, and the rest another.
    """
    size = x.dtype.itemsize
    padded = -(-in_features * size // _ROW) * _ROW // size
    if x.is_contiguous():
        stride, step = in_features, 1
    else:
        x = x.reshape(tokens, in_features)
        stride, step = x.stride()
    if tokens == 1:
        stride = padded  # never taken: any valid one will do
    inside = step == 1 and stride >= in_features
    beyond, apart = x.data_ptr() % row, stride * size % row
    if inside and not (beyond or apart):
        return [_Part(x, stride, tokens)]
    x = x.reshape(tokens, in_features)
    if not (halves and inside and 2 * apart == row and beyond in (0, apart)):
        return [_Part(x.new_empty((tokens, padded))[:, :in_features], padded, tokens, source=x)]
    first = int(beyond > 0)
    lie, others = x[first::2], x[1 - first :: 2]
    rows = lie.new_empty((len(others), padded))[:, :in_features]
    return [
        _Part(lie, 2 * stride, len(lie), first, 2),
        _Part(rows, padded, len(others), 1 - first, 2, others),
    ]


def _copy(parts: Sequence[_Part]) -> None:
    for part in parts:
        if part.source is not None:
            _copy_rows(part.rows, part.source)


def _copy_rows(rows: Tensor, x: Tensor) -> None:
    """x to rows of the same sizes and dtype; 8 bytes at a time where its rows begin at 8, because
    torch takes as long for an element of 2 bytes."""
    of_8 = 8 // x.dtype.itemsize
    places = x.shape[1], x.stride(0), x.storage_offset()
    if x.stride(1) == 1 and not any(at % of_8 for at in places) and x.data_ptr() % 8 == 0:
        rows, x = rows.view(torch.int64), x.detach().view(torch.int64)
    rows.copy_(x)


def _degenerate(
    y: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """The result of an empty sum: activation(bias) + residual in every row."""
    total = (
        torch.zeros(y.shape, device=y.device, dtype=torch.float32)
        if bias is None
        else bias.float().expand(y.shape)
    )
    total = activate(total, activation)
    return y.copy_(total if residual is None else total + residual)
