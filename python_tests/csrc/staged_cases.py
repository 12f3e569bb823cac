"""What the emulated split and prefill kernels have to get right alike: they stage y in shared
memory, and reach it in two ways."""

import torch

from python_tests.csrc.emulated_linear import call, ends_on_16_bytes, problem
from python_tests.linear_cases import PAIRS, random_input

F16 = torch.float16


def ways_to_y(tokens, out_features, dtype):
    """Where y lies and what is added: on 16 bytes, next to each other, with a gap, and y itself
    between two elements of 16 bytes; a bias that is not aligned, too; nothing beyond it is read."""
    bias = random_input((out_features,), dtype, seed=2, integers=True)
    residual = random_input((tokens, out_features), dtype, seed=3, integers=True)
    return (
        dict(bias=bias),
        dict(stride=out_features),
        dict(stride=out_features, shift=1, bias=bias),
        dict(stride=out_features + 5, shift=6, bias=bias, activation="relu"),
        dict(stride=out_features + 8, shift=1, bias=bias, residual=residual),
        dict(bias=bias, activation="relu", residual=residual),
        dict(late=True, bias=ends_on_16_bytes(bias)),
        dict(falling=True, shift=3, bias=ends_on_16_bytes(bias)),
    )


def scalings(tokens, out_features, dtype):
    """Scales of channels and tokens, with both ways to y."""
    bias = random_input((out_features,), dtype, seed=2, integers=True)
    residual = random_input((tokens, out_features), dtype, seed=3, integers=True)
    channels = 2.0 ** (torch.arange(out_features) % 3 - 1)
    of_tokens = 2.0 ** (torch.arange(tokens) % 2 - 2)
    return (
        dict(scale=channels, token_scale=of_tokens, bias=bias),
        dict(scale=channels, stride=out_features + 1 - out_features % 2, shift=1),
        dict(token_scale=of_tokens, residual=residual, activation="relu"),
    )


def patterns(rows, dtype):
    """Weights and inputs that show each of the six pairs in every row and column of a tile."""
    w = torch.zeros(rows, 384)
    for row in range(rows):
        for group in range(96):
            first, second = PAIRS[(row + group) % 6].tolist()
            w[row, 4 * group + first] = 1 + (row + group) % 5
            w[row, 4 * group + second] = -2 - row % 3
    for first in range(0, 384, 128):
        yield w, torch.eye(384)[first : first + 128].to(dtype)


def silu_is_rounded_once(emulate, config):
    """silu in float32, of rows that are aligned and that are not."""
    w, x = problem(33, 323, 96, F16)
    y64 = torch.nn.functional.silu(x.double() @ w.double().t())
    for stride in (None, 323):
        what = dict(weight=F16, activation="silu", clusters=1, stride=stride)
        broken, output = call(emulate, config, w, x, **what)
        assert not broken and not output.differ(output.y)
        assert ((output.y - y64).abs() <= y64.abs() * 2**-11 * (1 + 2**-8) + 2**-25).all()
