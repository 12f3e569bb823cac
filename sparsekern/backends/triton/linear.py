"""Sparse linear layer in Triton: y[tokens, out] = activation(x[tokens, in] · W[out, in]ᵀ + bias).

W is a row-major Sparse24. Each program reads a tile of values and metadata (9/16 of the dense bytes
in 16 bit), rebuilds the dense [BLOCK_OUT, BLOCK_IN] tile in registers and multiplies it with
tl.dot. The weights tile is the left operand because the tensor cores want at least 64 rows there
and as few as 8 columns on the right: a single token then costs one padded column block of 16, not a
padded row block of 64. This kernel exists so that every shape, dtype and number of tokens works on
every GPU that Triton supports; it does dense arithmetic and saves memory traffic alone. A few
tokens and many have kernels that expand less, or nothing (`pick_config` in configs.py); `linear`
launches all.

    operand     shape                dtype              memory
    x           [tokens, in]         fp32|fp16|bf16     unit stride along in, any along tokens
    values      [out, in/2]          dtype of x         row-major, two survivors per group of 4
    metadata    [out, ceil(in/8)]    uint8              nibble idx0 | idx1 << 2, low nibble first
    bias        [out]                dtype of x         optional
    out         [tokens, out]        dtype of x         row-major

Quantised weights: values are levels, which every dtype of x holds exactly, so they are widened, and
the sums get the scales. e4m3 is widened by its bits, because older GPUs have no such type.

    values      [out, in/2] int8 | float8_e4m3fn, [out, in/4] uint8 (int4, low nibble first)
    scales      [out, 1] or, per group of 64 or 128 columns, [out, groups]   fp32; a group's come
                with the sums of its tiles along in, a row's at the end
    x_scale     [tokens]             fp32               of an x that was quantised; optional

With few tokens and few rows the grid would not fill the GPU: in_features is then divided among
SPLIT_IN programs, which write float32 partial sums that a second kernel adds in ascending order
(epilogue.py). The metadata of a tile, single bytes that no asynchronous copy takes, are loaded
while the tile before it is multiplied. The config depends on shapes and dtype alone, so results are
reproducible from run to run and from GPU to GPU.

Specification: sparsekern/reference.py:linear. Launched by sparsekern/ops/linear_op.py.
"""

import functools
import importlib

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from sparsekern.backends.triton import epilogue, mma_sp_failed, mma_sp_reason
from sparsekern.backends.triton.configs import (
    SMALLEST_GROUP,
    Expanded,
    FewTokens,
    LinearConfig,
    MmaSp,
    pick_config,
)
from sparsekern.backends.triton.epilogue import finish
from sparsekern.formats import dtypes

# The kernels for x of 16 bits, by their configs; that of few tokens takes no scales. Imported when
# they are launched: not every Triton has what mma_sp needs.
_OTHERS = {FewTokens: "few_tokens", MmaSp: "mma_sp", Expanded: "expanded"}

# What the kernel calls levels, by their dtype: names of the element types.
_STORAGES = {row.storage: row.name for row in dtypes.elements() if row.scaled}


@triton.jit
def _widened(stored, dtype: tl.constexpr, STORAGE: tl.constexpr):
    """Levels of int8 or of the bits of e4m3 as numbers of dtype, exactly."""
    if STORAGE == "int8":
        return stored.to(tl.float32).to(dtype)
    # The exponent of float16 has 8 more in its bias and as many bits, from bit 10 on.
    bits = stored.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return (half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)


@triton.jit
def _widened_int4(packed, dtype: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """[BLOCK_OUT, BLOCK_IN/4] bytes -> [BLOCK_OUT, BLOCK_IN/2] levels of dtype."""
    nibbles = tl.join(packed & 0xF, packed >> 4).reshape(BLOCK_OUT, BLOCK_IN // 2).to(tl.int32)
    return ((nibbles ^ 8) - 8).to(tl.float32).to(dtype)


@triton.jit
def _decompress_tile(values, metadata, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """[BLOCK_OUT, BLOCK_IN/2] values, [BLOCK_OUT, BLOCK_IN/8] bytes -> [BLOCK_OUT, BLOCK_IN]."""
    nibbles = tl.join(metadata & 0xF, metadata >> 4).reshape(BLOCK_OUT, BLOCK_IN // 4)
    first, second = tl.split(values.reshape(BLOCK_OUT, BLOCK_IN // 4, 2))
    first_idx = nibbles & 3
    second_idx = nibbles >> 2
    zero = tl.zeros_like(first)
    column0 = tl.where(first_idx == 0, first, tl.where(second_idx == 0, second, zero))
    column1 = tl.where(first_idx == 1, first, tl.where(second_idx == 1, second, zero))
    column2 = tl.where(first_idx == 2, first, tl.where(second_idx == 2, second, zero))
    column3 = tl.where(first_idx == 3, first, tl.where(second_idx == 3, second, zero))
    # join appends an axis, the last one fastest: [.., i, j] holds column 2i + j.
    columns = tl.join(tl.join(column0, column2), tl.join(column1, column3))
    return columns.reshape(BLOCK_OUT, BLOCK_IN)


@triton.jit
def _spread_tile(values, metadata, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """The same for values of 16 bits, in a third of the instructions: both values of a group are
    shifted to their places in one 64-bit word."""
    byte = metadata.to(tl.int32)
    nibbles = tl.join(byte, byte >> 4).reshape(BLOCK_OUT, BLOCK_IN // 4)
    first, second = tl.split(values.reshape(BLOCK_OUT, BLOCK_IN // 4, 2))
    first = first.to(tl.uint16, bitcast=True).to(tl.int64)
    second = second.to(tl.uint16, bitcast=True).to(tl.int64)
    word = (first << ((nibbles << 4) & 48)) | (second << ((nibbles << 2) & 48))
    even = tl.join(word.to(tl.int16), (word >> 32).to(tl.int16))
    odd = tl.join((word >> 16).to(tl.int16), (word >> 48).to(tl.int16))
    columns = tl.join(even, odd).reshape(BLOCK_OUT, BLOCK_IN)
    return columns.to(values.dtype, bitcast=True)


# `tokens` changes from call to call: specialising on it would only compile the same code again.
@triton.jit(do_not_specialize=["tokens"])
def sparse_linear_kernel(
    x_ptr,
    values_ptr,
    metadata_ptr,
    scale_ptr,
    x_scale_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    stride_x,
    stride_values,
    stride_metadata,
    stride_scale,
    split_length,
    HAS_BIAS: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORAGE: tl.constexpr,  # "plain", "int8", "float8_e4m3fn" or "int4"
    GROUP: tl.constexpr,  # columns that share a scale, a multiple of BLOCK_IN; 0: all
    SPLIT_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One [BLOCK_OUT, BLOCK_TOKENS] tile of yᵀ over split_length columns of W.

    SPLIT_IN == 1: out is y [tokens, out] in its own dtype. Otherwise out is float32
    [SPLIT_IN, tokens, out], without bias and activation. split_length is a multiple of BLOCK_IN.
    """
    pid = tl.program_id(0)
    split_idx = tl.program_id(1)

    # Programs that run together share rows of W: token tiles vary fastest, within bands of 8 tiles.
    tiles_out = tl.cdiv(out_features, BLOCK_OUT)
    tiles_tokens = tl.cdiv(tokens, BLOCK_TOKENS)
    band_idx = pid // (8 * tiles_out)
    band_tokens = tl.minimum(tiles_tokens - band_idx * 8, 8)
    in_band = pid - band_idx * 8 * tiles_out
    out_tile = in_band // band_tokens
    token_tile = band_idx * 8 + in_band % band_tokens

    rows = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token_idx = token_tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row_ok = rows < out_features
    token_ok = token_idx < tokens
    # 64-bit row offsets: out · in passes 2^31 in large models.
    values_row = values_ptr + rows.to(tl.int64)[:, None] * stride_values
    metadata_row = metadata_ptr + rows.to(tl.int64)[:, None] * stride_metadata
    x_row = x_ptr + token_idx.to(tl.int64)[None, :] * stride_x
    if STORAGE != "plain":
        scale_row = scale_ptr + rows.to(tl.int64) * stride_scale

    acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    start = split_idx * split_length
    stop = tl.minimum(start + split_length, in_features)
    byte_idx = start // 8 + tl.arange(0, BLOCK_IN // 8)
    byte_ok = row_ok[:, None] & (byte_idx * 8 < stop)[None, :]
    metadata = tl.load(metadata_row + byte_idx[None, :], mask=byte_ok, other=0)
    for k in range(start, stop, BLOCK_IN):
        byte_idx = (k + BLOCK_IN) // 8 + tl.arange(0, BLOCK_IN // 8)
        byte_ok = row_ok[:, None] & (byte_idx * 8 < stop)[None, :]
        following = tl.load(metadata_row + byte_idx[None, :], mask=byte_ok, other=0)
        column = k + tl.arange(0, BLOCK_IN)
        if STORAGE == "int4":
            value_idx = k // 4 + tl.arange(0, BLOCK_IN // 4)
            value_ok = value_idx < in_features // 4
        else:
            value_idx = k // 2 + tl.arange(0, BLOCK_IN // 2)
            value_ok = value_idx < in_features // 2
        values = tl.load(
            values_row + value_idx[None, :], mask=row_ok[:, None] & value_ok[None, :], other=0
        )
        x = tl.load(
            x_row + column[:, None],
            mask=token_ok[None, :] & (column < in_features)[:, None],
            other=0.0,
        )
        if STORAGE == "int4":
            values = _widened_int4(values, x.dtype, BLOCK_OUT, BLOCK_IN)
        elif STORAGE != "plain":
            values = _widened(values, x.dtype, STORAGE)
        if x.dtype == tl.float32:
            dense = _decompress_tile(values, metadata, BLOCK_OUT, BLOCK_IN)
        else:
            dense = _spread_tile(values, metadata, BLOCK_OUT, BLOCK_IN)
        if GROUP > 0:
            of_tile = tl.load(scale_row + k // GROUP, mask=row_ok, other=0.0)
            acc += tl.dot(dense, x, input_precision="ieee") * of_tile[:, None]
        else:
            acc = tl.dot(dense, x, acc, input_precision="ieee")
        metadata = following

    if STORAGE != "plain":
        if GROUP == 0:
            acc *= tl.load(scale_row, mask=row_ok, other=0.0)[:, None]
        if HAS_X_SCALE:
            acc *= tl.load(x_scale_ptr + token_idx, mask=token_ok, other=0.0)[None, :]
    if SPLIT_IN == 1:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)
            acc = finish(acc, bias[:, None], ACTIVATION)
        else:
            acc = finish(acc, 0.0, ACTIVATION)
    else:
        out_ptr += split_idx.to(tl.int64) * tokens * out_features
    out_tile_ptr = out_ptr + token_idx.to(tl.int64)[:, None] * out_features + rows[None, :]
    y = tl.trans(acc).to(out_ptr.dtype.element_ty)
    tl.store(out_tile_ptr, y, mask=token_ok[:, None] & row_ok[None, :])


@functools.cache
def _other(kind):
    return importlib.import_module(f"sparsekern.backends.triton.{_OTHERS[kind]}")


def _launch_other(config, x, values, metadata, bias, activation, out, **scales):
    with torch.cuda.device_of(x):
        _other(type(config)).launch(x, values, metadata, bias, activation, config, out, **scales)


def linear(
    x,
    values,
    metadata,
    in_features,
    bias=None,
    activation=None,
    config=None,
    *,
    scale=None,
    group=0,
    x_scale=None,
):
    """Launches the kernels on x's device: y = activation(x · Wᵀ + bias), one rounding to x.dtype.

    Args:
        x: [tokens, in_features] float32 | float16 | bfloat16. Copied if its last stride is not 1.
        values: [out_features, in_features / 2], dtype of x, contiguous; with scale the stored
            levels, int8 | float8_e4m3fn, or uint8 [out_features, in_features / 4] of int4.
        metadata: uint8 [out_features, ceil(in_features / 8)], contiguous.
        in_features: dense count, a multiple of 4.
        bias: [out_features], dtype of x, contiguous, or None.
        activation: None | "relu" | "gelu" (exact) | "silu".
        config: one of configs.py; None means pick_config.
        scale: float32 [out_features, groups], contiguous, or None for plain values.
        group: columns that share a scale where there are several groups: a multiple of 64.
        x_scale: float32 [tokens], contiguous: y = activation(x · Wᵀ * x_scale + bias).
    Returns:
        [tokens, out_features], dtype of x, contiguous.
    Notes:
        Arguments are not checked here; sparsekern.linear does. float32 runs in IEEE precision,
        never TF32.
    """
    tokens, out_features = x.shape[0], values.shape[0]
    out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    storage = "plain" if scale is None else _STORAGES[values.dtype]
    scales = {}
    if scale is not None:
        group = 0 if scale.shape[1] == 1 else group
        scales = {"storage": storage, "scale": scale, "group": group, "x_scale": x_scale}
    if config is None:
        bits = None if scale is None else dtypes.element(storage).bits
        problem = tokens, out_features, in_features, x.dtype, bits, group
        config = pick_config(*problem, mma_sp=not mma_sp_reason())
        if isinstance(config, MmaSp):
            try:
                _launch_other(config, x, values, metadata, bias, activation, out, **scales)
                return out
            except TritonError as error:
                mma_sp_failed(error)
                config = pick_config(*problem)
    if not isinstance(config, LinearConfig):
        _launch_other(config, x, values, metadata, bias, activation, out, **scales)
        return out
    if scale is not None and group % config.block_in:
        config = config._replace(block_in=SMALLEST_GROUP)
    if storage == "float8_e4m3fn":
        values = values.view(torch.uint8)
    split_length = triton.cdiv(in_features, config.split_in)
    split_length = triton.cdiv(split_length, config.block_in) * config.block_in
    target = out
    if config.split_in > 1:
        shape = (config.split_in, tokens, out_features)
        target = torch.empty(shape, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(out_features, config.block_out) * triton.cdiv(tokens, config.block_tokens)
    kinds = {"STORAGE": storage, "GROUP": group, "HAS_X_SCALE": x_scale is not None}
    with torch.cuda.device_of(x):
        sparse_linear_kernel[(tiles, config.split_in)](
            x,
            values,
            metadata,
            scale,
            x_scale,
            bias,
            target,
            tokens,
            out_features,
            in_features,
            x.stride(0),
            values.stride(0),
            metadata.stride(0),
            0 if scale is None else scale.stride(0),
            split_length,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            SPLIT_IN=config.split_in,
            **kinds,
            BLOCK_OUT=config.block_out,
            BLOCK_IN=config.block_in,
            BLOCK_TOKENS=config.block_tokens,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if config.split_in > 1:
            epilogue.split_reduce(target, bias, activation, out)
    return out
