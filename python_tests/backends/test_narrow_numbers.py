"""The numbers that the narrow kernel makes of int4, which its tests on a GPU compare with."""

import pytest
import torch

from python_tests.widen_cases import numbers_in_registers, packed, rounded

BF16, F16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("dtype, share", [(BF16, 0.002), (F16, 0.01)], ids=str)
def test_the_numbers_of_the_weight_or_a_neighbour(group, dtype, share):
    w24 = packed(323, 1032, "int4", group, dtype)
    made = numbers_in_registers(w24, dtype)
    stored = w24.rowmajor().numbers(dtype)
    steps = (made.view(torch.int16).int() - stored.view(torch.int16).int()).abs()
    steps[(made == 0) & (stored == 0)] = 0
    assert steps.max() == 1
    assert 0 < (steps != 0).float().mean() < share


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounded_once(dtype):
    """Between two numbers, and beside the middle by less than float32 has digits for."""
    one = torch.tensor(1.0, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    assert rounded(one + eps / 2, dtype) == 1
    assert rounded(one + eps / 2 + 2.0**-40, dtype) == 1 + eps
    assert rounded(-one - eps * 3 / 2 + 2.0**-40, dtype) == -1 - eps
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    assert torch.equal(rounded(every.double(), dtype), every)
    least = torch.finfo(F16).smallest_normal * torch.finfo(F16).eps
    if dtype == F16:
        assert rounded(one * least * 1.5, dtype) == 2 * least and rounded(one * least / 2, F16) == 0
