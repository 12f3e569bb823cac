"""Problems and calls shared by the tests of the CUDA kernels and by sanitizer_child.py.

`call` runs one kernel, with an explicit variant, into an output full of NaN inside a larger buffer
full of NaN, so that a missing or a stray store shows.
"""

import functools

import pytest
import torch

from python_tests.linear_cases import random_input, random_weight
from sparsekern import _native
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.formats.sparse24 import compress
from sparsekern.formats.tile64 import pack

DEVICE = "cuda"
F16, BF16 = torch.float16, torch.bfloat16
GUARD = 8  # elements on each side of an output row, and rows above and below


class Problem:
    """A weight, an input and a bias with their exact float64 result; small integers by default.

    before: the rows of x follow each other, so many elements behind a 16-byte address; None: they
    all begin at 16 bytes.
    """

    def __init__(self, tokens, out_features, in_features, dtype, integers=True, before=None):
        w = random_weight(out_features, in_features, dtype, integers=integers)
        self.dtype, self.out_features, self.in_features = dtype, out_features, in_features
        self.w24 = pack(compress(w).to(DEVICE))
        self.w = w.to(DEVICE)
        x = random_input((tokens, in_features), dtype, integers=integers)
        self.x = self.rows(x) if before is None else self.contiguous_rows(x, before)
        self.bias = random_input((out_features,), dtype, seed=2, integers=integers).to(DEVICE)
        shape = (tokens, out_features)
        self.residual = random_input(shape, dtype, seed=3, integers=integers).to(DEVICE)
        self.product = self.x.double() @ self.w.double().t()  # [tokens, out_features]

    @staticmethod
    def rows(x):
        """x on the GPU with a row stride that is a multiple of 8, its padding full of NaN."""
        tokens, in_features = x.shape
        padded = torch.full((tokens, -(-in_features // 8) * 8 + 8), float("nan"), dtype=x.dtype)
        padded[:, :in_features] = x
        return padded.to(DEVICE)[:, :in_features]

    @staticmethod
    def contiguous_rows(x, before):
        memory = torch.full((before + x.numel() + GUARD,), float("nan"), dtype=x.dtype)
        memory[before : before + x.numel()] = x.flatten()
        return memory.to(DEVICE)[before : before + x.numel()].view(x.shape)


def mma_variants():
    """Every (kernel, config index) of the mma.sp kernel, which runs on every GPU from 8.0."""
    return [("mma", config["index"]) for config in _native.module().kernels()["mma"]]


def variants():
    """Every (kernel, config index) for this GPU; on Hopper the kernels that only it runs, too.

    Without the gated one, which computes something else.
    """
    if cuda_backend.hopper_refusal(torch.cuda.current_device()):
        return mma_variants()
    kernels = _native.module().kernels()
    return [
        (kernel, config["index"])
        for kernel, configs in kernels.items()
        if kernel != "decode_gated"
        for config in configs
        if ("bfloat16",) * 3 in config["types"]
    ]


def needs_hopper():
    """Skips the test on other GPUs."""
    if reason := cuda_backend.hopper_refusal(torch.cuda.current_device()):
        pytest.skip(reason)


def guarded(tokens, out_features, dtype):
    """(buffer, output): NaN everywhere; the output is a view inside with room on all sides."""
    buffer = torch.full(
        (tokens + 2 * GUARD, out_features + 2 * GUARD), float("nan"), dtype=dtype, device=DEVICE
    )
    return buffer, buffer[GUARD : GUARD + tokens, GUARD : GUARD + out_features]


def stream():
    return torch.cuda.current_stream().cuda_stream


@functools.cache
def workspace():
    """A workspace for the prefill kernel; the tests use one stream, and leave it as it was."""
    size = _native.module().prefill_workspace_bytes()
    return torch.zeros(size, dtype=torch.uint8, device=DEVICE)


def call(
    kernel,
    variant,
    p,
    tokens,
    y,
    bias=None,
    residual=None,
    activation=None,
    cut_k=True,
    channel_scale=None,
    token_scale=None,
    halves=None,
):
    """Launches a kernel of the native module on the first `tokens` rows of the problem.

    cut_k=False keeps the workspace from prefill, which then never cuts a tile along in_features.
    halves: rows of x that the kernel cannot fetch are copied: all (False), or every other one, of
    two launches (True).
    """
    parts = [cuda_backend._Part(p.x, p.x.stride(0), tokens)]
    if halves is not None:
        of = tokens, p.in_features, cuda_backend._row(kernel), halves
        parts = cuda_backend._rows(p.x[:tokens], *of)
        for part in parts:
            if part.source is not None:
                part.rows._base.fill_(float("nan"))
        cuda_backend._copy(parts)
    operands = dict(bias=bias, channel_scale=channel_scale, token_scale=token_scale)
    row = 0 if residual is None else residual.stride(0)
    for part in parts:
        linear = _native.module().Linear(
            kernel=kernel,
            config=variant,
            tokens=part.tokens,
            out_features=p.out_features,
            in_features=p.in_features,
            x_stride=part.stride,
            y_stride=part.step * y.stride(0),
            residual_stride=part.step * row,
            dtype=str(p.dtype).removeprefix("torch."),
            activation=activation,
        )
        if linear.needs_workspace and cut_k:
            operands["workspace"] = workspace()
        linear(
            x=part.rows.data_ptr(),
            values=p.w24.values.data_ptr(),
            metadata=p.w24.metadata.data_ptr(),
            y=y.data_ptr() + part.first * y.stride(0) * y.itemsize,
            residual=0 if residual is None else residual.data_ptr() + part.first * row * y.itemsize,
            stream=stream(),
            **{name: tensor.data_ptr() for name, tensor in operands.items() if tensor is not None},
        )


def same_bits(a, b):
    """Equal as bit patterns, so that NaN guards compare, too."""
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def assert_exact(kernel, variant, p, tokens, y64, **options):
    """The kernel writes y64, rounded once, and nothing outside it. options: as of `call`."""
    buffer, y = guarded(tokens, p.out_features, p.dtype)
    expected, inside = guarded(tokens, p.out_features, p.dtype)
    inside.copy_(y64[:tokens])
    call(kernel, variant, p, tokens, y, **options)
    if same_bits(buffer, expected):
        return
    wrong = (buffer.view(torch.int16) != expected.view(torch.int16)).nonzero()
    token, row = (wrong[0] - GUARD).tolist()
    got, wanted = (t[tuple(wrong[0].tolist())].item() for t in (buffer, expected))
    raise AssertionError(
        f"{kernel} {variant} {options}, {p.dtype}, {tokens} tokens, "
        f"{p.out_features} x {p.in_features}: {len(wrong)} wrong; "
        f"the first at token {token}, row {row}: got {got}, expected {wanted}"
    )
