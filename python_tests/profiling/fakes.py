"""Variants that take as long as they are told, and a clock that only they move."""


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
