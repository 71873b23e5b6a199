"""Memory of the machine."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GIB = 2**30  # bytes
PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def size(count: float) -> str:
    """A number of bytes, e.g. 2.13 GiB, or 4.2 MiB where that would be 0.00."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.1f} MiB"


def free() -> int:
    """Bytes that this process can still take: of the machine, or of its control groups if those have less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_of_groups()]
    with suppress(OSError):  # macOS has no /proc
        found += _numbers(PROC / "meminfo", r"MemAvailable:\s+(\d+)", 1024)
    return max(0, min(found))


def trim() -> None:
    """Give freed memory that lies between what is in use back to the system, if the C library can."""
    if release := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        release(0)


def _of_groups() -> Iterator[int]:
    """What the limits of the control groups around this process leave, which SLURM and containers set.

    Only those of version 2. Cached files count as free: the kernel drops them first.
    """
    with suppress(OSError):
        inner = re.search(r"^0::/(.*)$", (PROC / "self" / "cgroup").read_text(), re.MULTILINE)
        path = GROUPS / (inner[1] if inner else "")
        for folder in (path, *path.parents):
            if folder.is_relative_to(GROUPS) and (folder / "memory.max").is_file():
                limit = _numbers(folder / "memory.max", r"(\d+)")  # none if it says "max"
                used = _numbers(folder / "memory.current", r"(\d+)")
                cached = _numbers(folder / "memory.stat", r"^file (\d+)")
                yield from (one - two + three for one, two, three in zip(limit, used, cached, strict=False))


def _numbers(path: Path, pattern: str, unit: int = 1) -> list[int]:
    return [unit * int(number) for number in re.findall(pattern, path.read_text(), re.MULTILINE)[:1]]
