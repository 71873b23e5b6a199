"""Checks of a config before a job is queued: everything that would fail, found in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path

from dbtrain.config import Config
from dbtrain.doctor import environment as machine_checks
from dbtrain.doctor import settings as setting_checks
from dbtrain.doctor.case import Case, Check, Finding, findings_of, for_each_subject, ok, run_check
from dbtrain.runtime.errors import ConfigError, printable
from dbtrain.runtime.imports import importing

WIDTH = 16  # of the column with the names of checks
# Checks that need neither a config nor torch.
ANYWAY: tuple[tuple[str, Check], ...] = (
    ("packages", machine_checks.versions),
    ("processes", machine_checks.started),
)
# Checks that need a config, but not torch.
EARLY: tuple[tuple[str, Check], ...] = (
    ("prompts", for_each_subject(setting_checks.prompts)),
    ("learning rates", setting_checks.rates),
    ("job", machine_checks.job),
)


def _later() -> tuple[tuple[str, Check], ...]:
    """Checks that need torch, which takes two seconds to import. Each one depends only on earlier ones."""
    with importing(at_start=True):
        from dbtrain.doctor import base_model, captions, disk, gpu, passes, photos, shards_and_run
        from dbtrain.doctor.text_encoders import text_encoders

    return (
        ("extras", machine_checks.packages),
        ("model", base_model.model),
        ("adapter", base_model.adapter),
        ("photos", for_each_subject(photos.photos)),
        ("captions", for_each_subject(captions.captions)),
        ("captions", captions.table),
        ("prompt length", captions.prompts),
        ("text encoders", text_encoders),
        ("repeats", passes.repeats),
        ("passes", passes.passes),
        ("class images", photos.of_class),
        ("images", photos.generated_images),
        ("shards", shards_and_run.shards),
        ("batch", shards_and_run.batch),
        ("stop", shards_and_run.stopping),
        ("run folder", shards_and_run.run_folder),
        ("write access", disk.writing),
        ("disk", disk.disk),
        ("GPU", gpu.gpu),
        ("compiler", gpu.compiling),
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
) -> Iterator[tuple[str, Finding]]:
    """Run all checks, and yield (name of the check, finding). No check stops the others.

    Writes, downloads and loads nothing, unless `dry_run`. `ranks`: processes that will train. `gib`: memory
    of the GPU that will train, if it is not in this machine.
    Raises ConfigError if `gib` is not a size.
    """
    if gib is not None and not 0 < gib < inf:
        raise ConfigError(f"--gib is {gib:g}, which is not the size of a GPU's memory; use e.g. --gib 24")
    # The config itself.
    cfg = None
    try:
        cfg = Config.load(config, overrides)
    except ConfigError as problem:
        cure = "fix the file, or override it with section.key=value"
        yield from (("config", found) for found in findings_of(problem, cure))
    case = Case(cfg, ranks, gib, memory or gib is not None) if cfg else None
    if case:
        yield "config", setting_checks.loaded(case)
    # Checks in the order of what they need to import.
    yield from _each(ANYWAY, case)
    if not case:
        return
    yield from _each(EARLY, case)
    yield from _each(_later(), case)
    # The dry run.
    if dry_run:
        with importing(at_start=True):
            from dbtrain.doctor import dry_run as trial

        yield from _each((("dry run", trial.dry_run),), case)
    # What it measured is used here.
    from dbtrain.doctor import time

    yield from _each((("time", time.time),), case)


def _each(table: Sequence[tuple[str, Check]], case: Case | None) -> Iterator[tuple[str, Finding]]:
    for name, one in table:
        yield from ((name, found) for found in run_check(one, case))


def memory(case: Case) -> Iterator[Finding]:
    """The memory that training takes on each device, if asked for: runs a step on fake tensors."""
    if not case.memory:
        yield ok("not predicted; use --memory (a minute or two for SDXL), or --gib SIZE for a GPU elsewhere")
        return
    _ = case.base  # raises Unknown instead of downloading it
    with importing():
        from dbtrain.doctor import forecast
    from dbtrain.doctor.gpu import ranks_of

    lines = forecast.report(case.cfg, case.gib, ranks_of(case))
    yield ok(next(lines))
    yield from (Finding("", line) for line in lines)


def table(found: Iterator[tuple[str, Finding]]) -> Iterator[str]:
    """Lines of the table as the findings come in; the last line counts errors and warnings."""
    counts = {"error": 0, "warning": 0}
    last = ""
    for name, one in found:
        if one.level in counts:
            counts[one.level] += 1
        title = name if name != last else ""
        last = name
        yield f"{one.level:8} {title:{WIDTH}} {printable(one.what)}"
        if one.cure:
            yield f"{'':8} {'':{WIDTH}} -> {printable(one.cure)}"
    yield ", ".join(f"{count or 'no'} {level}{'s' * (count != 1)}" for level, count in counts.items())
