"""Attention of a decode step over a static key-value cache, without copies of the cache.

With a mask, as every step over a static cache has one, Transformers' "sdpa" first repeats keys and
values for each query head that shares them: in the 8B shape the whole cache is written and read
four times over, in every layer, whatever part of it is filled. "sparsekern" reads what the mask
shows, once. It is an attention implementation like Transformers' own, for any model, dense or 2:4:

    import sparsekern
    model = AutoModelForCausalLM.from_pretrained(DIR, attn_implementation="sparsekern")
    model.set_attn_implementation("sparsekern")           # or later
    model.generate(..., cache_implementation="static")

It takes single queries, masks of bools, and head_dim 16, 32, 64, 128 or 256 without gradients;
everything else, such as the prompt, goes to "sdpa". Results are those of "sdpa" but for the order
and the rounding of sums (float32; softmax weights are rounded to the dtype, as in flash attention).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.backends import triton
from sparsekern.errors import message
from sparsekern.formats import dtypes

NAME = "sparsekern"
_OP = "sparsekern.integrations.attention"
_DIMS = (16, 32, 64, 128, 256)
_LARGEST_GROUP = 64  # query heads that share a key head
# Parts of some models' attention that neither "sdpa" nor this has.
_UNKNOWN = ("s_aux", "softcap")


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q · kᵀ over what the mask shows) · v in float32; zeros where it is nothing.

    Args:
        q: [batch, heads, 1, dim].   k, v: [batch, key heads, length, dim]; heads is a multiple of
            key heads, and query head h reads key head h // (heads / key heads).
        mask: bool [batch | 1, 1, 1, length], True where a position is seen; None: everywhere.
    Returns:
        [batch, 1, heads, dim], dtype of q, contiguous.
    """
    batch, heads, _, dim = q.shape
    grouped = q.float().reshape(batch, k.shape[1], -1, dim)
    score = (grouped @ k.float().transpose(2, 3)) * scale
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    weight = torch.softmax(score, -1).nan_to_num(0.0)
    return (weight @ v.float()).to(q.dtype).reshape(batch, 1, heads, dim)


@torch.library.custom_op("sparsekern::decode_attention", mutates_args=())
def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`reference`, in two Triton kernels where they run. Arguments as there, not checked."""
    if q.is_cuda and triton.available():
        from sparsekern.backends.triton import attention

        with torch.cuda.device(q.device):
            y: Tensor = attention.decode_attention(q, k, v, mask, scale)
        return y
    return reference(q, k, v, mask, scale).clone()


@decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])


def takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """True when these are operands of `decode_attention`."""
    batch, heads, queries, dim = q.shape
    if queries != 1 or dim not in _DIMS or q.dtype not in dtypes.PLAIN or k.shape != v.shape:
        return False
    if k.dtype != q.dtype or v.dtype != q.dtype or k.shape[0] != batch or k.shape[3] != dim:
        return False
    if k.shape[1] == 0 or heads % k.shape[1] or heads // k.shape[1] > _LARGEST_GROUP:
        return False
    if mask is not None:
        sizes = mask.shape
        if mask.dtype != torch.bool or len(sizes) != 4 or sizes[1] != 1 or sizes[2] != 1:
            return False
        if sizes[0] not in (1, batch) or sizes[3] != k.shape[2]:
            return False
    wants_gradient = q.requires_grad or k.requires_grad or v.requires_grad
    return q.device.type in ("cuda", "cpu") and not (wants_gradient and torch.is_grad_enabled())


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of Transformers: query [batch, heads, queries, dim], key and value
    [batch, key heads, length, dim] -> ([batch, queries, heads, dim], None).

    Raises:
        NotImplementedError: the model's attention has sinks or caps its scores.
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            expected = "attention without sinks and without a cap of the scores"
            remedy = "Load the model with attn_implementation='eager'."
            raise NotImplementedError(message(_OP, expected, f"{name}=", remedy))
    plain = kwargs.get("position_bias") is None and not dropout
    if plain and not kwargs.get("is_causal", False) and takes(query, key, value, attention_mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        return decode_attention(query, key, value, attention_mask, scale), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    y: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return y


def register() -> None:
    """Make attn_implementation="sparsekern" known to Transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
