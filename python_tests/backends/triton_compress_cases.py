"""What the Triton compression kernels must reproduce, used on a GPU and in Triton's interpreter.

CASES compare every kernel with the torch code of sparsekern.formats.codec on the CPU, bit for bit.
As a script, with TRITON_INTERPRET=1 in the environment, this file runs them on the CPU.
"""

from __future__ import annotations

import itertools

import torch

from sparsekern.backends.triton import compress as kernels
from sparsekern.formats import codec as compression
from sparsekern.formats import tile64
from sparsekern.formats.sparse24 import Sparse24

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# rows x columns: one group; one pair; odd groups; one program of 128 pairs and a partial second.
SHAPES = ((1, 4), (1, 8), (3, 12), (5, 20), (33, 40), (0, 8), (4, 0))


def all_small_groups() -> torch.Tensor:
    """Every group over {-2, -1, -0.0, 0, 1, 2}: all ties, all zero patterns. [432, 12]."""
    levels = (-2.0, -1.0, -0.0, 0.0, 1.0, 2.0)
    return torch.tensor(list(itertools.product(levels, repeat=4))).view(432, 12)


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.cpu(), b.cpu()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.numel() else True


def compare(w: torch.Tensor, scores: torch.Tensor, device: str, launch: kernels.Launch) -> None:
    """Every mode on one weight and one set of scores (CPU tensors)."""
    w_there, scores_there = w.to(device), scores.to(device)
    mask, bad = kernels.mask24(scores_there, launch)
    assert int(bad) == 0
    assert torch.equal(mask.cpu(), compression.mask24(scores))
    expected = {
        "magnitude": compression.prune_compress_dense(w),
        "scores": compression.prune_compress_dense(w, scores),
        "mask": compression.compress_dense(w, mask.cpu()),
    }
    choices = {"magnitude": None, "scores": scores_there, "mask": mask}
    for mode, (values, metadata) in expected.items():
        got = kernels.compress(w_there, mode, choices[mode], launch)
        assert int(got[2]) == 0, (mode, w.dtype, list(w.shape))
        assert equal_bits(got[0], values), (mode, w.dtype, list(w.shape))
        assert equal_bits(got[1], metadata), (mode, w.dtype, list(w.shape))
        dense = kernels.decompress(got[0], got[1], w.shape[1], launch)
        assert equal_bits(dense, compression.decompress_dense(values, metadata, w.shape[1]))
        again = kernels.compress(dense, "exact", None, launch)
        assert int(again[2]) == 0
        assert equal_bits(again[0], values) and equal_bits(again[1], metadata)


def compare_random(device: str, launch: kernels.Launch) -> None:
    generator = torch.Generator().manual_seed(1)
    score_dtypes = itertools.cycle(DTYPES)
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        w = torch.randn(shape, generator=generator).mul(2).to(dtype)
        w[torch.rand(shape, generator=generator) < 0.3] = -0.0
        scores = torch.randn(shape, generator=generator).mul(2).round()
        scores[torch.rand(shape, generator=generator) < 0.1] = float("-inf")
        compare(w, scores.to(next(score_dtypes)), device, launch)


def compare_small_groups(device: str, launch: kernels.Launch) -> None:
    w = all_small_groups()
    for dtype in DTYPES:
        compare(w.to(dtype), w.flip(0).to(dtype), device, launch)


def extremes(device: str, launch: kernels.Launch) -> None:
    """Denormals and the largest finite numbers are neither lost nor taken for infinity."""
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        tiny, top = info.smallest_normal * info.eps, info.max
        w = torch.tensor([[tiny, 0, -tiny, 0, top, -top, 1, tiny]], dtype=dtype)
        assert (w != 0).sum() == 6
        compare(w, w, device, launch)


def rules_are_counted(device: str, launch: kernels.Launch) -> None:
    """`bad` counts pairs with NaN or Inf, NaN scores, and (exact, mask) a third non-zero."""
    values = itertools.cycle((float("nan"), float("inf"), float("-inf")))
    for dtype in DTYPES:
        for position, value in zip(range(8), values):
            w = torch.zeros(3, 20, dtype=dtype)
            w[1, position] = w[2, 16] = value
            w_there, nothing = w.to(device), torch.zeros(3, 20, dtype=torch.bool, device=device)
            for mode, choice in (("exact", None), ("mask", nothing), ("magnitude", None)):
                assert int(kernels.compress(w_there, mode, choice, launch)[2]) == 2
            zeros = torch.zeros_like(w_there)
            nan_scores = 2 if value != value else 0
            assert int(kernels.compress(zeros, "scores", w_there, launch)[2]) == nan_scores
            assert int(kernels.mask24(w_there, launch)[1]) == nan_scores
        w = torch.ones(3, 20, dtype=dtype)
        w[:, 3::4] = 0
        w[1:] = 0
        w_there, mask = w.to(device), torch.ones(3, 20, dtype=torch.bool, device=device)
        assert int(kernels.compress(w_there, "exact", None, launch)[2]) == 3
        assert int(kernels.compress(w_there, "mask", mask, launch)[2]) == 3
        mask[:, 0::4] = False
        assert int(kernels.compress(w_there, "mask", mask, launch)[2]) == 0


def tiled(device: str, launch: kernels.Launch) -> None:
    """Layout "tile64": whole and partial tiles, row groups of one to four panels."""
    generator = torch.Generator().manual_seed(2)
    for shape in ((64, 64), (60, 12), (1, 4), (130, 132), (256, 64), (330, 200), (0, 8), (4, 0)):
        for dtype in (torch.float16, torch.bfloat16):
            w = torch.randn(shape, generator=generator).to(dtype)
            w24 = Sparse24(*compression.prune_compress_dense(w), w.shape)
            packed = tile64.pack(w24)
            values, metadata = packed.values.to(device), packed.metadata.to(device)
            dense = kernels.decompress_tile64(values, metadata, w24.spec.shape)
            assert equal_bits(dense, w24.to_dense()), (dtype, shape)


def misaligned(device: str, launch: kernels.Launch) -> None:
    """A contiguous tensor that starts off 16 bytes gives the same bits."""
    flat = torch.randn(1 + 4 * 24)
    for dtype in DTYPES:
        w = flat.to(dtype)[1:].view(4, 24)
        got = kernels.compress(flat.to(device, dtype)[1:].view(4, 24), "magnitude", None, launch)
        values, metadata = compression.prune_compress_dense(w)
        assert equal_bits(got[0], values) and equal_bits(got[1], metadata)


CASES = (compare_random, compare_small_groups, extremes, rules_are_counted, tiled, misaligned)

if __name__ == "__main__":
    for case in CASES:
        case("cpu", kernels.Launch(block_pairs=128))
        print(case.__name__, "passed")
