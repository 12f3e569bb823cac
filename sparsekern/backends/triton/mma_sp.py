"""Sparse linear layer on the sparse tensor cores, in Gluon (Triton's language of explicit layouts):
yᵀ[out, tokens] = W[out, in] · xᵀ by mma.sp.m16n8k32, 16-bit operands, sums in float32.

A program has a tile of BLOCK_OUT rows of W and BLOCK_TOKENS rows of x. cp.async brings values,
metadata and x to shared memory, STEPS * 32 columns at a time, STAGES - 1 times ahead; ldmatrix
takes them to registers, and nothing is expanded. Columns are counted in steps of 32, the columns of
one mma.sp; an element of values is what a group of four keeps.

    operand     shape                 element            memory
    x           [tokens, 16 * steps]  2 numbers, int32   16 bytes aligned rows, any row stride
    values      [out, 8 * steps]      2 kept values      row-major; int32, int16 or int8
    metadata    [out, steps]          8 groups, int32    nibble idx0 | idx1 << 2, low nibble first
    bias        [out]                 fp16 | bf16        optional
    out         [tokens, out]         fp16 | bf16        or float32 [SPLIT_IN, tokens, out]

Quantised values are levels of int8 or e4m3 (int16) or of int4 (int8, low nibble first), which 16
bits hold exactly: a thread widens those of its fragments (`_widened`), and the sums get the scales:

    scale       [out] or, per GROUP columns, [out, groups]   fp32; a group's come with the sums of
                a stage, a row's at the end
    x_scale     [tokens]                                     fp32, optional

An operand of inline assembly is a tensor whose elements each thread has in a known order: all have
the shape [tiles of rows, of tokens, warps of rows, of tokens, 8, 2, 2, 2, 2] in one layout, where
the three dimensions after the warps are the lane (4 g + 2 t1 + t0) and the last two the register
(2 r1 + r0) of a fragment; PTX ISA, "Matrix Fragments for sparse mma.m16n8k32", 16-bit types:

    A   row g + 8 r0, word 4 r1 + t      B   token g, word 4 (2 r1 + r0) + t, words of two columns
    C   row g + 8 r1, token 2 t + r0     E   16 bits of row g, then of row g + 8: the first half of
                                             the columns from even lanes, the other from odd ones;
                                             lanes t = 0, 1 or 2, 3 as the selector says

A_DIMS to C_DIMS take tiles of shared memory to that shape. So that a lane's metadata are words as
they stand, lanes t1 = 0 have those of even steps and t1 = 1 of odd ones, and the selector is the
step's parity. Products follow one another along in_features, whatever STEPS and STAGES are.

in_features is a multiple of 32. Specification: sparsekern/reference.py:linear.
"""

import functools

import torch
import triton
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from sparsekern.backends.triton import epilogue
from sparsekern.backends.triton.configs import MMA_COLUMNS, MmaSp
from sparsekern.backends.triton.operands import words
from sparsekern.formats import dtypes

PART_STEPS = 4  # parts of in_features are multiples of so many steps
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_finish = gluon.jit(epilogue.finish.fn)

# Dimensions of a tile of shared memory, as the kernel splits it, in the order of the fragments.
A_DIMS = gl.constexpr((0, 1, 3, 5, 6, 4, 2))  # [tiles, warps, r0, g, r1, t1, t0]
B_DIMS = gl.constexpr((0, 1, 2, 5, 6, 3, 4))  # [tiles, warps, g, r1, r0, t1, t0]
E_DIMS = gl.constexpr((0, 1, 3, 5, 4, 2))  # [tiles, warps, r0, g, pairs of steps, t1]
C_DIMS = gl.constexpr((0, 2, 7, 4, 1, 3, 5, 6, 8))  # to [tiles, warps, r1, g; tiles, warps, t, r0]


@constexpr_function
def _bits(count, of_one):
    return [[of_one << bit, 0] for bit in range((count - 1).bit_length())]


@constexpr_function
def _layout(shape, warps, warps_before, warps_after, registers, lanes):
    """Which elements of a step's tile a thread loads, by the bits of register, lane and warp: those
    that FRAGMENT gives it, so that nothing is exchanged between threads.

    Args:
        warps: (count, rows of one), along this operand; warps_before, warps_after: those that have
            the same elements, along the other one, in faster and slower bits.
    """
    count, of_one = warps
    tiles = _bits(shape[0] // (of_one * count), of_one * count)
    same = [[0, 0]] * len(_bits(warps_before, 1)), [[0, 0]] * len(_bits(warps_after, 1))
    along = same[0] + _bits(count, of_one) + same[1]
    lanes = lanes + [[1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers + tiles, lanes, along, [], shape)


@constexpr_function
def _load_a(rows, warps_out, warps_tokens):
    words = [[0, 1], [0, 2]]
    return _layout([rows, 8], (warps_out, 16), warps_tokens, 1, [[8, 0], [0, 4]], words)


@constexpr_function
def _load_b(tokens, warps_out, warps_tokens):
    words = [[0, 1], [0, 2]]
    return _layout([tokens, 16], (warps_tokens, 8), 1, warps_out, [[0, 4], [0, 8]], words)


@constexpr_function
def _load_e(rows, warps_out, warps_tokens, steps):
    registers = [[8, 0], [0, 2]] if steps == 4 else [[8, 0]]
    words = [[0, 0], [0, 1]]
    return _layout([rows, steps], (warps_out, 16), warps_tokens, 1, registers, words)


@constexpr_function
def _rows_of_sums(rows, warps_out, warps_tokens):
    tiles = [[row] for row, _ in _bits(rows // (16 * warps_out), 16 * warps_out)]
    warps = [[0]] * len(_bits(warps_tokens, 1)) + [[row] for row, _ in _bits(warps_out, 16)]
    lanes = [[0], [0], [1], [2], [4]]
    return gl.DistributedLinearLayout([[8], *tiles], lanes, warps, [], [rows])


@gluon.jit
def _odd_lanes(LAYOUT: gl.constexpr, WARPS_OUT: gl.constexpr):
    """Of two words of metadata, row g's and row g + 8's, the halves that a lane supplies: the
    selector of prmt."""
    zero = gl.full([1, 1, WARPS_OUT, 1, 8, 2, 2, 1, 1], 0, gl.int32, LAYOUT)
    return gl.inline_asm_elementwise(
        "{ .reg .u32 lane; .reg .pred odd; mov.u32 lane, %laneid; and.b32 lane, lane, 1;"
        " setp.ne.u32 odd, lane, $1; selp.b32 $0, 0x7632, 0x5410, odd; }",
        "=r,r",
        [zero],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _halves(metadata, odd_lanes):
    """The words of E: twice the same for each pair of rows, because a fragment has four."""
    metadata, odd_lanes = gl.broadcast(metadata, odd_lanes)
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, $4; mov.b32 $1, $0;",
        "=&r,=&r,r,r,r,r",
        [metadata, odd_lanes],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _widened(levels, STORAGE: gl.constexpr, TYPE: gl.constexpr):
    """Words of two 16-bit numbers of elements that hold two levels, exactly.

    Integers: the bits of a level above those of 2^23 are a float32, and subtracting takes away what
    the sign has moved it by. e4m3: its exponent has 8 less in its bias than that of float16, and
    as many bits from bit 10 on; the product with 256 is exact.
    """
    bits = levels.to(gl.int32)
    if STORAGE == "float8_e4m3fn":
        apart = (bits & 0xFF) << 8 | (bits & 0xFF00) << 16
        half = (apart & -0x7FFF8000) | ((apart & 0x7F007F00) >> 1)
        TO_TYPE: gl.constexpr = (
            "{ .reg .b32 c; mov.b32 c, 0x5C005C00; mul.rn.f16x2 $0, $1, c; }"
            if TYPE == "f16"
            else "{ .reg .b32 c, h; .reg .b16 l0, l1; .reg .f32 f0, f1; mov.b32 c, 0x5C005C00;"
            " mul.rn.f16x2 h, $1, c; mov.b32 {l0, l1}, h; cvt.f32.f16 f0, l0; cvt.f32.f16 f1, l1;"
            " cvt.rn.bf16x2.f32 $0, f1, f0; }"
        )
        return gl.inline_asm_elementwise(
            TO_TYPE, "=r,r", [half], dtype=gl.int32, is_pure=True, pack=1
        )
    if STORAGE == "int8":
        SIGN: gl.constexpr = 0x80
        first = bits & 0xFF
        second = bits >> 8 & 0xFF
    else:
        SIGN: gl.constexpr = 8
        first = bits & 0xF
        second = bits >> 4 & 0xF
    OFFSET: gl.constexpr = 8388608.0 + SIGN
    first = (first ^ (0x4B000000 | SIGN)).to(gl.float32, bitcast=True) - OFFSET
    second = (second ^ (0x4B000000 | SIGN)).to(gl.float32, bitcast=True) - OFFSET
    return gl.inline_asm_elementwise(
        f"cvt.rn.{TYPE}x2.f32 $0, $2, $1;",
        "=r,f,f",
        [first, second],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _mma_sp(a, b, acc, e, PAIR: gl.constexpr, SELECTOR: gl.constexpr, TYPE: gl.constexpr):
    """acc + a · b of all fragments, which are broadcast. PAIR: of steps, whose word of e it is."""
    return gl.inline_asm_elementwise(
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{TYPE}.{TYPE}.f32"
        f" {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9, $10, $11}},"
        f" {{$12, $13, $14, $15}}, ${16 + 2 * PAIR}, {SELECTOR};",
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r",
        [a, b, acc, e],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _fetch(shared, tiles, places, stage, step, steps_in, EVEN: gl.constexpr):
    """Begins to copy `shared`'s columns from `step` on. tiles, places: pointers to the tiles' first
    words, and where words of the first stage are from there. Not EVEN: columns from steps_in on are
    not there, values and x of them are 0, metadata those of the last."""
    values, metadata, x = shared
    values_tile, metadata_tile, x_tile = tiles
    values_at, metadata_at, x_at = places
    if EVEN:
        _copy(values.index(stage), values_tile + step * 8 + values_at)
        _copy(metadata.index(stage), metadata_tile + step + metadata_at)
        _copy(x.index(stage), x_tile + step * 16 + x_at)
    else:
        WORDS: gl.constexpr = values.shape[2]
        OF_VALUES: gl.constexpr = gl.SliceLayout(0, values_at.type.layout)
        OF_METADATA: gl.constexpr = gl.SliceLayout(0, metadata_at.type.layout)
        OF_X: gl.constexpr = gl.SliceLayout(0, x_at.type.layout)
        there = gl.arange(0, WORDS, OF_VALUES) < (steps_in - step) * 8
        _copy(values.index(stage), values_tile + step * 8 + values_at, mask=there[None, :])
        column = gl.arange(0, WORDS // 8, OF_METADATA)
        back = gl.minimum(column + step, steps_in - 1) - column
        _copy(metadata.index(stage), metadata_tile + metadata_at + back[None, :])
        there = gl.arange(0, 2 * WORDS, OF_X) < (steps_in - step) * 16
        _copy(x.index(stage), x_tile + step * 16 + x_at, mask=there[None, :])


@gluon.jit(do_not_specialize=["tokens"])
def mma_sp_kernel(
    x_ptr,
    values_ptr,
    metadata_ptr,
    scale_ptr,
    x_scale_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    steps_in,  # in_features / 32
    stride_x,  # 16 bytes
    stride_scale,
    split_length,  # steps of a part of in_features
    TYPE: gl.constexpr,  # "bf16" or "f16"
    STORAGE: gl.constexpr,  # "plain", "int8", "float8_e4m3fn" or "int4"
    GROUP: gl.constexpr,  # columns that share a scale, a multiple of a stage's; 0: all
    HAS_X_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    EVEN: gl.constexpr,  # steps_in is a multiple of STEPS
    SPLIT_IN: gl.constexpr,
    BLOCK_OUT: gl.constexpr,
    BLOCK_TOKENS: gl.constexpr,
    WARPS_OUT: gl.constexpr,
    WARPS_TOKENS: gl.constexpr,
    STEPS: gl.constexpr,  # of a stage, 2 or 4
    STAGES: gl.constexpr,
):
    """One [BLOCK_OUT, BLOCK_TOKENS] tile of yᵀ over split_length steps of W."""
    WARPS: gl.constexpr = WARPS_OUT * WARPS_TOKENS
    OUT: gl.constexpr = BLOCK_OUT // (16 * WARPS_OUT)  # tiles of a warp
    TOKENS: gl.constexpr = BLOCK_TOKENS // (8 * WARPS_TOKENS)
    FRAGMENT: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, 1, 1, 1, 2, 2],
        [1, 1, 1, 1, 8, 2, 2, 1, 1],
        [1, 1, WARPS_OUT, WARPS_TOKENS, 1, 1, 1, 1, 1],
        [8, 7, 6, 5, 4, 3, 2, 1, 0],
    )
    LOAD_A: gl.constexpr = _load_a(BLOCK_OUT, WARPS_OUT, WARPS_TOKENS)
    LOAD_B: gl.constexpr = _load_b(BLOCK_TOKENS, WARPS_OUT, WARPS_TOKENS)
    LOAD_E: gl.constexpr = _load_e(BLOCK_OUT, WARPS_OUT, WARPS_TOKENS, STEPS)
    # How threads copy: 16 bytes each where rows are aligned; chunks of 16 bytes are XORed with the
    # row, so that the eight rows of a matrix lie in different banks.
    ELEMENT: gl.constexpr = values_ptr.dtype.element_ty
    WIDTH: gl.constexpr = 128 // ELEMENT.primitive_bitwidth  # elements in 16 bytes
    CHUNKS: gl.constexpr = 8 * STEPS // WIDTH  # of a row
    COPY_V: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32 // CHUNKS, CHUNKS], [WARPS, 1], [1, 0])
    COPY_E: gl.constexpr = gl.BlockedLayout([1, STEPS], [32, 1], [WARPS, 1], [1, 0])
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 4], [8 // STEPS, 4 * STEPS], [WARPS, 1], [1, 0])
    SHARED_V: gl.constexpr = gl.SwizzledSharedLayout(WIDTH, 8 // CHUNKS, CHUNKS, [1, 0])
    SHARED_E: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SHARED_X: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    smem_v = gl.allocate_shared_memory(ELEMENT, [STAGES, BLOCK_OUT, 8 * STEPS], SHARED_V)
    smem_e = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_OUT, STEPS], SHARED_E)
    smem_x = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_TOKENS, 16 * STEPS], SHARED_X)
    shared = (smem_v, smem_e, smem_x)

    # Programs that run together share rows of W: token tiles vary fastest, within bands of 8 tiles.
    pid = gl.program_id(0)
    split_idx = gl.program_id(1)
    tiles_out = gl.cdiv(out_features, BLOCK_OUT)
    band_idx = pid // (8 * tiles_out)
    band_tokens = gl.minimum(gl.cdiv(tokens, BLOCK_TOKENS) - band_idx * 8, 8)
    in_band = pid - band_idx * 8 * tiles_out
    first_row = in_band // band_tokens * BLOCK_OUT
    first_token = (band_idx * 8 + in_band % band_tokens) * BLOCK_TOKENS

    # Of a row or a token that is not there the last one is read again, and nothing is stored. The
    # places within a tile take 32 bits, or the pointers would leave too few registers.
    row_v = gl.arange(0, BLOCK_OUT, gl.SliceLayout(1, COPY_V))
    row_e = gl.arange(0, BLOCK_OUT, gl.SliceLayout(1, COPY_E))
    token = gl.arange(0, BLOCK_TOKENS, gl.SliceLayout(1, COPY_X))
    values_row = gl.minimum(row_v, out_features - 1 - first_row) * (steps_in * 8)
    metadata_row = gl.minimum(row_e, out_features - 1 - first_row) * steps_in
    x_row = gl.minimum(token, tokens - 1 - first_token) * (stride_x * 4)
    word_v = gl.arange(0, 8 * STEPS, gl.SliceLayout(0, COPY_V))
    word_e = gl.arange(0, STEPS, gl.SliceLayout(0, COPY_E))
    word_x = gl.arange(0, 16 * STEPS, gl.SliceLayout(0, COPY_X))
    tiles = (
        values_ptr + first_row.to(gl.int64) * (steps_in * 8),
        metadata_ptr + first_row.to(gl.int64) * steps_in,
        x_ptr + first_token.to(gl.int64) * (stride_x * 4),
    )
    places = (
        values_row[:, None] + word_v[None, :],
        metadata_row[:, None] + word_e[None, :],
        x_row[:, None] + word_x[None, :],
    )

    start = split_idx * split_length
    turns = gl.cdiv(gl.minimum(start + split_length, steps_in) - start, STEPS)
    for turn in gl.static_range(STAGES - 1):
        if turn < turns:
            _fetch(shared, tiles, places, turn, start + STEPS * turn, steps_in, EVEN)
        async_copy.commit_group()
    odd_lanes = _odd_lanes(FRAGMENT, WARPS_OUT)
    acc = gl.full([OUT, TOKENS, WARPS_OUT, WARPS_TOKENS, 8, 2, 2, 2, 2], 0.0, gl.float32, FRAGMENT)
    zeros = acc
    if GROUP > 0:
        row_s = gl.arange(0, BLOCK_OUT, _rows_of_sums(BLOCK_OUT, WARPS_OUT, WARPS_TOKENS))
        row_s = row_s.reshape(OUT, WARPS_OUT, 2, 8).permute(0, 1, 3, 2)
        row_s = gl.convert_layout(row_s.reshape(OUT, 1, WARPS_OUT, 1, 8, 1, 1, 2, 1), FRAGMENT)
        row_s = gl.minimum(row_s, out_features - 1 - first_row)
        scale_at = scale_ptr + (first_row + row_s).to(gl.int64) * stride_scale
    for turn in range(turns):
        async_copy.wait_group(STAGES - 2)
        ahead = turn + STAGES - 1
        if ahead < turns:
            _fetch(shared, tiles, places, ahead % STAGES, start + STEPS * ahead, steps_in, EVEN)
        async_copy.commit_group()
        stage = turn % STAGES
        e = smem_e.index(stage).load(LOAD_E).reshape(OUT, WARPS_OUT, 2, 8, STEPS // 2, 2)
        e = e.permute(E_DIMS.value).reshape(OUT, 1, WARPS_OUT, 1, 8, 2, 1, STEPS // 2, 2)
        e = _halves(gl.convert_layout(e, FRAGMENT), odd_lanes)
        part = zeros if GROUP > 0 else acc
        for step in gl.static_range(STEPS):
            a = smem_v.index(stage).slice(8 * step, 8, 1).load(LOAD_A)
            a = a.reshape(OUT, WARPS_OUT, 2, 8, 2, 2, 2).permute(A_DIMS.value)
            a = gl.convert_layout(a.reshape(OUT, 1, WARPS_OUT, 1, 8, 2, 2, 2, 2), FRAGMENT)
            if STORAGE != "plain":
                a = _widened(a, STORAGE, TYPE)
            b = smem_x.index(stage).slice(16 * step, 16, 1).load(LOAD_B)
            b = b.reshape(TOKENS, WARPS_TOKENS, 8, 2, 2, 2, 2).permute(B_DIMS.value)
            b = gl.convert_layout(b.reshape(1, TOKENS, 1, WARPS_TOKENS, 8, 2, 2, 2, 2), FRAGMENT)
            part = _mma_sp(a, b, part, e, step // 2, step % 2, TYPE)
        if GROUP > 0:
            of_group, part = gl.broadcast(
                gl.load(scale_at + (start + STEPS * turn) * 32 // GROUP), part
            )
            acc += of_group * part
        else:
            acc = part

    STORE: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [1, WARPS], [0, 1])
    sums = gl.convert_layout(acc.permute(C_DIMS.value).reshape(BLOCK_OUT, BLOCK_TOKENS), STORE)
    row = first_row + gl.arange(0, BLOCK_OUT, gl.SliceLayout(1, STORE))
    token_out = first_token + gl.arange(0, BLOCK_TOKENS, gl.SliceLayout(0, STORE))
    if STORAGE != "plain" and GROUP == 0:
        of_row = gl.load(scale_ptr + row.to(gl.int64) * stride_scale, row < out_features, 0.0)
        sums *= of_row[:, None]
    if HAS_X_SCALE:
        sums *= gl.load(x_scale_ptr + token_out, token_out < tokens, 0.0)[None, :]
    if SPLIT_IN > 1:
        out_ptr += split_idx.to(gl.int64) * tokens * out_features
    elif HAS_BIAS:
        bias = gl.load(bias_ptr + row, mask=row < out_features, other=0.0).to(gl.float32)
        sums = _finish(sums, bias[:, None], ACTIVATION)
    else:
        sums = _finish(sums, 0.0, ACTIVATION)
    out_at = out_ptr + token_out.to(gl.int64)[None, :] * out_features + row[:, None]
    there = (row < out_features)[:, None] & (token_out < tokens)[None, :]
    gl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=there)


def constants(config: MmaSp):
    """The kernel's compile-time arguments that follow from a config."""
    return {
        "SPLIT_IN": config.split_in,
        "BLOCK_OUT": config.block_out,
        "BLOCK_TOKENS": config.block_tokens,
        "WARPS_OUT": config.warps_out,
        "WARPS_TOKENS": config.warps_tokens,
        "STEPS": config.steps,
        "STAGES": config.stages,
    }


@functools.lru_cache(maxsize=1024)
def _fitting(config: MmaSp, device: int) -> MmaSp:
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return config.fitting(properties["max_shared_mem"])


def launch(
    x,
    values,
    metadata,
    bias,
    activation,
    config: MmaSp,
    out,
    *,
    storage="plain",
    scale=None,
    group=0,
    x_scale=None,
):
    """out = activation(x · Wᵀ + bias), arguments as linear.linear has checked them.

    Args:
        x: [tokens, in_features], float16 or bfloat16, in_features % 32 == 0.
        out: [tokens, out_features], contiguous.
        storage: name of the element type of quantised values.
    """
    tokens, out_features = out.shape
    steps_in = x.shape[1] // MMA_COLUMNS
    kind = dtypes.PLAIN[x.dtype].name.replace("loat", "")  # f16 or bf16
    x, metadata = words(x, torch.int32, 16), words(metadata, torch.int32, 4)
    element = {4: torch.int32, 2: torch.int16, 1: torch.int8}[config.element_bytes]
    values = words(values if scale is None else values.view(torch.uint8), element, 1)
    length = triton.cdiv(triton.cdiv(steps_in, config.split_in), PART_STEPS) * PART_STEPS
    config = _fitting(config, x.device.index)
    target = out
    if config.split_in > 1:
        target = torch.empty((config.split_in, *out.shape), dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(out_features, config.block_out) * triton.cdiv(tokens, config.block_tokens)
    mma_sp_kernel[(tiles, config.split_in)](
        x,
        values,
        metadata,
        scale,
        x_scale,
        bias,
        target,
        tokens,
        out_features,
        steps_in,
        x.stride(0) // 4,
        0 if scale is None else scale.stride(0),
        length,
        TYPE=kind,
        STORAGE=storage,
        GROUP=group,
        HAS_X_SCALE=x_scale is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        EVEN=steps_in % config.steps == 0,
        num_warps=config.warps_out * config.warps_tokens,
        **constants(config),
    )
    if config.split_in > 1:
        epilogue.split_reduce(target, bias, activation, out)
