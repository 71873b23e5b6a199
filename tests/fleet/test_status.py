"""fleet.json and its table on the terminal."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from dbtrain.fleet import status
from dbtrain.runtime import pace
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.fleet_status import NAME, Status, Subject

FLEET = Status(2, (Subject("dog", "dog", 400), Subject("cat", "cat", 300), Subject("mug", "mug", 400)))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    changed = FLEET.changed("dog", state="training", step=7)
    changed = changed.changed("mug", state="failed", problem="no photos")
    changed.write(tmp_path)
    assert Status.read(tmp_path) == changed
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert changed.subjects[1] == FLEET.subjects[1]


def test_files_without_times_and_of_later_versions_are_read(tmp_path: Path) -> None:
    one = {"name": "dog", "run": "dog", "state": "training", "step": 1, "steps": 2, "problem": None}
    (tmp_path / NAME).write_text(json.dumps({"slots": 8, "subjects": [{**one, "later": 1}], "later": 2}))
    assert Status.read(tmp_path) == Status(8, (Subject("dog", "dog", 2, "training", 1),))


@pytest.mark.parametrize("wrong", [
    {"state": "gone"}, {"step": "1"}, {"run": "../dog"}, {"run": "/dog"}, {"name": None}, {"problem": 3},
    {"started": "noon"},
])  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, wrong: dict[str, object]) -> None:
    one = {"name": "dog", "run": "dog", "state": "done", "step": 1, "steps": 2, **wrong}
    (tmp_path / NAME).write_text(json.dumps({"slots": 8, "subjects": [one]}))
    with pytest.raises(ConfigError, match=r"fleet\.json is damaged; run dbtrain fleet again"):
        Status.read(tmp_path)


def test_states_tell_the_time_and_times_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    fleet = FLEET.changed("dog", state="training").changed("cat", state="training")
    assert fleet.per_hour is None
    now = 1900.0
    fleet = fleet.changed("dog", state="waiting").changed("dog", state="training", step=5)
    assert fleet.subjects[0].started == 1000, "its first slot"
    now = 2800.0
    fleet = fleet.changed("dog", state="done").changed("cat", state="done").changed("mug", state="failed")
    assert [one.ended for one in fleet.subjects] == [2800.0] * 3
    assert fleet.per_hour == pytest.approx(4), "two in half an hour; one that failed does not count"


def test_the_table_has_a_line_for_each_subject_and_totals() -> None:
    fleet = FLEET.changed("dog", state="training", step=7)
    fleet = fleet.changed("mug", state="failed", problem="no\x1b photos")
    lines = status.table(fleet)
    assert [line.split() for line in lines[:2]] == [
        ["training", "dog", "7", "of", "400"], ["waiting", "cat", "0", "of", "300"]
    ]  # fmt: skip
    assert lines[2].startswith("failed ") and "photos" in lines[2] and "\x1b" not in lines[2]
    assert lines[3] == "3 subjects: 1 waiting, 1 training, 1 failed"
    assert status.table(Status(1, ())) == ["0 subjects: none"]


def test_the_bar_shows_states_steps_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resume, with a start that takes ten minutes, and slots that are empty at the end."""
    now = 0.0
    monkeypatch.setattr(pace, "clock", lambda: now)
    fleet = FLEET.changed("dog", state="training", step=100).changed("cat", state="training", step=100)
    with closing(status.Bar(fleet, 1)) as bar:
        shown = bar.bar.format_dict
        assert (shown["n"], shown["total"], shown["left"]) == (200, 1100, "? left")
        for at, step in ((600.0, 101), (602.0, 102), (605.0, 102), (622.0, 112)):
            now, fleet = at, fleet.changed("dog", step=step).changed("cat", step=step)
            bar.show(fleet)
        shown = bar.bar.format_dict
        assert (shown["n"], shown["prefix"]) == (224, "fleet (1 waiting, 2 training): ")
        assert shown["left"] == "14 min 36 s left", "438 rounds of two steps, 2 s each"
        fleet = fleet.changed("mug", state="failed").changed("cat", state="done")
        bar.show(fleet)
        shown = bar.bar.format_dict
        assert (shown["n"], shown["total"], shown["left"]) == (412, 700, "9 min 36 s left")
