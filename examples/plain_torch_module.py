"""Prune a module that is no Transformers model: calibrated as a whole, on your own batches."""

import torch
from torch import nn

import sparsekern as sk


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(1024, 32)
    y = x[:, :4].argmax(-1)
    model = Classifier()
    train(model, x[:512], y[:512])
    print(f"dense accuracy  {accuracy(model, x[512:], y[512:]):.3f}")
    batches = list(x[:512].split(64))  # each is one call of the module
    report = sk.prune_model(model, "sparsegpt", batches, skip=("head",), progress=False)
    print(report.table())
    print(f"pruned accuracy {accuracy(model, x[512:], y[512:]):.3f}")
    print(model)


if __name__ == "__main__":
    main()
