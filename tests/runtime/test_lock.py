"""Locks: one owner at a time, and none of the dead."""

from __future__ import annotations

import json
import os
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

from dbtrain.runtime import lock
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.lock import NAME, Lock, held


def written(folder: Path, **changes: object) -> None:
    """A lock that somebody else left."""
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(lock._me() | {"token": "theirs"} | changes))


def test_one_at_a_time(tmp_path: Path) -> None:
    first = Lock.take(tmp_path)
    assert first and Lock.take(tmp_path) is None
    told = rf"run_dir .* in use by another run \(process {os.getpid()} on"
    with pytest.raises(ConfigError, match=told), held(tmp_path, "run_dir"):
        raise AssertionError("two owners")
    first.release()
    with held(tmp_path, "run_dir"):
        assert (tmp_path / NAME).exists()
    assert not list(tmp_path.iterdir())


def test_one_of_many_gets_it(tmp_path: Path) -> None:
    """A stale lock that all try to take over; now and then the one who was to have it died too."""
    for number in range(60):
        folder = tmp_path / str(number)
        written(folder, pid=2**22 + 1)
        if number % 3 == 0:
            heir = folder / f"{NAME}.{sha256((folder / NAME).read_bytes()).hexdigest()[:16]}"
            heir.write_text(json.dumps(lock._me() | {"pid": 2**22 + 2}))
        taken: list[Lock | None] = []
        start = threading.Barrier(8)

        def one(folder: Path = folder, taken: list = taken, start: threading.Barrier = start) -> None:
            start.wait()
            taken.append(Lock.take(folder))

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 8
        (winner,) = [held for held in taken if held]
        winner.release()
        assert not list(folder.iterdir())


@pytest.mark.parametrize("left", [
    {"pid": 2**22 + 1}, {"started": "1"}, {"machine": "other", "job": "7", "restart": "0"}
], ids=["no such process", "another process has its number", "the job before its requeue"])  # fmt: skip
def test_a_dead_owner_s_lock_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: dict[str, object]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    written(tmp_path, **left)
    mine = Lock.take(tmp_path)
    assert mine
    mine.release()


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_spoilt_lock_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    mine = Lock.take(tmp_path)
    assert mine
    mine.release()


def test_an_owner_on_another_machine_is_told_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BEAT_S", 0.05), ("DEAD_S", 3.0), ("POLL_S", 0.02)):
        monkeypatch.setattr(lock, name, value)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(lock, "_machine", lambda: "another machine")
        theirs = Lock.take(tmp_path)
    assert theirs and Lock.take(tmp_path) is None
    theirs.closed.set()  # its machine fails
    theirs.thread.join()
    mine = Lock.take(tmp_path)
    assert mine
    theirs.release()
    assert (tmp_path / NAME).exists(), "the late first owner does not take the lock of the second"
    mine.release()


class Watched(Exception):
    """A lock has to be watched."""


def test_an_owner_that_is_gone_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at each of the locks that it left, unless it has touched one since."""
    monkeypatch.setattr(lock, "DEAD_S", 0.05)
    monkeypatch.setattr(lock, "POLL_S", 0.01)
    for name in ("first", "second", "touched"):
        written(tmp_path / name, machine="another machine")
    later = time.time() + 25
    os.utime(tmp_path / "touched" / NAME, (later, later))
    locks = [Lock.take(tmp_path / "first")]

    def watch(seconds: float) -> None:
        raise Watched

    monkeypatch.setattr(lock.time, "sleep", watch)
    locks.append(Lock.take(tmp_path / "second"))
    with pytest.raises(Watched):
        Lock.take(tmp_path / "touched")
    for mine in locks:
        assert mine
        mine.release()


def test_waiting_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "POLL_S", 0.02)
    first = Lock.take(tmp_path)
    assert first
    since = time.monotonic()
    threading.Timer(0.2, first.release).start()
    with held(tmp_path, "class images in", wait=True):
        assert time.monotonic() - since > 0.15


def test_what_cannot_be_written_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.os, "access", lambda *_: False)  # root may write anywhere
    with held(tmp_path, "data.shards"):
        assert not list(tmp_path.iterdir())
