"""Links to the files of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from dbtrain.report.run import Run
from dbtrain.runtime import files
from dbtrain.runtime.run_folder import SHEET, TABLES


@dataclass(frozen=True)
class Link:
    """A file or folder. Outside the page's reach, `href` is empty and `text` is the whole path."""

    what: str
    text: str
    href: str
    size: str


@dataclass(frozen=True)
class Reach:
    """What a page can link to: files below `root`, which is moved together with the page; None: nothing."""

    page: Path | None
    root: Path | None

    @classmethod
    def of(cls, page: Path | None, runs: Sequence[Run]) -> Reach:
        """The page's folder; if that is one of several runs' folders, the folder that it lies in."""
        if not page:
            return cls(None, None)
        beside = len(runs) > 1 and page.parent in [run.folder for run in runs]
        return cls(page, page.parent.parent if beside else page.parent)

    def path_to(self, path: Path) -> str:
        """Relative path from the page to a file; empty for a file that it cannot link to."""
        if not self.page or not self.root or not path.is_relative_to(self.root):
            return ""
        return os.path.relpath(path, self.page.parent)

    def href(self, path: Path) -> str:
        """Relative URL from the page to a file or folder; empty for one that it cannot link to."""
        found = self.path_to(path)
        return f"./{quote(os.fsencode(found))}{'/' if path.is_dir() else ''}" if found else ""


def of_run(run: Run, reach: Reach) -> list[Link]:
    """Links to adapter files, images, scores, checkpoints and logs, in this order."""
    return [_link(what, path, reach) for what, path in _files(run)]


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


def _link(what: str, path: Path, reach: Reach) -> Link:
    parts = path.rglob("*") if path.is_dir() else [path]
    size = sum(part.stat().st_size for part in parts if part.is_file())
    return Link(what, reach.path_to(path) or str(path), reach.href(path), files.size_text(size))
