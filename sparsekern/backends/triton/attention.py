"""Attention of one query over a key-value cache in Triton, with query heads in groups.

A program has one key head of one sequence, the GROUP query heads that read it, and a part of the
positions, so that every key and value is read once, whatever GROUP is; positions that the mask
hides are not read where BLOCK of them lie together. Each part keeps its running maximum and sum;
a second kernel joins the parts in order:

    operand     shape                            dtype              memory
    q           [batch, heads, 1, dim]           fp32 fp16 bf16     unit stride along dim
    k, v        [batch, key heads, length, dim]  the same           unit stride along dim
    mask        [batch | 1, 1, 1, length]        bool               True: seen; optional
    parts       [batch, heads, splits, dim]      fp32               sums of exp(score - most) · v
    most, sums  [batch, heads, splits]           fp32               of each part
    out         [batch, 1, heads, dim]           as q               contiguous

dim is a power of 2 from 16 to 256. A query that sees nothing gets zeros. Specification:
sparsekern/integrations/attention.py:reference.
"""

import torch
import triton
import triton.language as tl

BLOCK = 64  # positions that a program takes at a time; of float32 a quarter, for shared memory
PROGRAMS = 1024  # about so many are wanted: eight for each multiprocessor of a large GPU
MOST_SPLITS = 64


@triton.jit(do_not_specialize=["key_heads", "length"])
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    parts_ptr,
    most_ptr,
    sums_ptr,
    key_heads,
    length,
    split_length,
    q_batch,
    q_head,
    k_batch,
    k_head,
    k_position,
    v_batch,
    v_head,
    v_position,
    mask_batch,
    mask_position,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # at least GROUP and 16, a power of 2
    DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch_idx = (tl.program_id(0) // key_heads).to(tl.int64)
    head = (tl.program_id(0) % key_heads).to(tl.int64)
    split_idx = tl.program_id(1)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    there = row < GROUP
    q_at = q_ptr + batch_idx * q_batch + (head * GROUP + row[:, None]) * q_head + dim[None, :]
    q = tl.load(q_at, mask=there[:, None], other=0.0)
    k_ptr += batch_idx * k_batch + head * k_head
    v_ptr += batch_idx * v_batch + head * v_head
    most = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    part = tl.zeros([ROWS, DIM], tl.float32)
    start = split_idx * split_length
    stop = tl.minimum(start + split_length, length)
    for begin in range(start, stop, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        inside = position < stop
        at = position.to(tl.int64)
        seen = inside
        if HAS_MASK:
            flag = tl.load(
                mask_ptr + batch_idx * mask_batch + at * mask_position, mask=inside, other=0
            )
            seen = flag != 0
        if tl.max(seen.to(tl.int32), axis=0) > 0:
            k = tl.load(k_ptr + at[:, None] * k_position + dim, mask=seen[:, None], other=0.0)
            v = tl.load(v_ptr + at[:, None] * v_position + dim, mask=seen[:, None], other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            score = tl.where(seen[None, :], score, float("-inf"))
            now = tl.maximum(most, tl.max(score, axis=1))  # finite: something is seen
            weight = tl.exp(score - now[:, None])
            rescale = tl.exp(most - now)
            sums = sums * rescale + tl.sum(weight, axis=1)
            added = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            part = part * rescale[:, None] + added
            most = now
    index = ((batch_idx * key_heads + head) * GROUP + row) * SPLITS + split_idx
    tl.store(most_ptr + index, most, mask=there)
    tl.store(sums_ptr + index, sums, mask=there)
    tl.store(parts_ptr + index[:, None] * DIM + dim[None, :], part, mask=there[:, None])


@triton.jit
def attention_combine_kernel(
    parts_ptr,
    most_ptr,
    sums_ptr,
    out_ptr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,  # at least SPLITS, a power of 2
    DIM: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    dim = tl.arange(0, DIM)
    inside = part < SPLITS
    most = tl.load(most_ptr + head * SPLITS + part, mask=inside, other=float("-inf"))
    sums = tl.load(sums_ptr + head * SPLITS + part, mask=inside, other=0.0)
    highest = tl.max(most, axis=0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp(most - highest)  # 0 for a part that saw nothing
    total = tl.sum(weight * sums, axis=0)
    at = (head * SPLITS + part[:, None]) * DIM + dim[None, :]
    parts = tl.load(parts_ptr + at, mask=inside[:, None], other=0.0)
    y = tl.sum(parts * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + head * DIM + dim, y.to(out_ptr.dtype.element_ty))


def splits_of(programs: int, length: int, block: int) -> tuple[int, int]:
    """(parts that the positions are split in, positions of a part): whole blocks."""
    blocks = max(1, triton.cdiv(length, block))
    wanted = min(max(1, PROGRAMS // max(1, programs)), blocks, MOST_SPLITS)
    per_part = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, per_part), per_part * block


def decode_attention(q, k, v, mask, scale: float):
    """[batch, 1, heads, dim]; operands as above, checked by the caller."""
    batch, heads, _, dim = q.shape
    key_heads, length = k.shape[1], k.shape[2]
    group = heads // key_heads
    out = torch.empty(batch, 1, heads, dim, dtype=q.dtype, device=q.device)
    if batch * heads == 0:
        return out
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    block = BLOCK if q.element_size() == 2 else BLOCK // 4
    splits, split_length = splits_of(batch * key_heads, length, block)
    shape = (batch, heads, splits)
    parts = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
    most = torch.empty(shape, dtype=torch.float32, device=q.device)
    sums = torch.empty_like(most)
    flags = None if mask is None else mask.view(torch.uint8)
    steps = (0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(3))
    decode_attention_kernel[(batch * key_heads, splits)](
        q,
        k,
        v,
        flags,
        parts,
        most,
        sums,
        key_heads,
        length,
        split_length,
        q.stride(0),
        q.stride(1),
        *k.stride()[:3],
        *v.stride()[:3],
        *steps,
        scale,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        HAS_MASK=mask is not None,
        SPLITS=splits,
        BLOCK=block,
        num_warps=4,
    )
    attention_combine_kernel[(batch * heads,)](
        parts,
        most,
        sums,
        out,
        SPLITS=splits,
        PARTS=triton.next_power_of_2(splits),
        DIM=dim,
        num_warps=4,
    )
    return out
