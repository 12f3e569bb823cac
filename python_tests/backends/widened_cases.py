"""Problems and calls for the tests of the kernels that widen weights in registers."""

import torch

from python_tests.backends.cuda_cases import DEVICE, guarded, same_bits, stream
from python_tests.linear_cases import random_input, random_weight
from sparsekern import _native
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import compress, of_levels
from sparsekern.formats.tile64 import pack, scale_group

F32 = torch.float32
E4M3, INT8, INT4 = "float8_e4m3fn", "int8", "int4"


def _name(dtype):
    return str(dtype).removeprefix("torch.")


class Problem:
    """A weight of levels (small integers) and power-of-two scales, x, bias, residual; float64 y.

    product: x · levelsᵀ with the scales of groups, if there are such; scale: of the channels, which
    the kernel is given as channel_scale.
    """

    def __init__(self, tokens, out_features, in_features, weight, group, dtype, levels=None):
        w = random_weight(out_features, in_features, F32, integers=True)
        w = w if levels is None else levels
        self.out_features, self.in_features, self.dtype = out_features, in_features, dtype
        self.weight = weight
        self.scale = 2.0 ** (torch.arange(out_features, device=DEVICE) % 3 - 1)
        plain = compress(w)
        size = (out_features, in_features)
        columns = (group or in_features) if weight == INT4 else 0
        spec = WeightSpec.of(size, weight, dtype=dtype, group=columns)
        self.scale_group = scale_group(spec)
        if self.scale_group:
            count = -(-in_features // group)
            scale = 2.0 ** (torch.arange(out_features * count).view(out_features, count) % 3 - 1)
            self.w = (w * scale.repeat_interleave(group, 1)[:, :in_features]).to(DEVICE)
        else:
            scale, self.w = self.scale.cpu()[:, None], w.to(DEVICE)
        self.w24 = pack(of_levels(spec, plain.values, scale, plain.metadata).to(DEVICE))
        self.x = self.rows(random_input((tokens, in_features), dtype, integers=True))
        self.bias = random_input((out_features,), dtype, seed=2, integers=True).to(DEVICE)
        shape = (tokens, out_features)
        self.residual = random_input(shape, dtype, seed=3, integers=True).to(DEVICE)
        self.product = self.x.double() @ self.w.double().t()

    @staticmethod
    def rows(x):
        tokens, in_features = x.shape
        padded = torch.full((tokens, -(-in_features // 8) * 8 + 8), float("nan"), dtype=x.dtype)
        padded[:, :in_features] = x
        return padded.to(DEVICE)[:, :in_features]


def launcher(
    p,
    config,
    tokens,
    y,
    scaled=True,
    bias=None,
    residual=None,
    activation=None,
    kernel="decode",
):
    """A function that launches the kernel on the first `tokens` rows of x."""
    linear = _native.module().Linear(
        kernel=kernel,
        config=config,
        tokens=tokens,
        out_features=p.out_features,
        in_features=p.in_features,
        x_stride=p.x.stride(0),
        y_stride=y.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        dtype=_name(p.dtype),
        weight_dtype=p.weight,
        scale_group=p.scale_group,
        x_dtype=_name(p.dtype),
        activation=activation,
    )
    operands = dict(bias=bias, residual=residual, channel_scale=p.scale if scaled else None)
    addresses = {key: tensor.data_ptr() for key, tensor in operands.items() if tensor is not None}
    return lambda: linear(
        x=p.x.data_ptr(),
        values=p.w24.values.data_ptr(),
        metadata=p.w24.metadata.data_ptr(),
        y=y.data_ptr(),
        stream=stream(),
        **addresses,
    )


def assert_exact(p, config, tokens, y64, **options):
    """The kernel writes y64, rounded once, and nothing outside it."""
    buffer, y = guarded(tokens, p.out_features, p.dtype)
    expected, inside = guarded(tokens, p.out_features, p.dtype)
    inside.copy_(y64[:tokens])
    launcher(p, config, tokens, y, **options)()
    if same_bits(buffer, expected):
        return
    wrong = (buffer.view(torch.int16) != expected.view(torch.int16)).nonzero()
    first = tuple(wrong[0].tolist())
    raise AssertionError(
        f"config {config} {sorted(options)}, {p.weight} {p.scale_group} x {p.dtype}, "
        f"{tokens} tokens, {p.out_features} x {p.in_features}: {len(wrong)} wrong; the first at "
        f"{first} of the buffer: got {buffer[first].item()}, expected {expected[first].item()}"
    )
