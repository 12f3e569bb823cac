"""Tiny random models of every decoder family, shared by the driver tests: hidden 32, 2 blocks,
vocabulary 64."""

import pytest
import torch
from torch import nn

from sparsekern.oneshot.prune_model import prune_model

transformers = pytest.importorskip("transformers", reason="needs transformers")

VOCABULARY = 64
SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
)
GQA = dict(num_key_value_heads=2, head_dim=8)

# family -> (config class, its arguments beyond SIZES, Linear layers per block)
FAMILIES = {
    "llama": ("LlamaConfig", GQA, 7),
    "mistral": ("MistralConfig", dict(GQA, sliding_window=6), 7),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2), 7),
    "qwen3": ("Qwen3Config", GQA, 7),
    "gemma": ("GemmaConfig", GQA, 7),
    "gemma2": ("Gemma2Config", dict(GQA, sliding_window=6), 7),
    "gemma3": ("Gemma3TextConfig", dict(GQA, sliding_window=6), 7),
    "phi": ("PhiConfig", {}, 6),
    "opt": ("OPTConfig", dict(ffn_dim=64, word_embed_proj_dim=32), 6),
    "gpt2": ("GPT2Config", {}, 4),
}
GPT2_SIZES = dict(n_embd=32, n_head=4, n_inner=64, vocab_size=VOCABULARY, n_positions=64)


def build(family="llama", layers=2, seed=0, **overrides):
    """A random model of the family in float32, with weights large enough that its layers matter."""
    config_name, extra, _ = FAMILIES[family]
    if family == "gpt2":
        arguments = dict(GPT2_SIZES, n_layer=layers, initializer_range=0.2)
    else:
        arguments = dict(SIZES, **extra, num_hidden_layers=layers, initializer_range=0.2)
        if family == "opt":
            arguments["init_std"] = arguments.pop("initializer_range")
            arguments.pop("intermediate_size")
    arguments.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    arguments.update(overrides)
    config = getattr(transformers, config_name)(**arguments)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(samples=6, length=20, seed=1):
    """Random token ids [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


class MLP(nn.Module):
    """A plain tree without a chain of blocks; `narrow` cannot be pruned and `unused` is never
    called."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.gate = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.narrow = nn.Linear(6, 16)
        self.unused = nn.Linear(16, 16)

    def forward(self, x, scale=1.0):
        y = self.down(torch.relu(self.gate(x)) * self.up(x)) * scale
        return y + self.narrow(x[..., :6])


def plain(seed=0):
    torch.manual_seed(seed)
    return MLP()


def hook_inputs(model, modules, run):
    """Inputs that each module receives while run() runs: list of lists of tensors."""
    seen = [[] for _ in modules]
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, i=i: seen[i].append(args[0].detach().clone())
        )
        for i, module in enumerate(modules)
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def is_24(weight):
    """Whether every aligned group of 4 along dim 1 has at most two non-zeros."""
    return bool(((weight != 0).reshape(-1, 4).sum(1) <= 2).all())


def run_prune(model, method="sparsegpt", calibration=None, **kwargs):
    """prune_model on the CPU, quietly, with the usual calibration."""
    kwargs = {"device": "cpu", "progress": False, **kwargs}
    calibration = tokens() if calibration is None else calibration
    return prune_model(model, method, calibration, **kwargs)


def hessian64(inputs):
    """2/n Σ xᵀx in float64; n counts samples, as in the published code."""
    x = torch.cat([t.reshape(-1, t.shape[-1]) for t in inputs]).double()
    samples = sum(t.shape[0] for t in inputs)
    return 2 / samples * x.T @ x


def record_hessians(model, **kwargs):
    """Prune by magnitude through the callable interface; returns [(weight, Hessian matrix),
    ...]."""
    seen = []

    def score(w, hessian):
        seen.append((w.clone(), hessian.matrix.clone()))
        return w.abs()

    run_prune(model, score, **kwargs)
    return seen
