"""The CUDA kernel of prune_compress against the torch code on the CPU, bit for bit."""

import itertools

import pytest
import torch

import sparsekern as sk
from sparsekern import _native
from sparsekern.backends.cuda import compress as cuda_compress

pytestmark = pytest.mark.gpu
needs_module = pytest.mark.skipif(not _native.available(), reason=_native.reason())


def same(w):
    """prune_compress of w on both devices."""
    assert cuda_compress.supported(w.cuda())
    want, got = sk.prune_compress(w), sk.prune_compress(w.cuda(), layout="rowmajor").cpu()
    assert torch.equal(got.values.view(torch.int16), want.values.view(torch.int16))
    assert torch.equal(got.metadata, want.metadata)


@needs_module
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 24), (64, 512), (129, 4104), (1000, 1000)])
def test_random(shape, dtype):
    same(torch.randn(shape).to(dtype))


@needs_module
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_small_group(dtype):
    """All groups of -1, -0.0, 0, 1, 2, -2: ties, free slots and negative zeros."""
    groups = torch.tensor(list(itertools.product((-1.0, -0.0, 0.0, 1.0, 2.0, -2.0), repeat=4)))
    same(groups.reshape(-1, 8).to(dtype))


@needs_module
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named(value):
    w = torch.randn(16, 64).bfloat16()
    w[5, 17] = value
    with pytest.raises(ValueError, match="row 5"):
        sk.prune_compress(w.cuda(), layout="rowmajor")


@needs_module
def test_what_the_kernel_does_not_take_goes_elsewhere():
    w = torch.randn(16, 68).bfloat16()
    assert not cuda_compress.supported(w.cuda())
    got = sk.prune_compress(w.cuda(), layout="rowmajor").cpu()
    assert torch.equal(got.values, sk.prune_compress(w).values)
