"""How long a GPU call takes: graph replay over rotated inputs, or events with the L2 flushed.

    graph    `graph_sampler`: one CUDA graph with all of `calls`, in turn; a sample is one replay
             divided by their number. For kernels under about 100 us: no launch overhead is in it.
             The calls use different inputs of together at least 3 times the L2 cache (`rotations`
             says how many), so that no call finds its operands there.
    events   `event_sampler`: a sample is one call between two events, after the L2 was overwritten.
             Includes the host's launch overhead when the kernel is shorter than that.
    wall     `wall_sampler`: a sample is one call on the host's clock. For dry runs on the CPU.

`turns` takes samples of several providers round by round, in an order that rotates, so that clocks
and temperature drift over all of them alike. `compare` describes each: it stops when the standard
error of every mean is below a bound, or when the time is up. Which of them is the fastest is for
profiling/rounds.py. Protocol and reasons: bench/README.md.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
Sampler = Callable[[], float]  # takes one sample, returns microseconds


@dataclass(frozen=True)
class Timing:
    """Samples of one provider, in microseconds per call."""

    timer: str  # "graph", "events" or "wall"
    samples: tuple[float, ...]
    converged: bool  # False: the time was up before the standard error was small enough

    @property
    def us(self) -> dict[str, float]:
        """{"p20", "p50", "p80"}: quantiles, linearly interpolated."""
        return {f"p{percent}": quantile(self.samples, percent / 100) for percent in (20, 50, 80)}

    @property
    def median(self) -> float:
        return quantile(self.samples, 0.5)

    def row(self) -> dict[str, Any]:
        """The fields of a record (bench/record.py) that a timing fills."""
        return {
            "timer": self.timer,
            "iters": len(self.samples),
            "us": {name: round(value, 4) for name, value in self.us.items()},
            "converged": self.converged,
        }


@dataclass(frozen=True)
class StopRule:
    """When to stop sampling: enough rounds and a small standard error, or no time left."""

    standard_error: float = 0.01  # of the mean, relative to it
    min_rounds: int = 20
    max_rounds: int = 2000
    min_s: float = 0.0  # sample at least so long: power limits act only after a while
    budget_s: float = 5.0  # for all providers of a comparison together
    settle_s: float = 0.0  # under load, before the first round
    turn_s: float = 0.0  # of a provider in a round, at least one sample; the later half counts

    def at_most(self, seconds: float | None) -> StopRule:
        """The same with rounds for no longer than this; None: as it is."""
        if seconds is None or seconds >= self.budget_s:
            return self
        return replace(self, budget_s=seconds)

    def precise(self, samples: Samples) -> bool:
        """True when these samples are enough."""
        count = len(samples.values)
        if count < max(2, self.min_rounds):
            return False
        variance = samples.squares / (count - 1)
        return math.sqrt(variance / count) <= self.standard_error * samples.mean


@dataclass
class Samples:
    """Samples with their running mean and sum of squared deviations (Welford), so that the stop
    rule costs nothing between two samples."""

    values: list[float] = field(default_factory=list)
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.values.append(value)
        deviation = value - self.mean
        self.mean += deviation / len(self.values)
        self.squares += deviation * (value - self.mean)


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile (0 <= q <= 1), linearly interpolated between order statistics."""
    if not samples:
        raise ValueError("bench.quantile: expected at least one sample, got none.")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def rotations(bytes_per_set: int, l2_bytes: int | None = None, factor: float = 3.0) -> int:
    """How many input sets of this size exceed `factor` times the L2 cache; at least 2.

    Args:
        bytes_per_set: bytes that one call reads and writes.
        l2_bytes: size of the L2 cache; that of the current GPU when None.
    """
    if bytes_per_set <= 0:
        raise ValueError(f"bench.rotations: expected bytes_per_set > 0, got {bytes_per_set}.")
    if l2_bytes is None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, math.ceil(factor * l2_bytes / bytes_per_set))


class Round(NamedTuple):
    """One round of `turns`: us by name, and seconds since the first round began."""

    us: dict[str, float]
    elapsed: float


def turns(
    samplers: Mapping[str, Sampler],
    alive: Collection[str],
    failed: dict[str, str] | None,
    stop: StopRule,
    clock: Callable[[], float] = time.monotonic,
    offset: int = 0,
) -> Iterator[Round]:
    """Rounds in which each sampler has a turn, at most stop.max_rounds.

    Args:
        alive: names that take part; looked at anew before each round.
        failed: gets {name: why} of a sampler that raises, or whose time is not positive, and which
            then takes part no more; None: the exception goes on.
        offset: of the order. It rotates by one in every second round, and the rounds between run
            backwards: nobody always follows the same neighbour, and of two each is first as often.
    """

    def turn(name: str, seconds: float) -> float | None:
        try:
            deadline = clock() + seconds if seconds else 0.0
            taken = [samplers[name]()]
            while seconds and clock() < deadline:
                taken.append(samplers[name]())
            us = quantile(taken[len(taken) // 2 :], 0.5)
            if not 0 < us < math.inf:
                raise ValueError(f"expected a time, got {us} us")
            return us
        except Exception as error:
            if failed is None:
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            return None

    def left() -> list[str]:
        return [name for name in alive if not failed or name not in failed]

    if stop.settle_s:
        deadline = clock() + stop.settle_s
        while left() and clock() < deadline:
            for name in left():
                turn(name, 0.0)
    begin = clock()
    for number in range(stop.max_rounds):
        order = left()
        place = (number // 2 + offset) % max(1, len(order))
        order = order[place:] + order[:place]
        if number % 2:
            order.reverse()
        us = {name: taken for name in order if (taken := turn(name, stop.turn_s)) is not None}
        yield Round(us, clock() - begin)


def sample_rounds(
    samplers: Mapping[str, Sampler],
    stop: StopRule = StopRule(),
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """`turns` of every sampler until `stop`; seed: of the order.

    Returns:
        (samples by name, converged by name). Every name has the same number of samples.
    """
    if not samplers:
        raise ValueError("bench.sample_rounds: expected at least one sampler, got none.")
    samples = {name: Samples() for name in samplers}
    for taken in turns(samplers, list(samplers), None, stop, clock, seed):
        for name, us in taken.us.items():
            samples[name].add(us)
        if taken.elapsed >= stop.budget_s:
            break
        if taken.elapsed >= stop.min_s and all(stop.precise(one) for one in samples.values()):
            break
    converged = {name: stop.precise(one) for name, one in samples.items()}
    return {name: one.values for name, one in samples.items()}, converged


def warm_up(call: Call, seconds: float = 0.2) -> None:
    """Calls until so much time has passed: clocks rise by time, not by number of calls."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        call()
        torch.cuda.synchronize()


def graph_replay(calls: Sequence[Call], passes: int = 1) -> Sampler:
    """Captures `passes` times all calls in one CUDA graph; a sample is microseconds per call of one
    replay.

    Args:
        calls: work for the current stream that does not wait for the GPU; its kernels must have
            been launched before, because loading one cannot be captured. What the calls allocate
            stays alive with the graph.
    """
    # Not torch.cuda.graph: that collects garbage first, which takes longer than a measurement.
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for _ in range(passes):
                for call in calls:
                    call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    start, end = (_event() for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    first = replay()  # uploads the graph, which a millisecond of work does not notice
    kept = [first] if first > 1000 else []
    return lambda: (kept.pop() if kept else replay()) / (passes * len(calls))


def graph_sampler(calls: Sequence[Call], warm_s: float = 0.2, min_us: float = 200.0) -> Sampler:
    """`graph_replay` after each call was made once and the GPU was kept busy for warm_s.

    The sequence is repeated inside the graph until a replay takes about `min_us`, so that the
    resolution of the events (about 0.5 us) does not matter.
    """
    if not calls:
        raise ValueError("bench.graph_sampler: expected at least one call, got none.")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # lazy initialisation and autotuning cannot be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    sample = graph_replay(calls)
    warm_up(sample, warm_s)
    once = sample() * len(calls)
    if once < min_us:
        sample = graph_replay(calls, math.ceil(min_us / max(once, 1.0)))
        sample()
    return sample


def event_sampler(calls: Sequence[Call], warm_s: float = 0.2) -> Sampler:
    """A sample is one of `calls`, in turn, between two events, after the L2 was overwritten."""
    if not calls:
        raise ValueError("bench.event_sampler: expected at least one call, got none.")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device="cuda")
    for call in calls:
        warm_up(call, warm_s / len(calls))
    turns = itertools.cycle(calls)

    def sample() -> float:
        flush.zero_()
        return _elapsed_us(next(turns))

    return sample


def wall_sampler(calls: Sequence[Call], warm_s: float = 0.0) -> Sampler:
    """A sample is one of `calls`, in turn, on the host's clock, after each was called once."""
    if not calls:
        raise ValueError("bench.wall_sampler: expected at least one call, got none.")
    for call in calls:
        call()
    turns = itertools.cycle(calls)

    def sample() -> float:
        call = next(turns)
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    return sample


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _elapsed_us(call: Call) -> float:
    """Microseconds of GPU time between events around the call; waits for it."""
    start, end = (_event() for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000.0


SAMPLERS = {"graph": graph_sampler, "events": event_sampler, "wall": wall_sampler}


def compare(
    providers: Mapping[str, Sequence[Call]],
    timer: str = "graph",
    stop: StopRule = StopRule(),
    seed: int = 0,
    warm_s: float = 0.2,
) -> dict[str, Timing]:
    """Times several providers of the same result against each other.

    Args:
        providers: name -> calls, one per rotated input set. All should use the same inputs.
        timer: "graph", "events" or "wall".
        stop: precision and time; the time is that of the whole comparison.
        seed: of the order within the rounds.
        warm_s: seconds of warm-up for each provider.
    Raises:
        ValueError: unknown timer, no provider or no call.   RuntimeError: no GPU, and the timer is
            not "wall".
    """
    if timer not in SAMPLERS:
        raise ValueError(f"bench.compare: expected timer in {sorted(SAMPLERS)}, got {timer!r}.")
    if timer != "wall" and not torch.cuda.is_available():
        raise RuntimeError("bench.compare: expected a CUDA GPU, got none that torch can use.")
    samplers = {name: SAMPLERS[timer](calls, warm_s) for name, calls in providers.items()}
    samples, converged = sample_rounds(samplers, stop, seed)
    return {name: Timing(timer, tuple(samples[name]), converged[name]) for name in providers}
