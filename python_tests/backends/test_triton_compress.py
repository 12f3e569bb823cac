"""The Triton compression kernels: interpreted on the CPU, compiled for GPUs, and run on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekern.backends import triton as triton_kernels
from sparsekern.backends.compress import compress, decompress, mask24, prune_compress
from sparsekern.formats.sparse24 import verify

triton = pytest.importorskip("triton", reason="Triton is not installed")
HERE = Path(__file__).parent


def run_python(script: str, *arguments: str, **environment: str) -> str:
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    command = [sys.executable, *([script] if script.endswith(".py") else ["-c", script])]
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_interpreted_kernels_match_the_cpu_code():
    output = run_python(
        str(HERE / "triton_compress_cases.py"), TRITON_INTERPRET="1", OMP_NUM_THREADS="1"
    )
    assert output.count(" passed") == 6


COMPILE = """
import sys
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from sparsekern.backends.triton.compress import compress_kernel as kernel

arch = int(sys.argv[1])
constants = dict(choice_ptr=None, MODE="magnitude", BITS=16, MAX_FINITE=0x7F7F, SCORE_BITS=0,
                 SCORE_INF=0, ODD=False, BLOCK=1024)
pointers = dict(weight_ptr="*i64", values_ptr="*i32", metadata_ptr="*u8", bad_ptr="*i32")
names = kernel.arg_names
signature = {name: pointers.get(name, "i32") for name in names}
signature |= dict.fromkeys(constants, "constexpr")
source = ASTSource(
    fn=kernel,
    signature=signature,
    constexprs={(names.index(name),): value for name, value in constants.items()},
    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, "total"]},
)
compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
Path(sys.argv[2]).write_bytes(compiled.asm["cubin"])
print(compiled.asm["ptx"])
"""


@pytest.mark.parametrize("arch", [80, 90])
def test_fused_kernel_compiles_to_wide_accesses(arch, tmp_path):
    """16-byte loads, 8-byte stores of values, metadata in whole words; and few instructions."""
    ptx = run_python(COMPILE, str(arch), str(tmp_path / "kernel.cubin"))
    loads = re.findall(r"\bld\.global\S*", ptx)
    stores = re.findall(r"\bst\.global\S*", ptx)
    assert loads and all(re.search(r"\.v2\.b64$|\.v4\.b32$", load) for load in loads), loads
    assert stores and all(re.search(r"\.v[24]\.b32$|\.b64$", store) for store in stores), stores

    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not nvdisasm.exists():
        pytest.skip("this Triton brings no nvdisasm: accesses checked, instructions not counted")
    listing = subprocess.run(
        [nvdisasm, "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+(.*?) ;", listing, re.MULTILINE)
    groups_per_thread = 2 * 1024 // (4 * 32)
    assert 30 * groups_per_thread < len(instructions) < 70 * groups_per_thread
    assert not any(re.search(r"\b(LDL|STL)\b", line) for line in instructions)  # spills


@pytest.fixture(scope="module")
def gpu_cases():
    if not triton_kernels.available():
        pytest.skip(triton_kernels.reason())
    from python_tests.backends import triton_compress_cases

    return triton_compress_cases


@pytest.mark.gpu
@pytest.mark.parametrize("block_pairs, num_warps", [(1024, 4), (256, 8), (64, 1)])
def test_kernels_match_the_cpu_code(gpu_cases, block_pairs, num_warps):
    launch = gpu_cases.kernels.Launch(block_pairs, num_warps)
    for case in gpu_cases.CASES:
        case("cuda", launch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2048, 4096), (1000, 4100), (4097, 264)])
def test_large_weights_match_the_cpu_code(gpu_cases, dtype, shape):
    w = torch.randn(shape).to(dtype)
    w24 = prune_compress(w.cuda())
    expected = prune_compress(w)
    assert w24.device.type == "cuda"
    assert gpu_cases.equal_bits(w24.values, expected.values)
    assert gpu_cases.equal_bits(w24.metadata, expected.metadata)
    dense = decompress(w24)
    assert gpu_cases.equal_bits(dense, decompress(expected))
    assert gpu_cases.equal_bits(compress(dense).values, expected.values)
    verify(w24)


@pytest.mark.gpu
def test_errors_on_the_gpu_are_those_of_the_cpu(gpu_cases):
    full = torch.ones(4, 8)
    nan = torch.zeros(4, 8)
    nan[2, 5] = float("nan")
    for call, arguments in (
        (compress, (full,)),
        (compress, (nan,)),
        (prune_compress, (nan,)),
        (prune_compress, (full, nan)),
        (mask24, (nan,)),
    ):
        with pytest.raises(ValueError) as on_cpu:
            call(*arguments)
        with pytest.raises(ValueError) as on_gpu:
            call(*(argument.cuda() for argument in arguments))
        assert str(on_cpu.value) == str(on_gpu.value)


@pytest.mark.gpu
def test_torch_code_runs_on_cuda_without_triton(gpu_cases, monkeypatch):
    w = torch.randn(64, 132)
    expected = prune_compress(w)
    monkeypatch.setattr(triton_kernels, "available", lambda: False)
    w24 = prune_compress(w.cuda())
    assert gpu_cases.equal_bits(w24.values, expected.values)
    assert gpu_cases.equal_bits(w24.metadata, expected.metadata)
    assert gpu_cases.equal_bits(decompress(w24), decompress(expected))
