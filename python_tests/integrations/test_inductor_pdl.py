"""What is asked of Inductor's option for early starts, on this torch's own classes."""

import os

import pytest
import torch

from sparsekern.integrations import inductor_pdl as pdl

needs_option = pytest.mark.skipif(
    not pdl.known(), reason="this torch's Inductor has no triton.enable_pdl"
)


def test_the_name_of_the_option():
    from torch._inductor import config

    names = config.get_config_copy()
    assert pdl.known() == (pdl.PDL in names)
    if pdl.known():
        assert names[pdl.PDL] == (os.environ.get(pdl.VARIABLE) == "1")
        with config.patch({pdl.PDL: True}):
            assert config.triton.enable_pdl


@pytest.fixture
def kernel(monkeypatch):
    """Inductor's class of Triton kernels, which has its own method back afterwards."""
    from torch._inductor.codegen.triton import TritonKernel

    monkeypatch.setattr(TritonKernel, "_filter_pdl", TritonKernel._filter_pdl)
    monkeypatch.setattr(TritonKernel, "_enable_pdl_codegen", staticmethod(lambda: True))
    return TritonKernel


def filtered(kernel, lines):
    from torch._inductor.utils import IndentedBuffer

    code = IndentedBuffer()
    code.writelines(lines)
    kernel._filter_pdl(object.__new__(kernel), code)
    return [str(line) for line in code._lines]


@needs_option
def test_a_kernel_without_loads_waits_for_its_predecessor(kernel):
    assert filtered(kernel, ["tl.store(a, 0)"]) == ["tl.store(a, 0)"], "Inductor's own"
    assert pdl.complete() and pdl.complete()
    assert filtered(kernel, ["tl.store(a, 0)"]) == [kernel.GDC_WAIT, "tl.store(a, 0)"]


@needs_option
def test_other_kernels_stay_as_they_are(kernel, monkeypatch):
    wait, launch = kernel.GDC_WAIT, kernel.GDC_LAUNCH
    lines = ["a = tl.load(x)", wait, launch, "b = tl.load(y)", wait, launch, "tl.store(z, b)"]
    before = filtered(kernel, lines)
    assert before == ["a = tl.load(x)", wait, "b = tl.load(y)", launch, "tl.store(z, b)"]
    assert pdl.complete()
    assert filtered(kernel, lines) == before
    monkeypatch.setattr(kernel, "_enable_pdl_codegen", staticmethod(lambda: False))
    assert filtered(kernel, ["tl.store(a, 0)"]) == ["tl.store(a, 0)"], "the option is off"


def test_a_torch_with_other_names_is_left_alone(monkeypatch):
    from torch._inductor.codegen.triton import TritonKernel

    monkeypatch.delattr(TritonKernel, "_filter_pdl", raising=False)
    assert not pdl.complete() and not hasattr(TritonKernel, "_filter_pdl")
    assert torch.version.hip is None
