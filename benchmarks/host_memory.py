"""The host memory that this process holds, on Linux."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ANONYMOUS = "RssAnon"  # without pages of files, which processes share


def held(name: str = ANONYMOUS) -> int:
    """A line of Linux's account of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most anonymous bytes in the block, above those before it, sampled every 2 ms."""
    found, done = [0], threading.Event()
    before = held()

    def sample() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], held() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
