"""Tiny GGUF files for the tests: a random Llama written the way llama.cpp's converter writes one.

Everything here is written independently of sparsekern/integrations/gguf/model.py: the row permutation is the
formula of llama.cpp's converter in numpy, and the vocabulary is made by hand.
"""

import gguf
import numpy as np
import torch
import transformers

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rope_theta=5000.0,
    rms_norm_eps=1e-6,
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "a n", "an d", "1 2"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def byte_characters():
    """The 256 printable characters that GPT-2 writes bytes as, in byte order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def vocabulary():
    """Special tokens, the 256 bytes, then what the merges make."""
    return [*SPECIAL, *byte_characters(), *("".join(merge.split(" ")) for merge in MERGES)]


def tiny_llama(tied=True, seed=0):
    """A random float32 LlamaForCausalLM of SIZES."""
    config = transformers.LlamaConfig(
        **SIZES,
        vocab_size=len(vocabulary()),
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


def permute(weight, heads):
    """Row order of q and k in a GGUF file; formula of llama.cpp, convert_hf_to_gguf.py,
    LlamaModel.permute.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model):
    """{GGUF name: float32 array} of a tiny_llama."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        array, parts = tensor.numpy(), name.split(".")
        if name == "lm_head.weight":
            if not model.config.tie_word_embeddings:
                tensors["output.weight"] = array
        elif parts[1] == "layers":
            inner = ".".join(parts[3:-1])
            heads = {
                "self_attn.q_proj": SIZES["num_attention_heads"],
                "self_attn.k_proj": SIZES["num_key_value_heads"],
            }
            array = permute(array, heads[inner]) if inner in heads else array
            tensors[f"blk.{parts[2]}.{NAMES[inner]}.weight"] = array
        else:
            tensors[{"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight"] = (
                array
            )
    return tensors


def metadata():
    """{key: value} as llama.cpp's converter writes it."""
    tokens = vocabulary()
    return {
        "general.architecture": "llama",
        "llama.context_length": SIZES["max_position_embeddings"],
        "llama.embedding_length": SIZES["hidden_size"],
        "llama.block_count": SIZES["num_hidden_layers"],
        "llama.feed_forward_length": SIZES["intermediate_size"],
        "llama.attention.head_count": SIZES["num_attention_heads"],
        "llama.attention.head_count_kv": SIZES["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": SIZES["rms_norm_eps"],
        "llama.rope.freq_base": SIZES["rope_theta"],
        "llama.rope.dimension_count": SIZES["head_dim"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write_gguf(path, tensors, meta, quantise=False):
    """Write a GGUF file; with `quantise` matrices are Q4_1 and the embedding Q8_0, as in the demo's
    model.
    """
    writer = gguf.GGUFWriter(path, meta.get("general.architecture", "llama"))
    for key, value in meta.items():
        if key == "general.architecture":
            continue  # GGUFWriter has written it
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(key, value)
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType.F32
        if quantise and array.ndim == 2:
            kind = (
                gguf.GGMLQuantizationType.Q8_0
                if name == "token_embd.weight"
                else gguf.GGMLQuantizationType.Q4_1
            )
        data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
