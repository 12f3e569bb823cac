"""Variants that take as long as they are told, and a clock that only they move."""

import random


class Clock:
    """Seconds that pass only while a fake variant runs."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Fakes:
    """Variants by name: us per call, one after the other; the last one stays. An exception in the
    place of a time is raised. `sampler`, `wrong` and `dense` are as tune_cell.tune_cell wants them.

    wrong: names whose results are.   dense: us of the dense product; None: there is none.
    """

    def __init__(self, clock=None, wrong=(), dense=None, **us):
        self.us, self.clock, self.bad = dict(us), clock, set(wrong)
        self.names, self.samples, self.checked = list(us), dict.fromkeys(us, 0), []
        self.dense = None
        if dense is not None:
            self.us["dense"], self.samples["dense"] = dense, 0
            self.dense = lambda: self.sampler("dense")

    def sampler(self, name):
        def sample():
            times = self.us[name] if isinstance(self.us[name], list) else [self.us[name]]
            value = times[min(self.samples[name], len(times) - 1)]
            self.samples[name] += 1
            if isinstance(value, Exception):
                raise value
            if self.clock:
                self.clock.now += value * 1e-6
            return value

        return sample

    def wrong(self, name):
        self.checked.append(name)
        return "3 of 9 elements are wrong" if name in self.bad else ""


class Throttled:
    """Variants that draw power, on a GPU that has a limit: the clock follows the mean of what was
    drawn in the last `memory` seconds, so a variant gets its own clock only after a while.

    us, draw: {name: us at full clock}, {name: power over the limit}. noise: share of a time by
    which it is off. order: names as tune_cell gets them.
    """

    def __init__(self, us, draw, noise=0.01, memory=0.05, seed=0):
        self.us, self.draw, self.noise, self.memory = us, draw, noise, memory
        self.clock, self.power, self.random = Clock(), 0.5, random.Random(seed)

    def sampler(self, name):
        def sample():
            off = 1 + self.noise * self.random.gauss(0, 1)
            us = self.us[name] * max(1.0, self.power) * off
            self.power += (self.draw[name] - self.power) * min(1.0, us * 1e-6 / self.memory)
            self.clock.now += us * 1e-6
            return us

        return sample

    def sustained(self, name):
        """us of a variant that runs alone for long."""
        return self.us[name] * max(1.0, self.draw[name])
