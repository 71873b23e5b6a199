"""One self-contained HTML file about one or several runs.

Styles, script, curves and images are all in the file, and its content security policy forbids it to load
anything else, so it works offline and from a file share. uPlot (MIT) draws the curves: it is 50 KB, where
plotly.js is 4.7 MB. The copy in this folder is unmodified.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

import dbtrain
from dbtrain.report import crops, curves, figures, links, thumbs
from dbtrain.report.figures import Figure, short
from dbtrain.report.links import href_of
from dbtrain.report.run import Run, number, read_all
from dbtrain.runtime import files
from dbtrain.runtime.errors import printable

HERE = Path(__file__).parent
COLOURS = 8  # of runs, in page.css; more runs repeat them
LOG_TAIL = 40  # last lines of log.txt on the page
SECRETS = (  # in URLs: user and password, a signed query
    (re.compile(r"(\w://)[^/@\s'\"]+@"), r"\1…@"),
    (re.compile(r"(\w://[^?\s'\"]+)\?[^\s'\"]+"), r"\1?…"),
)


def report(folders: Sequence[Path], out: Path | None = None, most_crops: int = 64) -> Path:
    """Write the page about the runs in these folders, and return its path.

    `out`: by default `report.html` in the first folder. `most_crops`: stored crops to decode per data set.
    Raises ConfigError if a folder is not a run. The page itself says what a run is missing.
    """
    runs = read_all(folders)
    page = (files.expand(out) if out else runs[0].names.report).resolve()
    files.write_atomically(page, render(runs, page, most_crops))
    return page


def render(runs: Sequence[Run], page: Path, most_crops: int) -> str:
    """The page's HTML, for a file at `page`."""
    versions = {
        "dbtrain": dbtrain.__version__, "torch": version("torch"), "diffusers": version("diffusers"),
        "Python": platform.python_version(),
    }  # fmt: skip
    score_names = dict.fromkeys(name for run in runs for name in run.scores)
    script = "".join(_part(name) for name in ("uPlot.iife.min.js", "page.js"))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        finalize=without_secrets,
    )  # fmt: skip
    environment.filters["short"] = short
    return environment.from_string(_part("page.html.jinja")).render(
        runs=runs, title=" · ".join(dict.fromkeys(run.subject for run in runs)), colours=COLOURS,
        now=f"{datetime.datetime.now():%Y-%m-%d %H:%M}", versions=versions,
        style=_part("uPlot.min.css") + _part("page.css"), script=script, licence=_part("uPlot.LICENSE"),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        figures=table([figures.of_run(run) for run in runs]), groups=curves.groups(runs),
        scores={name: [run.scores.get(name) for run in runs] for name in score_names},
        meanings={k: text for run in runs for k, text in run.score_labels.items()},
        score_curves=curves.scores(runs), timelines=thumbs.timelines(runs),
        sheets=[thumbs.sheets(run) for run in runs], data=crops.data_sheets(runs, most_crops),
        differences=differences(runs), links=[links.of_run(run, page) for run in runs],
        href=lambda path: href_of(path, page), number=number, log_tail=LOG_TAIL,
    )  # fmt: skip


def table(columns: Sequence[Sequence[Figure]]) -> dict[str, list[Figure | None]]:
    """The figures of all runs by label; None where a run does not have one."""
    labels = dict.fromkeys(figure.label for column in columns for figure in column)
    by_label = [{figure.label: figure for figure in column} for column in columns]
    return {label: [column.get(label) for column in by_label] for label in labels}


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings in which the runs differ, except run_dir: dotted key -> each run's value."""
    flat = [dict(_flat(run.cfg.model_dump(mode="json", exclude={"run_dir"}))) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    values = {key: [one.get(key) for one in flat] for key in keys}
    return {key: every for key, every in values.items() if any(value != every[0] for value in every)}


def without_secrets(value: Any) -> Any:
    """A value to show: without control characters, and without credentials in URLs, as pages travel."""
    if not isinstance(value, str) or hasattr(value, "__html__"):  # the latter: markup of the page itself
        return value
    for pattern, replacement in SECRETS:
        value = pattern.sub(replacement, value)
    return "\n".join(map(printable, value.split("\n")))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _part(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
