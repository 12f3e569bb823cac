"""Products of float32 matrices as sums of float16 ones, and inverses made of them."""

import sys

import pytest
import torch

from python_tests.prune.test_admm import case
from sparsekern.prune import Hessian, admm, relative_error, retarget
from sparsekern.prune.products import Factor, inverse, large_inverse, product


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def definite(size, damp, seed=0, device="cpu"):
    """Ones on the diagonal, before the damping, and a spectrum as that of a layer's inputs."""
    parts = ((2 * size, size // 4), (size // 4, size), (2 * size, 1))
    a, b, c = (numbers(*part, seed=seed + i).to(device) for i, part in enumerate(parts))
    x = a @ b + 3 * c
    h = x.t() @ x
    scale = h.diagonal().sqrt()
    h = h / scale[:, None] / scale
    h.diagonal().add_(damp)
    return h


def amiss(got, a, b):
    """The largest error of a product, as a share of Σ |a||b|."""
    return float(((got.double() - a.double() @ b.double()).abs() / (a.abs() @ b.abs())).max())


def test_a_product_of_halves_has_the_errors_of_float32():
    """Over several sums; rows and columns of very different sizes; each factor used twice."""
    a = numbers(24, 4500) * torch.logspace(-12, 12, 24)[:, None]
    b = numbers(4500, 32, seed=1) * torch.logspace(-10, 10, 32)
    for _ in range(2):
        assert amiss(Factor(b, True).times(a), a, b) < 1e-6
    assert torch.equal(product(a, b), a @ b)  # small ones are multiplied as they are
    assert not product(torch.zeros(3, 4500), b, True).any()
    assert not product(a, b.masked_fill(b > -1, 0)[:, :1] * 0, True).any()
    assert product(torch.full((1, 8), torch.inf), torch.ones(8, 8), True).isnan().all()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size, leaf", [(96, 16), (77, 10), (40, 64)])
def test_an_inverse_by_halves(size, leaf, split):
    a = definite(size, 0.11)
    exact = torch.linalg.inv(a.double())
    given = a.tril() + torch.full_like(a, torch.nan).triu(1)  # what is above is not read
    got = inverse(given, leaf, split)
    direct = torch.cholesky_inverse(torch.linalg.cholesky(a))
    errors = [float((x - exact).norm() / exact.norm()) for x in (got, direct)]
    assert errors[0] < max(1e-5, 5 * errors[1])
    torch.testing.assert_close(got, got.t(), rtol=1e-3, atol=1e-4)
    a[-1, -1] = -1.0
    assert inverse(a, leaf, split) is None


def test_admm_is_the_same_with_inverses_of_products(monkeypatch):
    w, hessian = case(48, 96)
    pruned, mask, details = admm(w, hessian)
    module = sys.modules["sparsekern.prune.admm"]
    monkeypatch.setattr(module, "large_inverse", lambda a: inverse(a, 16, True))
    monkeypatch.setattr(module, "Factor", lambda a: Factor(a, True))
    other, other_mask, other_details = admm(w, hessian)
    assert details == other_details and (mask == other_mask).float().mean() > 0.99
    errors = [relative_error(w, one, hessian) for one in (pruned, other)]
    assert abs(errors[1] / errors[0] - 1) < 0.01


def test_retarget_is_the_same_with_an_inverse_of_products(monkeypatch):
    w, hessian = numbers(24, 64), Hessian(64)
    for seed in range(3):
        x = definite(64, 0.1, seed=seed) * torch.logspace(-2, 2, 64)
        hessian.add(x, x + 0.1 * numbers(64, 64, seed=seed + 9) * x.norm() / 8)
    expected = retarget(w, hessian, share=1.0)
    module = sys.modules["sparsekern.prune.retarget"]
    monkeypatch.setattr(module, "large_inverse", lambda a: inverse(a, 16, True))
    monkeypatch.setattr(module, "is_large", lambda a: True)
    got = retarget(w, hessian, share=1.0)
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_large_products_and_inverses_on_a_gpu():
    a, b = numbers(512, 6144).cuda(), numbers(6144, 3072, seed=1).cuda()
    factor = Factor(b)
    assert factor._parts, "the GPU's 16-bit products have no float32 sums"
    assert amiss(factor.times(a), a, b) < 3e-6
    a = definite(6144, 0.11, device="cuda")
    got, direct = inverse(a), torch.cholesky_inverse(torch.linalg.cholesky(a))
    z = numbers(8, 6144).cuda()
    errors = [float((z @ x @ a - z).norm() / z.norm()) for x in (got, direct)]
    assert errors[0] < 1e-2 and errors[0] < 20 * errors[1]
    assert large_inverse(a) is not None and large_inverse(a[:512, :512]) is None
    a[-1, -1] = -1.0
    assert inverse(a) is None
