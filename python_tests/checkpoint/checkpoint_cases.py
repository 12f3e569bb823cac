"""Small models and folders for the checkpoint tests."""

import json
import struct

import torch
from torch import nn

from sparsekern.checkpoint import save_pretrained
from sparsekern.formats.sparse24 import prune_compress
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot.discovery import dense_weight, is_linear

NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def sparsify(model, keep=("lm_head",)):
    """Magnitude-prune every linear layer of a model in place, except those whose name ends so."""
    made = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if is_linear(module) and not name.endswith(tuple(keep)):
            parent, _, attribute = name.rpartition(".")
            if module not in made:
                bias = None if module.bias is None else module.bias.detach()
                weight = prune_compress(dense_weight(module).contiguous())
                made[module] = SparseLinear.from_sparse24(weight, bias)
            setattr(model.get_submodule(parent), attribute, made[module])
    return model


def llama(dtype=torch.float32, tied=True, hidden=32, intermediate=60, vocab=64):
    """Llama with tied embeddings, as SmolLM2, and in_features that is not a multiple of 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        **NO_SPECIAL_TOKENS,
    )
    return with_dtype(LlamaForCausalLM(config), dtype)


def gpt2(dtype=torch.float32):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return with_dtype(GPT2LMHeadModel(GPT2Config(**sizes, **NO_SPECIAL_TOKENS)), dtype)


def opt(dtype=torch.float32):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=None,
        **NO_SPECIAL_TOKENS,
    )
    return with_dtype(OPTForCausalLM(config), dtype)


def gemma2(dtype=torch.float32):
    """A model with a scalar buffer beside the rotary ones, and with head_dim of its own."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=None,
        **NO_SPECIAL_TOKENS,
    )
    return with_dtype(Gemma2ForCausalLM(config), dtype)


def with_dtype(model, dtype):
    """Parameters in dtype, buffers as they are, as from_pretrained(dtype=) leaves a model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


class Plain(nn.Module):
    """Module without a config: a shared layer, a tied weight, a buffer of each kind, a bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.again = self.first
        self.second = nn.Linear(16, 12, bias=False)
        self.table = nn.Embedding(10, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("steps", torch.tensor([3]))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        return self.head(self.again(self.second(self.first(x))) * self.scale)


def plain_folder(folder, dtype=torch.bfloat16):
    """A folder with one shard and layers `first` (with bias) and `second`; returns the model."""
    model = sparsify(with_dtype(Plain(), dtype), keep=("head",))
    save_pretrained(model, folder)
    return model


def split_file(path):
    """(header as dict, data as bytearray) of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def join_file(path, header, data):
    """Write a safetensors file from a header (dict, or bytes to be taken as they are) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
