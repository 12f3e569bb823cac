"""Sparse linear layer for many tokens without a kernel of its own: some rows of W at a time are
expanded to memory (compress.decompress_kernel), torch.mm multiplies them with sums in float32, and
epilogue.split_reduce adds the bias, applies the activation and rounds once.

The expanded rows are few enough to be read from the L2 cache, and their memory is used again for
the next ones. W is read and written once, whatever the tokens; a tile kernel expands it once per
tile of tokens.

Of quantised weights the levels are expanded, which 16 bits hold exactly, and the sums get the row's
scale; with a scale per group, level times scale, rounded to the dtype of x.
"""

import torch

from sparsekern.backends.triton import compress, epilogue
from sparsekern.backends.triton.configs import Expanded
from sparsekern.formats import dtypes
from sparsekern.formats.scaled import SCALE


def _product(x, dense):
    """x · denseᵀ with float32 sums and a float32 result."""
    if x.is_cuda:
        return torch.mm(x, dense.t(), out_dtype=torch.float32)
    return torch.mm(x.float(), dense.float().t())


def launch(
    x,
    values,
    metadata,
    bias,
    activation,
    config: Expanded,
    out,
    *,
    storage="plain",
    scale=None,
    group=0,
    x_scale=None,
):
    """out = activation(x · Wᵀ + bias), arguments as linear.linear has checked them.

    Args:
        storage: name of the element type of quantised values.
    """
    in_features, out_features = x.shape[1], out.shape[1]
    codec = None if scale is None else dtypes.scaled_codec(storage)
    for start in range(0, out_features, config.rows):
        rows = slice(start, start + config.rows)
        numbers = values[rows]
        if codec is not None and group > 0:
            numbers = codec.decode({"values": numbers, SCALE: scale[rows]}, x.dtype, group)
        elif codec is not None:
            numbers = codec.unpack(numbers).to(x.dtype)
        dense = compress.decompress(numbers, metadata[rows], in_features)
        sums = _product(x, dense)
        if codec is not None and group == 0:
            sums *= scale[rows].t()
        if x_scale is not None:
            sums *= x_scale[:, None]
        of_rows = None if bias is None else bias[rows]
        epilogue.split_reduce(sums[None], of_rows, activation, out[:, rows])
        del numbers, dense, sums  # or the next ones would have other memory
