"""Prune with scores of your own: a function of the weight and of what calibration saw."""

import copy

import torch
from torch import nn

import sparsekern as sk


def weight_times_deviation(weight: torch.Tensor, hessian: sk.prune.Hessian | None) -> torch.Tensor:
    """|w| times the norm of its input, but relative to the row: long rows do not win."""
    assert hessian is not None, "this score needs calibration"
    scores = weight.abs() * hessian.act_norm
    return scores / scores.sum(dim=1, keepdim=True)


def error(dense: nn.Module, pruned: nn.Module, x: torch.Tensor) -> float:
    """‖dense(x) − pruned(x)‖² / ‖dense(x)‖²"""
    with torch.no_grad():
        wanted = dense(x)
        return ((wanted - pruned(x)).square().sum() / wanted.square().sum()).item()


def main() -> None:
    torch.manual_seed(0)
    scale = torch.logspace(-1, 1, 64)  # inputs of very different size
    x = torch.randn(512, 64) * scale
    dense = nn.Sequential(nn.Linear(64, 128, bias=False), nn.GELU(), nn.Linear(128, 32))
    for method in ("magnitude", "wanda", weight_times_deviation, "sparsegpt"):
        model = copy.deepcopy(dense)
        report = sk.prune_model(model, method, [x[:256]], skip=(), progress=False)
        print(f"{report.method:<24} error on new inputs {error(dense, model, x[256:]):.4f}")


if __name__ == "__main__":
    main()
