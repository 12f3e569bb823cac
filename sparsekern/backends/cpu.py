"""The CPU backend of sparsekern.linear: decompress some rows, multiply them with torch, go on.

Same two functions as every backend module: supported(x, w24) and linear(x, w24, bias, activation).
The dense weight never exists as a whole, neither in the forward pass nor in the gradient for x.

16-bit inputs are multiplied in float32: the products are exact, bias and activation come before the
one rounding, and speed does not hang on the processor having fast matmuls of this 16-bit kind.
"""

import torch

from sparsekern.formats.sparse24 import Sparse24, decompress

# Dense float32 bytes decompressed at a time: small enough for the temporaries of decompress to stay
# in cache, large enough that the matmul is not cut into slivers.
_CHUNK_BYTES = 4 * 2**20


def dense_chunks(w24):
    """Yields (start, stop, W[start:stop] as a dense float32 tensor) over the rows of W."""
    w24 = w24.rowmajor()
    out_features, in_features = w24.shape
    rows = max(1, _CHUNK_BYTES // max(1, 4 * in_features))
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        values, metadata = w24.values[start:stop], w24.metadata[start:stop]
        part = Sparse24(values, metadata, (stop - start, in_features))
        yield start, stop, decompress(part).float()


def activate(z, activation):
    """activation(z) for None | "relu" | "gelu" (exact, with erf) | "silu"."""
    if activation == "relu":
        return torch.relu(z)
    if activation == "gelu":
        return torch.nn.functional.gelu(z)
    if activation == "silu":
        return torch.nn.functional.silu(z)
    return z


def supported(x, w24):
    """(True, why) when x is on the CPU; every layout, dtype and shape is."""
    if x.device.type != "cpu":
        return False, f"backend 'cpu' needs x on the CPU, got {x.device}"
    return True, "x is on the CPU: decompress by rows, torch matmul in float32"


def config(x, w24):
    """The name that sparsekern.explain shows."""
    return "fp32_matmul"


def linear(x, w24, bias, activation):
    """y = activation(x · Wᵀ + bias) for x [tokens, in_features], rounded once to x.dtype."""
    y = torch.empty(x.shape[0], w24.shape[0])
    x32 = x.float()
    for start, stop, dense in dense_chunks(w24):
        torch.mm(x32, dense.t(), out=y[:, start:stop])
    if bias is not None:
        y += bias.float()
    return activate(y, activation).to(x.dtype)


def input_grad(grad, w24):
    """grad [tokens, out_features] · W -> [tokens, in_features], summed in float32, rounded once."""
    result = torch.zeros(grad.shape[0], w24.shape[1])
    for start, stop, dense in dense_chunks(w24):
        result.addmm_(grad[:, start:stop].float(), dense)
    return result.to(grad.dtype)
