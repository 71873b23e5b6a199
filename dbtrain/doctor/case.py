"""What `doctor` checks, and what its checks find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from dbtrain.runtime.errors import ConfigError, os_problem

if TYPE_CHECKING:
    from pathlib import Path

    from dbtrain.config import Config
    from dbtrain.data.photo_quality import PhotoQuality
    from dbtrain.data.shards import Manifest
    from dbtrain.models.base import Base

Level = Literal["ok", "warning", "error", "skipped", ""]  # "" continues the line above


@dataclass(frozen=True)
class Finding:
    """One finding: a line of the table, and how to fix it."""

    level: Level
    what: str
    cure: str = ""


ok, warning, error = partial(Finding, "ok"), partial(Finding, "warning"), partial(Finding, "error")


def findings_of(problem: ConfigError, cure: str = "", level: Level = "error") -> Iterator[Finding]:
    """One finding for each problem of a ConfigError.

    What follows a problem's last "; " is its cure. A problem without one gets `cure`.
    """
    for line in problem.problems:
        what, separator, own = line.rpartition("; ")
        yield Finding(level, what, own) if separator else Finding(level, line, cure)


def problems_of(rule: Callable[[], Any], cure: str) -> list[Finding]:
    """The problems that `rule`, another command's own check, raises as ConfigError; [] if it passes."""
    try:
        rule()
    except ConfigError as problem:
        return list(findings_of(problem, cure))
    return []


class Unknown(Exception):
    """A check needs something that an earlier check, the one named here, could not find out."""


FROM = {"base": "model", "photos": "photos", "manifest": "shards"}  # attribute of Case -> check that sets it


@dataclass
class Case:
    """The config to check, and what checks have found out for later ones."""

    cfg: Config
    ranks: int | None = None  # processes that will train, if given
    gib: float | None = None  # memory of a GPU elsewhere
    memory: bool = False  # whether to predict memory
    base: Base = field(init=False)
    photos: list[tuple[Path, PhotoQuality]] = field(init=False)  # the readable ones
    manifest: Manifest | None = field(init=False)  # None: there are no shards yet

    def __getattr__(self, name: str) -> Any:
        """Raise Unknown for what no check has found out."""
        if name not in FROM:
            raise AttributeError(name)
        raise Unknown(FROM[name])

    def knows(self, name: str) -> bool:
        return name in vars(self)


Check = Callable[..., Iterable[Finding]]


def run_check(check: Check, case: Case | None) -> Iterator[Finding]:
    """Run one check, and turn what it raises into findings. After a problem, "ok" is no longer claimed."""
    fine = True
    try:
        for found in check(case):
            fine = fine and found.level not in ("warning", "error")
            yield found if fine or found.level != "ok" else Finding("", found.what)
    except Unknown as missing:
        yield Finding("skipped", f"not checked: depends on '{missing}'")
    except ConfigError as problem:
        yield from findings_of(problem)
    except OSError as problem:
        yield error(os_problem(problem), "use a folder or file that can be read and written")


def for_each_subject(check: Check) -> Check:
    """The check for each of several subjects; its findings begin with the subject's token."""

    def every(case: Case) -> Iterator[Finding]:
        whole = case.cfg
        try:
            for one in whole.each_subject():
                case.cfg = one
                about = f"{one.subject.token}: " if whole.subjects else ""
                yield from (replace(found, what=f"{about}{found.what}") for found in check(case))
        finally:
            case.cfg = whole

    return every


def listed(names: Sequence[Any], most: int = 4) -> str:
    """The first `most` names, separated by commas, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
