"""`dbtrain run` or `dbtrain fleet` in one process, and the seconds of its phases.

A process of its own, started by `benchmarks/fleet.py`, so that imports and start-up count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from benchmarks import job
from benchmarks.phases import Clock

FIXED, TRAINING = "fixed", "training"
PHASES = (FIXED, TRAINING, "validation", "export")


class Phases:
    """The phase that a process is in, whose time its clock counts."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.now = clock, FIXED

    def enter(self, phase: str) -> None:
        if phase != self.now:
            self.clock.end(self.now)
            self.now = phase

    @contextmanager
    def around(self, owner: Any, name: str, phase: str) -> Iterator[None]:
        """In the block, calls of a function are of this phase; training goes on until another begins."""
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = self.now
            self.enter(phase)
            try:
                return original(*args, **kwargs)
            finally:
                self.enter(phase if phase == TRAINING else before)

        with mock.patch.object(owner, name, wrapped):
            yield


def run(given: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A command line: seconds of each phase. All that is in none of the others is fixed."""
    phases = Phases(Clock(given["started"]))
    from benchmarks import trainer
    from dbtrain.__main__ import app

    with ExitStack() as watched:
        for phase, calls in trainer.phases().items():
            for owner, name in calls:
                watched.enter_context(phases.around(owner, name, phase))
        app(given["words"], standalone_mode=False)
    phases.clock.end(phases.now)
    return phases.clock.spent


if __name__ == "__main__":
    job.answer(run)
