"""Stopping early with nothing lost: a signal, or the end of a SLURM job's time, becomes a wish to stop.

A handler only sets a flag; work looks at it between two pieces, where it can be gone on from. The
contract with batch scripts is a file in the run folder: PREEMPTED says "run the same command again".
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from dbtrain.runtime import files
from dbtrain.runtime.errors import Preempted
from dbtrain.runtime.run_folder import RunFolder

REASONS = (
    "",
    "SIGTERM",
    "SIGUSR1",
    "SIGINT",
    "the end of the job's time",
)  # ranks tell each other the number
SIGNALS = {signal.SIGTERM: 1, signal.SIGUSR1: 2, signal.SIGINT: 3}

_wish = 0  # number of a reason
_deadline = float("inf")  # by time.time()
_marker: Path | None = None


def listen(run_dir: str | Path, stop_before_s: float = 0.0) -> None:
    """From now on, signals ask for a stop; and so does SLURM's time limit, `stop_before_s` ahead.

    A second SIGINT interrupts at once. `run_dir` is where the marker goes.
    """
    global _wish, _deadline, _marker
    _wish, _marker = 0, RunFolder(run_dir).preempted
    ends = os.environ.get("SLURM_JOB_END_TIME", "")
    _deadline = float(ends) - stop_before_s if ends.isdigit() else float("inf")
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _wish
    if number == signal.SIGINT:
        if _wish == SIGNALS[signal.SIGINT]:
            raise KeyboardInterrupt
        os.write(2, b"\nstopping where this can be gone on from; Ctrl-C again: at once\n")
    _wish = _wish or SIGNALS[signal.Signals(number)]


def stop_requested() -> int:
    """Number of this process's reason to stop, by `REASONS`; 0 for none."""
    global _wish
    if not _wish and time.time() > _deadline:
        _wish = REASONS.index("the end of the job's time")
    return _wish


def check() -> None:
    """Raise Preempted if there is a reason to stop: to be asked between two pieces of work."""
    if reason := stop_requested():
        raise Preempted(REASONS[reason])


def interrupted() -> bool:
    """Whether it was a person, at a terminal, who asked."""
    return stop_requested() == SIGNALS[signal.SIGINT]


def mark(text: str) -> None:
    """Leave the marker: a batch script that finds it runs the same command again."""
    if _marker:
        files.write_atomically(_marker, text + "\n")


def unmark() -> None:
    """Remove the marker of an earlier start."""
    if _marker:
        _marker.unlink(missing_ok=True)
