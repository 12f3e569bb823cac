"""The CUDA backend of sparsekern.linear: the native kernels, on weights in "tile64".

    Hopper, up to 64 tokens   decode: streams the weights once   csrc/linear/decode_sm90.cuh
    Hopper, any number        prefill: wgmma.sp                  csrc/linear/prefill_sm90.cuh
    Hopper, few tiles         split: the same, K is shared       csrc/linear/splitk_sm90.cuh
    Ampere, Ada, newer GPUs   mma: mma.sp, any number            csrc/linear/mma_sm80.cuh

The last one runs on Hopper, too: where it is the fastest, for few tokens, and when asked for as
backend "cuda-mma" (`mma_linear`).

The same functions as every backend module, plus `packs`, by which SparseLinear decides on its
layout, and the gated pair of a gated MLP. Which kernel runs, and which variant of it, is in the
tuned tables of backends/cuda/tuned_tables.py; where they know nothing, backends/cuda/cost_model.py chooses.

A call at one token takes a few microseconds on the GPU, so this path is written for little work on
the host: no object is built, what depends on shapes alone is cached, and torch is asked through its
raw functions.
"""

from __future__ import annotations

import contextlib
import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from sparsekern import _native
from sparsekern.backends.cpu import activate
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.backends.cuda.cost_model import MmaTile, RowBlocks, SplitTile, Tile
from sparsekern.errors import message
from sparsekern.utils.torch_raw import current_device as _current_device
from sparsekern.utils.torch_raw import current_stream as _current_stream
from sparsekern.utils.torch_raw import empty_strided as _empty_strided

LAYOUT = "tile64"
_DTYPES = {torch.float16: 0, torch.bfloat16: 1}  # DType in csrc/core/problem.h
_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3}  # Activation in csrc/core/problem.h
_DTYPE_NAMES = {0: "float16", 1: "bfloat16"}
_AUTOMATIC = 0  # config of the decode kernel: it chooses
_MOST = 2**31 - 1024  # of any size: the kernels count in 32 bits, and up to the end of a tile
_RUNS = "the layout is 'tile64' and the GPU has compute capability 8.0 or newer"


# ---- what can run --------------------------------------------------------------------------------


@cache
def _capability(index):
    return torch.cuda.get_device_capability(index)


@cache
def refusal(index):
    """Why the kernels cannot run on GPU `index`; empty when they can."""
    if not _native.available():
        return _native.reason()
    capability = _capability(index)
    gpu = "{}.{}".format(*capability)
    if capability < (8, 0):
        return f"backend 'cuda' needs compute capability 8.0 or newer, cuda:{index} has {gpu}"
    archs = _native.module().build_info()["archs"]
    if capability[0] != 9 and not has_code(capability, archs):
        return (
            f"the CUDA module was built for {', '.join(archs)}, cuda:{index} has {gpu}; "
            "install sparsekern again without SPARSEKERN_CUDA_ARCHS"
        )
    return ""


def has_code(capability, archs):
    """True when a module built for `archs` ("80", "90a", ...) holds code for such a GPU.

    Machine code runs on the same major and no lower minor version; of the last arch without a
    suffix there is PTX, too, which newer GPUs compile (see CMakeLists.txt).
    """
    plain = [divmod(int(arch), 10) for arch in archs if arch.isdigit()]
    native = any(arch[0] == capability[0] and arch <= capability for arch in plain)
    return native or (bool(plain) and plain[-1] <= capability)


def hopper_refusal(index):
    """The same for the kernels that need Hopper: decode, prefill and the gated pair."""
    major, minor = _capability(index)
    if major == 9:
        return refusal(index)
    return f"the kernel needs compute capability 9.x, cuda:{index} has {major}.{minor}"


def packs(device, dtype):
    """True where weights of this dtype are best kept in layout "tile64", because kernels run it."""
    if device.type != "cuda" or dtype not in _DTYPES:
        return False
    return not refusal(torch.cuda.current_device() if device.index is None else device.index)


def why_not(x, w24):
    """Why this backend cannot compute linear(x, w24), as text; empty when it can."""
    if w24.layout != LAYOUT:
        return f"backend 'cuda' needs layout 'tile64' (SparseLinear), got {w24.layout!r}"
    if not x.is_cuda:
        return f"backend 'cuda' needs x on a GPU, got {x.device}"
    if x.dtype not in _DTYPES:
        return f"backend 'cuda' needs float16 or bfloat16, got {x.dtype}"
    return refusal(x.get_device())


def supported(x, w24):
    """(True, why) for x on a GPU of 8.0 or newer and a weight in layout "tile64"."""
    reason = why_not(x, w24)
    return not reason, reason or _RUNS


# ---- what to run ---------------------------------------------------------------------------------


@cache
def _tiles():
    """{Tile: config index} of the native module."""
    return {
        Tile(*(c[field] for field in Tile._fields)): c["index"]
        for c in _native.module().prefill_configs()
    }


def _built():
    """{variant as in backends/cuda/cost_model.py: (native function, its config)} of the native module."""
    decode = {
        RowBlocks(*(c[field] for field in RowBlocks._fields)): ("decode", c["index"])
        for c in _native.module().decode_configs()
    }
    prefill = {tile: ("prefill", index) for tile, index in _tiles().items()}
    split = {
        SplitTile(*(c[field] for field in SplitTile._fields)): ("split", c["index"])
        for c in _native.module().split_configs()
    }
    return decode | prefill | split | {tile: ("mma", index) for tile, index in _mma_tiles().items()}


@cache
def variants():
    """{name: (native function, its config)} of everything that the module was built with.

    The names are what `sparsekern.explain` shows and what tuned tables hold.
    """
    return {heuristics.name(variant): of for variant, of in _built().items()}


def runnable(index):
    """The variants that GPU `index` chooses among: all on Hopper, elsewhere mma."""
    hopper = _capability(index)[0] == 9
    return {name: of for name, of in variants().items() if hopper or of[0] == "mma"}


class Choice(NamedTuple):
    """What runs a problem, and why; us is its time where a table has measured just this."""

    variant: str  # a key of variants()
    why: str
    us: float | None = None


def heuristic(tokens, out_features, in_features, index):
    """The name of the variant that heuristics choose on GPU `index`."""
    if _capability(index)[0] != 9:
        return f"mma {_mma_tile(tokens, out_features, in_features, index)}"
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    problem = tokens, out_features, in_features, multiprocessors
    return heuristics.name(heuristics.fastest(*problem, tuple(_built())))


def choose(tokens, out_features, in_features, dtype, index):
    """The Choice for a problem on GPU `index`; dtype as in csrc/core/problem.h."""
    gpu, known = tuning.gpu_name(index), runnable(index)
    problem = _DTYPE_NAMES[dtype], out_features, in_features, tokens
    tuned = tuning.lookup(gpu, *problem, known)
    if tuned is None:
        name = heuristic(tokens, out_features, in_features, index)
        return Choice(name, "variant by heuristics, no tuned table knows this problem")
    which = "your tuned table" if tuned.source == tuning.YOURS else "the shipped tuned table"
    why, exact = f"variant from {which}", (tuned.dtype, tuned.tokens) == (problem[0], tokens)
    why += "" if tuned.tokens == tokens else f" at {tuned.tokens} tokens"
    why += "" if tuned.dtype == problem[0] else f", measured in {tuned.dtype}"
    return Choice(tuned.variant, why, tuned.us if exact else None)


@cache
def _mma_tiles():
    """{MmaTile: config index} of the native module."""
    return {
        MmaTile(*(c[field] for field in MmaTile._fields)): c["index"]
        for c in _native.module().mma_configs()
    }


def _mma_tile(tokens, out_features, in_features, index):
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    problem = tokens, out_features, in_features, multiprocessors
    rates = heuristics.mma_rates(_capability(index))
    return heuristics.mma_tile(*problem, rates, tuple(_mma_tiles()))


@lru_cache(maxsize=4096)
def _mma_plan(tokens, out_features, in_features, dtype, index):
    """As `_plan`, with the mma.sp kernel and its tile by heuristics, whatever the GPU."""
    _check_sizes(tokens, out_features, in_features)
    tile = _mma_tile(tokens, out_features, in_features, index)
    return _native.module().mma, _mma_tiles()[tile], False


@lru_cache(maxsize=4096)
def _plan(tokens, out_features, in_features, dtype, index):
    """(native function, its config, whether it takes a workspace) for a problem on GPU `index`."""
    _check_sizes(tokens, out_features, in_features)
    kernel, config = variants()[choose(tokens, out_features, in_features, dtype, index).variant]
    return getattr(_native.module(), kernel), config, kernel == "prefill"


def _check_sizes(*sizes):
    """ValueError for a number of tokens or features that the kernels cannot count."""
    if max(sizes) > _MOST:
        expected = f"tokens, out_features and in_features up to {_MOST}"
        raise ValueError(message("sparsekern.linear", expected, max(sizes), "Split x."))


def forget_plans():
    """Choose anew for every problem, from the tables as they are now."""
    tuning.forget()
    _plan.cache_clear()
    _known.clear()


# {(shape and dtype of x, GPU, shape of the weight, activation): what `linear_again` must know}
_known = {}
_KNOWN_CALLS = 4096  # when there are so many, they are forgotten

# {(GPU, stream, captured): (number of the capture or 0, address, tensor)} for the prefill kernel.
_workspaces = {}
_keeping_nothing = 0  # calls under way in `nothing_kept`


@contextlib.contextmanager
def nothing_kept():
    """For calls within a registered op: no memory that they take stays allocated.

    torch.compile(mode="reduce-overhead") records ops in CUDA graphs whose memory pool it owns, and
    refuses tensors in it that it does not know.
    """
    global _keeping_nothing
    _keeping_nothing += 1
    try:
        yield
    finally:
        _keeping_nothing -= 1


def _workspace(index, stream):
    """(number, address, tensor) of the workspace for the next prefill launch on this stream of the
    current GPU. The caller holds it until the launch.

    Launches that may overlap must not share one: so each stream has its own, and so has each graph
    capture, because a graph may be replayed on any stream. A captured one lives in the graph's
    memory pool, and every replay clears its counters first.
    """
    native = _native.module()
    if _keeping_nothing:
        return _new_workspace(native, index, 0)
    capture = native.capture_id(stream)
    known = _workspaces.get((index, stream, capture > 0))
    if known is None or known[0] != capture:
        known = _new_workspace(native, index, capture)
        _workspaces[index, stream, capture > 0] = known
    return known


def _new_workspace(native, index, number):
    size = native.prefill_workspace_bytes()
    space = torch.empty(size, dtype=torch.uint8, device=index)
    space[: native.PREFILL_COUNTER_BYTES].zero_()
    return number, space.data_ptr(), space


def _choice(x, w24):
    return choose(x.shape[0], *w24.shape, _DTYPES[x.dtype], x.get_device())


def config(x, w24):
    """What sparsekern.explain shows: "decode 256 rows, split 4", "prefill 256x192 cluster 2x1"."""
    return _choice(x, w24).variant


def origin(x, w24):
    """(why this config, its measured time in us or None), for sparsekern.explain."""
    chosen = _choice(x, w24)
    return chosen.why, chosen.us


def mma_config(x, w24):
    """The config of the mma.sp kernel in words: "mma 64x8, 2x1x4 warps"."""
    return f"mma {_mma_tile(x.shape[0], *w24.shape, x.get_device())}"


# ---- running it ----------------------------------------------------------------------------------


def linear(x, w24, bias, activation, residual=None, plan=_plan):
    """y = activation(x · Wᵀ + bias) + residual, summed in float32 and rounded once.

    Args:
        x: [..., in_features] on a GPU of 8.0 or newer, any strides. It is copied when its rows are
            not 16-byte aligned and contiguous, as with in_features % 8 == 4.
        w24: in layout "tile64". Its tensors must be complete: the decode kernel reads them before
            the work queued ahead of it has finished (see pack.pack).
        residual: [..., out_features], dtype and device of x, any strides, or None.
        plan: chooses the kernel and its variant.
    Returns:
        [..., out_features], new and contiguous.
    """
    index = x.get_device()
    if index != _current_device():
        with torch.cuda.device(index):
            return linear(x, w24, bias, activation, residual, plan)
    out_features, in_features = w24.shape
    dtype = x.dtype
    y, tokens = _output(x, out_features, dtype)
    if not (tokens and out_features and in_features):
        return _degenerate(y, bias, activation, residual)
    address, x_stride = x.data_ptr(), in_features
    copied = address % 16 or in_features % 8 or not x.is_contiguous()
    if copied:
        x, x_stride = _aligned_rows(x, tokens, in_features)
        address = x.data_ptr()
    bias_address = residual_address = residual_stride = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_address = bias.data_ptr()
    if residual is not None:
        residual = residual.reshape(tokens, out_features)
        if residual.stride(1) != 1:
            residual = residual.contiguous()
        residual_address, residual_stride = residual.data_ptr(), residual.stride(0)
    code = _DTYPES[dtype]
    run, variant, cuts_k = plan(tokens, out_features, in_features, code, index)
    if plan is _plan and not copied and residual is None and not _keeping_nothing:
        if len(_known) >= _KNOWN_CALLS:
            _known.clear()
        key = x.shape, dtype, index, w24.shape, activation
        _known[key] = run, variant, cuts_k, tokens, tuple(y.shape), y.stride(), code
    stream = _current_stream(index)
    space = _workspace(index, stream) if cuts_k else None
    tail = (space[1], stream) if cuts_k else (stream,)
    run(
        address,
        w24.values.data_ptr(),
        w24.metadata.data_ptr(),
        bias_address,
        residual_address,
        y.data_ptr(),
        tokens,
        out_features,
        in_features,
        x_stride,
        out_features,
        residual_stride,
        code,
        _ACTIVATIONS[activation],
        variant,
        *tail,
    )
    return y


def linear_again(x, w24, bias, activation):
    """`linear` without the checks, for a call like one before; None, and nothing done, for others.

    So that a call is quick on the host: one look-up finds the kernel, and stands for `why_not` and
    for those checks of ops.check_linear that the earlier call has passed. The others are here.

    Args:
        x, w24, bias: as in `linear`, not checked; w24 in layout "tile64".
        activation: checked.
    """
    dtype, index, shape = x.dtype, x.get_device(), w24.shape
    known = _known.get((x.shape, dtype, index, shape, activation))
    if known is None or index != _current_device() or not x.is_contiguous():
        return None
    values, address = w24.values, x.data_ptr()
    if values.dtype is not dtype or values.get_device() != index or values.requires_grad:
        return None
    out_features, in_features = shape
    if address % 16 or (bias is not None and bias.shape != (out_features,)):
        return None
    bias_address = 0
    if bias is not None:
        if bias.dtype is not dtype or bias.get_device() != index or not bias.is_contiguous():
            return None
        bias_address = bias.data_ptr()
    run, variant, cuts_k, tokens, sizes, strides, code = known
    y = _empty_strided(sizes, strides, dtype)
    stream = _current_stream(index)
    space = _workspace(index, stream) if cuts_k else None
    tail = (space[1], stream) if cuts_k else (stream,)
    run(
        address,
        values.data_ptr(),
        w24.metadata.data_ptr(),
        bias_address,
        0,
        y.data_ptr(),
        tokens,
        out_features,
        in_features,
        in_features,
        out_features,
        0,
        code,
        _ACTIVATIONS[activation],
        variant,
        *tail,
    )
    return y


def launcher(variant, x, w24, y, workspace):
    """A function without arguments that computes y = x · Wᵀ by one variant, on the current stream.

    For measuring: nothing is checked or allocated in a call, so a CUDA graph can hold many.

    Args:
        variant: a key of `variants`.
        x: [tokens, in_features], y: [tokens, out_features], both contiguous, on the current GPU.
        workspace: uint8 [prefill_workspace_bytes], zero, for launches that follow each other.
    """
    kernel, index = variants()[variant]
    run, device = getattr(_native.module(), kernel), x.get_device()
    tokens, (out_features, in_features) = x.shape[0], w24.shape
    rows, x_stride = _aligned_rows(x, tokens, in_features)
    tail = (workspace.data_ptr(),) if kernel == "prefill" else ()
    arguments = (
        rows.data_ptr(),
        w24.values.data_ptr(),
        w24.metadata.data_ptr(),
        0,
        0,
        y.data_ptr(),
        tokens,
        out_features,
        in_features,
        x_stride,
        out_features,
        0,
        _DTYPES[x.dtype],
        0,
        index,
        *tail,
    )
    keep = rows, w24, y, workspace

    def launch(keep=keep):
        run(*arguments, _current_stream(device))

    return launch


def mma_linear(x, w24, bias, activation):
    """`linear` by the mma.sp kernel, whatever the GPU."""
    return linear(x, w24, bias, activation, plan=_mma_plan)


def gated_supported(x, gate24, up24):
    """True when one launch can compute gated_linear: Hopper, few tokens, both weights "tile64"."""
    return (
        up24.layout == LAYOUT
        and not why_not(x, gate24)
        and not hopper_refusal(x.get_device())
        and x.numel() <= heuristics.GATED_TOKENS * gate24.shape[1]
    )


def gated_linear(x, gate24, up24):
    """silu(x · Gᵀ) · (x · Uᵀ) in one launch, rounded once; x as in `linear`, at most 32 tokens."""
    index = x.get_device()
    if index != _current_device():
        with torch.cuda.device(index):
            return gated_linear(x, gate24, up24)
    out_features, in_features = gate24.shape
    y, tokens = _output(x, out_features, x.dtype)
    if not (tokens and out_features and in_features):
        return y.zero_()
    rows, x_stride = _aligned_rows(x, tokens, in_features)
    _native.module().decode_gated(
        rows.data_ptr(),
        gate24.values.data_ptr(),
        gate24.metadata.data_ptr(),
        up24.values.data_ptr(),
        up24.metadata.data_ptr(),
        y.data_ptr(),
        tokens,
        out_features,
        in_features,
        x_stride,
        out_features,
        _DTYPES[x.dtype],
        _AUTOMATIC,
        _current_stream(index),
    )
    return y


def _output(x, out_features, dtype):
    """(an uninitialised [..., out_features] for x [..., in_features], the number of tokens).

    dtype: of x. Cutting a shape costs as much as a small tensor, hence a branch for each.
    """
    shape = x.shape
    if len(shape) == 2:
        tokens = shape[0]
        return _empty_strided((tokens, out_features), (out_features, 1), dtype), tokens
    if len(shape) == 3:
        batch, length = shape[0], shape[1]
        strides = length * out_features, out_features, 1
        return _empty_strided((batch, length, out_features), strides, dtype), batch * length
    return x.new_empty(*shape[:-1], out_features), math.prod(shape[:-1])


def _aligned_rows(x, tokens, in_features):
    """Rows that the kernels can fetch, and their stride in elements: x itself, or a copy."""
    padded = -(-in_features // 8) * 8
    if x.is_contiguous():
        stride, step = in_features, 1
    else:
        x = x.reshape(tokens, in_features)
        stride, step = x.stride()
    if tokens == 1:
        stride = padded  # never taken: any valid one will do
    if step == 1 and stride % 8 == 0 and stride >= in_features and x.data_ptr() % 16 == 0:
        return x, stride
    rows = x.new_empty((tokens, padded))[:, :in_features]
    return rows.copy_(x.reshape(tokens, in_features)), padded


def _degenerate(y, bias, activation, residual):
    """The result of an empty sum: activation(bias) + residual in every row."""
    total = torch.zeros(y.shape, device=y.device) if bias is None else bias.float().expand(y.shape)
    total = activate(total, activation)
    return y.copy_(total if residual is None else total + residual)
