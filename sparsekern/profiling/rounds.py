"""Which of several candidates is the fastest, measured in turns: what `sparsekern tune`, `bench`
and `prune_model(keep_dense="if-slower")` compare by.

In a round every candidate has one turn, in an order that rotates (timer.turns), and its time is
compared with that of the best candidate in the same round, so that what drifts over all of them
(clock, temperature, a neighbour on the machine) is in both. What counts is the median of these
ratios, and how well it is known: an interval from order statistics, which assumes nothing about how
the times are spread:

    n ratios, sorted: the median lies between the k-th from below and the k-th from above, but for a
    risk of sum_{i<k} C(n, i) / 2^n on each side; k is the largest for which that is at most
    RISK * (FIRST / n)^2: less and less, because each of many looks is a chance to err

The first candidate is the best one until another is faster beyond its interval. One that is slower
beyond it, or cannot be faster by more than the rule's `standard_error`, leaves. So a choice does
not change from run to run by noise alone: among equals the first one stays.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sparsekern.backends.cuda.cost_model import SUSTAINED_PRODUCTS
from sparsekern.profiling import timer

RISK, FIRST = 1 / 64, 6  # of each side of an interval: the extremes of six ratios
# After so many rounds those leave that were always slower than the fastest by more than this.
EARLY_ROUNDS, FAR = 3, 0.02
LOOKS = 32  # rounds after each of which the intervals are looked at; then once in so many

# A launch at the power limit is measured for long: its clock falls only after a while under load,
# and a variant that draws less gets a higher one. Before the first round the candidates run for
# settle_s, and of a turn the later half counts.
SHORT = timer.StopRule(0.002, min_rounds=6, max_rounds=60, budget_s=0.1)
SUSTAINED = timer.StopRule(
    0.002, min_rounds=6, max_rounds=24, budget_s=5.0, settle_s=0.3, turn_s=0.08
)


def rule(tokens: int, out_features: int, in_features: int) -> timer.StopRule:
    """How a layer's kernels are compared: SUSTAINED where launches one after the other reach the
    power limit (cost_model.SUSTAINED_PRODUCTS), else SHORT."""
    return SUSTAINED if tokens * out_features * in_features >= SUSTAINED_PRODUCTS else SHORT


class Interval(NamedTuple):
    """A ratio: its median, and between what it is known to lie."""

    low: float
    middle: float
    high: float


@functools.cache
def _outer(count: int) -> int:
    """The k of the text at the top of the file, 0 where there is none; of many by the normal
    distribution, whose error is below a rank there."""
    risk = RISK * (FIRST / max(count, 1)) ** 2
    if count > 200:
        deviations = -statistics.NormalDist().inv_cdf(risk)
        return int((count - deviations * math.sqrt(count)) / 2)
    below, outer = 0.0, 0
    while outer < count // 2:
        below += math.comb(count, outer) / 2**count
        if below > risk:
            break
        outer += 1
    return outer


def interval(ratios: Sequence[float]) -> Interval:
    """The median of the ratios and its interval; of fewer than FIRST (0, median, inf)."""
    ordered, outer = sorted(ratios), _outer(len(ratios))
    middle = statistics.median(ordered)
    if outer == 0:
        return Interval(0.0, middle, math.inf)
    return Interval(ordered[outer - 1], middle, ordered[-outer])


@dataclass
class Standing:
    """The outcome of `contest`.

    best: the fastest, or the first one where none is faster beyond the noise.
    values: {name: us of its turns}, a value per round, of all that ran; who left early has fewer.
    failed: {name: why} of those whose sampler raised, or gave no time.
    decided: False when rounds or time were up before all that were left were told apart.
    """

    best: str
    values: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    decided: bool = False

    def ratio(self, name: str, over: str) -> Interval:
        """The time of one over that of another, in the rounds in which both ran."""
        return interval([a / b for a, b in zip(self.values[name], self.values[over])])

    @property
    def us(self) -> dict[str, float]:
        """{name: us}: the median of the best one, and that times the others' ratios to it."""
        best = statistics.median(self.values[self.best])
        return {name: best * self.ratio(name, self.best).middle for name in self.values}


def contest(
    samplers: Mapping[str, timer.Sampler],
    rule: timer.StopRule = SHORT,
    peers: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Standing | None:
    """Measure candidates in turns until it is known which is the fastest.

    Args:
        samplers: {name: function that takes one sample, in us}. The first one is the best until
            another is faster beyond the noise. One that raises is out.
        rule: when to stop, and how long a turn lasts; its standard_error is the gain below which a
            challenger is not worth a change.
        peers: of these names only the ratio to the best is wanted: they run in every round, however
            slow, and become the best only when there is nothing else.
        clock: seconds.
    Returns:
        Standing; None when every candidate failed.
    """
    if not samplers:
        raise ValueError("sparsekern.contest: expected at least one sampler, got none.")
    alive, failed = list(samplers), dict[str, str]()
    standing = Standing(alive[0], {name: [] for name in samplers}, failed)
    values = standing.values
    for count, taken in enumerate(timer.turns(samplers, alive, failed, rule, clock), 1):
        for name, us in taken.us.items():
            values[name].append(us)
        alive[:] = [name for name in alive if name not in failed]
        if standing.best in failed:
            left = alive or [name for name, us in values.items() if us and name not in failed]
            if not left:
                return None
            standing.best = min(left, key=lambda n: (n in peers, statistics.median(values[n])))
        if not alive:
            break
        if count < rule.min_rounds:
            if count >= EARLY_ROUNDS:
                _drop_far(standing, alive, peers)
        elif count <= LOOKS or count % LOOKS == 0:  # looking takes time, too
            _replace(standing, alive, peers)
            stay = {standing.best, *peers}
            alive[:] = [n for n in alive if n in stay or not _known(standing, n, rule)]
            standing.decided = all(_known(standing, n, rule, n in peers) for n in alive)
        if taken.elapsed >= rule.min_s and (standing.decided or taken.elapsed >= rule.budget_s):
            break
    for name in failed:
        del values[name]
    return standing


def _drop_far(standing: Standing, alive: list[str], peers: Collection[str]) -> None:
    """Takes out, without waiting for an interval, who was never nearer than FAR to the fastest."""
    values = standing.values
    able = [name for name in alive if name not in peers]
    if able:
        lead = min(able, key=lambda name: standing.ratio(name, standing.best).middle)
        far = {n for n in able if all(u > (1 + FAR) * v for u, v in zip(values[n], values[lead]))}
        standing.best = lead if standing.best in far else standing.best
        alive[:] = [name for name in alive if name not in far]


def _replace(standing: Standing, alive: Collection[str], peers: Collection[str]) -> None:
    faster = {n: standing.ratio(n, standing.best) for n in alive if n not in peers}
    faster = {name: ratio for name, ratio in faster.items() if ratio.high < 1}
    if faster:
        standing.best = min(faster, key=lambda name: faster[name].middle)


def _known(standing: Standing, name: str, rule: timer.StopRule, peer: bool = False) -> bool:
    """True for one that is slower than the best one, or not faster by what is worth a change; of a
    peer also when it is faster."""
    low, _, high = standing.ratio(name, standing.best)
    return low >= 1 - rule.standard_error or (peer and high < 1)
