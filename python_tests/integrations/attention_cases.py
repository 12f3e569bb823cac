"""What attention over a static cache must give, on a GPU and in Triton's interpreter.

As a script, with TRITON_INTERPRET=1 in the environment, this file runs its cases on the CPU and
prints {case: error or null}. bfloat16 is left to the GPU: Triton's interpreter multiplies the bit
patterns of its operands.
"""

import json

import torch

from sparsekern.backends.triton import attention
from sparsekern.integrations.attention import reference

# (batch, heads, key heads, length, dim, positions seen; None: no mask)
CASES = [
    (1, 8, 2, 40, 16, 17),  # part of a block
    (2, 2, 2, 200, 32, 130),  # no groups; parts that see nothing
    (1, 4, 1, 129, 64, None),  # one key head; a block of one position
    (1, 32, 1, 70, 16, 70),  # more query heads than the rows of one tile
    (1, 2, 1, 64, 128, 0),  # nothing is seen
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def operands(case, dtype, device="cpu", seed=0):
    """q, k, v and mask; q with the strides of a transposed view, v with those of a longer cache."""
    batch, heads, key_heads, length, dim, seen = case
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 1, heads, dim, generator=generator).transpose(1, 2)
    k = torch.randn(batch, key_heads, length, dim, generator=generator)
    v = torch.randn(batch, key_heads, length + 3, dim, generator=generator)
    q, k, v = (t.to(device, dtype) for t in (q, k, v))
    mask = None
    if seen is not None:
        flags = torch.arange(length, device=device) < seen
        mask = flags.expand(batch, 1, 1, length)
        if batch > 1 and seen > 1:
            mask = mask.clone()
            mask[0, ..., 0] = False  # padding on the left of one sequence
    return q, k, v[:, :, :length], mask


def error_of(case, dtype, device="cpu"):
    """None, or how far the kernels' result is from the formula."""
    q, k, v, mask = operands(case, dtype, device)
    got = attention.decode_attention(q, k, v, mask, 0.25)
    wanted = reference(q, k, v, mask, 0.25)
    if got.shape != wanted.shape or not got.is_contiguous():
        return f"shape {list(got.shape)}"
    distance = float((got.float() - wanted.float()).abs().max())
    return None if distance <= TOLERANCE[dtype] else f"distance {distance}"


if __name__ == "__main__":
    found = {f"{case}": error_of(case, torch.float16) for case in CASES}
    found["float32"] = error_of(CASES[0], torch.float32)
    attention.PROGRAMS = 1  # one part
    found["one part"] = error_of(CASES[1], torch.float16)
    print(json.dumps(found))
