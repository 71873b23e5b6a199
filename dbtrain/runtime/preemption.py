"""Graceful stops: on a signal, or shortly before a SLURM job reaches its time limit.

The signal handler only sets a flag, which work checks at points from which it can resume. The file
PREEMPTED in the run folder tells batch scripts to run the same command again.
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

REASONS = ("", "SIGTERM", "SIGUSR1", "SIGINT", "the end of the job's time")  # ranks exchange the index
SIGNALS = {signal.SIGTERM: 1, signal.SIGUSR1: 2, signal.SIGINT: 3}

_requested = 0  # index of a reason
_warned = False  # whether a SIGINT has said what the next one does
_deadline = float("inf")  # in time.time() seconds
_marker: Path | None = None


def listen(run_dir: str | Path, stop_before_s: float = 0.0) -> None:
    """From now on, signals request a stop, and so does SLURM's time limit, `stop_before_s` seconds early.

    A second SIGINT interrupts at once. The marker is written into `run_dir`.
    """
    global _requested, _warned, _deadline, _marker
    _requested, _warned, _marker = 0, False, RunFolder(run_dir).preempted
    ends = os.environ.get("SLURM_JOB_END_TIME", "")
    _deadline = float(ends) - stop_before_s if ends.isdigit() else float("inf")
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _requested, _warned
    if number == signal.SIGINT:
        if _warned:
            raise KeyboardInterrupt
        _warned = True
        os.write(2, b"\nstopping at the next point to resume from; press Ctrl-C again to stop at once\n")
    _requested = _requested or SIGNALS[signal.Signals(number)]


def stop_requested() -> int:
    """Index in `REASONS` of this process's reason to stop; 0 for none."""
    global _requested
    if not _requested and time.time() > _deadline:
        _requested = REASONS.index("the end of the job's time")
    return _requested


def check() -> None:
    """Raise Preempted if there is a reason to stop. Call this where work can be resumed."""
    if reason := stop_requested():
        raise Preempted(REASONS[reason])


def interrupted() -> bool:
    """Whether a user requested the stop with Ctrl-C."""
    return stop_requested() == SIGNALS[signal.SIGINT]


def mark(text: str) -> None:
    """Write the marker, which tells a batch script to run the same command again."""
    if _marker:
        files.write_atomically(_marker, text + "\n")


def unmark() -> None:
    """Remove the marker of an earlier stop."""
    if _marker:
        _marker.unlink(missing_ok=True)
