"""How a process ends: its exit code, and what a user is told of what went wrong."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from dbtrain.runtime import preemption
from dbtrain.runtime.errors import ConfigError, Lost, Preempted, os_problem, reason

# What torch raises for things that a user can help, by a word of the error's kind or message.
CURES = {
    "OutOfMemoryError": "make batches smaller (train.micro_batch, prepare.sampling.batch, sample.batch), "
    "or set train.gradient_checkpointing; `dbtrain doctor CONFIG --memory` says what fits",
    "InvalidCxxCompiler": "train.compile needs a C++ compiler; install one, or set train.compile=false",
}
PREEMPTED, LOST, INTERRUPTED = 75, 3, 130


def end(work: Callable[[], None]) -> None:
    """Do the work and exit: 0 done, 2 the user can fix it, 1 a bug, and see above."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
        if code == INTERRUPTED:  # click's word for a KeyboardInterrupt
            print("interrupted; run the same command again to go on", file=sys.stderr)
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
        lost = (
            sys.modules["dbtrain.runtime.dist"].lost(error) if "dbtrain.runtime.dist" in sys.modules else None
        )
        cure = next((cure for kind, cure in CURES.items() if kind in f"{type(error).__name__} {error}"), None)
        if lost:
            code = _alone(lost)
        elif cure:
            code = _refuse(ConfigError(f"{reason(error)}: {cure}"))
        else:
            traceback.print_exc()
    if "dbtrain.runtime.dist" in sys.modules:
        sys.modules["dbtrain.runtime.dist"].finish(code)
    sys.exit(code)


def _stopped(stop: Preempted) -> int:
    """Say so once, and leave the marker. Under torchrun 0, as its agent takes all else for a failure."""
    if os.environ.get("RANK", "0") == "0":
        print(f"stopped: {stop}; run the same command again to go on", file=sys.stderr)
        if not preemption.interrupted():
            preemption.mark(str(stop))
    if preemption.interrupted():
        return INTERRUPTED
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else PREEMPTED


def _alone(lost: Lost) -> int:
    """Every survivor speaks and leaves the marker: any of them may be the only one."""
    text = f"rank {os.environ['RANK']}: {lost}"
    if lost.ended:
        print(f"error: {text}", file=sys.stderr)
        return 2
    print(f"error: {text}; run the same command again to go on from the last checkpoint", file=sys.stderr)
    try:
        preemption.mark(text)
    except OSError as error:
        print(f"error: {os_problem(error)}", file=sys.stderr)
    return LOST


def _refuse(error: ConfigError) -> int:
    """Tell the user what to fix. What all ranks know is said once a node; else the rank has a name."""
    distributed = (
        "dbtrain.runtime.dist" in sys.modules and sys.modules["dbtrain.runtime.dist"].is_initialized()
    )
    alone = distributed and not error.shared
    who = f"rank {os.environ['RANK']}: " if alone else ""
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        for problem in error.problems:
            print(f"error: {who}{problem}", file=sys.stderr)
    return 2
