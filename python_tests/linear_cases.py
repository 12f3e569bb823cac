"""Weights, error bounds and comparisons shared by the tests of the sparse linear layer."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = (None, "relu", "gelu", "silu")
PAIRS = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])

# (tokens, out_features, in_features), with what each is there for.
SHAPES = (
    (1, 64, 128),  # one token, whole tiles
    (3, 7, 4),  # one group: in_features % 8 == 4, half a byte of metadata
    (16, 70, 36),  # ragged rows, a tail of 4 columns
    (17, 5, 260),  # one token past a tile of 16, fewer rows than a tile
    (33, 129, 132),  # one row and one token past the tiles
    (130, 130, 192),  # the tiles for many tokens, both ragged
)

# Unit roundoff of each dtype: half the gap between 1 and the next number.
_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_SUBNORMAL = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def random_weight(out_features, in_features, dtype, seed=0, integers=False):
    """A dense 2:4 weight [out, in] in which every group has its own random pattern of the six."""
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // 4
    pattern = torch.randint(0, 6, (out_features, groups), generator=generator)
    if integers:
        kept = torch.randint(1, 5, (out_features, groups, 2), generator=generator).double()
        kept *= torch.randint(0, 2, kept.shape, generator=generator) * 2 - 1
    else:
        kept = torch.randn(out_features, groups, 2, generator=generator, dtype=torch.float64)
    dense = torch.zeros(out_features, groups, 4, dtype=torch.float64)
    dense.scatter_(2, PAIRS[pattern], kept)
    return dense.view(out_features, in_features).to(dtype)


def random_input(shape, dtype, seed=1, integers=False):
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def error_bound(x, w, bias, y64, dtype):
    """Elementwise bound on |y - y64| for float32 accumulation and one rounding to dtype.

    A sum of in_features / 2 products is off by at most that many roundings of Σ|x||w|; the factor 2
    covers the tensor cores, which truncate, and the activations: their slopes stay below 1.13 and
    they add a few float32 roundings of the pre-activation.
    """
    magnitude = x.double().abs() @ w.double().abs().t()
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    accumulation = 2 * (w.shape[1] / 2 + 4) * 2.0**-23 * magnitude
    return accumulation + _ROUNDOFF[dtype] * y64.abs() + _SUBNORMAL[dtype]


def assert_within(y, y64, bound):
    """Every element of y within its bound of y64; the failure names the worst one."""
    assert y.shape == y64.shape
    error = (y.double().cpu() - y64).abs()
    excess = torch.where(error <= bound, 0.0, error / bound)  # NaN compares false: an excess
    excess = excess.nan_to_num(nan=float("inf"))
    worst = int(excess.argmax()) if excess.numel() else 0
    assert not excess.any(), (
        f"{int((excess > 0).sum())} of {excess.numel()} elements out of bounds; the worst, number "
        f"{worst}: got {y.flatten()[worst]}, expected {y64.flatten()[worst]}"
    )


def assert_same(y, expected, what=""):
    """The same shape, dtype and numbers; the failure says in one line where the first differs."""
    y, expected = y.detach().cpu(), expected.detach().cpu()
    got, wanted = (f"{t.dtype} {list(t.shape)}" for t in (y, expected))
    assert got == wanted, f"{what}: got {got}, expected {wanted}"
    wrong = (y != expected).nonzero()
    first = tuple(wrong[0].tolist()) if len(wrong) else ()
    assert not len(wrong), (
        f"{what}: {len(wrong)} of {y.numel()} elements differ; the first at {first}: "
        f"got {y[first]}, expected {expected[first]}"
    )
