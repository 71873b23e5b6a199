"""fleet.json: where each subject of a fleet stands, for the fleet itself, its page, and scripts.

runs/fleet/
├── fleet.json           slots; name, run folder, state, step, steps, problem and times of each subject
├── report.html          the fleet's page
└── dog/, cat/, ...      one run folder a subject
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

NAME = "fleet.json"
State = Literal["waiting", "training", "done", "failed"]
STATES: tuple[State, ...] = get_args(State)
ENDED = ("done", "failed")


@dataclass(frozen=True)
class Subject:
    """One subject. `run`: its run folder, relative to the fleet's. Times are seconds since the epoch."""

    name: str
    run: str
    steps: int
    state: State = "waiting"
    step: int = 0
    problem: str | None = None  # of one that failed
    started: float | None = None  # when it first got a slot
    ended: float | None = None

    def changed(self, **changes: Any) -> Subject:
        """This subject with other values. A new state sets the time at which it began."""
        new = replace(self, **changes)
        if new.state == self.state:
            return new
        now = time.time()
        started = self.started or (now if new.state == "training" else None)
        return replace(new, started=started, ended=now if new.state in ENDED else None)


@dataclass(frozen=True)
class Status:
    """A fleet: how many subjects train at once, and every subject in the order of its list."""

    slots: int
    subjects: tuple[Subject, ...]

    @classmethod
    def read(cls, fleet: Path) -> Status:
        """The status in a fleet's folder. Raises ConfigError if its file is missing or damaged."""
        path = fleet / NAME
        values = files.read_json(path)
        try:
            return cls(int(values["slots"]), tuple(map(_subject, values["subjects"])))
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is damaged; run dbtrain fleet again, which repairs it") from error

    def write(self, fleet: Path) -> None:
        """Replace the file in a fleet's folder, in one step."""
        files.write_atomically(fleet / NAME, json.dumps(asdict(self), indent=1) + "\n")

    def changed(self, name: str, **changes: Any) -> Status:
        """This status with other values for one subject. A new state sets the time at which it began."""
        return replace(
            self, subjects=tuple(one.changed(**changes) if one.name == name else one for one in self.subjects)
        )

    @property
    def counts(self) -> dict[State, int]:
        """The number of subjects in each state."""
        states = [one.state for one in self.subjects]
        return {state: states.count(state) for state in STATES}

    @property
    def steps_left(self) -> list[int]:
        """How many steps each subject that is waiting or training still has to do."""
        return [one.steps - one.step for one in self.subjects if one.state not in ENDED]

    @property
    def per_hour(self) -> float | None:
        """Subjects done an hour, from the first start to the last end, pauses included; None if none is."""
        started = [one.started for one in self.subjects if one.started is not None]
        ended = [one.ended for one in self.subjects if one.state == "done" and one.ended is not None]
        seconds = max(ended) - min(started) if started and ended else 0.0
        return 3600 * len(ended) / seconds if seconds > 0 else None


def _subject(values: Mapping[str, Any]) -> Subject:
    """A subject from JSON; keys of later versions are left out. Raises ValueError for wrong values."""
    one = Subject(**{field.name: values[field.name] for field in fields(Subject) if field.name in values})
    run = PurePosixPath(one.run)
    counts = isinstance(one.step, int) and isinstance(one.steps, int)
    texts = isinstance(one.name, str) and isinstance(one.problem, str | None)
    times = all(isinstance(at, float | int | None) for at in (one.started, one.ended))
    if not (counts and texts and times and one.state in STATES) or run.is_absolute() or ".." in run.parts:
        raise ValueError(f"not a subject: {values}")
    return one
