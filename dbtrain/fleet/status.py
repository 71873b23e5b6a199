"""A fleet's status on the terminal. `runtime/fleet_status.py` has the status itself."""

from __future__ import annotations

import re
from os import SEEK_END
from pathlib import Path
from typing import Any

from dbtrain.runtime import console, lock, pace
from dbtrain.runtime.errors import ConfigError, os_problem, printable
from dbtrain.runtime.fleet_status import NAME, Status
from dbtrain.runtime.run_folder import RunFolder, step_of

TAIL = 4096  # bytes, more than a line of the metrics
STEP = re.compile(rb'^\{"step": (\d+),.*\}$', re.MULTILINE)


def read(fleet: Path) -> Status:
    """The status of a fleet so far; an empty one of a new fleet, or if it cannot be read."""
    try:
        return Status.read(fleet)
    except ConfigError as problem:
        if (fleet / NAME).exists():
            console.warn(f"{problem}; beginning with a new one")
        return Status(0, ())


def found(path: Path) -> dict[str, Any]:
    """State, step and problem of the subject with this run folder."""
    try:
        return _found(path)
    except OSError as error:
        return {"state": "failed", "step": 0, "problem": os_problem(error)}


def _found(path: Path) -> dict[str, Any]:
    run = RunFolder(path)
    checkpoints = run.checkpoints()
    step = max(_logged(run), step_of(checkpoints[-1]) if checkpoints else 0)
    if run.failed.is_file():
        return {"state": "failed", "step": step, "problem": run.failed.read_text().strip()}
    state = "done" if run.done.is_file() else "training" if lock.holder(path) else "waiting"
    return {"state": state, "step": step, "problem": None}


def _logged(run: RunFolder) -> int:
    """The last step in the metrics, from the end of the file."""
    try:
        with run.table("metrics").open("rb") as file:
            file.seek(max(0, file.seek(0, SEEK_END) - TAIL))
            steps = STEP.findall(file.read())
    except FileNotFoundError:
        return 0
    return int(steps[-1]) if steps else 0


class Bar:
    """A fleet's progress bar: the states of its subjects, and the steps of those that did not fail."""

    def __init__(self, status: Status, ranks: int) -> None:
        self.lanes = max(1, status.slots * ranks)  # subjects that can train at once
        self.rate = pace.Rate()  # of rounds, each of which is a step of every subject that trains
        self.done, self.since = _done(status), pace.clock()
        total = _steps(status)
        before = total - sum(status.steps_left)
        self.bar = console.bar(total, f"fleet ({_states(status)})", "step", initial=before)
        self.bar.ahead = self.ahead
        self.left = self.rounds = 0.0  # still to come
        self.show(status)

    def show(self, status: Status) -> None:
        """Show where each subject stands now."""
        left, done, training = status.steps_left, _done(status), status.counts["training"]
        self.left, self.rounds = sum(left), max(sum(left) / self.lanes, max(left, default=0))
        if done != self.done:
            now = pace.clock()
            if training and done > self.done:
                self.rate.add(now - self.since, (done - self.done) / training)
            self.done, self.since = done, now
        self.bar.set_description_str(f"fleet ({_states(status)}): ", refresh=False)
        self.bar.total = _steps(status)
        self.bar.update(self.bar.total - self.left - self.bar.n)

    def ahead(self) -> tuple[float, float] | None:
        """As `console.Bar` wants it; the last subjects leave slots empty, which makes a step take longer.

        None before the second look at which there was progress: what comes first loads and compiles.
        """
        if not self.rate.units or not self.left:
            return None
        return self.rate.each * self.rounds / self.left, 0.0

    def close(self) -> None:
        self.bar.close()


def _done(status: Status) -> int:
    """The steps that all subjects have done."""
    return sum(one.step for one in status.subjects)


def _steps(status: Status) -> int:
    """The steps of the subjects that did not fail."""
    return sum(one.steps for one in status.subjects if one.state != "failed")


def table(status: Status) -> list[str]:
    """A line for each subject, with its problem if it failed, and a last line of totals."""
    width = max((len(printable(one.name)) for one in status.subjects), default=0)
    lines = []
    for one in status.subjects:
        problem = f"  {printable(one.problem)}" if one.problem else ""
        lines.append(f"{one.state:8} {printable(one.name):{width}} {one.step:>6} of {one.steps}{problem}")
    return [*lines, totals(status)]


def totals(status: Status) -> str:
    """How many subjects are in each state, and how many are done an hour."""
    rate = f"; {status.per_hour:.3g} done an hour" if status.per_hour else ""
    return f"{len(status.subjects)} subjects: {_states(status) or 'none'}{rate}"


def _states(status: Status) -> str:
    return ", ".join(f"{count} {state}" for state, count in status.counts.items() if count)
