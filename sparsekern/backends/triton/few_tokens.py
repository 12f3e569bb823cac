"""Sparse linear layer in Triton for 1 to 4 tokens: x is picked by the metadata, W is not expanded.

A thread takes pairs of groups, 8 columns: one 8-byte load of four values, one byte of metadata, and
16 bytes of x for each token. The four numbers of x that meet a group are one 64-bit word, and the
one that a value wants is that word shifted right by 16 times its index:

    x word      x3 x2 x1 x0        16 bits each, in_features from the right
    index i     (word >> 16 * i)   low half: x_i

So a kept value costs a shift, a widening and an FMA per token, and its own widening and two
instructions for the index once (csrc/notes/triton.md counts them). A program has ROWS rows of W,
which share the loads of x. Sums are float32: each thread's own, then those of the program (tl.sum).
With few rows in_features are shared by SPLIT_IN programs, whose sums epilogue.split_reduce adds in
order.

    operand     shape                 dtype              memory
    x           [tokens, in/4]        int64              4 numbers of 16 bits, any row stride
    values      [out, in/8]           int64              4 kept values, row-major
    metadata    [out, in/8]           uint8              nibble idx0 | idx1 << 2, low nibble first
    bias        [out]                 fp16 | bf16        optional
    out         [tokens, out]         fp16 | bf16        or float32 [SPLIT_IN, tokens, out]

in_features is a multiple of 8. Specification: sparsekern/reference.py:linear.
"""

import torch
import triton
import triton.language as tl

from sparsekern.backends.triton import epilogue
from sparsekern.backends.triton.configs import FewTokens
from sparsekern.backends.triton.epilogue import finish
from sparsekern.backends.triton.operands import words
from sparsekern.formats import dtypes


@triton.jit
def _number(word, shift, HALF: tl.constexpr):
    """The 16-bit number at bit `shift` of int64 words, in float32: of float16, else of bfloat16."""
    bits = (word >> shift).to(tl.int32)
    if HALF:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tokens"])
def few_tokens_kernel(
    x_ptr,
    values_ptr,
    metadata_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    pairs,  # of groups in a row: in_features / 8
    stride_x,
    split_length,  # pairs of a program
    TOKENS: tl.constexpr,  # at least `tokens`
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HALF: tl.constexpr,
    EVEN: tl.constexpr,  # every program has whole turns of the loop
    SPLIT_IN: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    split_idx = tl.program_id(1)
    start = split_idx * split_length
    stop = tl.minimum(start + split_length, pairs)
    pair = start + tl.arange(0, BLOCK)
    # Of a token that is not there the last one is read again, and nothing is stored.
    x_at = ()
    for t in tl.static_range(TOKENS):
        row_ptr = x_ptr + tl.minimum(t, tokens - 1).to(tl.int64) * stride_x
        x_at = x_at + (row_ptr + 2 * pair[:, None] + tl.arange(0, 2)[None, :],)
    values_at = ()
    metadata_at = ()
    for r in tl.static_range(ROWS):
        at = tl.minimum(first_row + r, out_features - 1).to(tl.int64) * pairs + pair
        values_at = values_at + (values_ptr + at,)
        metadata_at = metadata_at + (metadata_ptr + at,)
    sums = (tl.zeros([BLOCK], tl.float32),) * (ROWS * TOKENS)
    for begin in range(start, stop, BLOCK * UNROLL):
        for part in tl.static_range(UNROLL):
            if EVEN:
                inside = None
                inside2 = None
            else:
                inside = begin + part * BLOCK + tl.arange(0, BLOCK) < stop
                inside2 = inside[:, None]
            words_x = ()
            for t in tl.static_range(TOKENS):
                x_two = _load(x_at[t] + 2 * part * BLOCK, inside2, EVEN)
                low, high = tl.split(x_two)
                words_x = words_x + (low, high)
            updated = ()
            for r in tl.static_range(ROWS):
                word = _load(values_at[r] + part * BLOCK, inside, EVEN)
                byte = _load(metadata_at[r] + part * BLOCK, inside, EVEN).to(tl.int32)
                i0 = (byte << 4) & 48
                i1 = (byte << 2) & 48
                i2 = byte & 48
                i3 = (byte >> 2) & 48
                w0 = _number(word, 0, HALF)
                w1 = _number(word, 16, HALF)
                w2 = _number(word, 32, HALF)
                w3 = _number(word, 48, HALF)
                for t in tl.static_range(TOKENS):
                    acc = sums[r * TOKENS + t]
                    acc += w0 * _number(words_x[2 * t], i0, HALF)
                    acc += w1 * _number(words_x[2 * t], i1, HALF)
                    acc += w2 * _number(words_x[2 * t + 1], i2, HALF)
                    acc += w3 * _number(words_x[2 * t + 1], i3, HALF)
                    updated = updated + (acc,)
            sums = updated
        x_at = _moved(x_at, 2 * UNROLL * BLOCK, TOKENS)
        values_at = _moved(values_at, UNROLL * BLOCK, ROWS)
        metadata_at = _moved(metadata_at, UNROLL * BLOCK, ROWS)

    if SPLIT_IN > 1:
        out_ptr += split_idx.to(tl.int64) * tokens * out_features
    for r in tl.static_range(ROWS):
        row = first_row + r + tl.arange(0, 1)
        if HAS_BIAS and SPLIT_IN == 1:
            bias = tl.load(bias_ptr + row, mask=row < out_features, other=0.0).to(tl.float32)
        else:
            bias = tl.zeros([1], tl.float32)
        for t in tl.static_range(TOKENS):
            total = tl.sum(sums[r * TOKENS + t][None, :], axis=1)
            if SPLIT_IN == 1:
                total = finish(total, bias, ACTIVATION)
            there = row < tl.where(t < tokens, out_features, 0)
            y = total.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + t * out_features + row, y, mask=there)


@triton.jit
def _load(ptr, inside, EVEN: tl.constexpr):
    if EVEN:
        loaded = tl.load(ptr)
    else:
        loaded = tl.load(ptr, mask=inside, other=0)
    return loaded


@triton.jit
def _moved(pointers, step: tl.constexpr, COUNT: tl.constexpr):
    moved = ()
    for i in tl.static_range(COUNT):
        moved = moved + (pointers[i] + step,)
    return moved


def launch(x, values, metadata, bias, activation, config: FewTokens, out):
    """out = activation(x · Wᵀ + bias), arguments as linear.linear has checked them.

    Args:
        x: [tokens, in_features], float16 or bfloat16, 1 to 4 tokens, in_features % 8 == 0.
        out: [tokens, out_features], contiguous.
    """
    tokens, out_features = out.shape
    half = dtypes.PLAIN[x.dtype].name == "float16"
    x, values = words(x, torch.int64, 8), words(values, torch.int64, 8)
    pairs, turn = values.shape[1], 32 * config.num_warps * config.unroll
    split_length = triton.cdiv(triton.cdiv(pairs, config.split_in), turn) * turn
    target = out
    if config.split_in > 1:
        target = torch.empty((config.split_in, *out.shape), dtype=torch.float32, device=x.device)
    few_tokens_kernel[(triton.cdiv(out_features, config.rows), config.split_in)](
        x,
        values,
        metadata,
        bias,
        target,
        tokens,
        out_features,
        pairs,
        x.stride(0),
        split_length,
        TOKENS=triton.next_power_of_2(tokens),
        ROWS=config.rows,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        HALF=half,
        EVEN=pairs % turn == 0,
        SPLIT_IN=config.split_in,
        BLOCK=32 * config.num_warps,
        UNROLL=config.unroll,
        num_warps=config.num_warps,
    )
    if config.split_in > 1:
        epilogue.split_reduce(target, bias, activation, out)
