"""Weights of 8 bits on other GPUs than Hopper, and by name: what is chosen, refused and said."""

import pytest
import torch

from python_tests.backends.test_cuda_backend import (
    BF16,
    BLOCKS,
    E4M3,
    INT8,
    MMA_TILES,
    PLAIN,
    forget,
    native,
    on_cpu,
    problem,
    quantized,
    rows,
    scaled_on_cpu,
    tune,
)
from sparsekern.backends.cuda import configs, mma_model, scaled_linear
from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.backends.cuda.backend import (
    CudaBackend,
    MmaBackend,
    PreciseBackend,
    SixteenBitBackend,
)
from sparsekern.backends.cuda.variant import Bits, MmaTile
from sparsekern.formats.dtypes import element

__all__ = ["native", "on_cpu", "scaled_on_cpu"]  # fixtures

CUDA = torch.device("cuda", 0)
AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)


@pytest.fixture(autouse=True)
def built(native):
    """All types of mma, as csrc/linear/kernels.h has them."""
    native.rows["mma"] = rows(MMA_TILES)
    forget()


def become(native, capability):
    native.capability = capability
    forget()


def on_gpu(storage, tokens=8):
    x, w24 = torch.ones(tokens, 256, dtype=torch.bfloat16), quantized(storage)
    return problem(x, w24)._replace(device=CUDA, gpu=0)


@pytest.mark.parametrize(
    "capability, runs",
    [(AMPERE, [INT8]), ((8, 6), [INT8]), (ADA, [INT8, E4M3]), ((12, 0), [INT8, E4M3])],
)
def test_what_other_gpus_run(native, capability, runs):
    become(native, capability)
    for storage in (INT8, E4M3, "int4"):
        why, spec = CudaBackend().supports(on_gpu(storage)), quantized(storage).spec
        assert (why is None) == (storage in runs)
        assert CudaBackend().prefers(spec, CUDA) == ("tile64" if storage in runs else None)
        assert (MmaBackend().supports(on_gpu(storage)) is None) == (storage in runs)
    if E4M3 not in runs:
        need = "mma.sp of float8_e4m3fn needs compute capability 8.9, cuda:0 has 8."
        assert need in CudaBackend().supports(on_gpu(E4M3))
    for backend in (PreciseBackend(), SixteenBitBackend()):
        assert "compute capability 9" in backend.supports(on_gpu(INT8))


@pytest.mark.parametrize("storage", [INT8, E4M3])
@pytest.mark.parametrize("tokens", [1, 8, 150])
def test_x_is_quantised_at_every_number_of_tokens(scaled_on_cpu, native, storage, tokens):
    become(native, ADA)
    x, w24 = torch.randn(tokens, 256).to(torch.bfloat16), quantized(storage)
    bias = torch.ones(64, dtype=torch.bfloat16)
    y = scaled_linear.bind(problem(x, w24, activation="relu", bias=True))(x, w24, bias)
    assert (y.shape, y.dtype) == ((tokens, 64), torch.bfloat16)
    (call,) = scaled_on_cpu.calls
    assert (call["kernel"], call["activation"]) == ("mma", "relu")
    assert (call["weight_dtype"], call["x_dtype"], call["dtype"]) == (storage, storage, BF16)
    assert call["token_scale"] and call["channel_scale"] and not call["workspace"]
    told = CudaBackend().explain(on_gpu(storage, tokens))
    assert told.config == f"mma {MMA_TILES[call['config']]}"
    assert f"W8A8: x is quantised to {storage}" in told.why and "expected" not in told.why


def test_x_of_8_bits(scaled_on_cpu, native):
    become(native, AMPERE)
    x, scale, w24 = torch.ones(5, 256, dtype=torch.int8), torch.ones(5), quantized(INT8)
    for options in ({}, {"mma": True}):
        scaled_on_cpu.calls.clear()
        scaled_linear.bind(problem(x, w24), **options)(x, w24, None, scale)
        (call,) = scaled_on_cpu.calls
        assert (call["kernel"], call["token_scale"]) == ("mma", scale.data_ptr())
    assert "W8A8: x is int8" in scaled_linear.explain(problem(x, w24)).why


def test_hopper_runs_mma_at_8_bits_by_name_alone(scaled_on_cpu, native):
    types = configs.Types(INT8, INT8, BF16)
    assert set(configs.variants(types)) > set(configs.runnable(0, types))
    assert not any(kernel == "mma" for kernel, _ in configs.runnable(0, types).values())
    assert any(k == "mma" for k, _ in configs.runnable(0, configs.Types.of(BF16)).values())
    tune(tuning.user_path(), {8: (f"mma {MMA_TILES[0]}", 1.0)}, INT8, (64, 256))
    assert not configs.choose(8, 64, 256, types, 0).variant.startswith("mma")
    x, w24 = torch.ones(8, 256, dtype=torch.bfloat16), quantized(INT8)
    MmaBackend().bind(problem(x, w24))(x, w24)
    (call,) = scaled_on_cpu.calls
    assert call["kernel"] == "mma" and call["x_dtype"] == INT8
    told = MmaBackend().explain(problem(x, w24))
    assert told.config == f"mma {MMA_TILES[call['config']]}" and "tile64" in told.why


def test_a_module_without_these_kernels(native):
    become(native, ADA)
    native.rows["mma"] = rows(MMA_TILES, 0, PLAIN)
    native.rows["decode"] = rows(BLOCKS, 1, PLAIN)
    forget()
    assert "was not built for weights of int8" in CudaBackend().supports(on_gpu(INT8))
    assert CudaBackend().prefers(quantized(INT8).spec, CUDA) is None


@pytest.mark.parametrize("capability", [AMPERE, ADA])
def test_tiles_are_chosen_by_bytes_and_rates_of_8_bits(capability):
    bits = Bits(8, 8)
    assert element(INT8).bits == element(E4M3).bits == bits.weight
    rates = mma_model.mma_rates(capability, bits)
    assert rates.mma <= mma_model.mma_rates(capability).mma
    tile = MmaTile(256, 128, 4, 2, 1, 2)
    size = 4096, 8192, 8192, 108
    narrow = mma_model.mma_clocks(tile, *size, rates, bits)
    wide = mma_model.mma_clocks(tile, *size, mma_model.mma_rates(capability))
    assert 1.5 < wide / narrow < (4.5 if capability == ADA else 2.0)
    tiles = (tile, MmaTile(64, 16, 2, 1, 4, 3))
    assert mma_model.mma_tile(4096, 8192, 8192, 108, rates, tiles, bits) == tile
    assert mma_model.mma_tile(1, 8192, 8192, 108, rates, tiles, bits) == tiles[1]
