"""Tiny GGUF files for the tests: a random Llama written the way llama.cpp's converter writes one.

Everything here is written independently of sparsekern/integrations/gguf: the row permutation is the
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


SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    initializer_range=0.1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def other_model(architecture, seed=0):
    """(a random causal language model, its GGUF metadata, its GGUF tensors) of "qwen2", "gemma3" or
    "phi3": biases of q, k and v; norms stored with one added, and a head dimension of its own;
    q, k and v in one matrix, as gate and up.
    """
    config, special = dict(
        qwen2=(transformers.Qwen2Config, dict(rope_theta=5000.0)),
        gemma3=(
            transformers.Gemma3TextConfig,
            dict(head_dim=32, query_pre_attn_scalar=256, sliding_window=128, rope_theta=5000.0),
        ),
        phi3=(transformers.Phi3Config, dict(rope_theta=5000.0, tie_word_embeddings=False)),
    )[architecture]
    tokens, scores, types = piece_vocabulary()
    count = len(vocabulary()) if architecture == "qwen2" else len(tokens)
    config = config(**SMALL, **special, vocab_size=count)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, 0.5, 0.1)
    meta = {"general.architecture": architecture}
    for key, value in {
        "context_length": SMALL["max_position_embeddings"],
        "embedding_length": SMALL["hidden_size"],
        "block_count": SMALL["num_hidden_layers"],
        "feed_forward_length": SMALL["intermediate_size"],
        "attention.head_count": SMALL["num_attention_heads"],
        "attention.head_count_kv": SMALL["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": SMALL["rms_norm_eps"],
        "rope.freq_base": 5000.0,
    }.items():
        meta[f"{architecture}.{key}"] = value
    if architecture == "gemma3":
        meta |= {"gemma3.attention.key_length": 32, "gemma3.attention.value_length": 32}
        meta |= {"gemma3.attention.sliding_window": 128}
    if architecture == "qwen2":
        meta |= {key: v for key, v in metadata().items() if key.startswith("tokenizer.")}
        meta["tokenizer.ggml.pre"] = "qwen2"
    else:
        meta |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 3,
            "tokenizer.ggml.padding_token_id": 0,
        }
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture],
        SMALL["num_hidden_layers"],
    )
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, end = name.rsplit(".", 1)
        one = 1.0 if architecture == "gemma3" and stem.endswith("norm") else 0.0
        tensors[f"{names.get_name(stem)}.{end}"] = tensor.numpy() + np.float32(one)
    return model, meta, tensors


def piece_vocabulary():
    """(tokens, scores, types) of a small sentencepiece vocabulary: special tokens, the 256 bytes,
    characters, and pieces that are made of them.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    codes = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["▁t", "he", "▁the", "an", "and", "▁and", "in", "ing", "er", "▁a"]
    letters = ["▁", *map(chr, range(ord("a"), ord("z") + 1))]
    scores = [0.0] * (len(special) + len(codes))
    scores += [-float(i) for i in range(len(pieces) + len(letters))]
    types = [3, 3, 3, 2] + [6] * len(codes) + [1] * (len(pieces) + len(letters))
    return [*special, *codes, *pieces, *letters], scores, types
