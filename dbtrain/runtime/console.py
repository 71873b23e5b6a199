"""Console output: messages and progress bars of rank 0, warnings of all ranks, and the time of each phase."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dbtrain.runtime import dist, files, pace
from dbtrain.runtime.errors import printable

for _library in ("TRANSFORMERS", "DIFFUSERS"):  # on import they warn about optional packages
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")

logger = logging.getLogger("dbtrain")
say = logger.info
warn = logger.warning  # shown for every rank

_run: ContextVar[str] = ContextVar("run", default="")  # of many, whose work this is; "": that of all
started = time.monotonic()
spent_s: dict[str, float] = {}  # by phase; mostly the lifetime of its progress bar
INNER = ("validation", "images")  # phases within another one, which is training


class _Line(logging.Formatter):
    """Formats records. Ours are one line each, whatever characters the names of files in it have."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return printable(text) if record.name == logger.name else text


class ToFile(logging.Handler):
    """Appends the records of a run to log.txt. Raises errors where logging's handlers would print them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.run = path, _run.get()
        self.setFormatter(_Line("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        if _run.get() == self.run:
            files.append(self.path, self.format(record) + "\n")


class _AboveBar(logging.Handler):
    """Prints records above the progress bar; of the records of one run among many, only its warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        run = _run.get()
        if not run or record.levelno > logging.INFO:
            tqdm.write(f"{run}: " * bool(run) + self.format(record), file=sys.stderr)


def start() -> None:
    """Show the messages of rank 0 and the warnings of all ranks, including Python's. Runs once."""
    if logger.handlers:
        return
    handler = _AboveBar()
    handler.setFormatter(_Line())
    logger.setLevel(logging.INFO)
    if not dist.is_main():
        logger.setLevel(logging.WARNING)
        handler.setFormatter(_Line(f"rank {dist.rank()}: %(message)s"))
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addHandler(handler)
    logger.addHandler(handler)
    logger.propagate = False


@contextmanager
def about(run: str) -> Iterator[None]:
    """In the block, messages are about this run among many: they go to its log, and bars are hidden."""
    before = _run.set(run)
    try:
        yield
    finally:
        _run.reset(before)


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Add the time that the block takes to `phase`."""
    before = time.monotonic()
    try:
        yield
    finally:
        spent_s[phase] = spent_s.get(phase, 0.0) + time.monotonic() - before


class Bar(tqdm):
    """A progress bar that adds its duration to the time of its phase. Units can be done in parts."""

    # Returns (seconds per unit, seconds of other work until the end), or None if unknown; None: an average.
    ahead: Callable[[], tuple[float, float] | None] | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        found = dict(super().format_dict)
        ahead = self.ahead() if self.ahead else None
        if ahead:
            found["rate"] = 1 / ahead[0]
        elif found["elapsed"] and not self.ahead:
            found["rate"] = found["rate"] or (found["n"] - found["initial"]) / found["elapsed"]
        left = "? left" if found["n"] < found["total"] else pace.left(0.0)
        if rate := found["rate"]:
            left = pace.left((found["total"] - found["n"]) / rate + (ahead[1] if ahead else 0.0))
        return found | {
            "whole": int(found["n"] + 1e-6), "left": left, "spent": pace.human(found["elapsed"], 0)
        }  # fmt: skip

    def close(self) -> None:
        if not self.disable:  # tqdm disables a bar when it closes it
            phase = self.desc.removesuffix(": ").partition(" (")[0]
            spent_s[phase] = spent_s.get(phase, 0.0) + self.format_dict["elapsed"]
        super().close()


class _Lines:
    """Replaces stderr for progress bars outside a terminal: each update is a line of its own."""

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():  # tqdm moves the cursor up after a nested bar
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(total: int, what: str, unit: str, initial: int = 0, share: bool = False, leave: bool = True) -> Bar:
    """A progress bar on rank 0; in a batch log, a line every 30 seconds.

    `share`: `total` is this rank's share of work that is split over ranks. `leave`: a full bar stays on
    the screen; without it, a batch log shows the bar only if it takes longer than 30 seconds.
    """
    if share and dist.world() > 1:
        what = f"{what} (rank 0 of {dist.world()})"
    terminal = sys.stderr.isatty()
    return Bar(
        total=total, desc=what, unit=unit, initial=initial, dynamic_ncols=terminal,
        file=sys.stderr if terminal else _Lines(), mininterval=0.1 if terminal else 30.0,
        disable=not dist.is_main() or bool(_run.get()), leave=leave,
        delay=0 if leave or terminal else 30, miniters=0,
        bar_format="{l_bar}{bar}| {whole}/{total_fmt} [{spent}, {left}, {rate_fmt}]",
    )  # fmt: skip
