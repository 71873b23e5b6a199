"""What a user sees: lines and progress bars, of rank 0."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from dbtrain import dist, files

for _library in ("TRANSFORMERS", "DIFFUSERS"):  # which remark on what they miss when imported
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")

logger = logging.getLogger("dbtrain")
say = logger.info


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
    """Show `say` lines on rank 0's terminal. Once a process."""
    if logger.handlers:
        return
    logger.addHandler(_BelowBar() if dist.is_main() else logging.NullHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Lines:
    """A file for bars where no terminal redraws them: a line each time, instead of returns."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(total: int, what: str, unit: str, initial: int = 0, share: bool = False, leave: bool = True) -> tqdm:
    """A progress bar on rank 0; in a batch log, a line every half minute.

    `share` says that `total` is this rank's part of work that is split over ranks; `leave`, that the
    bar stays when it is full.
    """
    if share and dist.world() > 1:
        what = f"{what} (rank 0 of {dist.world()})"
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit=unit, initial=initial, dynamic_ncols=terminal,
        file=sys.stderr if terminal else _Lines(), mininterval=0.1 if terminal else 30.0,
        disable=not dist.is_main(), leave=leave,
    )  # fmt: skip
