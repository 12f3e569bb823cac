"""Operands of the Triton kernels as words that are wider than their elements."""

import torch


def words(tensor, word, alignment):
    """The same rows as words of a wider dtype, rows of `alignment` bytes; copied where a row does
    not begin at a multiple of that.

    Args:
        tensor: [rows, columns], columns a multiple of a word.
        word: torch.int32 | torch.int64.
        alignment: bytes, a multiple of a word.
    """
    stride, step = tensor.stride()
    first = tensor.data_ptr() % 16 == 0
    aligned = first and stride * tensor.itemsize % alignment == 0
    whole = tensor.storage_offset() * tensor.itemsize % word.itemsize == 0
    if not (aligned and whole and step == 1):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(word)
