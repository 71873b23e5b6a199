"""How good a run is, and which of its checkpoints is the one to take.

Two judges answer the same questions: DINO and CLIP for any base (`protocol`), and for the embedded
base a small classifier that knows its world (`tiny.score`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config
from dbtrain.evaluate import dino_clip, tiny_judge
from dbtrain.evaluate import scores as fidelity
from dbtrain.models.base import Base
from dbtrain.models.locate import EMBEDDED
from dbtrain.runtime import console, dist, files
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.run_folder import SHEET, RunFolder, read_state, step_of

FEW = 3  # checkpoints that are hardly a choice


@dataclass(frozen=True)
class Scorer:
    """Who scores, and by which two scores checkpoints are compared."""

    evaluate: Callable[[Config, str, Path, Path | None], Any]  # scores on rank 0
    load: Callable[[Path], Any]
    table: Callable[[Any, Any], str]
    subject: str  # is it the subject
    prompt: str  # does the prompt still count
    slack: float  # by how much less of that a checkpoint still counts as good


DINO_AND_CLIP = Scorer(dino_clip.evaluate, fidelity.Scores.load, fidelity.table, "dino", "clip_t", 0.01)
CLASSIFIER = Scorer(tiny_judge.evaluate, tiny_judge.Scores.load, tiny_judge.table, "likeness", "place", 0.1)


def judge_of(cfg: Config) -> Scorer:
    """The embedded base's own judge for it, unless a DINO is asked for."""
    return CLASSIFIER if cfg.model.path == EMBEDDED and cfg.evaluation.dino is None else DINO_AND_CLIP


def evaluate(cfg: Config, beside: Path | None = None) -> Iterator[str]:
    """Score the run's adapter into `scores/` of its folder; what to print, on rank 0.

    `beside` is the `scores.json` of another run, to show next to it.
    """
    dist.init()
    judge, out = judge_of(cfg), RunFolder(cfg.run_dir).scores
    with dist.agreed():
        other = judge.load(beside) if beside else None
    if scores := judge.evaluate(cfg, cfg.run_dir, out, None):
        yield judge.table(scores, other)
        yield f"contact sheet: {out / SHEET}"


@dataclass(frozen=True)
class Candidate:
    """An adapter of the run that could be taken."""

    name: str
    step: int | None  # None for an export of none of the checkpoints that are kept
    adapter: Path
    out: Path
    exported: bool = False


def checkpoints(cfg: Config) -> Iterator[str]:
    """Score every checkpoint of the run, and the export; a table, a plot and a suggestion, on rank 0.

    All of them share the bare base's pictures. Writes `scores/checkpoints.json` and, if matplotlib is
    installed, `.png`.
    """
    dist.init()
    judge, run, base = judge_of(cfg), RunFolder(cfg.run_dir), Base.find(cfg.model)
    with dist.agreed():
        found = candidates(cfg, base, run)
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(found, 1):
        console.say(f"{one.name} ({number} of {len(found)})")
        scores = judge.evaluate(cfg, str(one.adapter), one.out, run.scores / "base")
        if scores:
            rows.append({"name": one.name, "step": one.step, "exported": one.exported, **_numbers(scores)})
    with dist.agreed():
        lines = _publish(rows, judge, run.scores) if dist.is_main() else []
    if lines and len(found) < FEW:
        lines.append(f"only {len(found)} to choose from: train with a train.keep of more than "
                     f"{cfg.train.keep}, and a smaller train.checkpoint_every, for more")  # fmt: skip
    yield from lines


def candidates(cfg: Config, base: Base, run: RunFolder) -> list[Candidate]:
    """Checkpoints of a run, oldest first, and its export if that is of none of them.

    Raises ConfigError if there is nothing, or a checkpoint is damaged.
    """
    paths = run.checkpoints()
    for path in paths:
        read_state(path)
    try:
        export = formats.find(run.path)
    except ConfigError:
        export = None  # a run that is not done has none
    if not paths and export is None:
        raise ConfigError(f"{run.path} has neither a checkpoint nor an export; run: dbtrain train")
    source = _source(cfg, base, export, paths) if export else None
    found = [Candidate(f"step {step_of(path)}", step_of(path), path,
                       run.scores / path.name, path == source) for path in paths]  # fmt: skip
    if export and source is None:
        found.append(Candidate("export", None, export, run.scores, True))
    return found


def _source(cfg: Config, base: Base, export: Path, paths: Sequence[Path]) -> Path | None:
    """The checkpoint that was exported; None if it is not kept."""
    modules = cache(base.module_names)
    ours = formats.read(export, base.family, modules)
    for path in reversed(paths):
        theirs = formats.read(path, base.family, modules)
        if theirs.keys() == ours.keys() and all(
            mine.tensors.keys() == theirs[name].tensors.keys()
            and all(tensor.equal(theirs[name].tensors[key]) for key, tensor in mine.tensors.items())
            for name, mine in ours.items()
        ):
            return path
    return None


def suggestion(rows: Sequence[Mapping[str, Any]], judge: Scorer) -> tuple[Mapping[str, Any], str]:
    """The one to take, and why: the most like the subject of those that follow prompts well enough.

    Well enough is within the judge's slack of the one that does best; of equals, the earlier.
    """
    most = max(row[judge.prompt] for row in rows)
    good = [row for row in rows if row[judge.prompt] >= most - judge.slack]
    best = max(good, key=lambda row: row[judge.subject])
    return best, (
        f"suggested: {best['name']}, which has the highest {judge.subject} ({best[judge.subject]:.3f}) of "
        f"the {len(good)} whose {judge.prompt} is within {judge.slack:g} of the best ({most:.3f})"
    )


def _numbers(scores: Any) -> dict[str, float]:
    """Scores by their plain names."""
    return {name: value for name, value in asdict(scores).items() if value is not None}


def _publish(rows: Sequence[dict[str, Any]], judge: Scorer, folder: Path) -> list[str]:
    """Write the rows and their plot; a line for each, with the two scores that count, and the suggestion."""
    best, why = suggestion(rows, judge)
    rows = [row | {"suggested": row is best} for row in rows]
    files.write_atomically(folder / "checkpoints.json", json.dumps(rows, indent=1) + "\n")
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}  {judge.subject:>10}  {judge.prompt:>10}"]
    for row in rows:
        marks = [text for key, text in (("exported", "exported"), ("suggested", "<- suggested")) if row[key]]
        values = f"{row['name']:{width}}  {row[judge.subject]:10.3f}  {row[judge.prompt]:10.3f}"
        lines.append("  ".join([values, *marks]))
    return [*lines, why, _plot(rows, judge, folder / "checkpoints.png")]


def _plot(rows: Sequence[Mapping[str, Any]], judge: Scorer, path: Path) -> str:
    """Draw the rows by the two scores that count, joined in their order; what to print about it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return (
            f"{path} is not drawn: {reason(error)}; run: pip install 'dbtrain[benchmarks]' "
            "(dbtrain report has the scores' curves without it)"
        )
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(
        xlabel=f"{judge.prompt}: does the prompt count", ylabel=f"{judge.subject}: is it the subject"
    )
    axes.margins(0.15)  # room for names
    axes.plot([row[judge.prompt] for row in rows], [row[judge.subject] for row in rows], "o-", color="gray")
    for row in rows:
        axes.annotate(
            row["name"], (row[judge.prompt], row[judge.subject]), (0, 6), textcoords="offset points",
            ha="center", color="tab:red" if row["suggested"] else "tab:blue",
        )  # fmt: skip
    png = io.BytesIO()
    figure.savefig(png)
    files.write_atomically(path, png.getvalue())
    return f"plot: {path}"
