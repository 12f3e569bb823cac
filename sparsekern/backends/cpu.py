"""The CPU backend of sparsekern.linear: decompress some rows, multiply them with torch, go on.

The dense weight never exists as a whole, neither in the forward pass nor in the gradient for x.

16-bit inputs are multiplied in float32: the products are exact, bias and activation come before the
one rounding, and speed does not hang on the processor having fast matmuls of this 16-bit kind.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekern.backends.protocol import Explained, Launch, Problem, folded
from sparsekern.formats import codec, dtypes
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.utils.exact import exact_on_cpu

# Dense float32 bytes decompressed at a time: small enough for the temporaries of decompress to stay
# in cache, large enough that the matmul is not cut into slivers.
_CHUNK_BYTES = 4 * 2**20


def dense_chunks(w24: Sparse24) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (start, stop, W[start:stop] as a dense float32 tensor) over the rows of W."""
    w24 = w24.rowmajor()
    spec, metadata = w24.spec, w24.metadata
    scaled = dtypes.scaled_codec(spec.storage) if spec.element.scaled else None
    numbers = w24.numbers() if scaled is None else w24.values
    out_features, in_features = w24.shape
    rows = max(1, _CHUNK_BYTES // max(1, 4 * in_features))
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        kept = numbers[start:stop]
        if scaled is not None:  # their numbers are float32, whatever x is
            some = {name: tensor[start:stop] for name, tensor in w24.tensors.items()}
            kept = scaled.decode(some, torch.float32, spec.group)
        part = codec.decompress_dense(kept, metadata[start:stop], in_features)
        yield start, stop, part.float()


def activate(z: Tensor, activation: str | None) -> Tensor:
    """activation(z) for None | "relu" | "gelu" (exact, with erf) | "silu"."""
    if activation == "relu":
        return torch.relu(z)
    if activation == "gelu":
        return torch.nn.functional.gelu(z)
    if activation == "silu":
        return torch.nn.functional.silu(z)
    return z


class CpuBackend:
    """Every layout, element type and shape, on the CPU."""

    name = "cpu"
    quantized = True

    def supports(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"backend 'cpu' needs x on the CPU, got {problem.device}"
        return None

    def bind(self, problem: Problem) -> Launch:
        activation = problem.activation
        if problem.quantized is not None:
            return folded(
                lambda x, w24, bias, scale: quantized_linear(x, scale, w24, bias, activation)
            )
        return folded(lambda x, w24, bias: linear(x, w24, bias, activation))

    def explain(self, problem: Problem) -> Explained:
        if problem.quantized is not None:
            return Explained("fp64_matmul", "x is on the CPU: levels multiplied in float64, exact")
        why = "x is on the CPU: decompress by rows, torch matmul in float32"
        return Explained("fp32_matmul", why)


def linear(
    x: Tensor, w24: Sparse24, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """y = activation(x · Wᵀ + bias) for x [tokens, in_features], rounded once to x.dtype."""
    # Said in full: torch's default dtype and device are the user's.
    y = torch.empty(x.shape[0], w24.shape[0], dtype=torch.float32, device=x.device)
    x32 = x.float()
    with exact_on_cpu():
        for start, stop, dense in dense_chunks(w24):
            torch.mm(x32, dense.t(), out=y[:, start:stop])
    if bias is not None:
        y += bias.float()
    return activate(y, activation).to(x.dtype)


def quantized_linear(
    x: Tensor,
    x_scale: Tensor,
    w24: Sparse24,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y = activation(x · levels(W)ᵀ * weight_scale * x_scale + bias), rounded once to w24.dtype.

    x [tokens, in_features] of the weight's 8-bit type, x_scale float32 [tokens]. The sums are exact
    (float64 holds those of int8 up to 2^39 columns, and of e4m3 up to 2^17); they become float32
    first, then come the scales, the channel's before the token's.
    """
    w24 = w24.rowmajor()
    scaled, (out_features, in_features) = dtypes.scaled_codec(w24.spec.storage), w24.shape
    y = torch.empty(x.shape[0], out_features, dtype=torch.float32, device=x.device)
    x64 = x.double()
    rows = max(1, _CHUNK_BYTES // max(1, 8 * in_features))
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        levels, metadata = scaled.unpack(w24.values[start:stop]), w24.metadata[start:stop]
        dense = codec.decompress_dense(levels, metadata, in_features)
        y[:, start:stop] = x64 @ dense.double().t()
    y *= w24.tensors[SCALE].view(-1)
    y *= x_scale[:, None]
    if bias is not None:
        y += bias.float()
    return activate(y, activation).to(w24.dtype)


def input_grad(grad: Tensor, w24: Sparse24) -> Tensor:
    """grad [tokens, out_features] · W -> [tokens, in_features], summed in float32, rounded once."""
    result = torch.zeros(grad.shape[0], w24.shape[1], dtype=torch.float32, device=grad.device)
    with exact_on_cpu():
        for start, stop, dense in dense_chunks(w24):
            result.addmm_(grad[:, start:stop].float(), dense)
    return result.to(grad.dtype)
