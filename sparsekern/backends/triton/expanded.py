"""Sparse linear layer for many tokens without a kernel of its own: some rows of W at a time are
expanded to memory (compress.decompress_kernel), torch.mm multiplies them with sums in float32, and
epilogue.split_reduce adds the bias, applies the activation and rounds once.

The expanded rows are few enough to be read from the L2 cache, and their memory is used again for
the next ones. W is read and written once, whatever the tokens; a tile kernel expands it once per
tile of tokens.
"""

import torch

from sparsekern.backends.triton import compress, epilogue
from sparsekern.backends.triton.configs import Expanded


def _product(x, dense):
    """x · denseᵀ with float32 sums and a float32 result."""
    if x.is_cuda:
        return torch.mm(x, dense.t(), out_dtype=torch.float32)
    return torch.mm(x.float(), dense.float().t())


def launch(x, values, metadata, bias, activation, config: Expanded, out):
    """out = activation(x · Wᵀ + bias), arguments as linear.linear has checked them."""
    in_features, out_features = x.shape[1], out.shape[1]
    for start in range(0, out_features, config.rows):
        rows = slice(start, start + config.rows)
        dense = compress.decompress(values[rows], metadata[rows], in_features)
        sums = _product(x, dense)[None]
        epilogue.split_reduce(sums, None if bias is None else bias[rows], activation, out[:, rows])
        del dense, sums  # or the next ones would have other memory
