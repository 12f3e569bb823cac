"""Time for tests of what seconds end: a clock of their own, or further tries with more time.

A busy machine can be ten times as slow for a minute; neither way depends on that.
"""

import subprocess
import time


class Clock:
    """Stands for the module `time`: every look at it finds `each` seconds gone."""

    def __init__(self, each):
        self.each, self.now = each, 0.0

    def perf_counter(self):
        self.now += self.each
        return self.now

    monotonic = perf_counter

    def __getattr__(self, name):
        return getattr(time, name)


def patiently(attempt, *seconds):
    """What `attempt` gives for the first of `seconds` with which it does not fail; the last one
    may. For real processes, which cannot be given a clock."""
    *first, last = seconds
    for limit in first:
        try:
            return attempt(limit)
        except (AssertionError, subprocess.TimeoutExpired):
            continue
    return attempt(last)
