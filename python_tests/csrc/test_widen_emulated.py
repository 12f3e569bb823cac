"""The widening kernel without a GPU: its source, run by widen_emulator.cpp, against `pack` of the
dequantised weight: every byte."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from python_tests.csrc.building import ROOT, cuda_include
from python_tests.widen_cases import INT8, KINDS, SHAPES, assert_widened, packed
from sparsekern.formats import dtypes
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.tile64 import scale_group

GUARD = 64  # bytes around the result that must stay as they are


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    include, compiler = cuda_include(), shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("needs g++ and the headers of an nvcc on PATH")
    folder = tmp_path_factory.mktemp("emulator")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for header in (folder / "csrc" / "ptx").iterdir():
        header.write_text("")  # the emulator has its own
    library = folder / "emulator.so"
    source = Path(__file__).with_name("widen_emulator.cpp")
    command = [compiler, "-std=c++17", "-O1", "-w", "-Wno-psabi", "-shared", "-fPIC"]
    command += [f"-I{include}", f"-I{folder / 'csrc'}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.widened_bytes_of.restype = ctypes.c_int64
    return loaded


def widen(emulator, w24, scaled=True):
    """What the kernel writes for a packed weight, as bytes."""
    size = emulator.widened_bytes_of(*w24.shape)
    memory = torch.full((size + 2 * GUARD + 16,), 0xA5, dtype=torch.uint8)
    start = GUARD + -(memory.data_ptr() + GUARD) % 16
    widened = memory[start : start + size]
    group = scale_group(w24.spec)
    emulator.emulate(
        *w24.shape,
        dtypes.element(w24.spec.storage).native_code,
        int(w24.dtype == torch.bfloat16),
        group,
        *(ctypes.c_void_p(w24.tensors[name].data_ptr()) for name in ("values", "metadata")),
        ctypes.c_void_p(w24.tensors[SCALE].data_ptr() if scaled and not group else 0),
        ctypes.c_void_p(widened.data_ptr()),
    )
    assert (memory[:start] == 0xA5).all() and (memory[start + size :] == 0xA5).all()
    return widened


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage, group", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_widened_is_what_pack_makes_of_the_numbers(emulator, shape, storage, group, dtype):
    w24 = packed(*shape, storage, group, dtype)
    assert_widened(widen(emulator, w24), w24, f"{shape} {storage} {group}")


@pytest.mark.parametrize("storage, group", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_that_round_to_zero_or_are_subnormal(emulator, storage, group, dtype):
    """Negative ones, too: +0."""
    smallest = 2.0**-30 if dtype == torch.float16 else 1e-38
    w24 = packed(64, 256, storage, group, dtype, smallest, 2 * smallest)
    assert_widened(widen(emulator, w24), w24)


def test_levels_alone_without_scales(emulator):
    w24 = packed(70, 136, INT8, 0, torch.bfloat16, 1.0, 1.0)
    assert_widened(widen(emulator, w24, scaled=False), w24)
