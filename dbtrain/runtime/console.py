"""What a user sees: lines and progress bars of rank 0, warnings of all ranks, the time of each phase."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from dbtrain.runtime import dist, files

for _library in ("TRANSFORMERS", "DIFFUSERS"):  # which remark on what they miss when imported
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")

logger = logging.getLogger("dbtrain")
say = logger.info
warn = logger.warning  # seen from every rank

started = time.monotonic()
spent_s: dict[str, float] = {}  # by phase: mostly between start and end of its progress bar


class ToFile(logging.Handler):
    """Lines of log.txt. What goes wrong is raised, not printed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        files.append(self.path, self.format(record) + "\n")


class _BelowBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start() -> None:
    """Show `say` lines of rank 0, and warnings of all ranks, Python's too. Once a process."""
    if logger.handlers:
        return
    handler = _BelowBar()
    logger.setLevel(logging.INFO)
    if not dist.is_main():
        logger.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter(f"rank {dist.rank()}: %(message)s"))
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addHandler(handler)
    logger.addHandler(handler)
    logger.propagate = False


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Count the block's time as that phase's."""
    before = time.monotonic()
    try:
        yield
    finally:
        spent_s[phase] = spent_s.get(phase, 0.0) + time.monotonic() - before


class _Bar(tqdm):
    """A progress bar that remembers how long its phase took."""

    def close(self) -> None:
        if not self.disable:  # tqdm disables it when it is closed
            phase = self.desc.removesuffix(": ").partition(" (")[0]
            spent_s[phase] = spent_s.get(phase, 0.0) + self.format_dict["elapsed"]
        super().close()


class _Lines:
    """A file for bars where no terminal redraws them: a line each time, instead of returns."""

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():  # which tqdm moves up with, after an inner bar
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(total: int, what: str, unit: str, initial: int = 0, share: bool = False, leave: bool = True) -> tqdm:
    """A progress bar on rank 0; in a batch log, a line every half minute.

    `share` says that `total` is this rank's part of work that is split over ranks; `leave`, that the
    bar stays when it is full, and is shown in a batch log at all if it is soon done.
    """
    if share and dist.world() > 1:
        what = f"{what} (rank 0 of {dist.world()})"
    terminal = sys.stderr.isatty()
    return _Bar(
        total=total, desc=what, unit=unit, initial=initial, dynamic_ncols=terminal,
        file=sys.stderr if terminal else _Lines(), mininterval=0.1 if terminal else 30.0,
        disable=not dist.is_main(), leave=leave, delay=0 if leave or terminal else 30,
    )  # fmt: skip
