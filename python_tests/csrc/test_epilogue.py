"""The scales of the epilogue on the GPU: y = act(x · Wᵀ * channel * token + bias) + residual.

Through the naive kernel, which has them; whole numbers and scales that keep them exact.
"""

import pytest
import torch

from python_tests.backends.cuda_cases import (
    BF16,
    DEVICE,
    F16,
    Problem,
    assert_exact,
    call,
    guarded,
    needs_hopper,
    variants,
)

pytestmark = pytest.mark.gpu

SHAPES = ((70, 325, 900), (1, 64, 64), (64, 136, 68))  # (tokens, out_features, in_features)


def scales(tokens, out_features):
    """(of the channels, of the tokens): float32, few bits each."""
    channel = torch.tensor([0.5, 1.0, 2.0, 3.0], device=DEVICE).repeat(out_features // 4 + 1)
    token = torch.tensor([1.0, 0.25, 4.0], device=DEVICE).repeat(tokens // 3 + 1)
    return channel[:out_features].contiguous(), token[:tokens].contiguous()


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of", ["channels", "tokens", "both"])
@pytest.mark.parametrize("rest", [False, True])
def test_scales_come_before_bias_activation_and_residual(dtype, shape, of, rest):
    needs_hopper()
    p = Problem(*shape, dtype)
    channel, token = scales(*shape[:2])
    options, y64 = {}, p.product
    if of != "tokens":
        options["channel_scale"], y64 = channel, y64 * channel.double()
    if of != "channels":
        options["token_scale"], y64 = token, y64 * token.double()[:, None]
    if rest:
        options |= dict(bias=p.bias, residual=p.residual, activation="relu")
        y64 = (y64 + p.bias.double()).relu() + p.residual.double()
    assert_exact("naive", 0, p, shape[0], y64, **options)


def test_a_kernel_without_scales_refuses_them():
    p = Problem(8, 64, 64, BF16)
    channel, token = scales(8, 64)
    _, y = guarded(8, 64, BF16)
    for kernel, variant in {kernel: (kernel, index) for kernel, index in variants()}.values():
        if kernel == "naive":
            continue
        for options in (dict(channel_scale=channel), dict(token_scale=token)):
            with pytest.raises(ValueError, match=f"expected .*_scale 0 with kernel '{kernel}'"):
                call(kernel, variant, p, 8, y, **options)
    assert y.isnan().all()
