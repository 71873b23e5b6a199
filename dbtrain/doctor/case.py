"""What `doctor` finds, and what it is given to look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dbtrain.runtime.errors import ConfigError, os_problem

if TYPE_CHECKING:
    from pathlib import Path

    from dbtrain.config import Config
    from dbtrain.data.photo_quality import PhotoQuality
    from dbtrain.data.shards import Manifest
    from dbtrain.models.base import Base

Answer = TypeVar("Answer")
LEVELS = ("ok", "warning", "error", "skipped", "")


@dataclass(frozen=True)
class Found:
    """One line of the table."""

    level: str  # one of LEVELS; "" goes on with the line above
    what: str
    cure: str = ""


def ok(what: str) -> Found:
    return Found("ok", what)


def warning(what: str, cure: str) -> Found:
    return Found("warning", what, cure)


def error(what: str, cure: str) -> Found:
    return Found("error", what, cure)


def refused(problem: ConfigError, cure: str = "", level: str = "error") -> Iterator[Found]:
    """What a verb's own rule says, a line each, its cure apart; `cure` where it names none."""
    for line in problem.problems:
        what, named, own = line.rpartition("; ")
        yield Found(level, what, own) if named else Found(level, line, cure)


def ruled(rule: Callable[[], Any], cure: str, level: str = "error") -> list[Found]:
    """What is wrong by a verb's own rule; nothing if it does not raise."""
    try:
        rule()
    except ConfigError as problem:
        return list(refused(problem, cure, level))
    return []


class Unknown(Exception):
    """What a check builds on is not known; the check named in it has told why."""


FROM = {"base": "model", "photos": "photos", "manifest": "shards"}


@dataclass
class Case:
    """What is checked, and what the checks have found out for those after them."""

    cfg: Config
    ranks: int | None = None  # as asked for
    gib: float | None = None  # memory of a GPU elsewhere
    memory: bool = False  # whether to predict it
    base: Base = field(init=False)
    photos: list[tuple[Path, PhotoQuality]] = field(init=False)  # those that can be read
    manifest: Manifest | None = field(init=False)  # None: there are no shards yet

    def __getattr__(self, name: str) -> Any:
        """What has not been found out."""
        if name not in FROM:
            raise AttributeError(name)
        raise Unknown(FROM[name])

    def knows(self, name: str) -> bool:
        return name in vars(self)


Check = Callable[..., Iterable[Found]]


def looked(check: Check, case: Case | None) -> Iterator[Found]:
    """What one check finds, whatever it runs into. Beside something wrong, what is right is no verdict."""
    fine = True
    try:
        for found in check(case):
            fine = fine and found.level not in ("warning", "error")
            yield found if fine or found.level != "ok" else Found("", found.what)
    except Unknown as missing:
        yield Found("skipped", f"not checked: needs what '{missing}' could not find")
    except ConfigError as problem:
        yield from refused(problem)
    except OSError as problem:
        yield error(os_problem(problem), "give a folder or file that can be read and written")


def listed(names: Sequence[Any], most: int = 4) -> str:
    """Names in a line, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def ranks_of(case: Case, gpus: int = 0) -> int:
    """How many processes are to train: as asked, as started, or one a GPU."""
    started = os.environ.get("WORLD_SIZE", "")
    if case.ranks:
        return case.ranks
    return int(started) if started.isdigit() and int(started) else max(1, gpus)
