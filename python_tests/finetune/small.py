"""What the finetune tests share: a small network, its masks, and training steps."""

import torch
from torch import nn

from sparsekern import prune

IN, HIDDEN, OUT = 16, 32, 8


class Net(nn.Module):
    """Two Linear layers with a norm and dropout between them."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.up = nn.Linear(IN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, x):
        return self.down(self.dropout(torch.relu(self.norm(self.up(x)))))


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return Net(dropout)


def masks_of(model):
    return {
        name: prune.magnitude_mask(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def pruned(seed=0, dropout=0.0):
    """A network whose weights are 2:4 already."""
    model = network(seed, dropout)
    for name, mask in masks_of(model).items():
        model.get_submodule(name).weight.data.masked_fill_(~mask, 0)
    return model


def batch(step, samples=12):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(samples, IN, generator=generator)
    return x, torch.randn(samples, OUT, generator=generator)


def train(model, optimizer, steps, first=0, masked=None, clip=None):
    for step in range(first, first + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        if masked is not None and clip:
            masked.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **options})


def bits(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
