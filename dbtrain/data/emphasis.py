"""How often each photo is seen, and how much its loss counts: by the folder it is in, and by patterns.

A pattern is that of a shell, for the path of a photo relative to the folder of the photos, or for that of a
folder, which has all photos below it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

from dbtrain.config import Prepare
from dbtrain.config.base import MOST_REPEATS
from dbtrain.runtime.errors import ConfigError, printable

K = TypeVar("K")
T = TypeVar("T")

NUMBERED = re.compile(r"(\d+)_")  # 10_sks dog: a folder of kohya's scripts, each photo 10 times
NAMED = 5  # most photos or folders in a message


class Emphasis(NamedTuple):
    """How often a photo is seen, relative to the others, and a factor of its loss."""

    repeats: int = 1
    weight: float = 1.0

    def about(self) -> list[str]:
        """Phrases for what is not 1."""
        often = [f"{self.repeats} times an epoch"] if self.repeats != 1 else []
        return often + ([f"loss × {self.weight:g}"] if self.weight != 1 else [])


def of_photos(names: Mapping[K, str], cfg: Prepare) -> dict[K, Emphasis]:
    """`of_photo` for each of some photos; the repeats are as small as their proportions allow."""
    found = {key: of_photo(name, cfg) for key, name in names.items()}
    often = reduced([one.repeats for one in found.values()])
    return {key: one._replace(repeats=count) for (key, one), count in zip(found.items(), often, strict=True)}


def of_rows(sources: Sequence[K], times: Sequence[int], photos: Mapping[K, Emphasis]) -> list[Emphasis]:
    """That of each stored row of some photos, so that a photo is seen as often as `photos` says.

    Some have more rows than others, or the same row several `times`.
    """
    counts: Counter[K] = Counter()
    for source, count in zip(sources, times, strict=True):
        counts[source] += count
    common = math.lcm(*counts.values())
    each = [photos[source] for source in sources]
    often = reduced([one.repeats * count * (common // counts[source])
                     for one, source, count in zip(each, sources, times, strict=True)])  # fmt: skip
    return [one._replace(repeats=count) for one, count in zip(each, often, strict=True)]


def reduced(counts: Sequence[int]) -> list[int]:
    """The smallest numbers of the same proportions, or nearly so: at most MOST_REPEATS."""
    divisor = max(math.gcd(*counts), max(counts, default=0) / MOST_REPEATS)
    return [max(1, round(count / divisor)) for count in counts]


def of_photo(name: str, cfg: Prepare) -> Emphasis:
    """That of a photo by its name, as the settings have it.

    Raises ConfigError if its folder's number is too large to be one of repeats.
    """
    return Emphasis(_repeats(name, cfg), _last(cfg.weights, name) or 1.0)


def check(cfg: Prepare, names: Collection[str]) -> None:
    """Raise ConfigError if a pattern matches none of these photos."""
    problems = [
        f"prepare.{key}: '{pattern}' matches no photo; {_instead(pattern, names)}"
        for key, patterns in (("repeats", cfg.repeats), ("weights", cfg.weights))
        for pattern in patterns
        if not any(_matches(pattern, name) for name in names)
    ]
    if problems:
        raise ConfigError(*problems)


def _repeats(name: str, cfg: Prepare) -> int:
    """By the last pattern that matches, else by the number of the nearest folder that has one."""
    if given := _last(cfg.repeats, name):
        return given
    for folder in _folders(name):
        if number := NUMBERED.match(PurePosixPath(folder).name):
            if (count := int(number[1])) > MOST_REPEATS:  # rather a year
                raise ConfigError(
                    f"prepare.photos: its folder '{folder}' has a name by which photos are seen {count} "
                    f"times as often; rename it, or set prepare.repeats to {{'{folder}': 1}}"
                )
            return count
    return 1


def _last(patterns: Mapping[str, T], name: str) -> T | None:
    """The value of the last pattern that matches a photo's name."""
    return next((patterns[one] for one in reversed(list(patterns)) if _matches(one, name)), None)


def _matches(pattern: str, name: str) -> bool:
    pattern = pattern.removesuffix("/")
    return any(one == pattern or fnmatchcase(one, pattern) for one in (name, *_folders(name)))


def _folders(name: str) -> Iterator[str]:
    """The folders that a photo is in, the nearest first."""
    return (str(folder) for folder in PurePosixPath(name).parents if folder.name)


def _instead(pattern: str, names: Collection[str]) -> str:
    """What could be meant."""
    folders = dict.fromkeys(folder for name in names for folder in _folders(name))
    if near := difflib.get_close_matches(pattern, [*folders, *names], n=1, cutoff=0.7):
        return printable(f"did you mean '{near[0]}'?")
    what, there = ("folders", [*folders]) if folders else ("photos", [*names])
    more = f" and {len(there) - NAMED} more" if len(there) > NAMED else ""
    return printable(f"the {what} are {', '.join(there[:NAMED])}{more}")
