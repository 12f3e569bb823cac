"""One cell of `sparsekern tune`: which variant computes a layer the fastest.

1. every variant gets two short samples, of which the shorter counts, until the screening time is
   used up: the one that heuristics choose first, then in order of their predictions. One sample
   alone was longer by half now and then: its clock runs while the CPU gets to the launch;
2. of the fastest those whose result on small whole numbers equals the dense product, bit for
   bit, go on. A wrong one is refused and reported;
3. they are measured in turns (rounds.contest), and dense with them. The choice of the
   heuristics stays unless another is faster beyond the noise. From
   cost_model.SUSTAINED_PRODUCTS on that is done under load, long enough for the power limit to
   show (rounds.SUSTAINED).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sparsekern.backends.cuda.tuned_tables import DENSE
from sparsekern.profiling import rounds, timer

KEEP = 1.3  # a variant slower than this times the best is not sampled again
FINALISTS = 6
SCREEN_S = 0.4  # per cell, to prepare the samplers
SCREENING = timer.StopRule(max_rounds=2)


@dataclass
class Cell:
    """The outcome of one cell; us are medians per call, those of the last rounds comparable.

    refused: {name: why}, those that were fast and wrong, or failed.
    times: {variant: us} of all that were sampled; of those that left early the shorter of two.
    dense_us: of the dense product; None when it was not measured.
    """

    tokens: int
    best: str
    us: float
    heuristic: str
    heuristic_us: float
    refused: dict[str, str] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    dense_us: float | None = None

    @property
    def gap(self) -> float:
        """How much slower the heuristic's variant is: 0.05 for 5 %."""
        return self.heuristic_us / self.us - 1

    def __str__(self) -> str:
        text = f"{self.tokens} tokens: {self.best} {self.us:.2f} us; heuristics: "
        same = self.best == self.heuristic
        text += "the same" if same else f"{self.heuristic}, {self.gap:.1%} slower"
        if self.dense_us is not None:
            text += f"; {self.dense_us / self.us:.2f} x dense"
        return text + "".join(f"; REFUSED {name}: {why}" for name, why in self.refused.items())


def tune_cell(
    tokens: int,
    candidates: Sequence[str],
    sampler: Callable[[str], timer.Sampler],
    wrong: Callable[[str], str],
    clock: Callable[[], float] = time.perf_counter,
    rule: timer.StopRule = rounds.SHORT,
    dense: Callable[[], timer.Sampler] | None = None,
) -> Cell | None:
    """Find the fastest correct variant of one cell.

    Args:
        candidates: names, that of the heuristics first, then the most promising ones.
        sampler: name -> function that takes one sample, in us per call.
        wrong: name -> why its result is wrong, or "".
        clock: seconds.
        rule: of the rounds.
        dense: makes the sampler of the dense product.
    Returns:
        Cell; None when no variant is right and runs to the end.
    """
    begin = clock()
    samplers: dict[str, timer.Sampler] = {}
    refused: dict[str, str] = {}

    def prepare(name: str, make: Callable[[], timer.Sampler]) -> None:
        try:
            samplers[name] = make()
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"[:300]

    for name in candidates:
        if samplers and clock() - begin > SCREEN_S:
            break
        prepare(name, functools.partial(sampler, name))
    if not samplers:
        return None
    screened = replace(SCREENING, settle_s=rule.settle_s)
    standing = rounds.contest(samplers, screened, peers=samplers, clock=clock)
    if standing is None:
        return None
    refused |= standing.failed
    first = {name: min(us) for name, us in standing.values.items()}
    finalists = _finalists(first, candidates[0], wrong, refused)
    if not finalists:
        return None
    running = {name: samplers[name] for name in finalists}
    if dense is not None:
        samplers.clear()
        prepare(DENSE, dense)
        running |= samplers
    standing = rounds.contest(running, rule, peers=(DENSE,), clock=clock)
    if standing is None or standing.best == DENSE:
        return None
    refused |= standing.failed
    us = standing.us
    dense_us, times = us.pop(DENSE, None), first | us
    chosen, now = candidates[0], us[standing.best]
    known = times.get(chosen, now)
    return Cell(tokens, standing.best, now, chosen, known, refused, times, dense_us)


def _finalists(
    first: dict[str, float], chosen: str, wrong: Callable[[str], str], refused: dict[str, str]
) -> list[str]:
    """The fastest right ones, and the chosen one, which comes first; the wrong ones are refused.

    Those beyond KEEP times the fastest right one are not asked.
    """
    found: list[str] = []
    for name in sorted(first, key=first.__getitem__):
        if found and (len(found) == FINALISTS or first[name] > KEEP * first[found[0]]):
            break
        if why := wrong(name):
            refused[name] = why
        else:
            found.append(name)
    if chosen in first and chosen not in found and chosen not in refused:
        if why := wrong(chosen):
            refused[chosen] = why
        else:
            found.append(chosen)
    return sorted(found, key=lambda name: name != chosen)
