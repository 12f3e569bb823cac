"""Masks under DDP and FSDP2: two gloo processes end with the weights of one process."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from python_tests.finetune import dist_child
from python_tests.finetune.small import adamw, batch, pruned
from sparsekern.finetune import Masked
from sparsekern.finetune.tensors import unpack_bits

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


CPU = ("ddp", "ddp-moving", "fsdp", "fsdp-moving")
GPUS = [pytest.param(f"{kind}-cuda", marks=pytest.mark.gpu) for kind in ("ddp", "fsdp-moving")]


def in_two_processes(kinds, folder):
    """{kind: what the child saved}."""
    if kinds[0].endswith("cuda") and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "python_tests.finetune.dist_child", ",".join(kinds), folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: torch.load(folder / kind / "out.pt", weights_only=True) for kind in kinds}


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory):
    """All of CPU, by the same two processes."""
    return in_two_processes(CPU, tmp_path_factory.mktemp("distributed"))


LONG = [pytest.param(f"{kind}-long-cuda", marks=pytest.mark.gpu) for kind in ("ddp", "fsdp")]


@pytest.mark.parametrize("kind", [pytest.param("ddp-long", marks=pytest.mark.slow), *LONG])
def test_two_thousand_steps_without_a_violation(kind, tmp_path):
    """AdamW, weight decay, clipping; looked at every 100 steps."""
    result = in_two_processes([kind], tmp_path)[kind]
    assert result["wrong"] == 0 and result["steps"] == 2000
    assert all(bool(weight.isfinite().all()) for weight in result["weights"].values())


@pytest.mark.parametrize("kind", [*CPU, *GPUS])
def test_two_processes_equal_one(kind, tmp_path, request):
    if kind in CPU:
        result = request.getfixturevalue("on_the_cpu")[kind]
    else:
        result = in_two_processes([kind], tmp_path)[kind]
    assert result["wrong"] == 0
    model = pruned()
    masked = Masked(model, schedule=dist_child.schedule_of(kind))
    optimizer = masked.attach(adamw(model))
    for step in range(dist_child.STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            result["weights"][name], parameter.detach(), rtol=1e-4, atol=1e-5
        )
    for name, mask in masked.masks.items():
        state = result["state"]
        assert torch.equal(unpack_bits(state["masks"][name], state["shapes"][name]), mask)
        weight = result["weights"][f"{name}.weight"]
        assert not weight[~mask].any()
