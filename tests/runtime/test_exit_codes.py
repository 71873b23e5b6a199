"""How a process ends: its exit code, its last line, and the marker."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbtrain.runtime import exit_codes, preemption
from dbtrain.runtime.errors import Lost, Preempted


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run folder of a process that listens to signals."""
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    preemption.listen(tmp_path)
    yield tmp_path
    preemption.listen(tmp_path)  # forgets what was requested
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(problem: Exception) -> int:
    """The exit code after this problem."""

    def work() -> None:
        raise problem

    with pytest.raises(SystemExit) as found:
        exit_codes.end(work)
    assert isinstance(found.value.code, int)
    return found.value.code


@pytest.mark.parametrize(
    "number", [errno.ENOTEMPTY, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ENOLCK, errno.EINVAL]
)
def test_what_a_network_file_system_reports_is_no_bug(
    capsys: pytest.CaptureFixture[str], number: int
) -> None:
    assert ended(OSError(number, os.strerror(number), "shards/instance-0.tar")) == 2
    assert capsys.readouterr().err == f"error: shards/instance-0.tar: {os.strerror(number)}\n"


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EPROTO])
@pytest.mark.parametrize("rank", ["stopped", "survived"])
def test_a_stop_is_a_stop_where_the_marker_cannot_be_written(
    listening: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    rank: str, number: int,
) -> None:  # fmt: skip
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number), "PREEMPTED")

    monkeypatch.setattr(preemption.files, "write_atomically", fails)
    if rank == "stopped":
        assert ended(Preempted("SIGTERM at step 3 (checkpoint saved)")) == exit_codes.PREEMPTED
    else:
        monkeypatch.setenv("RANK", "1")
        assert exit_codes._survived(Lost("rank 0 is gone", ended=False)) == exit_codes.LOST
    said = capsys.readouterr().err
    assert "run the same command again" in said and "Traceback" not in said
    assert f"error: the marker cannot be written: [Errno {number}]" in said


@pytest.mark.parametrize("before", [None, signal.SIGTERM, signal.SIGUSR1, "the time limit"])
def test_the_second_ctrl_c_stops_at_once_whatever_came_before(
    listening: Path, monkeypatch: pytest.MonkeyPatch, before: signal.Signals | str | None
) -> None:
    if before == "the time limit":
        monkeypatch.setattr(preemption, "_deadline", 0.0)
    elif before:
        signal.raise_signal(before)  # type: ignore[arg-type]
    first = preemption.stop_requested()
    signal.raise_signal(signal.SIGINT)
    assert preemption.stop_requested() == (first or preemption.SIGNALS[signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
