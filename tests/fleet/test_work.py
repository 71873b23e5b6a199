"""What a rank of a fleet decides."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import pytest

from dbtrain.fleet.listing import Entry
from dbtrain.fleet.work import Request, Work
from dbtrain.runtime.fleet_status import State, Status, Subject
from dbtrain.train import memory


@pytest.mark.parametrize(
    ("state", "step", "count"),
    [
        ("done", 4, 3),
        ("waiting", 0, 3),
        ("failed", 0, 3),
        ("training", 0, 1),
        ("waiting", 2, 1),
        ("failed", 2, 1),
    ],
)
def test_the_number_of_slots_stays_while_a_subject_is_half_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State, step: int, count: int
) -> None:
    """As it would be trained to its end with other rounding. One that was tried alone leaves no mark."""
    Status(1, (Subject("s0", "s0", 4, state, step),)).write(tmp_path)
    monkeypatch.setattr(memory, "memory_of", lambda device: inf)
    nothing: Any = None
    for asked, slots in ((None, count), (2, 2)):
        request = Request(tmp_path / "c.yaml", tmp_path / "subjects", slots=asked)
        work = Work(request, tmp_path, [Entry(f"s{number}", None, None) for number in range(3)])
        assert work._slots(nothing, nothing) == slots
