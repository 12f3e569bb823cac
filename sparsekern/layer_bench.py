"""Time SparseLinear against dense torch on one layer shape: what `sparsekern bench` prints.

Both sides compute the same product (the dense weight holds the zeros), the sparse result is checked
against the dense one before anything is timed, and a shape where sparse loses is a row like any
other. Weights rotate among copies that together exceed the last-level cache, because a layer inside
a model never finds its weight there.

On a GPU a CUDA graph of several calls is replayed and timed with events, so that launch overhead
hides no kernel time; on the CPU calls are timed one by one. The median over repeats is reported.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from .errors import check

CACHE_BYTES = 128 * 2**20  # more than the L2 of an H100 (50 MiB) or the L3 of a desktop CPU
MAX_COPIES = 64
REPEATS = 15
MAX_SECONDS = 5.0  # per measurement
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of the largest |y|


@dataclass
class BenchRow:
    """One shape and number of tokens; microseconds are medians per call."""

    out_features: int
    in_features: int
    tokens: int
    dtype: str
    dense_us: float
    sparse_us: float
    backend: str

    @property
    def speedup(self):
        """dense time / sparse time: below 1 the sparse layer is slower."""
        return self.dense_us / self.sparse_us


def bench_shape(out_features, in_features, tokens, *, dtype, device):
    """Time one layer with `tokens` tokens.

    Args:
        out_features, in_features: of the layer; in_features a multiple of 4.
        tokens: rows of x.
        dtype, device: of weights and activations.
    Returns:
        BenchRow.
    Raises:
        ValueError: sizes not positive.
        RuntimeError: the sparse result differs from the dense one.
    """
    from .linear import SparseLinear
    from .ops import explain
    from .prune import magnitude_mask
    from .sparse24 import compress

    check(
        min(out_features, in_features, tokens) > 0,
        "sparsekern.bench",
        "positive sizes",
        f"{out_features}x{in_features}, {tokens} tokens",
    )
    generator = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator, device=device)
    weight = (weight * in_features**-0.5).to(dtype)
    x = torch.randn(tokens, in_features, generator=generator, device=device).to(dtype)
    mask = magnitude_mask(weight)
    dense, sparse = weight * mask, compress(weight, mask)
    copies = max(1, min(MAX_COPIES, -(-CACHE_BYTES // max(1, sparse.nbytes))))
    weights = [dense.clone() for _ in range(copies)]
    layers = [SparseLinear.from_sparse24(sparse.clone()) for _ in range(copies)]
    measure = _graph_us if torch.device(device).type == "cuda" else _cpu_us
    with torch.inference_mode():
        _check_agreement(layers[0](x), x, dense)
        return BenchRow(
            out_features,
            in_features,
            tokens,
            str(dtype).removeprefix("torch."),
            measure([lambda w=w: torch.nn.functional.linear(x, w) for w in weights]),
            measure([lambda layer=layer: layer(x) for layer in layers]),
            explain(x, layers[0].weight).backend,
        )


def _check_agreement(y, x, dense):
    """RuntimeError unless y is x · denseᵀ up to rounding: a wrong kernel must not be timed."""
    expected = x.float() @ dense.float().t()
    error = (y.float() - expected).abs().max().item()
    limit = TOLERANCE[y.dtype] * expected.abs().max().item()
    check(
        error <= limit,
        "sparsekern.bench",
        f"the dense result up to {limit:.3g}",
        f"a difference of {error:.3g}",
        "Run: sparsekern doctor, and report the shape.",
        exc=RuntimeError,
    )


def _cpu_us(calls):
    """Median microseconds of one call; the calls take turns."""
    for call in calls[:2]:
        call()
    times, begin = [], time.perf_counter()
    while len(times) < REPEATS and time.perf_counter() - begin < MAX_SECONDS:
        call = calls[len(times) % len(calls)]
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def _graph_us(calls):
    """Median microseconds of one call inside a replayed CUDA graph of all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def table(rows):
    """The rows as text, with a note on what the columns are."""
    head = ("out x in", "tokens", "dtype", "dense us", "sparse us", "dense/sparse", "backend")
    cells = [head] + [
        (
            f"{row.out_features}x{row.in_features}",
            str(row.tokens),
            row.dtype,
            f"{row.dense_us:.1f}",
            f"{row.sparse_us:.1f}",
            f"{row.speedup:.2f}",
            row.backend,
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells]
    slower = sum(row.speedup < 1 for row in rows)
    lines.append(
        "medians; weights rotated among copies larger than the cache; "
        f"sparse is slower in {slower} of {len(rows)} rows"
    )
    return "\n".join(lines)
