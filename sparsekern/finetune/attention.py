"""Two attention functions for Transformers models, put in place of the model's own for a while.

causal    rows without padding: scaled_dot_product_attention with is_causal and no mask. Under
          torch.compile Transformers writes the causal mask out, and a mask keeps its attention from
          the flash kernels.
sampling  one new token a row against keys and values that are kept here, of a length that is
          rounded up: no cache object, no mask, nothing that a CUDA graph could not hold.

Both are looked up under their names through Transformers' AttentionInterface; a model whose layers
do not use that is not changed by them, which the callers find out by comparing outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

CAUSAL, SAMPLING = "sparsekern_causal", "sparsekern_sampling"


def causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """query [rows, heads, tokens, d], key and value [rows, key-value heads, tokens, d] ->
    ([rows, tokens, heads, d], None)."""
    group = query.shape[1] // key.shape[1]
    query, key = query.to(value.dtype), key.to(value.dtype)  # as autocast does
    # The kernels for float32 and for CPUs want as many keys as queries.
    grouped = value.is_cuda and value.dtype != torch.float32
    if group > 1 and not grouped:
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    y = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=query.shape[2] > 1,
        scale=scaling,
        enable_gqa=group > 1 and grouped,
    )
    return y.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def use(model: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The model's attention is `function`, registered as `name`, inside the block.

    Raises:
        RuntimeError: Transformers is missing, or the model has no config that names an attention.
    """
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise RuntimeError(f"no AttentionInterface: {error}") from error
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "_attn_implementation"):
        raise RuntimeError("the model's config names no attention")
    AttentionInterface.register(name, function)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def why_not_causal(model: nn.Module, tokens: int) -> str:
    """Why `causal` cannot stand in for the model's attention over rows of so many tokens, "" when
    it can: the model uses "sdpa", no window slides, and outputs agree."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return "the model's attention is not sdpa"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return "windows slide"
    body = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    if not isinstance(body, nn.Module) or body is model:
        return "no base model"
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        device = next(model.parameters()).device
        size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (1, tokens), generator=generator, device="cpu").to(device)
        theirs = body(input_ids=ids, use_cache=False).last_hidden_state.float()
        with use(model, CAUSAL, causal):
            ours = body(input_ids=ids, use_cache=False).last_hidden_state.float()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for module, flag in flags:
            module.training = flag
    distance = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
    return "" if distance < 0.02 else f"outputs differ by {distance:.3g}"
