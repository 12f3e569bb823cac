"""FlopCounterMode counts dense-equivalent work for every op with a 2:4 weight, wherever it runs."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from python_tests.oneshot.driver_models import build, tokens

OUT, IN, TOKENS = 24, 64, 10
ONE = 2 * TOKENS * OUT * IN


def layer(**options):
    dense = nn.Linear(IN, OUT)
    mask = sk.prune.magnitude_mask(dense.weight.detach())
    return sk.SparseLinear.from_linear(dense, mask, **options)


def x(**options):
    return torch.randn(2, TOKENS // 2, IN, **options)


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter


def total(call):
    return counted(call).get_total_flops()


@pytest.mark.parametrize("dtype", [None, "int8", "fp8", "int4"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_layer_counts_what_a_dense_one_does(dtype, mode):
    made = layer(dtype=dtype)
    with mode():
        assert total(lambda: made(x())) == ONE == total(lambda: nn.Linear(IN, OUT)(x()))
        counts = counted(lambda: made(x())).get_flop_counts()
        assert counts["Global"] == counts["SparseLinear"] == {torch.ops.sparsekern.linear: ONE}
        assert total(lambda: made(x()[:, :0])) == 0
        assert total(lambda: made(x()[0, 0])) == 2 * OUT * IN
        assert total(lambda: made.to("meta")(x(device="meta"))) == ONE


def test_a_backward_pass_counts_the_gradient_of_the_input():
    made, rows = layer(), x(requires_grad=True)
    assert total(lambda: made(rows).sum().backward()) == 2 * ONE  # the weight is frozen
    assert total(lambda: made(x()).sum().backward()) == ONE  # of the bias alone


def test_every_op():
    w24, rows = layer().weight, x()
    w8 = sk.quantize(w24, "int8")
    with torch.no_grad():
        assert total(lambda: sk.linear(rows, w24, activation="gelu")) == ONE
        assert total(lambda: torch.vmap(lambda row: sk.linear(row, w24))(rows)) == ONE
        assert total(lambda: sk.gated_linear(rows, w24, w24)) == 2 * ONE
        assert total(lambda: sk.linear_quantized(*sk.quantize_rows(rows, "int8"), w8)) == ONE


def test_a_pruned_model_counts_what_the_dense_one_does():
    model, ids = build(), tokens(2, 8)
    with torch.no_grad():
        dense = total(lambda: model(ids))
        sk.prune_model(model, "magnitude", progress=False)
        assert total(lambda: model(ids)) == dense > 0


def test_the_counter_is_not_imported_and_may_come_later():
    code = """
import sys, torch, sparsekern as sk
assert not {"torch.utils.flop_counter", "triton"} & set(sys.modules)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter, torch.no_grad():
    sk.SparseLinear(8, 4)(torch.ones(3, 8))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(2 * 3 * 8 * 4)], done.stderr
