"""What the suite shares: devices, sizes, inputs. SPARSEKERN_BENCH_SIZE sets the size of a layer."""

from __future__ import annotations

import os

import pytest
import torch

import sparsekern as sk
from sparsekern.prune import magnitude_mask

NO_GPU = "" if torch.cuda.is_available() else "no CUDA GPU that torch can use"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; skipped with a reason elsewhere")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NO_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Case:
    """A layer: dense weight, its 2:4 form, and inputs."""

    def __init__(self, device: str):
        size = int(os.environ.get("SPARSEKERN_BENCH_SIZE", "4096" if device == "cuda" else "1024"))
        self.device, self.size = device, size
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(0)
        self.weight = torch.randn(size, size, device=device).to(self.dtype) * size**-0.5
        self.mask = magnitude_mask(self.weight)
        self.pruned = self.weight * self.mask
        self.w24 = sk.compress(self.weight, self.mask)

    def x(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, self.size, device=self.device).to(self.dtype)


@pytest.fixture
def case(device: str) -> Case:
    return Case(device)
