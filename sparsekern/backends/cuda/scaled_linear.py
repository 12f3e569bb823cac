"""The CUDA backend for quantised weights: e4m3 and int8 with a scale per output channel, int4.

    x of 16 bits       W8A16: decode widens the weights     csrc/linear/decode_sm90.cuh
                       W8A16: they are widened in memory    csrc/weights/widen.cuh
                       W8A8: x is quantised, then as below  csrc/activations/
    x of 8 bits        W8A8: prefill, split in 8 bits       csrc/linear/prefill_sm90.cuh
    int4               W4A16: as W8A16; from 17 tokens on   csrc/linear/narrow_sm90.cuh
    other GPUs         W8A8: mma, whatever x is             csrc/linear/mma_sm80.cuh

    y = activation(x · levels(W)ᵀ * weight_scale * x_scale + bias)       rounded once to 16 bits

x of 16 bits is quantised with more than 64 tokens, and with fewer where that is expected to be
faster by WORTH at least (`widens`): W8A16 is bound by the instructions that widen, and from some 16
tokens on slower than weights of 16 bits. What is expected depends on the sizes, on the tuned tables
and on nothing else, so a problem is computed in the same way every time. The error of quantised x
is about that of the quantised weights; whoever wants x as it is asks for backend "cuda-a16".

There, and always with int4, more than WIDEN_TOKENS tokens, of int4 NARROW_TOKENS (up
to twice as many where the narrow kernel is expected to be faster, `_pays`), are multiplied by the
kernels for weights of 16 bits, as they would be chosen for such a weight: the same native call
first writes the weight's numbers, level times scale rounded to the type of x, to memory that lives
as long as the call (9/8 bytes for every dense number). The narrow kernel multiplies the same
numbers where int4 has scales of groups, and widens them in registers; up to 16 tokens, and with one
scale a row, float32 sums are scaled. On other GPUs than Hopper no kernel widens: x is quantised
at every number of tokens, weights of int8 run from 8.0 on and of e4m3 from 8.9 on, and int4 does
not.

int8 is summed in int32, exactly. The tensor cores add up products of e4m3 with some 14 bits;
`precise` (backend "cuda-precise") has their sums of every 256 in_features added up in float32.

What can run for which types the native module says (kernels()). Hopper has the mma.sp kernel for
them, too, as backend "cuda-mma".
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsekern import _native
from sparsekern.backends import quantize_rows, registry
from sparsekern.backends.cuda import configs, narrow_model
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda.configs import Types
from sparsekern.backends.cuda.linear import (
    _aligned_rows,
    _check_sizes,
    _contiguous_strides,
    _current_device,
    _current_stream,
    _degenerate,
    _empty_strided,
    _name,
    _native_linear,
    _workspace,
    layout_refusal,
)
from sparsekern.backends.cuda.linear import _plan as _plain_plan
from sparsekern.backends.protocol import ALIGNMENT, Explained, Launch, Problem
from sparsekern.formats import dtypes
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.formats.tile64 import fits, scale_group

_CHOSEN, _PRECISE, _MMA = "chosen", "precise", "mma"
WORTH = 1.05  # how much faster x of 8 bits must be where x of 16 bits would do
_ROW = 16  # bytes, and so elements of 8 bits, that every row of x begins at a multiple of


# ---- what can run, and how -----------------------------------------------------------------------


@cache
def _built_for(kernel: str, types: Types) -> bool:
    """Whether there is a native module and it has this kernel for these types."""
    if not _native.available():
        return False
    return any(types in row["types"] for row in _native.module().kernels().get(kernel, ()))


def _eight(problem: Problem) -> Types:
    storage = problem.spec.storage
    return Types(storage, storage, _name(problem.dtype))


def _widened(problem: Problem) -> Types:
    dtype = _name(problem.dtype)
    return Types(problem.spec.storage, dtype, dtype)


def widens(problem: Problem) -> bool:
    """True when the weights are widened for x as it is: 16-bit x of few tokens, if x of 8 bits is
    not faster, or of int4 weights, for which there is nothing else; in registers or in memory
    (`_in_memory`)."""
    if problem.quantized is not None or not _built_for("decode", _widened(problem)):
        return False
    if not configs.hopper(problem.gpu):
        return False
    if problem.spec.element.bits == 4:
        return True
    if problem.tokens > heuristics.DECODE_TOKENS:
        return False
    widened, quantized = _expected(problem)
    return widened <= WORTH * quantized


def _in_memory(problem: Problem) -> bool:
    """True when a weight that is widened has so many tokens that a copy of 16 bits is made."""
    if problem.tokens <= _most_in_registers(problem):
        return False
    narrow = _built_for("narrow", _widened(problem))
    return not (narrow and _pays(problem.tokens, *problem.sizes, _widened(problem), problem.gpu))


def _most_in_registers(problem: Problem) -> int:
    """The most tokens for which weights are widened in registers whatever their sizes are."""
    narrow = heuristics.NARROW_TOKENS if _built_for("narrow", _widened(problem)) else 0
    return max(narrow, heuristics.WIDEN_TOKENS)


@lru_cache(maxsize=4096)
def _pays(tokens: int, out_features: int, in_features: int, widened: Types, index: int) -> bool:
    """Whether int4 of so many tokens is expected to be faster when it is widened in registers."""
    size = tokens, out_features, in_features
    if min(size) == 0 or not narrow_model.considered(tokens):
        return False
    us = configs.expected_us(*size, (widened, Types.of(widened.x)), index)
    return narrow_model.pays(*size, *us)


def _expected(problem: Problem) -> tuple[float, float]:
    """us of W8A16, and of quantising x and W8A8."""
    return _expected_us(
        problem.tokens, *problem.sizes, _widened(problem), _eight(problem), problem.gpu
    )


@lru_cache(maxsize=4096)
def _expected_us(
    tokens: int, out_features: int, in_features: int, widened: Types, eight: Types, index: int
) -> tuple[float, float]:
    size = tokens, out_features, in_features
    if min(size) == 0:
        return 0.0, 0.0
    of_16, of_8 = configs.expected_us(*size, (widened, eight), index)
    return of_16, of_8 + heuristics.quantize_us(tokens, in_features)


def why_not(
    problem: Problem, precise: bool = False, widened: bool = False, mma: bool = False
) -> str | None:
    """Why the kernels cannot compute a problem with a quantised weight; None when they can.

    Args:
        precise: with sums of e4m3 in float32.   widened: with x as it is, in 16 bits.
        mma: by the mma.sp kernel.
    """
    spec = problem.spec
    if why := layout_refusal(problem):
        return why
    if problem.device.type != "cuda":
        return f"backend 'cuda' needs x on a GPU, got {problem.device}"
    if problem.dtype not in dtypes.NATIVE:
        return f"backend 'cuda' needs {dtypes.native_names()}, got {problem.dtype}"
    if mma or not (widened or precise or spec.element.bits == 4 or configs.hopper(problem.gpu)):
        return configs.mma_refusal(problem.gpu, _eight(problem)) or None
    refusal = configs.hopper_refusal(problem.gpu)
    if refusal:
        return refusal
    if widened and problem.quantized is not None:
        return f"x is {spec.storage} already"
    if widened or spec.element.bits == 4:
        built = problem.quantized is None and _built_for("decode", _widened(problem))
    else:
        built = _built_for("prefill", _eight(problem))
    if not built:
        return f"backend 'cuda' has no kernel for weights of {spec.storage}"
    if precise and not any(tile.promoted for tile in configs._tiles(_eight(problem))):
        return f"sums of {spec.storage} are exact, there is nothing to promote"
    return None


def packs(spec: WeightSpec, device: torch.device) -> bool:
    """True where such a weight is best kept in layout "tile64", because kernels run it."""
    if device.type != "cuda" or not spec.element.scaled or spec.dtype not in dtypes.NATIVE:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    dtype = _name(spec.dtype)
    if spec.element.bits == 8 and not configs.hopper(index):
        return not configs.mma_refusal(index, Types(spec.storage, spec.storage, dtype))
    if spec.element.bits == 4:
        built = fits(spec) and _built_for("decode", Types(spec.storage, dtype, dtype))
    else:
        built = _built_for("prefill", Types(spec.storage, spec.storage, dtype))
    return built and not configs.hopper_refusal(index)


@lru_cache(maxsize=4096)
def _plan(
    tokens: int, out_features: int, in_features: int, types: Types, index: int, way: str
) -> tuple[str, int]:
    """(kernel, its config) for a problem on GPU `index`; way: _CHOSEN, _PRECISE or _MMA."""
    _check_sizes(tokens, out_features, in_features)
    if way == _PRECISE:
        name = configs.promoted(tokens, out_features, index, types)
    elif way == _MMA:
        name = f"mma {configs.mma_tile(tokens, out_features, in_features, index, types)}"
    else:
        name = configs.choose(tokens, out_features, in_features, types, index).variant
    return configs.variants(types)[name]


registry.watch(_plan.cache_clear)
registry.watch(_expected_us.cache_clear)
registry.watch(_pays.cache_clear)


def explain(
    problem: Problem, precise: bool = False, widened: bool = False, mma: bool = False
) -> Explained:
    """What `bind` would choose, and why."""
    storage, tokens, index = problem.spec.storage, problem.tokens, problem.gpu
    if precise:
        name = configs.promoted(tokens, problem.out_features, index, _eight(problem))
        return Explained(name, f"{_rows_are(problem)}; sums of 256 in_features added in float32")
    if mma:
        tile = configs.mma_tile(tokens, *problem.sizes, index, _eight(problem))
        return Explained(f"mma {tile}", _rows_are(problem))
    few = tokens <= heuristics.DECODE_TOKENS and configs.hopper(index)
    compared = few and problem.quantized is None and problem.spec.element.bits == 8 and not widened
    why = ""
    if compared:
        of_16, of_8 = _expected(problem)
        why = f"{of_16:.1f} us are expected with x as it is, {of_8:.1f} with x of 8 bits; "
    if widened or widens(problem):
        kind = f"W{problem.spec.element.bits}A16: {storage} is widened for x as it is"
        if _in_memory(problem):
            dtype = _name(problem.dtype)
            chosen = configs.choose(tokens, *problem.sizes, dtype, index)
            kind += f", to {dtype} in memory, more than {_most_in_registers(problem)} tokens"
            return Explained(f"widen + {chosen.variant}", f"{kind}; as in 16 bits: {chosen.why}")
        chosen = configs.choose(tokens, *problem.sizes, _widened(problem), index)
        return Explained(chosen.variant, f"{kind}; {why}{chosen.why}", chosen.us)
    chosen = configs.choose(tokens, *problem.sizes, _eight(problem), index)
    us = None if problem.quantized is None else chosen.us  # without the time to quantise
    return Explained(chosen.variant, f"{_rows_are(problem)}; {why}{chosen.why}", us)


def _rows_are(problem: Problem) -> str:
    if problem.quantized is not None:
        return f"W8A8: x is {problem.spec.storage}"
    return f"W8A8: x is quantised to {problem.spec.storage}, one scale a token"


# ---- running it ----------------------------------------------------------------------------------


def bind(
    problem: Problem, precise: bool = False, widened: bool = False, mma: bool = False
) -> Launch:
    """The launch of a problem with a quantised weight; see `why_not` and the top of the file.

    x is copied when its rows are not 16-byte aligned and evenly spaced. As with `linear.bind`, the
    weight's tensors must be complete.
    """
    (out_features, in_features), tokens = problem.spec.shape, problem.tokens
    if not (tokens and out_features and in_features):
        return _bind_degenerate(problem)
    way = _PRECISE if precise else _MMA if mma else _CHOSEN
    if problem.quantized is not None:
        return _bind_quantized(problem, way)
    if way != _CHOSEN or not (widened or widens(problem)):
        return _bind_dynamic(problem, way)
    return _bind_widened(problem)


def _bind_degenerate(problem: Problem) -> Launch:
    sizes, dtype = (*problem.x_shape[:-1], problem.out_features), problem.dtype

    def launch(
        x: Tensor, w24: Sparse24, bias: Tensor | None = None, x_scale: Tensor | None = None
    ) -> Tensor:
        return _degenerate(x.new_empty(sizes, dtype=dtype), bias, problem.activation, None)

    return launch


class _Product:
    """x · Wᵀ and what follows for one problem, whatever the stride of x. in_memory: by the kernels
    for plain weights, with a copy of the numbers."""

    def __init__(
        self, problem: Problem, types: Types, way: str = _CHOSEN, in_memory: bool = False
    ) -> None:
        (out_features, in_features), tokens = problem.spec.shape, problem.tokens
        self.size = tokens, out_features, in_features
        self.types, self.index, self.activation = types, problem.gpu, problem.activation
        self.group, self.stored = scale_group(problem.spec), ""
        if in_memory:
            dtype = _name(problem.dtype)
            self.types, self.stored = Types.of(dtype), problem.spec.storage
            self.plan = _plain_plan(*self.size, dtype, problem.gpu)
        else:
            self.plan = _plan(*self.size, types, problem.gpu, way)
        self.shares_tiles = _shares_tiles(self.plan, *self.size, self.types, problem.gpu)
        self.sizes = (*problem.x_shape[:-1], out_features)
        self.strides, self.dtype = _contiguous_strides(self.sizes), problem.dtype

    def run(self, x_stride: int) -> Any:
        """The native launch for rows of this stride."""
        fixed = (*self.plan, *self.size, x_stride, 0, self.types, self.activation)
        return _native_linear(*fixed, self.group, self.stored)

    def __call__(
        self,
        x: Tensor,
        x_stride: int,
        w24: Sparse24,
        bias: Tensor | None,
        x_scale: Tensor | None = None,
    ) -> Tensor:
        """y of aligned rows, on the current GPU."""
        run, tensors = self.run(x_stride), w24.tensors
        y = _empty_strided(self.sizes, self.strides, self.dtype)
        stream = _current_stream(self.index)
        # Within an op a workspace is new, and clearing it a launch of its own.
        shares = run.needs_workspace and self.shares_tiles
        space = _workspace(self.index, stream) if shares else (0, 0, None)
        more, wide = {}, None
        if self.stored:
            wide = _empty_strided((run.widened_bytes,), (1,), torch.uint8)
            more["widened"] = wide.data_ptr()
        run(
            x=x.data_ptr(),
            values=tensors["values"].data_ptr(),
            metadata=tensors["metadata"].data_ptr(),
            channel_scale=0 if self.group else tensors[SCALE].data_ptr(),
            y=y.data_ptr(),
            stream=stream,
            bias=0 if bias is None else bias.data_ptr(),
            workspace=space[1],
            token_scale=0 if x_scale is None else x_scale.data_ptr(),
            **more,
        )
        return y


def _shares_tiles(
    plan: tuple[str, int], tokens: int, out_features: int, _: int, types: Types, gpu: int
) -> bool:
    """Whether thread blocks of a launch that takes a workspace may share a tile through it."""
    kernel, number = plan
    if kernel != "prefill":
        return True
    (tile,) = (tile for tile, config in configs._tiles(types).items() if config == number)
    multiprocessors = torch.cuda.get_device_properties(gpu).multi_processor_count
    return heuristics.may_cut(tile, tokens, out_features, multiprocessors)


def _bind_quantized(problem: Problem, way: str) -> Launch:
    """x of 8 bits, with float32 [tokens] contiguous as its scales."""
    product = _Product(problem, _eight(problem), way)
    tokens, index, in_features = problem.tokens, problem.gpu, problem.in_features

    def launch(x: Tensor, w24: Sparse24, bias: Tensor | None, x_scale: Tensor) -> Tensor:
        if index != _current_device():
            with torch.cuda.device(index):
                return launch(x, w24, bias, x_scale)
        rows, x_stride = _aligned_rows(x, tokens, in_features)
        return product(rows, x_stride, w24, bias, x_scale)

    return launch


def _bind_dynamic(problem: Problem, way: str) -> Launch:
    """x of 16 bits, quantised on the way."""
    product, storage = _Product(problem, _eight(problem), way), problem.spec.storage
    shape, index = (problem.tokens, problem.in_features), problem.gpu

    def launch(x: Tensor, w24: Sparse24, bias: Tensor | None = None) -> Tensor:
        if index != _current_device():
            with torch.cuda.device(index):
                return launch(x, w24, bias)
        rows = x if x.dim() == 2 else x.reshape(shape)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        q, x_scale = quantize_rows.quantize(rows, storage, _ROW)
        return product(q, q.stride(0), w24, bias, x_scale)

    return launch


def _bind_widened(problem: Problem) -> Launch:
    """x of 16 bits as it is, with weights that are widened in registers or in memory."""
    in_memory = _in_memory(problem)
    product, index = _Product(problem, _widened(problem), in_memory=in_memory), problem.gpu
    tokens, in_features, dtype = problem.tokens, problem.in_features, problem.dtype

    def anywhere(x: Tensor, w24: Sparse24, bias: Tensor | None = None) -> Tensor:
        if index != _current_device():
            with torch.cuda.device(index):
                return anywhere(x, w24, bias)
        return product(*_aligned_rows(x, tokens, in_features), w24, bias)

    whole_rows = in_features * dtype.itemsize % _ROW == 0
    if in_memory or not (problem.aligned and problem.x_stride is None and whole_rows):
        return anywhere
    run, sizes, strides = product.run(in_features), product.sizes, product.strides
    grouped = bool(product.group)

    def launch(x: Tensor, w24: Sparse24, bias: Tensor | None = None) -> Tensor:
        address = x.data_ptr()
        if address % ALIGNMENT or index != _current_device():
            return anywhere(x, w24, bias)
        tensors = w24.tensors
        y = _empty_strided(sizes, strides, dtype)
        run(
            x=address,
            values=tensors["values"].data_ptr(),
            metadata=tensors["metadata"].data_ptr(),
            channel_scale=0 if grouped else tensors[SCALE].data_ptr(),
            y=y.data_ptr(),
            stream=_current_stream(index),
            bias=0 if bias is None else bias.data_ptr(),
        )
        return y

    return anywhere if run.needs_workspace else launch
