"""Device functions of the compression kernels: one 2:4 group as integers in registers.

A group is four elements as bit patterns in int32: the magnitudes of floats order like their bits
without the sign, a maximum over them finds NaN and Inf, a copy is exact, and an 8-bit dtype will
only need another word size. The four meet in six comparisons (`survivors`), which also settle the
free slots of a group with fewer than two non-zeros; the CPU code in formats/codec.py takes those
from a table, and the tests hold the two against each other bit for bit.

Memory is read and written in *pairs of groups* (8 columns, one metadata byte), whose words are
consecutive, so that a thread moves 16 bytes at once. in_features % 8 == 4 leaves the last pair of
each row with one group (ODD): the groups of row r then start r words early, the missing one is
masked, and accesses are one word wide.

Written for few instructions: while an H100 copies 12.5 bytes (a 16-bit group read, its values and
nibble written) at 2.43 TB/s, its 132 SMs of 64 integer lanes at 1.6 GHz have time for about 70 of
them. python_tests/test_triton_compress.py counts them in the machine code.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- memory <-> groups ---------------------------------------------------------------------------


@triton.jit
def pairs(total, pairs_per_row, BLOCK: tl.constexpr, ODD: tl.constexpr):
    """This program's pairs, counted from its first one to keep the addresses in 32 bits.

    Returns (start: index of its first pair, pair: offsets from there, first: offset of each pair's
    first group from group 2 * start, whether the pair exists, whether its second group exists).
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    pair = tl.arange(0, BLOCK)
    inside = pair < tl.minimum(total - start, BLOCK).to(tl.int32)
    if ODD:
        row = (start + pair) // pairs_per_row
        first = 2 * pair - row
        second = inside & ((start + pair + 1) % pairs_per_row != 0)
    else:
        first = 2 * pair
        second = inside
    return start, pair, first, inside, second


@triton.jit
def load_two(ptr, first, inside, second, ODD: tl.constexpr):
    """Words `first` and `first + 1` of each pair, 0 where absent; one vector load when not ODD."""
    if ODD:
        g0 = tl.load(ptr + first, mask=inside, other=0)
        g1 = tl.load(ptr + first + 1, mask=second, other=0)
    else:
        half = tl.arange(0, 2)[None, :]
        g0, g1 = tl.split(tl.load(ptr + first[:, None] + half, mask=inside[:, None], other=0))
    return g0, g1


@triton.jit
def store_two(ptr, first, g0, g1, inside, second, ODD: tl.constexpr):
    """Inverse of `load_two`."""
    if ODD:
        tl.store(ptr + first, g0, mask=inside)
        tl.store(ptr + first + 1, g1, mask=second)
    else:
        half = tl.arange(0, 2)[None, :]
        tl.store(ptr + first[:, None] + half, tl.join(g0, g1), mask=inside[:, None])


@triton.jit
def _elements16(group):
    """int64 word of four 16-bit elements -> four int32 in column order, anything above bit 15."""
    low = group.to(tl.int32)
    high = (group >> 32).to(tl.int32)
    return low, low >> 16, high, high >> 16


@triton.jit
def _elements32(low, high):
    """Two int64 words of two 32-bit elements each -> four int32, in column order."""
    return low.to(tl.int32), (low >> 32).to(tl.int32), high.to(tl.int32), (high >> 32).to(tl.int32)


@triton.jit
def load_elements(ptr, start, first, inside, second, BITS: tl.constexpr, ODD: tl.constexpr):
    """The two groups of each pair as 2 x 4 int32 bit patterns; `ptr` points to int64 words."""
    if BITS == 16:
        g0, g1 = load_two(ptr + 2 * start, first, inside, second, ODD)
        return _elements16(g0), _elements16(g1)
    else:
        low0, high0 = load_two(ptr + 4 * start, 2 * first, inside, inside, False)
        low1, high1 = load_two(ptr + 4 * start + 2, 2 * first, second, second, False)
        return _elements32(low0, high0), _elements32(low1, high1)


@triton.jit
def mask_flags(word):
    """int32 word of four bool bytes -> four flags."""
    return (word & 0xFF) != 0, (word & 0xFF00) != 0, (word & 0xFF0000) != 0, (word >> 24) != 0


@triton.jit
def mask_word(keep):
    """Inverse of `mask_flags`."""
    k0, k1, k2, k3 = keep
    low = tl.where(k0, 1, 0) | tl.where(k1, 0x100, 0)
    return low | tl.where(k2, 0x10000, 0) | tl.where(k3, 0x1000000, 0)


@triton.jit
def spread16(word, nibble):
    """Two 16-bit values and their nibble -> the int64 word of the group."""
    value0 = (word & 0xFFFF).to(tl.int64)
    value1 = ((word >> 16) & 0xFFFF).to(tl.int64)
    return (value0 << ((nibble & 3) * 16).to(tl.int64)) | (
        value1 << ((nibble >> 2) * 16).to(tl.int64)
    )


@triton.jit
def spread32(word, nibble):
    """Two 32-bit values and their nibble -> the two int64 words of the group."""
    value0 = word & 0xFFFFFFFF
    value1 = (word >> 32) & 0xFFFFFFFF
    index0 = nibble & 3
    index1 = nibble >> 2
    low = tl.where(index0 == 0, value0, 0) | tl.where(index0 == 1, value0 << 32, 0)
    low = low | tl.where(index1 == 1, value1 << 32, 0)
    high = tl.where(index0 == 2, value0, 0)
    high = high | tl.where(index1 == 2, value1, 0) | tl.where(index1 == 3, value1 << 32, 0)
    return low, high


# ---- order, selection, encoding ------------------------------------------------------------------


@triton.jit
def _majority(x, y, z):
    return (x & y) | (z & (x | y))


@triton.jit
def _majority_not(x, y, z):
    """The majority of ~x, y, z: y where x and y differ, else z. Written without a complement, which
    the compiler would push through the subtraction that made x."""
    return z ^ ((x ^ y) & (y ^ z))


@triton.jit
def _two_largest(d01, d02, d03, d12, d13, d23):
    """Four flags, two of them set, from d_ij < 0 where "i beats j", i < j: who wins at least twice.

    The sign bits are combined as integers (one three-input logic instruction for each majority):
    the same logic on booleans exhausts the predicate registers and costs twice the instructions.
    """
    k0 = _majority(d01, d02, d03) < 0
    k1 = _majority_not(d01, d12, d13) < 0
    k2 = _majority_not(d23, d02, d12) >= 0
    k3 = _majority(d03, d13, d23) >= 0
    return k0, k1, k2, k3


@triton.jit
def _best(k0, k1, k2, k3):
    """Flags of the two largest keys; of equal keys the higher column is kept."""
    return _two_largest(
        -(k0 > k1).to(tl.int32),
        -(k0 > k2).to(tl.int32),
        -(k0 > k3).to(tl.int32),
        -(k1 > k2).to(tl.int32),
        -(k1 > k3).to(tl.int32),
        -(k2 > k3).to(tl.int32),
    )


@triton.jit
def survivors(a0, a1, a2, a3):
    """Flags of the two slots stored for magnitudes a >= 0 (integers).

    The larger one is kept, of equal ones the higher column. Zeros so fill the free slots as
    compression.SLOT_TABLE says, but for one exception: where columns 1, 2 and 3 are all zero,
    column 2 beats column 3. There max(a2, 1 - a1) is 1; elsewhere it decides like a2.
    """
    d23 = a3 - tl.maximum(a2, 1 - a1)
    return _two_largest(a1 - a0, a2 - a0, a3 - a0, a2 - a1, a3 - a1, d23)


@triton.jit
def _score_key(bits, BITS: tl.constexpr):
    """Sign-magnitude float bits -> integer of the same order, with -0.0 equal to +0.0."""
    magnitude = bits & ((1 << (BITS - 1)) - 1)
    return tl.where(((bits >> (BITS - 1)) & 1) != 0, -magnitude, magnitude)


@triton.jit
def kept(e, keep):
    """The elements of a group with those not kept set to zero."""
    e0, e1, e2, e3 = e
    k0, k1, k2, k3 = keep
    return tl.where(k0, e0, 0), tl.where(k1, e1, 0), tl.where(k2, e2, 0), tl.where(k3, e3, 0)


@triton.jit
def _magnitudes(e, MAGNITUDE: tl.constexpr):
    e0, e1, e2, e3 = e
    return e0 & MAGNITUDE, e1 & MAGNITUDE, e2 & MAGNITUDE, e3 & MAGNITUDE


@triton.jit
def _largest(e, MAGNITUDE: tl.constexpr):
    a0, a1, a2, a3 = _magnitudes(e, MAGNITUDE)
    return tl.maximum(tl.maximum(a0, a1), tl.maximum(a2, a3))


@triton.jit
def any_above(e, f, MAGNITUDE: tl.constexpr, LIMIT: tl.constexpr):
    """Whether a magnitude of two groups exceeds LIMIT: the largest finite number, or infinity."""
    return tl.maximum(_largest(e, MAGNITUDE), _largest(f, MAGNITUDE)) > LIMIT


@triton.jit
def _join16(value0, value1):
    """Two 16-bit values -> their int32 word, -0.0 as +0.0.

    Adding 0x7FFF to a magnitude sets the sign bit of its half exactly when it is not zero.
    """
    word = (value0 & 0xFFFF) | (value1 << 16)
    return word & (((word & 0x7FFF7FFF) + 0x7FFF7FFF) | 0x7FFF7FFF)


@triton.jit
def _join32(value0, value1):
    """Two 32-bit values -> their int64 word, -0.0 as +0.0."""
    low = tl.where((value0 & 0x7FFFFFFF) == 0, 0, value0).to(tl.int64) & 0xFFFFFFFF
    high = tl.where((value1 & 0x7FFFFFFF) == 0, 0, value1).to(tl.int64) << 32
    return low | high


@triton.jit
def best_scores(s, BITS: tl.constexpr):
    """Flags of the two best scores of a group."""
    s0, s1, s2, s3 = s
    return _best(
        _score_key(s0, BITS), _score_key(s1, BITS), _score_key(s2, BITS), _score_key(s3, BITS)
    )


@triton.jit
def encode(e, BITS: tl.constexpr, EXACT: tl.constexpr):
    """One group -> (word of its two values, nibble idx0 | idx1 << 2, holds a third non-zero)."""
    MAGNITUDE: tl.constexpr = (1 << (BITS - 1)) - 1
    e0, e1, e2, e3 = e
    a0, a1, a2, a3 = _magnitudes(e, MAGNITUDE)
    k0, k1, k2, k3 = survivors(a0, a1, a2, a3)
    value0 = tl.where(k0, e0, tl.where(k1, e1, e2))
    value1 = tl.where(k3, e3, tl.where(k2, e2, e1))
    nibble = tl.where(k0, 0, tl.where(k1, 1, 2)) | tl.where(k3, 12, tl.where(k2, 8, 4))
    if BITS == 16:
        word = _join16(value0, value1)
    else:
        word = _join32(value0, value1)
    if EXACT:
        count = (a0 != 0).to(tl.int32) + (a1 != 0).to(tl.int32)
        count += (a2 != 0).to(tl.int32) + (a3 != 0).to(tl.int32)
        third = count > 2
    else:
        third = a0 < 0  # never: pruning leaves two
    return word, nibble, third
