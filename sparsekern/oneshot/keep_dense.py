"""Which layers are worth pruning: `prune_model(keep_dense="if-slower")`.

Every distinct (shape, dtype) among the layers to prune is measured once, dense against 2:4, at the
given numbers of tokens (layer_bench.bench_shape), where a tuned table of this GPU does not have
both times (layer_bench.tuned_times). A layer stays dense where the sum of its sparse
times is the longer one. Times differ from run to run, so a resumed run takes the stored ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from sparsekern.errors import check
from sparsekern.oneshot.discovery import Layer

OP = "sparsekern.oneshot.keep_dense"
IF_SLOWER = "if-slower"
TOKENS = (1, 16, 256)


def check_arguments(keep_dense: Any, tokens: Any, compress: bool, op: str = OP) -> tuple[int, ...]:
    """The numbers of tokens as a tuple. Raises ValueError."""
    expected = f'keep_dense None or "{IF_SLOWER}"'
    check(keep_dense in (None, IF_SLOWER), op, expected, repr(keep_dense))
    remedy = "Zeros in a dense weight change no time: leave keep_dense out."
    check(not keep_dense or compress, op, "compress=True with keep_dense", compress, remedy)
    good = isinstance(tokens, Sequence) and len(tokens) > 0
    good = good and all(type(count) is int and count > 0 for count in tokens)
    check(good, op, "keep_dense_tokens, positive ints", repr(tokens), "Pass such as (1, 16, 256).")
    return tuple(tokens)


def key(layer: Layer) -> str:
    """What is measured once for all layers that share it: "4096x14336 bfloat16"."""
    return f"{layer.shape[0]}x{layer.shape[1]} {layer.dtype}"


def measure(
    layers: Sequence[Layer],
    tokens: Sequence[int],
    device: torch.device | str,
    bench: Callable[..., Any] | None = None,
) -> dict[str, list[float]]:
    """{key: [dense us, sparse us]}, both summed over the numbers of tokens, JSON-able.

    Args:
        device: where the layers are to run.
        bench: stands in for layer_bench.bench_shape.
    """
    from sparsekern.profiling import layer_bench

    run = cast(Callable[..., Any], bench or layer_bench.bench_shape)

    def pair(out_features: int, in_features: int, count: int, **where: Any) -> tuple[float, float]:
        known = layer_bench.tuned_times(out_features, in_features, count, **where)
        if known is not None:
            return known
        row = run(out_features, in_features, count, **where)
        return row.dense_us, row.sparse_us

    times: dict[str, list[float]] = {}
    for layer in layers:
        if key(layer) not in times:
            where: dict[str, Any] = dict(dtype=layer.weight.dtype, device=str(device))
            out_features, in_features = layer.shape
            pairs = [pair(out_features, in_features, count, **where) for count in tokens]
            times[key(layer)] = [sum(us) for us in zip(*pairs)]
    return times


def decide(
    layers: Sequence[Layer],
    times: dict[str, list[float]],
    tokens: Sequence[int],
    device: torch.device | str,
    op: str = OP,
) -> None:
    """Gives the layers that 2:4 makes slower the reason to stay dense. Warns when none is left."""
    slow = []
    for layer in layers:
        dense, sparse = times[key(layer)]
        if sparse > dense:
            layer.reason = (
                f"kept dense: 2:4 is {sparse / dense:.2f}x slower at tokens "
                f"{', '.join(map(str, tokens))} ({sparse:.1f} us, dense {dense:.1f} us)"
            )
            slow.append(layer)
    if slow and len(slow) == len(layers):
        why = (
            ""
            if torch.device(device).type != "cpu"
            else (" (on a CPU every call of a sparse layer decompresses its weight)")
        )
        text = f"nothing is pruned: on {device} 2:4 is slower for every layer{why}"
        warnings.warn(f'{op}(keep_dense="{IF_SLOWER}"): {text}.', stacklevel=4)
