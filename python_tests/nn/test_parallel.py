"""Sparse24.narrow, and tensor_parallel over processes (gloo; NCCL where there are two GPUs)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekern as sk

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("kind", [None, "fp8", "int8", "int4"])
@pytest.mark.parametrize("layout", ["rowmajor", "tile64"])
def test_narrow_is_narrow_of_the_dense_weight(kind, layout):
    w24 = sk.prune_compress(torch.randn(200, 512).bfloat16())
    w24 = w24 if kind is None else sk.quantize(w24, kind)
    if layout == "tile64" and kind == "int4":
        pytest.skip("int4 weights stay row-major here")
    dense = w24.to_dense()
    w24 = w24.to_layout(layout)
    for dim, start, length in [(0, 0, 64), (0, 3, 77), (0, 199, 1), (1, 128, 256), (1, 256, 256)]:
        part = w24.narrow(dim, start, length)
        assert part.layout == layout and part.spec.storage == w24.spec.storage
        assert torch.equal(part.to_dense(), dense.narrow(dim, start, length))
    if kind != "int4":
        assert torch.equal(w24.narrow(1, 8, 24).to_dense(), dense[:, 8:32])


def test_narrow_refuses():
    w24 = sk.prune_compress(torch.randn(16, 64))
    with pytest.raises(ValueError, match=r"dim 0 or 1, got 2"):
        w24.narrow(2, 0, 1)
    with pytest.raises(ValueError, match=r"a range within 0..16, got 10..20"):
        w24.narrow(0, 10, 10)
    with pytest.raises(ValueError, match=r"multiples of 8, got 4..12"):
        w24.narrow(1, 4, 8)
    four = sk.quantize(sk.prune_compress(torch.randn(16, 256)), "int4", group=64)
    with pytest.raises(ValueError, match=r"multiples of 64"):
        four.narrow(1, 32, 64)


def run(world, backend):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(HERE / "parallel_child.py")]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port), backend],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for child in children:
        output, errors = child.communicate(timeout=900)
        assert child.returncode == 0, errors[-3000:]
        assert output.strip().endswith("all equal"), output


def test_two_ranks_compute_what_one_does():
    pytest.importorskip("transformers")
    run(2, "gloo")


@pytest.mark.gpu
def test_two_gpus_compute_what_one_does():
    pytest.importorskip("transformers")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run(2, "nccl")


def test_without_processes():
    with pytest.raises(RuntimeError, match="torchrun"):
        sk.tensor_parallel(torch.nn.Linear(8, 8))
