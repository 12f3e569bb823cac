"""What the memory of this GPU gives today: bandwidth of a copy and of a read.

Shares of bandwidth in the records refer to these, measured in the same run, not to a data sheet.
"""

from __future__ import annotations

import torch

from . import timing

BYTES = 2**31  # of one buffer; far more than any L2


def copy_calls(size: int = BYTES, device="cuda") -> tuple[list[timing.Call], int]:
    """(calls, bytes that one moves, read plus written): torch's copy of one large buffer."""
    source = torch.rand(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return [lambda: target.copy_(source)], 2 * size


def read_calls(size: int = BYTES, device="cuda") -> tuple[list[timing.Call], int]:
    """(calls, bytes that one moves): torch's sum of one large float32 buffer."""
    source = torch.rand(size // 4, dtype=torch.float32, device=device)
    return [lambda: source.sum()], size


def bandwidths(run) -> dict:
    """Measures and records {"copy_tb_s", "read_tb_s"}; run is an options.Run."""
    size = BYTES if run.device.type == "cuda" else 2**22
    cases = {"copy": copy_calls(size, run.device), "read": read_calls(size, run.device)}
    check_sums(cases["copy"][0][0](), float(cases["read"][0][0]()))
    times = timing.compare(
        {name: calls for name, (calls, _) in cases.items()},
        "events" if run.timer == "graph" else run.timer,
        timing.StopRule(min_rounds=5 if run.quick else 20, budget_s=1.0),
    )
    metrics = {
        f"{name}_tb_s": round(moved / times[name].median / 1e6, 4)
        for name, (_, moved) in cases.items()
    }
    run.add(op="bandwidth", backend="torch", check="bounded", case=f"{size} bytes", metrics=metrics)
    run.say(f"bandwidth: copy {metrics['copy_tb_s']:.2f}, read {metrics['read_tb_s']:.2f} TB/s")
    return metrics


def check_sums(copied: torch.Tensor, total: float) -> None:
    """RuntimeError unless both are of uniform numbers in [0, 1): a wrong copy is no ceiling."""
    wanted = copied.numel() / 2
    for got in (float(copied.sum(dtype=torch.float64)), total):
        if not abs(got - wanted) <= 0.01 * wanted:
            raise RuntimeError(f"bench.ceilings: expected a sum near {wanted:g}, got {got:g}.")
