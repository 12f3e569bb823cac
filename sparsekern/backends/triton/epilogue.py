"""What the Triton kernels of sparsekern.linear do with their sums: bias, activation, one rounding;
and the kernel that adds the parts of a problem whose in_features are split, in ascending order."""

import triton
import triton.language as tl

BLOCK = 1024  # outputs of a program


@triton.jit
def finish(acc, bias, ACTIVATION: tl.constexpr):
    """activation(acc + bias) in float32; the caller rounds."""
    acc += bias
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)  # keeps NaN, as torch does
    elif ACTIVATION == "gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    elif ACTIVATION == "silu":
        acc = acc / (1.0 + tl.exp(-acc))
    return acc


@triton.jit(do_not_specialize=["tokens"])
def split_reduce_kernel(
    partial_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    stride_out,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT_IN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [tokens, out_features], row stride stride_out: activation(partial[0] + partial[1] + .. +
    bias), one fixed order, one rounding. A program has BLOCK outputs of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < out_features
    size = tl.cast(tokens, tl.int64) * out_features
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for split_idx in tl.static_range(SPLIT_IN):
        part_ptr = partial_ptr + (split_idx * size + token * out_features)
        acc += tl.load(part_ptr + column, mask=ok, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=ok, other=0.0).to(tl.float32)
        acc = finish(acc, bias, ACTIVATION)
    else:
        acc = finish(acc, 0.0, ACTIVATION)
    row_ptr = out_ptr + token * stride_out
    tl.store(row_ptr + column, acc.to(out_ptr.dtype.element_ty), mask=ok)


def split_reduce(partial, bias, activation, out):
    """out [tokens, out_features], rows of any stride, of partial [parts, tokens, out_features]."""
    tokens, out_features = out.shape
    split_reduce_kernel[(tokens, triton.cdiv(out_features, BLOCK))](
        partial,
        bias,
        out,
        tokens,
        out_features,
        out.stride(0),
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        SPLIT_IN=partial.shape[0],
        BLOCK=BLOCK,
        num_warps=4,
    )
