"""Large float32 products on tensor cores, and the inverse of a large matrix by such products.

A GPU multiplies 16-bit matrices some ten times as fast as float32 ones. Each factor is scaled by
powers of two and written as a sum of two float16 numbers, which hold 22 bits of it:

    a = r·(a₁ + a₂),   b = (b₁ + b₂)·c        r per row of a, c per column of b
    a b = r·(a₂ b₁ + a₁ b₂ + a₁ b₁)·c         without a₂ b₂, below the rounding of the rest

The tensor cores add in float32, but cut off instead of rounding: sums over more than `DEPTH`
numbers are put together outside, and the small terms are added first. Errors are those of float32
products, within a small factor. Matrices below `SMALLEST` are multiplied as they are.

Source: Markidis et al. 2018 (arXiv:1803.04014), for the sum of two; Ootomo and Yokota 2022
(arXiv:2203.03341), for the scaling, the term that can be left out and sums outside.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SMALLEST = 3072  # rows and columns of a right factor that is worth the split
DEPTH = 2048
BLOCKED = 6144  # rows of a matrix whose inverse is worth products instead of a factorisation
AMISS = 0.02  # of an inverse that is not good enough: ‖z A⁻¹ A − z‖ / ‖z‖
LEAF = 1024  # rows of a matrix that is inverted by its Cholesky factor
_TOP = 14  # scaled numbers are below 2**14


@functools.cache
def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this 16-bit type here with float32 sums and results:
    tried once, on sums that anything narrower rounds visibly."""
    if device.type != "cuda" or not dtype.is_floating_point or dtype.itemsize != 2:
        return False
    generator = torch.Generator(device).manual_seed(0)
    x = torch.rand(4096, 64, generator=generator, device=device, dtype=torch.float32).to(dtype)
    try:
        got = torch.mm(x.t(), x, out_dtype=torch.float32)  # torch 2.8 and later, on CUDA alone
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    wanted = x.double().t() @ x.double()
    return got.dtype == torch.float32 and bool(((got - wanted).abs() <= 1e-4 * wanted).all())


def product16(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of 16-bit matrices for which `sums_in_float32`; on a CPU of their numbers in float32."""
    if not a.is_cuda:
        return a.t().float() @ b.float()
    y: Tensor = torch.mm(a.t(), b, out_dtype=torch.float32)
    return y


class Factor:
    """The right factor of several products.

    Args:
        matrix: float32 [n, m]; must not change.
        split: whether it is multiplied as float16; None: on a GPU, where it is large enough.
    """

    def __init__(self, matrix: Tensor, split: bool | None = None) -> None:
        if split is None:
            large = matrix.is_cuda and min(matrix.shape) >= SMALLEST
            split = large and sums_in_float32(matrix.device, torch.float16)
        self._parts: list[Tensor] = []
        self._whole = None if split else matrix
        if split:
            power = _power(matrix, 0)
            self._back = power.reciprocal()
            for part in torch.split(matrix, DEPTH):
                high, low = _halves(part * power)
                self._parts.append(torch.cat([high, low, high]))

    def times(self, a: Tensor) -> Tensor:
        """a @ matrix, float32 [k, m], new; a float32 [k, n]."""
        if self._whole is not None:
            return a @ self._whole
        power = _power(a, 1)[:, None]
        result: Tensor | None = None
        for columns, part in zip(torch.split(a, DEPTH, 1), self._parts):
            high, low = _halves(columns * power)
            product = product16(torch.cat([low, high, high], 1).t(), part)
            result = product if result is None else result.add_(product)
        assert result is not None
        return result.mul_(power.reciprocal()).mul_(self._back)


def product(a: Tensor, b: Tensor, split: bool | None = None) -> Tensor:
    """a @ b of float32 matrices."""
    return Factor(b, split).times(a)


def inverse(a: Tensor, leaf: int = LEAF, split: bool | None = None) -> Tensor | None:
    """The inverse of a symmetric matrix, float32 [n, n], new; None where it is not positive
    definite to within rounding. Only the lower triangle is read; `a` stays.

    With L Lᵀ = A and M = L⁻¹, by halves:

        L₂₁ = A₂₁ M₁₁ᵀ,   M₂₂ from A₂₂ − L₂₁ L₂₁ᵀ,   M₂₁ = −M₂₂ L₂₁ M₁₁;      A⁻¹ = Mᵀ M

    2.3 n³ multiplications, almost all of them in large products.
    """
    failures: list[Tensor] = []
    m = torch.zeros_like(a)
    _invert_factor(a, m, leaf, split, failures)
    half = len(a) // 2
    left, below, right = m[:half, :half], m[half:, :half], m[half:, half:]
    result = torch.empty_like(a)
    result[half:, half:] = product(right.t(), right, split)
    corner = product(right.t(), below, split)
    result[half:, :half] = corner
    result[:half, half:] = corner.t()
    del corner
    whole = product(below.t(), below, split)
    torch.add(product(left.t(), left, split), whole, out=result[:half, :half])
    return None if int(torch.stack(failures).abs().sum()) else result


def is_large(a: Tensor) -> bool:
    """Whether `large_inverse` takes this matrix."""
    return a.is_cuda and len(a) >= BLOCKED


def large_inverse(a: Tensor) -> Tensor | None:
    """`inverse` of a large matrix on a GPU; None of another one, and where eight vectors say that
    it is not good enough."""
    if not is_large(a):
        return None
    found = inverse(a)
    if found is None:
        return None
    generator = torch.Generator(a.device).manual_seed(0)
    z = torch.randn(8, len(a), generator=generator, device=a.device, dtype=torch.float32)
    return found if float((z @ found @ a - z).norm() / z.norm()) <= AMISS else None


def _invert_factor(
    a: Tensor, m: Tensor, leaf: int, split: bool | None, failures: list[Tensor]
) -> None:
    """Write L⁻¹ of L Lᵀ = a into the lower triangle of m."""
    size = len(a)
    if size <= leaf:
        lower, info = torch.linalg.cholesky_ex(a)
        # A GPU's factorisation may say nothing of a pivot that is no number.
        failures.append(info + (~(lower.diagonal() > 0)).sum(dtype=info.dtype))
        unit = torch.eye(size, dtype=a.dtype, device=a.device)
        m.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
        return
    half = size // 2
    _invert_factor(a[:half, :half], m[:half, :half], leaf, split, failures)
    below = product(a[half:, :half], m[:half, :half].t(), split)
    rest = a[half:, half:] - product(below, below.t(), split)
    _invert_factor(rest, m[half:, half:], leaf, split, failures)
    del rest
    below = product(below, m[:half, :half], split)
    m[half:, :half] = product(m[half:, half:], below, split).neg_()


def _power(matrix: Tensor, dim: int) -> Tensor:
    """For each column (dim 0) or row (dim 1) the power of two that brings its largest number into
    [2^13, 2^14)."""
    largest = torch.linalg.vector_norm(matrix, float("inf"), dim=dim)
    exponent = torch.frexp(largest)[1].clamp(-100, 100)
    return ((127 + _TOP - exponent) << 23).view(torch.float32)  # its bits: exact on every device


def _halves(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Two float16 numbers whose sum is the given one, to 22 bits."""
    high = scaled.half()
    return high, (scaled - high).half()
