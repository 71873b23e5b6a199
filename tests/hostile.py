"""What a stranger's input is allowed to do: to be refused in one line, in bounded time and memory."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dbtrain.runtime import exit_codes

ROOM = 2 * 2**30  # bytes that it may take, torch's own included
LONG = 60  # seconds after which it hangs
CANARY = "canary"  # a file in the working folder that exists if a stranger's code has run
CODE = f"open({CANARY!r}, 'w').close()\n"


@contextmanager
def _limits() -> Iterator[None]:
    def hangs(*_: Any) -> None:
        raise AssertionError(f"it takes more than {LONG} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LONG)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _yes() -> Iterator[None]:
    """Somebody, or a pipe, answers every question with yes."""
    reading, writing = os.pipe()
    os.write(writing, b"y\n" * 100)
    os.close(writing)
    before = sys.stdin
    with os.fdopen(reading) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


Refused = Callable[[Callable[[], object], str], None]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Refused:
    """A command that does `work` ends with exit code 2 and one line that matches `told`.

    It shows no traceback, asks nothing, and no code of the stranger's runs.
    """
    monkeypatch.chdir(tmp_path)

    def check(work: Callable[[], object], told: str) -> None:
        capsys.readouterr()
        with _limits(), _yes(), pytest.raises(SystemExit) as ended:
            exit_codes.end(lambda: work() and None)
        said = capsys.readouterr()
        assert ended.value.code == 2, said.err
        assert "Traceback" not in said.err and "[y/N]" not in said.out, said
        assert not (tmp_path / CANARY).exists(), "its code ran"
        lines = [line for line in said.err.splitlines() if "step/s]" not in line]  # a progress bar
        assert lines and all(line.startswith("error: ") and len(line) < 1000 for line in lines), said.err
        assert re.search(told, said.err), said.err

    return check
