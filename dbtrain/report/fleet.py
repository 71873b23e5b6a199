"""What the page about a fleet shows: its totals, and a row for each subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dbtrain.report import crops, curves, thumbs, verdict
from dbtrain.report.links import Reach
from dbtrain.report.run import METRICS, Run, read
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.fleet_status import State, Status, Subject
from dbtrain.runtime.run_folder import RunFolder

PICTURES, PHOTOS = 3, 2  # most of each in a row
LOSSES = {"loss_instance": "Instance loss", "loss_prior": "Class loss"}  # by column of the metrics
POINTS = 40  # most of a small curve
URGENCY: tuple[State, ...] = ("failed", "training", "waiting", "done")  # what to look at first
LEVELS = {"failed": verdict.POOR, "done": verdict.GOOD}  # colours of the bars
WIDTH, HEIGHT = 96, 24  # px, of a small curve


@dataclass(frozen=True)
class Loss:
    """The mean of a loss over the last tenth of the steps, and its curve as an SVG path."""

    last: float
    path: str


@dataclass(frozen=True)
class Row:
    """One subject. `run` is None if there is no run folder yet, or `problem` says why it cannot be read."""

    subject: Subject
    run: Run | None
    problem: str
    href: str  # of the subject's own report, or else of its run folder; empty for one out of reach
    losses: dict[str, Loss]  # by title
    ratings: dict[str, verdict.Rating]  # by question
    images: list[thumbs.Picture]
    photos: list[thumbs.Picture]

    @property
    def share(self) -> float:
        """How much of its steps the subject has behind it."""
        return self.subject.step / max(1, self.subject.steps)

    @property
    def percent(self) -> str:
        return f"{100 * self.share:.0f}%"

    @property
    def level(self) -> str:
        return LEVELS.get(self.subject.state, "")

    @property
    def rank(self) -> float:
        """Where the row comes by its state and, within one, by its steps."""
        return URGENCY.index(self.subject.state) + self.share / 2


@dataclass(frozen=True)
class Fleet:
    name: str
    status: Status
    rows: list[Row]
    reach: Reach

    @property
    def runs(self) -> list[Run]:
        """The run folders that could be read."""
        return [row.run for row in self.rows if row.run]

    @property
    def places(self) -> dict[str, int]:
        """The place of each subject in the order of the alphabet."""
        return {name: k for k, name in enumerate(sorted(one.name for one in self.status.subjects))}

    @property
    def states(self) -> dict[str, int]:
        """How many subjects are in each state that any is in."""
        return {state: count for state, count in self.status.counts.items() if count}

    @property
    def losses(self) -> list[str]:
        """The losses that any subject has."""
        return [title for title in LOSSES.values() if any(title in row.losses for row in self.rows)]

    @property
    def questions(self) -> list[str]:
        return verdict.questions(list(row.ratings.values()) for row in self.rows)

    @property
    def charts(self) -> curves.Group:
        return curves.losses(self.runs)

    def mean(self, question: str) -> tuple[float, int]:
        """The mean answer to a question, and of how many subjects."""
        shares = [row.ratings[question].share for row in self.rows if question in row.ratings]
        return sum(shares) / len(shares), len(shares)


def view(folder: Path, page: Path | None) -> Fleet:
    """The fleet in a folder, for a page at `page`. Raises ConfigError if its fleet.json is damaged."""
    status, reach = Status.read(folder), Reach(page, page and page.parent)
    side = thumbs.side(len(status.subjects) * (PICTURES + PHOTOS))
    return Fleet(folder.name, status, [_row(folder, one, reach, side) for one in status.subjects], reach)


def _row(fleet: Path, subject: Subject, reach: Reach, side: int) -> Row:
    names = RunFolder(fleet / subject.run)
    run, problem = None, subject.problem or ""
    if names.config.is_file():
        try:
            run = read(names.path, subject.name)
        except ConfigError as error:
            problem = problem or str(error)
    if run is None:
        return Row(subject, None, problem, "", {}, {}, [], [])
    samples = thumbs.samples(run, PICTURES, side, first=PICTURES)
    photos = crops.photos_of(run.cfg, PHOTOS, side)
    return Row(
        subject, run, problem or photos.problem,
        reach.href(names.report if names.report.is_file() else names.path), _losses(run),
        {rating.measure.question: rating for rating in verdict.ratings(run.scores)},
        [picture for sample in samples for picture in sample.pictures], photos.pictures,
    )  # fmt: skip


def _losses(run: Run) -> dict[str, Loss]:
    found = {}
    for key, title in LOSSES.items():
        _, values = run.values(METRICS, key)
        last = curves.mean(values[-max(1, len(values) // 10) :])
        if last is not None:
            found[title] = Loss(last, path(curves.thinned(list(range(len(values))), values, POINTS)[1]))
    return found


def path(values: Sequence[float | None]) -> str:
    """An SVG path through the values, WIDTH by HEIGHT px, with a gap where one is None."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    across, up = WIDTH / max(1, len(values) - 1), HEIGHT / ((high - low) or 1)
    parts, pen = [], "M"
    for k, value in enumerate(values):
        if value is not None:
            parts.append(f"{pen}{k * across:.1f} {HEIGHT - (value - low) * up:.1f}")
        pen = "M" if value is None else "L"
    return "".join(parts)
