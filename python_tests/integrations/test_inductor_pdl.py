"""What is asked of Inductor's option for early starts, on this torch's own classes."""

import os

import pytest

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
@pytest.mark.parametrize(
    "lines",
    [
        ["tl.store(a, 0)"],
        ["a = tl.load(x)", "WAIT", "LAUNCH", "b = tl.load(y)", "WAIT", "LAUNCH", "tl.store(z, b)"],
    ],
    ids=["no loads", "loads"],
)
def test_kernels_begin_with_the_wait_and_the_permission(kernel, monkeypatch, lines):
    begin = [kernel.GDC_WAIT, kernel.GDC_LAUNCH]
    lines = [dict(zip(("WAIT", "LAUNCH"), begin)).get(line, line) for line in lines]
    before = filtered(kernel, lines)
    assert before[: len(begin)] != begin, "Inductor's own"
    assert pdl.at_once() and pdl.at_once()
    assert filtered(kernel, lines) == begin + before
    monkeypatch.setattr(kernel, "_enable_pdl_codegen", staticmethod(lambda: False))
    assert filtered(kernel, lines) == before, "the option is off"


def test_a_torch_with_other_names_is_left_alone(monkeypatch):
    from torch._inductor.codegen.triton import TritonKernel

    monkeypatch.delattr(TritonKernel, "_filter_pdl", raising=False)
    assert not pdl.at_once() and not hasattr(TritonKernel, "_filter_pdl")
