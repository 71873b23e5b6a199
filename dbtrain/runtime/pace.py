"""How fast this process works: the seconds per unit of each kind of work, such as a step or an image."""

from __future__ import annotations

import time

FADE = 0.99  # weight of a measurement relative to the next one: the last hundred count

clock = time.perf_counter  # seconds


class Rate:
    """Seconds per unit. The first of several measurements does not count, as it warms up and compiles."""

    def __init__(self) -> None:
        self.seconds = self.units = 0.0
        self.first: tuple[float, float] | None = None  # seconds, units

    def add(self, seconds: float, units: float) -> None:
        if self.first is None:
            self.first = (seconds, units)
        else:
            self.seconds = FADE * self.seconds + seconds
            self.units = FADE * self.units + units

    @property
    def each(self) -> float:
        """Seconds per unit."""
        assert self.first
        seconds, units = (self.seconds, self.units) if self.units else self.first
        return seconds / units

    @property
    def count(self) -> float:
        """Units that `each` is the mean of."""
        assert self.first
        return self.units or self.first[1]

    @property
    def warm_up(self) -> float:
        """Seconds that the first measurement took longer than later ones."""
        assert self.first
        return max(0.0, self.first[0] - self.first[1] * self.each)


measured: dict[str, Rate] = {}  # by kind of work


def add(kind: str, seconds: float, units: float = 1.0) -> None:
    """Record that `units` of a kind of work took `seconds`."""
    measured.setdefault(kind, Rate()).add(seconds, units)


def forget(*kinds: str) -> None:
    """Forget what was recorded about these kinds of work."""
    for kind in kinds:
        measured.pop(kind, None)


def each(kind: str) -> float | None:
    """Seconds per unit of a kind of work; None if there was none so far."""
    return measured[kind].each if kind in measured else None


def times(every: int, after: int, steps: int) -> int:
    """How often something that is due every `every` steps, and after the last, is due after step `after`."""
    return steps // every - after // every + (steps % every != 0 and after < steps)


def left(seconds: float) -> str:
    """The time that work still takes, as bars and log lines show it."""
    return f"{human(seconds, 0)} left"


def human(seconds: float, decimals: int = 1) -> str:
    """A duration in words; `decimals` are those of seconds alone."""
    if seconds < 100:
        return f"{seconds:.{decimals}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
