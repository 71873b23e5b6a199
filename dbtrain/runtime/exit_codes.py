"""How a process ends: its exit code and its last message to the user."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbtrain.runtime import preemption
from dbtrain.runtime.errors import ConfigError, Lost, Preempted, os_problem, printable, reason

# Remedies for errors of torch that a user can fix, by a part of the error's class or message.
REMEDIES = {
    "OutOfMemoryError": "make batches smaller (train.micro_batch, prepare.sampling.batch, sample.batch; in a "
    "fleet, --slots), or set train.gradient_checkpointing; `dbtrain doctor CONFIG --memory` says what fits",
    "InvalidCxxCompiler": "train.compile needs a C++ compiler; install one, or set train.compile=false",
}
PREEMPTED, LOST, INTERRUPTED = 75, 3, 130


def end(work: Callable[[], None]) -> None:
    """Run `work` and exit with 0, 1 for a bug, 2 for an error that the user can fix, or a code above."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
        if code == INTERRUPTED:  # click turns KeyboardInterrupt into this
            print("interrupted; run the same command again to resume", file=sys.stderr)
    except ConfigError as error:
        code = _refuse(error)
    except OSError as error:
        try:
            code = _refuse(ConfigError(os_problem(error)))
        except OSError:
            traceback.print_exc()
    except Preempted as stop:
        code = _stopped(stop)
    except Exception as error:
        dist = _dist()
        text = f"{type(error).__name__} {error}"
        remedy = next((remedy for part, remedy in REMEDIES.items() if part in text), None)
        if dist and (lost := dist.lost(error)):
            code = _survived(lost)
        elif remedy:
            code = _refuse(ConfigError(f"{reason(error)}: {remedy}"))
        else:
            traceback.print_exc()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on, Ctrl-C would only add a traceback
    if dist := _dist():
        dist.finish(code)
    sys.exit(code)


def _dist() -> Any:
    """The module `dist` if it was imported: it imports torch, which takes seconds."""
    return sys.modules.get("dbtrain.runtime.dist")


def _stopped(stop: Preempted) -> int:
    """Print a line on rank 0 and write the marker. 0 under torchrun, which treats other codes as failures."""
    if os.environ.get("RANK", "0") == "0":
        print(f"stopped: {stop}; run the same command again to resume", file=sys.stderr)
        if not preemption.interrupted():
            _mark(str(stop))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return 0
    return INTERRUPTED if preemption.interrupted() else PREEMPTED


def _survived(lost: Lost) -> int:
    """Print the error and write the marker on every rank, since any of them could be the only survivor."""
    text = f"rank {os.environ['RANK']}: {lost}"
    _tell_torchrun(text)
    if lost.ended:
        print(f"error: {text}", file=sys.stderr)
        return 2
    print(f"error: {text}; run the same command again to resume from the last checkpoint", file=sys.stderr)
    _mark(text)
    return LOST


def _mark(text: str) -> None:
    """Write the marker. On a full disk, say that it is missing, and end as with it."""
    try:
        preemption.mark(text)
    except OSError as error:
        print(f"error: the marker cannot be written: {reason(error)}", file=sys.stderr)


def _refuse(error: ConfigError) -> int:
    """Print what to fix: once per node if all ranks raise the error, otherwise with the rank's number."""
    dist = _dist()
    one_rank = dist and dist.is_initialized() and not error.shared
    prefix = f"rank {os.environ['RANK']}: " if one_rank else ""
    _tell_torchrun("; ".join(error.problems))
    if one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        for problem in error.problems:
            print(f"error: {prefix}{printable(problem)}", file=sys.stderr)
    return 2


def _tell_torchrun(text: str) -> None:
    """Give torchrun the error for its own report, which otherwise says `error_file: <N/A>`."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": f"error: {text}", "timestamp": f"{time.time():.0f}"}
        with contextlib.suppress(OSError):  # the error itself is printed in any case
            Path(path).write_text(
                json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8"
            )
