"""A config looked at before it is queued: everything that would fail, found at once and in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dbtrain.config import Config
from dbtrain.doctor import environment as machine_checks
from dbtrain.doctor import settings as setting_checks
from dbtrain.doctor.case import Case, Check, Found, looked, ok, ranks_of, refused
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.imports import importing

WIDTH = 16  # of the names of checks
# Without a config; before torch is imported.
ANYWAY: tuple[tuple[str, Check], ...] = (
    ("packages", machine_checks.versions),
    ("processes", machine_checks.started),
)
EARLY: tuple[tuple[str, Check], ...] = (
    ("prompts", setting_checks.prompts),
    ("learning rates", setting_checks.rates),
    ("job", machine_checks.job),
)


def _later() -> tuple[tuple[str, Check], ...]:
    """What needs torch, which takes two seconds to import. Each needs only what stands above it."""
    with importing(at_start=True):
        from dbtrain.doctor import base_model, disk, gpu, photos, shards_and_run

    return (
        ("extras", machine_checks.packages),
        ("model", base_model.model),
        ("adapter", base_model.adapter),
        ("photos", photos.photos),
        ("passes", photos.passes),
        ("class images", photos.of_class),
        ("pictures", photos.drawn),
        ("shards", shards_and_run.shards),
        ("batch", shards_and_run.batch),
        ("run folder", shards_and_run.run_folder),
        ("writing", disk.writing),
        ("disk", disk.disk),
        ("GPU", gpu.gpu),
        ("compiling", gpu.compiling),
        ("Hub", base_model.hub),
        ("memory", memory),
    )


def check(
    config: Path,
    overrides: Sequence[str] = (),
    ranks: int | None = None,
    gib: float | None = None,
    memory: bool = False,
    dry_run: bool = False,
) -> Iterator[tuple[str, Found]]:
    """(check, what it found) of all checks, as they are made; none of them stops the others.

    Nothing is written, downloaded or loaded, but for `dry_run`. `ranks`: processes that are to train.
    `gib`: memory of the GPU that is to train, if it is not this machine's.
    """
    cfg = None
    try:
        cfg = Config.load(config, overrides)
    except ConfigError as problem:
        cure = "correct it in the file, or put section.key=value after it"
        yield from (("config", found) for found in refused(problem, cure))
    case = Case(cfg, ranks, gib, memory or gib is not None) if cfg else None
    tables = [ANYWAY]
    if case:
        yield "config", next(iter(setting_checks.loaded(case)))
        tables.append(EARLY)
    for table in tables:
        yield from _each(table, case)
    if case:
        yield from _each(_later(), case)
        if dry_run:
            with importing(at_start=True):
                from dbtrain.doctor import dry_run as rehearsal

            yield from (("dry run", found) for found in looked(rehearsal.dry_run, case))


def _each(table: Sequence[tuple[str, Check]], case: Case | None) -> Iterator[tuple[str, Found]]:
    for name, one in table:
        for found in looked(one, case):
            yield name, found


def memory(case: Case) -> Iterator[Found]:
    """What training takes on each device, if asked for: that runs a step, on tensors without content."""
    if not case.memory:
        yield ok(
            "not asked for: --memory predicts it (half a minute for SDXL), --gib SIZE for a GPU elsewhere"
        )
        return
    _ = case.base  # raises Unknown: it would be downloaded
    with importing():
        from dbtrain.doctor import memory as predicted
    from dbtrain.doctor.gpu import gpus

    lines = predicted.report(case.cfg, case.gib, ranks_of(case, gpus(case)))
    yield ok(next(lines))
    yield from (Found("", line) for line in lines)


def table(found: Iterator[tuple[str, Found]]) -> Iterator[str]:
    """Lines of the table, as they come; the last one counts."""
    counts = {"error": 0, "warning": 0}
    last = ""
    for name, one in found:
        if one.level in counts:
            counts[one.level] += 1
        title = name if name != last else ""
        last = name
        yield f"{one.level:8} {title:{WIDTH}} {one.what}"
        if one.cure:
            yield f"{'':8} {'':{WIDTH}} -> {one.cure}"
    yield ", ".join(f"{count or 'no'} {level}{'s' * (count != 1)}" for level, count in counts.items())
