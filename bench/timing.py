"""The package's timer, under the name that the benchmarks use: sparsekern/profiling/timer.py."""

from sparsekern.profiling.timer import (
    SAMPLERS,
    Call,
    Sampler,
    Samples,
    StopRule,
    Timing,
    compare,
    event_sampler,
    graph_replay,
    graph_sampler,
    quantile,
    rotations,
    sample_rounds,
    wall_sampler,
    warm_up,
)

__all__ = [
    "SAMPLERS",
    "Call",
    "Sampler",
    "Samples",
    "StopRule",
    "Timing",
    "compare",
    "event_sampler",
    "graph_replay",
    "graph_sampler",
    "quantile",
    "rotations",
    "sample_rounds",
    "wall_sampler",
    "warm_up",
]
