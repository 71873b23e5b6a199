"""Links to the files of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from dbtrain.report.run import Run
from dbtrain.runtime import files
from dbtrain.runtime.run_folder import SHEET, TABLES


@dataclass(frozen=True)
class Link:
    """A file or folder. Outside the page's folder, `href` is empty and `text` is the whole path."""

    what: str
    text: str
    href: str
    size: str


def of_run(run: Run, page: Path) -> list[Link]:
    """Links to adapter files, images, scores, checkpoints and logs, in this order."""
    return [_link(what, path, page) for what, path in _files(run)]


def _files(run: Run) -> Iterator[tuple[str, Path]]:
    names = run.names
    for path in sorted(names.export.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            yield ("adapter" if path.suffix == ".safetensors" else "export"), path
    for folder, pattern in ((names.samples, "*/"), (names.scores, ""), (names.validation, "*/")):
        yield from (("images", path) for path in sorted(folder.glob(pattern + SHEET)))
    yield from (("scores", path) for path in sorted(names.scores.glob("*.json")))
    yield from (("checkpoint", path) for path in names.checkpoints())
    logs = (names.config, names.log, *map(names.table, TABLES))
    yield from (("log", path) for path in logs if path.is_file())


def _link(what: str, path: Path, page: Path) -> Link:
    href = href_of(path, page)
    text = str(path.relative_to(page.parent)) if href else str(path)
    parts = path.rglob("*") if path.is_dir() else [path]
    size = sum(part.stat().st_size for part in parts if part.is_file())
    return Link(what, text, href, files.size_text(size))


def href_of(path: Path, page: Path) -> str:
    """Relative URL from the page to a file below its folder; empty for other files."""
    if not path.is_relative_to(page.parent):
        return ""
    return (
        "./" + quote(os.fsencode(path.relative_to(page.parent).as_posix())) + ("/" if path.is_dir() else "")
    )
