"""Triton kernels of the row-major format: 2:4 mask, compress, prune + compress, decompress; and
decompress of the layout that the CUDA kernels read (formats/tile64.py), a program a tile.

Each of the first is one pass over *pairs of groups* (8 columns, one metadata byte; see groups.py):

    16-bit weight   reads 16 B per pair (two int64 groups)   writes 8 B of values, 1 B of metadata
    32-bit weight   reads 32 B per pair                      writes 16 B of values, 1 B of metadata

The metadata bytes of a program pass through shared memory, so that they too leave as wide stores.

Kernels never raise: they count the pairs that break a rule in `bad`; formats/codec.py names them.
Launchers (below the kernels) expect contiguous tensors whose dtype and shape have been checked.

Specification: reference.py. Format: formats/sparse24.py.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sparsekern.backends.triton.groups import (
    any_above,
    best_scores,
    encode,
    kept,
    load_elements,
    load_two,
    mask_flags,
    mask_word,
    pairs,
    spread16,
    spread32,
    store_two,
)
from sparsekern.formats import dtypes, tile64


@triton.jit
def _count_bad(bad_ptr, bad):
    count = tl.sum(bad.to(tl.int32), axis=0)
    tl.atomic_add(bad_ptr, count, mask=count > 0, sem="relaxed")


@triton.jit
def compress_kernel(
    weight_ptr,  # int64 words: four 16-bit or two 32-bit elements each
    choice_ptr,  # MODE "mask": int32 words of four bytes 0 | 1; "scores": int64 words; else unused
    values_ptr,  # one word of two values per group: int32 (16-bit) or int64 (32-bit)
    metadata_ptr,  # uint8, one per pair
    bad_ptr,  # int32, number of pairs that break a rule
    total,
    pairs_per_row,
    MODE: tl.constexpr,  # "exact" | "mask" | "magnitude" | "scores"
    BITS: tl.constexpr,
    MAX_FINITE: tl.constexpr,
    SCORE_BITS: tl.constexpr,
    SCORE_INF: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    MAGNITUDE: tl.constexpr = (1 << (BITS - 1)) - 1
    start, pair, first, inside, second = pairs(total, pairs_per_row, BLOCK, ODD)
    e, f = load_elements(weight_ptr, start, first, inside, second, BITS, ODD)
    bad = any_above(e, f, MAGNITUDE, MAX_FINITE)
    if MODE == "mask":
        m0, m1 = load_two(choice_ptr + 2 * start, first, inside, second, ODD)
        e = kept(e, mask_flags(m0))
        f = kept(f, mask_flags(m1))
    elif MODE == "scores":
        SCORE_MAGNITUDE: tl.constexpr = (1 << (SCORE_BITS - 1)) - 1
        s, t = load_elements(choice_ptr, start, first, inside, second, SCORE_BITS, ODD)
        bad = bad | any_above(s, t, SCORE_MAGNITUDE, SCORE_INF)
        e = kept(e, best_scores(s, SCORE_BITS))
        f = kept(f, best_scores(t, SCORE_BITS))
    EXACT: tl.constexpr = MODE == "exact" or MODE == "mask"
    word0, nibble0, third0 = encode(e, BITS, EXACT)
    word1, nibble1, third1 = encode(f, BITS, EXACT)
    if ODD:
        nibble1 = tl.where(second, nibble1, 4)
    store_two(values_ptr + 2 * start, first, word0, word1, inside, second, ODD)
    tl.store(metadata_ptr + start + pair, (nibble0 | (nibble1 << 4)).to(tl.uint8), mask=inside)
    _count_bad(bad_ptr, bad | third0 | third1)


@triton.jit
def mask_kernel(
    scores_ptr,  # int64 words
    mask_ptr,  # int32 words of four bytes 0 | 1, one per group
    bad_ptr,
    total,
    pairs_per_row,
    BITS: tl.constexpr,
    INF: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    MAGNITUDE: tl.constexpr = (1 << (BITS - 1)) - 1
    start, pair, first, inside, second = pairs(total, pairs_per_row, BLOCK, ODD)
    s, t = load_elements(scores_ptr, start, first, inside, second, BITS, ODD)
    word0 = mask_word(best_scores(s, BITS))
    word1 = mask_word(best_scores(t, BITS))
    store_two(mask_ptr + 2 * start, first, word0, word1, inside, second, ODD)
    _count_bad(bad_ptr, any_above(s, t, MAGNITUDE, INF))


@triton.jit
def decompress_kernel(
    values_ptr,  # one word of two values per group: int32 (16-bit) or int64 (32-bit)
    metadata_ptr,  # uint8, one per pair
    weight_ptr,  # int64 words: four 16-bit or two 32-bit elements each
    total,
    pairs_per_row,
    BITS: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, pair, first, inside, second = pairs(total, pairs_per_row, BLOCK, ODD)
    byte = tl.load(metadata_ptr + start + pair, mask=inside, other=0x44).to(tl.int32)
    v0, v1 = load_two(values_ptr + 2 * start, first, inside, second, ODD)
    if BITS == 16:
        g0 = spread16(v0, byte & 15)
        g1 = spread16(v1, byte >> 4)
        store_two(weight_ptr + 2 * start, first, g0, g1, inside, second, ODD)
    else:
        low0, high0 = spread32(v0, byte & 15)
        low1, high1 = spread32(v1, byte >> 4)
        store_two(weight_ptr + 4 * start, 2 * first, low0, high0, inside, inside, False)
        store_two(weight_ptr + 4 * start + 2, 2 * first, low1, high1, second, second, False)


@triton.jit
def decompress_tile64_kernel(
    values_ptr,  # int32 words, one per group: 1024 of each tile
    metadata_ptr,  # uint8, 512 of each tile
    weight_ptr,  # int64 words, one per group
    out_features,
    groups_per_row,
    k_tiles,
    panels,
    PANELS: tl.constexpr,
):
    """One tile of 64 rows and 16 groups, in the places of formats/tile64.py."""
    tile = tl.program_id(0)
    before = tile // (PANELS * k_tiles) * PANELS  # panels of the row groups before this one
    count = tl.minimum(panels - before, PANELS)
    inside = tile - before * k_tiles
    panel, k_tile = before + inside % count, inside // count
    index = tl.arange(0, 1024)
    row, group = index // 16, index % 16
    word = tl.load(values_ptr + tile.to(tl.int64) * 1024 + group // 4 * 256 + row * 4 + group % 4)
    # row = (warp, half, row of 8), byte = (t, one of two)
    place = row // 16 * 128 + row % 8 * 16 + group // 4 * 4 + row // 8 % 2 * 2 + group // 2 % 2
    byte = tl.load(metadata_ptr + tile.to(tl.int64) * 512 + place).to(tl.int32)
    nibble = (byte >> group % 2 * 4) & 15
    r, g = panel * 64 + row, k_tile * 16 + group
    mask = (r < out_features) & (g < groups_per_row)
    tl.store(weight_ptr + r.to(tl.int64) * groups_per_row + g, spread16(word, nibble), mask=mask)


# ---- launchers -----------------------------------------------------------------------------------


class Launch(NamedTuple):
    """How a launcher cuts its work: the tuning knobs, equal for every kernel here."""

    block_pairs: int = 1024  # pairs of groups per program, a power of two
    num_warps: int = 4
    maxnreg: int | None = None  # cap on registers per thread


def _bits(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize


def _words(tensor: torch.Tensor, word: torch.dtype) -> torch.Tensor:
    """The same memory as integers of another width."""
    return tensor.view(word) if tensor.numel() else tensor


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The input, or a copy where a slice starts off the 16 bytes that a vector load needs."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _run(kernel, pointers, shape, launch: Launch, device: torch.device, **constants) -> None:
    out_features, in_features = shape
    pairs_per_row = (in_features + 7) // 8
    total = out_features * pairs_per_row
    if total == 0:
        return
    options = {"num_warps": launch.num_warps}
    if launch.maxnreg is not None:
        options["maxnreg"] = launch.maxnreg
    grid = (triton.cdiv(total, launch.block_pairs),)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](
            *pointers,
            total,
            pairs_per_row,
            **constants,
            ODD=in_features % 8 != 0,
            BLOCK=launch.block_pairs,
            **options,
        )


def compress(
    w: torch.Tensor,
    mode: str,
    choice: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prune and compress in one pass over w.

    Args:
        w: [out, in] float32 | float16 | bfloat16, contiguous, in % 4 == 0.
        mode: "exact" (w is 2:4 already), "mask" (choice: bool [out, in]), "magnitude", or "scores"
            (choice: float32 | float16 | bfloat16 [out, in]).
        launch: tuning knobs; by default fewer pairs with scores, which need more registers.
    Returns:
        values [out, in/2], metadata uint8 [out, ceil(in/8)] and `bad` int32 [1]: how many pairs
        hold NaN or Inf, a NaN score, or (exact, mask) a third non-zero. The first two mean nothing
        unless it is 0; reading it waits for the kernel.
    """
    if launch is None:
        launch = Launch(512) if mode == "scores" else Launch(1024, num_warps=8)
    out_features, in_features = w.shape
    values = w.new_empty(out_features, in_features // 2)
    metadata = w.new_empty(out_features, (in_features + 7) // 8, dtype=torch.uint8)
    bad = torch.zeros(1, dtype=torch.int32, device=w.device)
    bits = _bits(w.dtype)
    constants = {"MODE": mode, "BITS": bits, "MAX_FINITE": dtypes.PLAIN[w.dtype].infinity_bits - 1}
    constants |= {"SCORE_BITS": 0, "SCORE_INF": 0}
    if mode == "mask":
        choice = _words(_aligned(choice), torch.int32)
    elif mode == "scores":
        constants |= {
            "SCORE_BITS": _bits(choice.dtype),
            "SCORE_INF": dtypes.PLAIN[choice.dtype].infinity_bits,
        }
        choice = _words(_aligned(choice), torch.int64)
    words = _words(values, torch.int32 if bits == 16 else torch.int64)
    pointers = (_words(_aligned(w), torch.int64), choice, words, metadata, bad)
    _run(compress_kernel, pointers, w.shape, launch, w.device, **constants)
    return values, metadata, bad


def mask24(scores: torch.Tensor, launch: Launch | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The two best of every four scores as bool [out, in], and `bad`: pairs with a NaN."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    bad = torch.zeros(1, dtype=torch.int32, device=scores.device)
    constants = {"BITS": _bits(scores.dtype), "INF": dtypes.PLAIN[scores.dtype].infinity_bits}
    pointers = (_words(_aligned(scores), torch.int64), _words(mask, torch.int32), bad)
    _run(mask_kernel, pointers, scores.shape, launch or Launch(), scores.device, **constants)
    return mask, bad


def decompress(
    values: torch.Tensor, metadata: torch.Tensor, in_features: int, launch: Launch | None = None
) -> torch.Tensor:
    """values [out, in/2] and metadata uint8 [out, ceil(in/8)] -> dense [out, in], bit for bit."""
    dense = values.new_empty(values.shape[0], in_features)
    bits = _bits(values.dtype)
    words = _words(_aligned(values), torch.int32 if bits == 16 else torch.int64)
    pointers = (words, metadata, _words(dense, torch.int64))
    _run(decompress_kernel, pointers, dense.shape, launch or Launch(), values.device, BITS=bits)
    return dense


def decompress_tile64(
    values: torch.Tensor, metadata: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """values [tiles, 2048] of 16 bits and metadata uint8 [tiles, 512] of layout "tile64" -> dense
    [out, in] of that shape, bit for bit."""
    out_features, in_features = shape
    dense = values.new_empty(out_features, in_features)
    panels, k_tiles = tile64.packed_shape(out_features, in_features)
    if dense.numel() == 0:
        return dense
    device = values.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        decompress_tile64_kernel[(panels * k_tiles,)](
            _words(_aligned(values), torch.int32),
            metadata,
            _words(dense, torch.int64),
            out_features,
            in_features // 4,
            k_tiles,
            panels,
            PANELS=tile64.PANELS,
        )
    return dense
