"""The curves of a page, as lists of numbers that the page's script draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dbtrain.report.run import METRICS, SPEED, TIMESTEPS, VALIDATION, Line, Run, number
from dbtrain.train.metrics import TENTHS

POINTS = 1500  # most points of a curve; neighbors are averaged if there are more
LEAST_POINTS = 200  # of those, if there are many runs
RUNS = 4  # with more runs, curves have fewer points
WINDOWS = 60  # most points of a curve by timestep, each a mean over many images
ROLES = {"instance": "instance images", "prior": "class images"}
Values = list[float | None]


@dataclass(frozen=True)
class Series:
    """One line. `colour`: a run's number, or "k/n" for the k-th of n shades."""

    label: str
    xs: list[int]
    ys: Values
    colour: int | str
    smooth: bool = False  # drawn faint, with a smoothed line over it
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over one axis. `log`: whether a logarithmic scale is offered."""

    title: str
    series: list[Series]
    note: str = ""
    x: str = "step"
    log: bool = False
    percent: bool = False


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    title: str
    charts: list[Chart]
    note: str = ""

    def data(self) -> list[dict[str, Any]]:
        """The charts for JSON, with six digits per value, which is more than a screen shows."""
        charts = [asdict(chart) for chart in self.charts]
        for series in (series for chart in charts for series in chart["series"]):
            series["ys"] = [None if y is None else float(f"{y:.6g}") for y in series["ys"]]
        return charts


@dataclass(frozen=True)
class Column:
    """A column of a run's table, for a chart with one line per run."""

    table: str
    key: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    smooth: bool = False


BY_TIMESTEP = "Loss by timestep"
TIMES_NOTE = (
    "From 0%, almost no noise, where details are learned, to 100%, almost pure noise, where shape and layout "
    "are learned."
)
NOISY = {"log": True}
LOSSES = (
    Column(METRICS, "loss_instance", "Training loss, instance images", NOISY, smooth=True),
    Column(METRICS, "loss_prior", "Training loss, class images", NOISY, smooth=True),
    Column(VALIDATION, "held_out_instance", "Held-out loss, instance images"),
    Column(VALIDATION, "held_out_prior", "Held-out loss, class images"),
)
SCORES = (
    Column(VALIDATION, "likeness", "Likeness of the subject"),
    Column(VALIDATION, "place", "Images in the place that their prompt names", {"percent": True}),
    Column(VALIDATION, "dino", "DINO: similarity to the photos"),
    Column(VALIDATION, "clip_i", "CLIP-I: similarity to the photos"),
    Column(VALIDATION, "clip_t", "CLIP-T: similarity to the prompt"),
)
OPTIMIZER = (
    Column(METRICS, "lr", "Learning rate"),
    Column(METRICS, "grad_norm", "Gradient norm, before clipping", NOISY, smooth=True),
)
SPEEDS = (
    Column(SPEED, "samples_per_s", "Samples per second, all ranks"),
    Column(SPEED, "step_ms", "Time of a step, ms"),
    Column(SPEED, "wait_share", "Share of the time waiting for data", {"percent": True}),
    Column(SPEED, "peak_gib", "Peak memory of rank 0, GiB"),
)


def losses(runs: Sequence[Run]) -> Group:
    """Training and held-out losses."""
    return Group(
        "Loss", _charts(runs, LOSSES),
        "The training loss is a mean over all ranks and micro-batches, but at random timesteps, so it is "
        "noisy. Held-out losses use the same timesteps and noise every time, so compare those.",
    )  # fmt: skip


def groups(runs: Sequence[Run]) -> list[Group]:
    """All charts that have data, grouped by subject; for several runs, those that compare them."""
    found = [
        losses(runs),
        Group(
            "Scores of validation images", _charts(runs, SCORES),
            "From a few images, so they are noisy. With train.stop: best, they decide when the run stops.",
        ),
        Group(BY_TIMESTEP, [*(_by_tenth(runs[0]) if len(runs) == 1 else ()), *_profiles(runs)], TIMES_NOTE),
        Group("Optimizer", _charts(runs, OPTIMIZER)),
        Group("Speed and memory", _charts(runs, SPEEDS)),
    ]  # fmt: skip
    return [group for group in found if group.charts]


def of_one(run: Run) -> Group:
    """The charts that show one run of several."""
    return Group(BY_TIMESTEP, list(_by_tenth(run)), TIMES_NOTE)


def scores(runs: Sequence[Run]) -> Group:
    """The scores of each run's checkpoints, one chart per score."""
    keys = [key for run in runs for key in run.score_names]
    charts = []
    for key in dict.fromkeys(keys):
        lines = []
        for at, run in enumerate(runs):
            rows = [(row["step"], value) for row in run.checkpoint_scores
                    if (value := number(row.get(key))) is not None]  # fmt: skip
            if len(rows) > 1:
                lines.append(Series(run.label, [s for s, _ in rows], [v for _, v in rows], at))
        if lines:
            charts.append(Chart(key.replace("_", " "), lines))
    return Group("Scores over checkpoints", charts)


def _charts(runs: Sequence[Run], columns: Sequence[Column]) -> list[Chart]:
    """One chart for each column that any run has values for."""
    charts = []
    most = max(LEAST_POINTS, min(POINTS, POINTS * RUNS // max(1, len(runs))))
    for column in columns:
        lines, longest = [], 0
        for at, run in enumerate(runs):
            steps, values = run.values(column.table, column.key)
            xs, ys = thinned(steps, values, most)
            longest = max(longest, group_size(len(steps), most))
            if any(y is not None for y in ys):
                lines.append(Series(run.label, xs, ys, at, smooth=column.smooth))
        faint = "each step" if longest == 1 else f"means of up to {longest} steps"
        note = f"faint: {faint}; bold: smoothed" if column.smooth else ""
        if lines:
            charts.append(Chart(column.title, lines, note, **column.options))
    return charts


def group_size(count: int, most: int) -> int:
    """How many neighbors to average so that at most `most` of `count` points are left."""
    return max(1, -(-count // most))


def thinned(xs: list[int], ys: Values, most: int) -> tuple[list[int], Values]:
    """At most `most` points: means of groups of neighbors, each at its last step."""
    size = group_size(len(xs), most)
    if size == 1:
        return xs, ys
    parts = [slice(start, start + size) for start in range(0, len(xs), size)]
    return [xs[part][-1] for part in parts], [mean(ys[part]) for part in parts]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _by_tenth(run: Run) -> Iterator[Chart]:
    """For each role, a chart of the training loss by tenth of the timesteps, over steps."""
    for role, images in ROLES.items():
        lines = [line for line in run.tables[TIMESTEPS] if _tenths(line.get(role))]
        size = group_size(len(lines), WINDOWS)
        windows = [lines[start : start + size] for start in range(0, len(lines), size)]
        if not windows:
            continue
        series = [
            Series(f"{10 * k}–{10 * (k + 1)}%", *_tenth(windows, role, k), f"{k}/{TENTHS}", smooth=True)
            for k in range(TENTHS)
        ]
        title = f"Training loss by timestep, {images}"
        yield Chart(title, series, "one line per tenth of the timesteps, smoothed", log=True)


def _tenths(part: Any) -> bool:
    """Whether a role's values in a line have a count and a sum for each tenth."""
    if not isinstance(part, dict):
        return False
    columns = [part.get("rows"), part.get("loss")]
    return all(isinstance(column, list) and len(column) == TENTHS for column in columns)


def _tenth(windows: Sequence[Sequence[Line]], role: str, tenth: int) -> tuple[list[int], Values]:
    """(last step, mean loss) of each window of lines with images in this tenth; None if not finite."""
    xs: list[int] = []
    ys: Values = []
    for window in windows:
        rows = sum(number(line[role]["rows"][tenth]) or 0 for line in window)
        sums = [number(line[role]["loss"][tenth]) for line in window]
        if rows:
            xs.append(window[-1]["step"])
            ys.append(None if None in sums else sum(value for value in sums if value is not None) / rows)
    return xs, ys


def _profiles(runs: Sequence[Run]) -> Iterator[Chart]:
    """For each role, a chart of the held-out loss over timesteps at the first and last validation."""
    for role in ROLES:
        series = []
        for at, run in enumerate(runs):
            lines = [line for line in run.tables[VALIDATION] if _profile(line, role)]
            for line in (lines[0], lines[-1]) if len(lines) > 1 else lines:
                label = f"{run.label}, step {line['step']}" if len(runs) > 1 else f"step {line['step']}"
                ys = [number(value) for value in line["by_timestep"][role]]
                series.append(Series(label, line["timesteps"], ys, at, dashed=line is not lines[-1]))
        if series:
            title = f"Held-out loss over timesteps, {ROLES[role]}"
            yield Chart(title, series, "dashed: first; solid: last", x="timestep", log=True)


def _profile(line: Line, role: str) -> bool:
    """Whether a line has a loss for each of its timesteps."""
    by_role, times = line.get("by_timestep"), line.get("timesteps")
    losses = by_role.get(role) if isinstance(by_role, dict) else None
    return isinstance(times, list) and isinstance(losses, list) and len(times) == len(losses) > 0
