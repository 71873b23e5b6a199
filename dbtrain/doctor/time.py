"""How long the job takes, and the time limit to ask SLURM for."""

from __future__ import annotations

from collections.abc import Iterator

from dbtrain.doctor.case import Case, Finding, ok
from dbtrain.doctor.gpu import ranks_of
from dbtrain.prepare import duration
from dbtrain.runtime.errors import ConfigError

MOST = 3  # devices to list


def time(case: Case) -> Iterator[Finding]:
    """The time of the whole job on each device on which these settings were measured."""
    _ = case.base  # raises Unknown instead of guessing what is left to do
    try:
        todo = duration.Todo.of(case.cfg)
    except ConfigError:
        yield Finding("skipped", "not estimated: the job would end with an error above")
        return
    if todo == duration.Todo():
        yield ok("nothing is left to do")
        return
    found = [speed for speed in duration.speeds(case.cfg, ranks_of(case)) if speed.told(case.cfg, todo)]
    if not found:
        yield ok("unknown: nothing was measured yet with these settings and number of processes",
                 "run doctor --dry-run where the job will run; a run measures it too")  # fmt: skip
    for speed in found[:MOST]:
        limit = duration.slurm_time(speed.total(case.cfg, todo), case.cfg.faults.stop_before_s)
        yield ok(speed.told(case.cfg, todo), f"on SLURM: sbatch --time={limit} launch/train.sbatch CONFIG")
    if found and not any(speed.gpu for speed in found):
        yield Finding("", "not the time on a cluster's GPU: to measure that, run doctor --dry-run in a job")
