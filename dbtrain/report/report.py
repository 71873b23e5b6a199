"""One self-contained HTML file about one or several runs, or about a fleet.

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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

import dbtrain
from dbtrain.report import crops, curves, figures, fleet, links, palette, thumbs, usage, verdict
from dbtrain.report.figures import Figure, short
from dbtrain.report.run import Run, number, read_all
from dbtrain.runtime import files, fleet_status
from dbtrain.runtime.errors import ConfigError, printable
from dbtrain.runtime.run_folder import RunFolder

HERE = Path(__file__).parent
FEW = 4  # more runs than this have smaller pictures, and folded sections
SUBJECTS = 3  # most in the title
PHOTOS, PREVIEW = 4, 3  # most photos beside a run's images; most images in the table of runs
# For one run, few, and many: most images of a run, their longest side, and that in the table of runs, in px.
SIZES = ((8, 320, 0), (6, 256, 192), (4, 128, 96))
SCRIPTS = ("uPlot.iife.min.js", "page.js")
LOG_TAIL = 40  # last lines of log.txt on the page
SECRETS = (  # in URLs: user and password, a signed query
    (re.compile(r"(\w://)[^/@\s'\"]+@"), r"\1…@"),
    (re.compile(r"(\w://[^?\s'\"]+)\?[^\s'\"]+"), r"\1?…"),
)


@dataclass(frozen=True)
class View:
    """What the page says and shows of one run first, and its files."""

    run: Run
    verdict: verdict.Verdict
    words: usage.Words | None
    programs: list[usage.Program]
    commands: dict[str, str]
    photos: crops.Part
    samples: list[thumbs.Sample]
    preview: list[thumbs.Picture]  # in the table of all runs
    sheets: list[thumbs.Picture]
    own: curves.Group  # charts that do not compare runs
    links: list[links.Link]


def report(folders: Sequence[Path], out: Path | None = None, most_crops: int = 64) -> Path:
    """Write the page about the runs in these folders, or about the fleet in one, and return its path.

    `out`: by default `report.html` in the first folder. `most_crops`: stored crops of runs to decode.
    Raises ConfigError if a folder is not a run. The page itself says what a run is missing.
    """
    page = (files.expand(out) if out else RunFolder(folders[0]).report).resolve()
    files.write_atomically(page, html_of(folders, page, most_crops))
    return page


def html_of(folders: Sequence[Path], page: Path | None, most_crops: int = 0, live: str = "") -> str:
    """The HTML of the page about the runs in these folders, or about the fleet in one, for a file at `page`.

    `page`: None for one that is served, which has no links. `live`: the version of that one.
    """
    fleets = [names.path for names in map(RunFolder, folders) if (names.path / fleet_status.NAME).is_file()]
    if fleets and len(folders) > 1:
        raise ConfigError(f"{fleets[0]} is a fleet, which has a page of its own; give it alone, or only runs")
    if fleets:
        shown = fleet.view(fleets[0].resolve(), page)
        return filled(
            "fleet.html.jinja", len(shown.runs), fleet=shown, title=shown.name, many=True, live=live
        )
    runs = read_all(folders)
    return render(runs, links.Reach.of(page, runs), most_crops, live)


def render(runs: Sequence[Run], reach: links.Reach, most_crops: int, live: str = "") -> str:
    """The HTML of the page about runs."""
    many = len(runs) > FEW
    views = [view(run, reach, len(runs)) for run in runs]
    return filled(
        "page.html.jinja", len(runs), runs=runs, views=views, several=len(runs) > 1, many=many,
        title=title(runs), questions=verdict.questions(one.verdict.ratings for one in views),
        figures=table([figures.of_run(run) for run in runs]), groups=curves.groups(runs),
        score_names=dict.fromkeys(name for run in runs for name in run.scores),
        meanings={k: text for run in runs for k, text in run.score_labels.items()},
        score_curves=curves.scores(runs), timelines=thumbs.timelines(runs, by_seed=many),
        data=crops.data_sheets(runs, most_crops), differences=differences(runs), href=reach.href,
        number=number, log_tail=LOG_TAIL, live=live,
    )  # fmt: skip


def filled(template: str, count: int, live: str = "", **values: Any) -> str:
    """The HTML of a template with these values, and colours for `count` runs; `live`: see `html_of`."""
    versions = {
        "dbtrain": dbtrain.__version__, "torch": version("torch"), "diffusers": version("diffusers"),
        "Python": platform.python_version(),
    }  # fmt: skip
    script = "".join(_part(name) for name in (*SCRIPTS, *["live.js"] * bool(live)))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=without_secrets,
    )  # fmt: skip
    environment.filters["short"] = short
    return environment.get_template(template).render(
        now=f"{datetime.datetime.now():%Y-%m-%d %H:%M}", versions=versions,
        style=_part("uPlot.min.css") + _part("page.css"), script=script, licence=_part("uPlot.LICENSE"),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colours={theme: palette.colours(count, theme) for theme in palette.LIGHTNESS},
        live=live, **values,
    )  # fmt: skip


def view(run: Run, reach: links.Reach, count: int) -> View:
    """What to show of one of `count` runs; the more there are, the smaller its pictures."""
    most, side, small = SIZES[0 if count == 1 else 1 if count <= FEW else 2]
    preview = thumbs.samples(run, PREVIEW, small, 1) if small else []
    return View(
        run, verdict.verdict(run), usage.words(run.cfg), usage.programs(run), usage.commands(run),
        crops.photos_of(run.cfg, PHOTOS if count <= FEW else 0), thumbs.samples(run, most, side),
        [picture for shown in preview for picture in shown.pictures],
        thumbs.sheets(run) if count <= FEW else [],
        curves.of_one(run) if count > 1 else curves.Group("", []), links.of_run(run, reach),
    )  # fmt: skip


def title(runs: Sequence[Run]) -> str:
    """The subjects of the runs, or how many there are."""
    subjects = list(dict.fromkeys(run.subject for run in runs))
    return " · ".join(subjects) if len(subjects) <= SUBJECTS else f"{len(subjects)} subjects"


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
