"""A fleet's status on the terminal. `runtime/fleet_status.py` has the status itself."""

from __future__ import annotations

from dbtrain.runtime.errors import printable
from dbtrain.runtime.fleet_status import Status


def table(status: Status) -> list[str]:
    """A line for each subject, with its problem if it failed, and a last line of totals."""
    width = max((len(printable(one.name)) for one in status.subjects), default=0)
    lines = []
    for one in status.subjects:
        problem = f"  {printable(one.problem)}" if one.problem else ""
        lines.append(f"{one.state:8} {printable(one.name):{width}} {one.step:>6} of {one.steps}{problem}")
    return [*lines, totals(status)]


def totals(status: Status) -> str:
    """How many subjects are in each state, and how many are done an hour."""
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items() if count)
    rate = f"; {status.per_hour:.3g} done an hour" if status.per_hour else ""
    return f"{len(status.subjects)} subjects: {counts or 'none'}{rate}"
