"""Read a GGUF file into a Transformers model and tokenizer.

GGUF is llama.cpp's container: metadata, vocabulary and (usually quantised) tensors in one file. It
is also the only form in which a small instruction-tuned model can be had from a package index
alone, which is what the demo needs. This reader covers the Llama architecture with a GPT-2-style
byte-level BPE vocabulary, and refuses everything else by name rather than producing a model that is
slightly wrong.

Three things differ from a Transformers checkpoint and are undone here:
  * weights are quantised in blocks: dequantised with the `gguf` package, rounded once to `dtype`
  * rows of q_proj and k_proj are permuted, because llama.cpp rotates neighbouring pairs (2i, 2i+1)
    and Transformers the halves (i, i + head_dim/2): undone by `unpermute_rope_rows`
  * tensors have other names: `LAYER_NAMES`

Source: the GGUF specification (ggml, docs/gguf.md); llama.cpp, convert_hf_to_gguf.py, `permute`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sparsekern.errors import FormatError, check
from sparsekern.integrations.gguf.tokenizer import build_tokenizer

# GGUF name -> Transformers name, for the tensors of one block ("blk.7.attn_q" ->
# "model.layers.7.self_attn.q_proj").
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def load_gguf(path, dtype=torch.bfloat16):
    """Read a Llama-architecture GGUF file.

    Args:
        path: the .gguf file.
        dtype: floating-point dtype of the weights; each is dequantised in float32 and rounded once.
    Returns:
        (model, tokenizer): LlamaForCausalLM on the CPU in eval mode, PreTrainedTokenizerFast.
    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: `gguf` or `transformers` is not installed.
        FormatError: not a GGUF file, damaged, or an architecture, vocabulary or tensor that is not
            covered.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"sparsekern.load_gguf: no file at {path}.")
    reader = _open(path)
    meta = _Metadata(reader, path)
    config = llama_config(meta)
    model = _build_model(config, _read_tensors(reader, config, dtype, path), path)
    model.config.dtype = dtype
    tokenizer = build_tokenizer(meta)
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval(), tokenizer


class _Metadata:
    """The key-value part of a GGUF file; a missing or mistyped key is a FormatError that names
    it."""

    def __init__(self, reader, path):
        self.fields, self.path = reader.fields, path

    def get(self, key, kind, default=None, required=False):
        field = self.fields.get(key)
        if field is None:
            check(
                not required,
                "sparsekern.load_gguf",
                f"metadata key {key!r}",
                "none",
                f"File: {self.path}.",
                exc=FormatError,
            )
            return default
        value = field.contents()
        check(
            isinstance(value, kind),
            "sparsekern.load_gguf",
            f"{key} of type {kind}",
            type(value).__name__,
            f"File: {self.path}.",
            exc=FormatError,
        )
        return value

    def need(self, key, kind):
        return self.get(key, kind, required=True)


def _open(path):
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sparsekern.load_gguf: the package 'gguf' is not installed. "
            "Run: pip install 'sparsekern[hf]'."
        ) from error
    try:
        return gguf.GGUFReader(path)
    except (
        Exception
    ) as error:  # the parser walks the bytes and meets damage as whatever numpy raises
        raise FormatError(
            f"sparsekern.load_gguf: expected a complete GGUF file, got {path} "
            f"({type(error).__name__}: {error}). Fetch the file again."
        ) from error


def llama_config(meta):
    """LlamaConfig from GGUF metadata; FormatError for other architectures and rope variants."""
    from transformers import LlamaConfig

    op = "sparsekern.load_gguf"
    arch = meta.need("general.architecture", str)
    check(
        arch == "llama",
        op,
        "general.architecture == 'llama'",
        repr(arch),
        "Use the model's safetensors checkpoint instead.",
        exc=FormatError,
    )
    scaling = meta.get("llama.rope.scaling.type", str, "none")
    check(
        scaling == "none",
        op,
        "unscaled rope (llama.rope.scaling.type 'none')",
        repr(scaling),
        "Use the model's safetensors checkpoint instead.",
        exc=FormatError,
    )
    hidden, heads = (
        meta.need("llama.embedding_length", int),
        meta.need("llama.attention.head_count", int),
    )
    blocks = meta.need("llama.block_count", int)
    kv_heads = meta.get("llama.attention.head_count_kv", int, heads)
    check(
        min(hidden, heads, kv_heads, blocks) > 0 and hidden % heads == 0 and heads % kv_heads == 0,
        op,
        "positive sizes, embedding_length a multiple of head_count and that of head_count_kv",
        f"{hidden}, {heads}, {kv_heads} ({blocks} blocks)",
        f"File: {meta.path}.",
        exc=FormatError,
    )
    head_dim = meta.get("llama.attention.key_length", int, hidden // heads)
    rotated = meta.get("llama.rope.dimension_count", int, head_dim)
    check(
        head_dim == rotated and head_dim % 2 == 0,
        op,
        "rope over the whole, even head dimension",
        f"{rotated} of {head_dim}",
        "Use the model's safetensors checkpoint instead.",
        exc=FormatError,
    )
    return LlamaConfig(
        vocab_size=len(meta.need("tokenizer.ggml.tokens", list)),
        hidden_size=hidden,
        intermediate_size=meta.need("llama.feed_forward_length", int),
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=meta.need("llama.context_length", int),
        rms_norm_eps=meta.need("llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=meta.get("llama.rope.freq_base", float, 10000.0),
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id", int),
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id", int),
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id", int),
    )


def unpermute_rope_rows(weight, heads):
    """Undo llama.cpp's row order of q_proj and k_proj: row 2i + j of a head goes back to row
    j·head_dim/2 + i.

    Args:
        weight: [heads · head_dim, in_features] in GGUF order.
        heads: number of heads that the rows are split into (key-value heads for k_proj).
    Returns:
        The same shape and dtype, in Transformers' order.
    """
    out_features, in_features = weight.shape
    return (
        weight.reshape(heads, -1, 2, in_features).transpose(1, 2).reshape(out_features, in_features)
    )


def _read_tensors(reader, config, dtype, path):
    """All tensors as {Transformers name: tensor in dtype}, in Transformers' row order."""
    from gguf.quants import dequantize

    state = {}
    for tensor in reader.tensors:
        name = transformers_name(tensor.name, path)
        try:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except Exception as error:  # unknown quantisation, or data that does not fill its blocks
            raise FormatError(
                "sparsekern.load_gguf: expected a tensor that the gguf package can dequantise, "
                f"got {tensor.name} of type {tensor.tensor_type.name} ({error}). File: {path}."
            ) from error
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            check(
                weight.dim() == 2 and weight.shape[0] == heads * config.head_dim,
                "sparsekern.load_gguf",
                f"{tensor.name} with {heads * config.head_dim} rows",
                list(weight.shape),
                f"File: {path}.",
                exc=FormatError,
            )
            weight = unpermute_rope_rows(weight, heads)
        state[name] = weight.to(dtype)
    return state


def transformers_name(name, path="the file"):
    """Transformers name of one GGUF tensor; FormatError when a plain Llama has no such tensor."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[3] == "weight":
        if parts[2] in LAYER_NAMES:
            return f"model.layers.{int(parts[1])}.{LAYER_NAMES[parts[2]]}.weight"
    raise FormatError(
        "sparsekern.load_gguf: expected the tensors of a plain Llama model, "
        f"got {name!r} in {path}. Use the model's safetensors checkpoint instead."
    )


def _build_model(config, state, path):
    from transformers import LlamaForCausalLM

    config.tie_word_embeddings = "lm_head.weight" not in state
    with torch.device(
        "meta"
    ):  # no storage and no random initialisation: every parameter comes from the file
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(
        config=config
    )  # its buffers are computed, not stored
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = [
        f"{name}: expected {expected.get(name, 'no such tensor')}, got {found.get(name, 'none')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    check(
        not differing,
        "sparsekern.load_gguf",
        "the tensors that the metadata announces",
        f"{len(differing)} that differ, first {differing[0] if differing else ''}",
        f"File: {path}.",
        exc=FormatError,
    )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model
