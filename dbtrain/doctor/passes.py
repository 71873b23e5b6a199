"""How often each photo is trained on, and how much it counts."""

from __future__ import annotations

from collections.abc import Iterator

from dbtrain.data import emphasis, photos
from dbtrain.data.emphasis import Emphasis
from dbtrain.data.sources import folder_of
from dbtrain.doctor.case import Case, Finding, findings_of, listed, ok, warning
from dbtrain.prepare.images import left
from dbtrain.runtime.errors import ConfigError

SEEN = (20, 2000)  # times that each photo is trained on: guides say 80 to 1000


def repeats(case: Case) -> Iterator[Finding]:
    """Photos that are seen more often than others, or count more or less; nothing if that is not set."""
    cfg = case.cfg.prepare
    if not cfg or not (cfg.subfolders or cfg.repeats or cfg.weights):
        return
    every = _emphasis(case)
    try:
        emphasis.check(cfg, [name for one in every for name in one])
    except ConfigError as problem:
        yield from findings_of(problem)
    for one in every:
        groups: dict[Emphasis, list[str]] = {}
        for name, how in one.items():
            groups.setdefault(how, []).append(name)
        for how, names in sorted(groups.items()):
            yield ok(f"{', '.join(how.about()) or 'once an epoch'}: {listed(names)}")


def _emphasis(case: Case) -> list[dict[str, Emphasis]]:
    """That of each subject's readable photos, by name."""
    found = []
    for one in filter(None, (one.prepare for one in case.cfg.each_subject())):
        folder = folder_of(one.photos)
        mine = [path for path, _ in case.photos if path.is_relative_to(folder)]
        names = photos.named(one, mine).values()
        found.append(emphasis.of_photos({name: name for name in names}, one))
    return found


def passes(case: Case) -> Iterator[Finding]:
    """How often each photo is trained on, over the whole run."""
    cfg, count = case.cfg, len(case.photos)
    if not count:
        yield Finding("skipped", "not checked: no photo can be read")
        return
    often = [how.repeats for one in _emphasis(case) for how in one.values()] or [1]
    if cfg.prepare:
        count = left(cfg.prepare, "instance", count)
    rows = count * sum(often) / len(often)  # of an epoch
    least, most = (
        cfg.train.steps * cfg.train.global_batch * times / rows for times in (min(often), max(often))
    )
    each = f"{least:.3g}" + (f" to {most:.3g}" if most > least else "")
    text = f"{cfg.train.steps} steps of {cfg.train.global_batch} images: each of {count} photos {each} times"
    low, high = SEEN
    if low <= least and most <= high:
        yield ok(text)
        return
    steps = max(1, round(100 * rows / cfg.train.global_batch))
    effect = "too rarely to learn it" if least < low else "which overfits"
    yield warning(f"{text}, {effect}; usual are {low} to {high}", f"start with train.steps={steps}")
