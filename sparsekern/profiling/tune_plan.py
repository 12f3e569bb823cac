"""In which order `sparsekern tune` measures its cells, and which of several processes measures
which.

Cells go in passes, those with most tokens first (PASSES): a budget that is too short is spent
where most time is lost. Within a pass a job is one dtype and shape with its numbers of tokens, and
goes as a whole to the process that has least to do so far, by the estimate of `seconds`. So n
processes on n GPUs of one kind, `--shard 1/n` to `--shard n/n`, measure every cell once, and may
write to one file at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sparsekern.backends.cuda.cost_model import DECODE_TOKENS
from sparsekern.profiling import rounds, timer

PASSES = (1024, DECODE_TOKENS + 1, 1)  # the fewest tokens of each
# Of an estimate: to prepare and check a cell, and the providers of its rounds under load.
PREPARE_S, RUNNING = 0.4, 6


class Job(NamedTuple):
    """One layer, which is made once, and the numbers of tokens to measure, in order."""

    dtype: str
    shape: tuple[int, int]
    tokens: tuple[int, ...]

    def seconds(self, most_s: float | None = None) -> float:
        """About how long it takes; most_s as in `rule`."""
        return sum(seconds(rule(number, *self.shape, most_s)) for number in self.tokens)


def rule(
    tokens: int, out_features: int, in_features: int, most_s: float | None = None
) -> timer.StopRule:
    """That of rounds.rule, with rounds for at most `most_s` seconds."""
    return rounds.rule(tokens, out_features, in_features).at_most(most_s)


def seconds(of: timer.StopRule) -> float:
    """About how long a cell with this rule takes."""
    least = RUNNING * of.turn_s * of.min_rounds
    return PREPARE_S + 2 * of.settle_s + min(of.budget_s, max(least, 0.1))


def jobs(
    dtypes: Iterable[str],
    shapes: Sequence[tuple[int, int]],
    tokens: Iterable[int],
    shard: tuple[int, int] = (1, 1),
) -> list[Job]:
    """The jobs of process shard[0] of shard[1], in order.

    Raises:
        ValueError: the shard is not one of 1/n to n/n.
    """
    number, of = shard
    if not 1 <= number <= of:
        raise ValueError(f"sparsekern tune: expected a shard from 1/{of} to {of}/{of}, got {shard}")
    dtypes, counts, mine = list(dtypes), sorted(set(tokens)), []
    highest = float("inf")
    load = [0.0] * of
    for fewest in PASSES:
        members = tuple(count for count in counts if fewest <= count < highest)
        highest = fewest
        if not members:
            continue
        every = [Job(dtype, shape, members) for dtype in dtypes for shape in shapes]
        owner = {}
        for place in sorted(range(len(every)), key=lambda i: -every[i].seconds()):
            owner[place] = least = min(range(of), key=load.__getitem__)
            load[least] += every[place].seconds()
        mine += [job for place, job in enumerate(every) if owner[place] == number - 1]
    return mine
