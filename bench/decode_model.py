"""A Llama-shaped Transformers model with random weights, and one decode step of it.

The forward is LlamaForCausalLM's. Four things are exchanged, in the dense and the sparse model
alike, so that the step is what an inference engine would run and not a row of tiny kernels:

    RMSNorm             torch.nn.functional.rms_norm, one kernel
    rotary embedding    the same function, compiled by torch.compile
    silu(gate) · up     the same expression, compiled; or sparsekern's fused gated layer
    attention           torch's scaled_dot_product_attention on the grouped heads, without a mask:
                        the step is always that of the last position of the cache

The key-value cache is static and full but for that last position, which every step writes again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

import sparsekern
from sparsekern import SparseLinear, prune_compress

ATTENTION = "sparsekern_bench"
PRESETS = {
    "8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
    "tiny": dict(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
    ),
}


class LastPositionCache:
    """A static key-value cache of `length` positions that always writes the last one."""

    is_compileable = True

    def __init__(self, config, batch: int, length: int, dtype: torch.dtype, device):
        size = (batch, config.num_key_value_heads, length, config.head_dim)
        self.length = length
        self.keys = [
            torch.randn(size, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self.values = [torch.randn_like(keys) for keys in self.keys]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        self.keys[layer][:, :, -1:].copy_(keys)
        self.values[layer][:, :, -1:].copy_(values)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, *_) -> int:
        return self.length - 1


def grouped_attention(module, query, key, value, mask, scaling=None, dropout=0.0, **_):
    """One query over the whole cache; query heads share key heads in groups."""
    y = nn.functional.scaled_dot_product_attention(
        query, key, value, scale=scaling, enable_gqa=True
    )
    return y.transpose(1, 2).contiguous(), None


def build(
    preset: str,
    layers: int,
    dtype,
    device,
    sparse: bool,
    seed: int = 0,
    attention: str | None = ATTENTION,
) -> nn.Module:
    """LlamaForCausalLM with random weights made on the device, one tensor at a time.

    Args:
        sparse: every Linear but lm_head becomes a SparseLinear of a random 2:4 weight; the dense
            weight lives only until it is compressed.
        attention: None for the model as Transformers has it, norms included.
    """
    import transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, grouped_attention)
    config = transformers.LlamaConfig(
        **PRESETS[preset],
        num_hidden_layers=layers,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        attn_implementation=attention or "sdpa",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and sparse and name != "lm_head":
            weight = _random(module.weight, dtype, device, generator)
            layer = SparseLinear.from_sparse24(prune_compress(weight))
            del weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        else:
            for key, parameter in list(module.named_parameters(recurse=False)):
                value = torch.ones(parameter.shape, dtype=dtype, device=device)
                if parameter.dim() == 2:
                    value = _random(parameter, dtype, device, generator)
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    for module in model.modules():
        if attention and type(module).__name__ == "LlamaRMSNorm":
            _fuse_norm(module)
    return model.eval()


def _random(like: Tensor, dtype, device, generator) -> Tensor:
    weight = torch.empty(like.shape, dtype=dtype, device=device)
    return weight.normal_(0, like.shape[-1] ** -0.5, generator=generator)


def _fuse_norm(module: nn.Module) -> None:
    def forward(x):
        return nn.functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)

    module.forward = forward


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


@contextlib.contextmanager
def fused_pointwise(compiled: bool):
    """Inside, rotary embeddings of Llama models are compiled; yields the silu_mul to use."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb
    if compiled:
        torch._dynamo.config.suppress_errors = True  # then that part stays eager, with a warning
    compile_ = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
    modeling_llama.apply_rotary_pos_emb = compile_(original)
    try:
        yield compile_(silu_mul)
    finally:
        modeling_llama.apply_rotary_pos_emb = original


def set_mlp(model: nn.Module, product: Callable, gated: Callable | None) -> None:
    """Chooses how the MLPs compute silu(gate) · up.

    Args:
        product: (gate, up) -> silu(gate) · up.
        gated: (x, gate weight, up weight) -> the same in one launch, or None for two layers.
    """

    def two_layers(mlp):
        return lambda x: mlp.down_proj(product(mlp.gate_proj(x), mlp.up_proj(x)))

    def one_layer(mlp):
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        return lambda x: mlp.down_proj(gated(x, gate, up))

    for layer in model.model.layers:
        layer.mlp.forward = (one_layer if gated else two_layers)(layer.mlp)


def gated_layer() -> Callable | None:
    """sparsekern.gated_linear, or None where this version has none."""
    return getattr(sparsekern, "gated_linear", None)


class Step:
    """One decode step of a model: fixed token ids in, logits [batch, vocabulary] out."""

    def __init__(self, model: nn.Module, batch: int, context: int):
        self.model = model
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.cache = LastPositionCache(model.config, batch, context, dtype, device)
        ids = torch.arange(batch, device=device).unsqueeze(1) * 7919
        self.ids = ids % model.config.vocab_size
        self.positions = torch.full((batch, 1), context - 1, device=device)

    def __call__(self) -> Tensor:
        output = self.model(
            input_ids=self.ids,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]


@contextlib.contextmanager
def reference_linears():
    """Inside, SparseLinear multiplies its decompressed weight with torch: slow and independent."""

    def forward(self, x):
        return nn.functional.linear(x, sparsekern.decompress(self.weight), self.bias)

    original = SparseLinear.forward
    SparseLinear.forward = forward
    try:
        yield
    finally:
        SparseLinear.forward = original
