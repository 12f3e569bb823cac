"""Tiny random mixtures of Transformers, and one of our own, for the tests of experts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from python_tests.checkpoint.architectures import MODELS, TEXT

transformers = pytest.importorskip("transformers")

SMALL = TEXT | {"num_experts_per_tok": 2, "initializer_range": 0.2}
MOE = SMALL | {"num_experts": 4, "moe_intermediate_size": 32}
FAMILIES = {
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", MOE | {"head_dim": 16}),
    "deepseek-v3": ("DeepseekV3", MODELS["deepseek-v3"][2] | {"initializer_range": 0.2}),
    "gpt-oss": ("GptOss", SMALL | {"num_local_experts": 4, "head_dim": 16}),
    "llama4": (
        "Llama4",
        SMALL
        | {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16}
        | {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
    ),
    "olmoe": ("Olmoe", MOE),
    "granite-moe": ("GraniteMoe", SMALL | {"num_local_experts": 4}),
}


def build(family, seed=0, **more):
    """A random model of the family in eval mode, biases and all."""
    stem, arguments = FAMILIES[family]
    config = "Llama4TextConfig" if stem == "Llama4" else f"{stem}Config"
    made = getattr(transformers, config)(**{**copy.deepcopy(arguments), **more})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}ForCausalLM")(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts." in name or "block_sparse_moe" in name:
                parameter.normal_(std=0.2)
    return model


def ids(samples=4, length=24, seed=1):
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (samples, length), generator=generator)


@torch.no_grad()
def logits(model, tokens=None):
    """Of the model on tokens that no calibration has."""
    return model(ids(2, 12, seed=7) if tokens is None else tokens).logits


class Bank(nn.Module):
    """Experts in the manner of nobody: three parameters, a square one among them."""

    def __init__(self, experts, features):
        super().__init__()
        self.first = nn.Parameter(torch.randn(experts, features, features) / features**0.5)
        self.second = nn.Parameter(torch.randn(experts, features, 2 * features) / features**0.5)
        self.last = nn.Parameter(torch.randn(experts, 2 * features, features) / features**0.5)
        self.bias = nn.Parameter(torch.randn(experts, 2 * features))

    def forward(self, x, indices, scores):
        y = torch.zeros_like(x)
        for expert in range(self.first.shape[0]):
            token, place = (indices == expert).nonzero(as_tuple=True)
            h = functional.linear(x[token], self.first[expert]).tanh()
            h = torch.relu(h @ self.second[expert] + self.bias[expert])
            h = torch.matmul(h, self.last.transpose(1, 2)[expert].mT)
            y = y.index_add(0, token, h * scores[token, place, None])
        return y


class Mixture(nn.Module):
    """A router and a Bank on tokens [tokens, features]."""

    def __init__(self, experts=4, features=16, chosen=1):
        super().__init__()
        self.chosen = chosen
        self.router = nn.Parameter(torch.randn(experts, features))
        self.bank = Bank(experts, features)

    def route(self, x):
        return (x @ self.router.t()).softmax(-1).topk(self.chosen)

    def forward(self, x):
        scores, indices = self.route(x)
        return self.bank(x, indices, scores)
