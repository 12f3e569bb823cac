"""Time SparseLinear against dense torch on layer shapes: what `sparsekern bench` prints, and what
`prune_model(keep_dense="if-slower")` decides by.

Both sides compute the same product (the dense weight holds the zeros), the sparse result is checked
against the dense one before anything is timed, and a shape where sparse loses is a row like any
other. Weights rotate among copies that together exceed the last-level cache, because a layer inside
a model never finds its weight there.

On a GPU a CUDA graph of several calls is replayed and timed with events, so that launch overhead
hides no kernel time; on the CPU calls are timed one by one. Both sides take turns (rounds.contest):
the speed-up is the median of their ratios, and the sparse time is the dense one over it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.errors import check
from sparsekern.formats import dtypes
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.ops.compress import compress
from sparsekern.ops.linear_op import explain
from sparsekern.profiling import rounds, timer
from sparsekern.prune import magnitude_mask

CACHE_BYTES = 128 * 2**20  # more than the L2 of an H100 (50 MiB) or the L3 of a desktop CPU
MAX_COPIES = 256
CPU_RULE = timer.StopRule(0.01, min_rounds=6, max_rounds=15, budget_s=5.0)
EVEN = 0.02  # times that differ by less are called even
# Of the largest |y|: so many roundings of y; in float32 the order of the sums counts for more.
_ROUNDINGS, _SUMS = 5.12, 1e-5


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
    dense_bytes: int
    sparse_bytes: int

    @property
    def speedup(self) -> float:
        """dense time / sparse time: below 1 the sparse layer is slower."""
        return self.dense_us / self.sparse_us

    @property
    def verdict(self) -> str:
        """ "faster", "slower" or "even": what 2:4 makes of the layer's time."""
        return _verdict(self.dense_us, self.sparse_us)


def copies_beyond_cache(weight_bytes: int, other_bytes: int = 0) -> int:
    """How many copies of a weight to rotate among, so that each is gone from the cache when its
    turn comes.

    other_bytes: what every call touches beside its weight.
    """
    wanted = -(-(CACHE_BYTES - other_bytes) // max(1, weight_bytes))
    return max(1, min(MAX_COPIES, wanted))


def bench_shape(
    out_features: int,
    in_features: int,
    tokens: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> BenchRow:
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
    sizes = (out_features, in_features, tokens)
    check(
        0 < min(sizes) and max(sizes) < 2**31 and in_features % 4 == 0,
        "sparsekern.bench",
        "sizes of 1 up to 2147483647, in_features a multiple of 4",
        f"{out_features}x{in_features}, {tokens} tokens",
    )
    generator = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(
        out_features, in_features, generator=generator, device=device, dtype=torch.float32
    )
    weight = (weight * in_features**-0.5).to(dtype)
    x = torch.randn(
        tokens, in_features, generator=generator, device=device, dtype=torch.float32
    ).to(dtype)
    mask = magnitude_mask(weight)
    dense, sparse = weight * mask, compress(weight, mask)
    copies = copies_beyond_cache(sparse.nbytes)
    weights = [dense.clone() for _ in range(copies)]
    layers = [SparseLinear.from_sparse24(sparse.clone()) for _ in range(copies)]
    on_gpu = torch.device(device).type == "cuda"
    make = timer.SAMPLERS["graph" if on_gpu else "wall"]
    rule = rounds.rule(tokens, out_features, in_features) if on_gpu else CPU_RULE
    with torch.inference_mode():
        _check_agreement(layers[0](x), x, dense)
        samplers = {
            "dense": make([lambda w=w: torch.nn.functional.linear(x, w) for w in weights], 0.0),
            "sparse": make([lambda layer=layer: layer(x) for layer in layers], 0.0),
        }
        standing = rounds.contest(samplers, rule, peers=("sparse",))
    failed = {"dense": "no result"} if standing is None else standing.failed
    check(
        not failed,
        "sparsekern.bench",
        "both sides to run",
        "; ".join(f"{name}: {why}" for name, why in failed.items()),
        exc=RuntimeError,
    )
    assert standing is not None
    return BenchRow(
        out_features,
        in_features,
        tokens,
        str(dtype).removeprefix("torch."),
        standing.us["dense"],
        standing.us["sparse"],
        explain(x, layers[0].weight).backend,
        dense.nbytes,
        layers[0].weight.nbytes,
    )


def tuned_times(
    out_features: int, in_features: int, tokens: int, *, dtype: torch.dtype, device: str
) -> tuple[float, float] | None:
    """(dense us, sparse us) of just this layer and number of tokens, as `sparsekern tune` has
    measured them on this GPU, in turns; None where no tuned table has both."""
    where = torch.device(device)
    if not cuda_backend.packs(where, dtype):
        return None
    index = torch.cuda.current_device() if where.index is None else where.index
    name = dtypes.PLAIN[dtype].name
    chosen = cuda_backend.choose(tokens, out_features, in_features, name, index)
    if chosen.us is None or chosen.dense_us is None:
        return None
    return chosen.dense_us, chosen.us


def tolerance(dtype: torch.dtype) -> float:
    """How much of the largest |y| a right result may differ by: 4e-2 for bfloat16, 5e-3 for
    float16, 1e-5 for float32."""
    return max(_SUMS, _ROUNDINGS * torch.finfo(dtype).eps)


def _check_agreement(y: Tensor, x: Tensor, dense: Tensor) -> None:
    """RuntimeError unless y is x · denseᵀ up to rounding: a wrong kernel must not be timed."""
    expected = x.float() @ dense.float().t()
    error = (y.float() - expected).abs().max().item()
    limit = tolerance(y.dtype) * expected.abs().max().item()
    check(
        error <= limit,
        "sparsekern.bench",
        f"the dense result up to {limit:.3g}",
        f"a difference of {error:.3g}",
        "Run: sparsekern doctor, and report the shape.",
        exc=RuntimeError,
    )


def table(rows: Sequence[BenchRow], counts: Mapping[tuple[int, int], int] | None = None) -> str:
    """The rows as text, with notes on what the columns are and where 2:4 loses.

    Args:
        counts: (out_features, in_features) -> how many layers of a model have it; adds the column
            and, for each number of tokens, the sum over all layers.
    """
    head = (
        *("out x in", "tokens", "dtype", "dense us", "sparse us", "dense/sparse", "backend"),
        *("dense bytes", "sparse bytes", "2:4 is", "layers"),
    )
    cells = [head] + [
        (
            f"{row.out_features}x{row.in_features}",
            str(row.tokens),
            row.dtype,
            f"{row.dense_us:.1f}",
            f"{row.sparse_us:.1f}",
            f"{row.speedup:.2f}",
            row.backend,
            str(row.dense_bytes),
            str(row.sparse_bytes),
            row.verdict,
            str((counts or {}).get((row.out_features, row.in_features), "")),
        )
        for row in rows
    ]
    if counts is None:
        cells = [line[:-1] for line in cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells]
    if counts is not None:
        lines += totals(rows, counts)
    slower = sum(row.speedup < 1 for row in rows)
    lines.append(
        "medians; weights rotated among copies larger than the cache; "
        f"sparse is slower in {slower} of {len(rows)} rows"
    )
    return "\n".join(lines)


def totals(rows: Sequence[BenchRow], counts: Mapping[tuple[int, int], int]) -> list[str]:
    """One line per number of tokens: time and bytes of all layers, dense and sparse."""
    lines = []
    for tokens in dict.fromkeys(row.tokens for row in rows):
        own = [
            (row, counts[row.out_features, row.in_features]) for row in rows if row.tokens == tokens
        ]
        dense, sparse, dense_bytes, sparse_bytes = (
            sum(getattr(row, key) * count for row, count in own)
            for key in ("dense_us", "sparse_us", "dense_bytes", "sparse_bytes")
        )
        losing = [f"{row.out_features}x{row.in_features}" for row, _ in own if row.speedup < 1]
        lines.append(
            f"all {sum(count for _, count in own)} layers, {tokens} tokens: dense {dense:.1f} us, "
            f"2:4 {sparse:.1f} us ({dense / sparse:.2f}, {_verdict(dense, sparse)}); "
            f"weights {dense_bytes} -> {sparse_bytes} bytes ({sparse_bytes / dense_bytes:.4f}); "
            f"2:4 loses at {', '.join(losing) or 'no shape'}"
        )
    return lines


def _verdict(dense_us: float, sparse_us: float) -> str:
    if abs(dense_us / sparse_us - 1) < EVEN:
        return "even"
    return "faster" if sparse_us < dense_us else "slower"
