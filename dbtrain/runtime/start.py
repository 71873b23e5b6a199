"""How a process begins: its first line, before the seconds that torch takes to import."""

from __future__ import annotations

import os
import sys

from dbtrain.runtime.errors import printable


def is_main() -> bool:
    """Whether this is rank 0 of torchrun or srun, or the only process."""
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == "0"


def say(verb: str, what: str) -> None:
    """Say on rank 0 what begins."""
    if is_main():
        print(printable(f"dbtrain {verb}: {what}; loading libraries"), file=sys.stderr, flush=True)
