"""What a rank of a fleet decides."""

from __future__ import annotations

from contextlib import closing
from math import inf
from pathlib import Path
from typing import Any

import pytest

from dbtrain.fleet import work as works
from dbtrain.fleet.listing import Entry
from dbtrain.fleet.status import Bar
from dbtrain.fleet.work import Request, Work
from dbtrain.runtime.fleet_status import State, Status, Subject
from dbtrain.runtime.memory import GIB
from dbtrain.train import memory
from dbtrain.train.placement import Weights
from tests.conftest import Make, draw_photo
from tests.fleet.test_listing import CONFIG


def failed(folder: Path, monkeypatch: pytest.MonkeyPatch, entries: str) -> Work:
    """The work on a list whose entries have all failed, which looks for mended ones each time."""
    monkeypatch.setattr(works, "LOOK_S", 0.0)
    monkeypatch.setattr(works, "SETTLED_S", 0.0)
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "list.yaml").write_text(entries)
    request = Request(folder / "c.yaml", folder / "list.yaml", watch=True)
    work = Work(request, folder / "runs", request.read())
    for name, entry in work.entries.items():
        work._fail(name, entry.problem or "")
    return work


@pytest.mark.parametrize("copied", [False, True], ids=["there", "being copied first"])
def test_a_row_that_comes_before_its_photos_is_trained_once_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """But what another rank ran into meanwhile stays."""
    work = failed(tmp_path, monkeypatch, "- {photos: mug}\n- {photos: cat}\n")
    with closing(Bar(work._status(), 1)) as work.bar:
        work._look()
        assert {one.state for one in work.status.subjects} == {"failed"}
        for number, name in enumerate(work.entries):
            (tmp_path / name).mkdir()
            draw_photo(tmp_path / name / "0.png", number)
        if copied:  # this look comes while they are
            monkeypatch.setattr(works, "SETTLED_S", inf)
            work._look()
            monkeypatch.setattr(works, "SETTLED_S", 0.0)
        (tmp_path / "runs" / "cat" / "FAILED").write_text("the loss is NaN\n")
        work._look()
    assert {name: work._is_open(name) for name in work.entries} == {"mug": True, "cat": False}
    assert {one.name: one.problem for one in work.status.subjects} == {"mug": None, "cat": "the loss is NaN"}
    assert "mug" not in work.early, "its shards are still to be made"


def test_an_entry_whose_name_is_mended_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another rank has removed the note of its problem before."""
    for name in ("mug", "cat"):
        (tmp_path / name).mkdir()
        draw_photo(tmp_path / name / "0.png", len(name))
    work = failed(tmp_path, monkeypatch, "- {photos: mug, name: a/b}\n- {photos: cat, steps: 0}\n")
    assert [*work.bad] == ["entry 1", "cat"]
    (tmp_path / "list.yaml").write_text("- {photos: mug, name: ab}\n- {photos: cat, steps: 2}\n")
    (tmp_path / "runs" / "cat" / "FAILED").unlink()
    with closing(Bar(work._status(), 1)) as work.bar:
        work._look()
    assert sorted(work.entries) == ["ab", "cat"] and not work.bad
    assert all(map(work._is_open, work.entries))


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


@pytest.mark.parametrize(("shard", "slots"), [("none", 7), ("all", 8)])
def test_a_gpu_gets_as_many_slots_as_it_has_room_for(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str, slots: int
) -> None:
    """A slot takes 2 GiB beside the base's 10, of which two ranks can share 8: with two blocks at a time."""
    cfg = make(train__shard=shard, train__gradient_checkpointing="blocks")
    block = ((2**20, 1024),)  # rows and bytes of a row: 1 GiB
    weights = Weights(10 * GIB, (GIB,) * 8, (block,) * 8)
    found = memory.Prediction(10 * GIB, 0, GIB // 2, GIB, GIB // 2, weights=weights)
    monkeypatch.setattr(memory, "predict", lambda *_: found)
    # Room for 7 slots and a half.
    has = memory.needed(10 * GIB + 2 * GIB) + 6.5 * 2 * GIB
    monkeypatch.setattr(memory, "memory_of", lambda device: has / (1 - memory.SPARE))
    work = Work(
        Request(tmp_path / "c.yaml", tmp_path), tmp_path, [Entry(f"s{n}", None, None) for n in range(99)]
    )
    work.world = 2
    base: Any = None
    assert work._slots(cfg, base) == slots
