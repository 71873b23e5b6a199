"""Score a run, or each of its checkpoints to find the best one.

Two scorers answer the same questions: DINO and CLIP for any base (`dino_clip`), and a small classifier of
its own for the embedded base (`tiny_judge`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import one_hot

from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config
from dbtrain.evaluate import dino_clip, tiny_judge
from dbtrain.evaluate import scores as fidelity
from dbtrain.models.base import Base
from dbtrain.models.locate import EMBEDDED
from dbtrain.runtime import console, dist, files
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.run_folder import CONFUSION, SHEET, RunFolder, read_state, step_of

FEW = 3  # fewer checkpoints than this are hardly a choice


@dataclass(frozen=True)
class Scorer:
    """How adapters are scored, and the two scores that compare checkpoints."""

    evaluate: Callable[[Config, str, Path, Path | None], Any]  # the scores, on rank 0
    load: Callable[[Path], Any]  # the scores in a scores.json
    shown: Callable[[Any], list[tuple[str, str]]]  # (label, value) of each score
    subject: str  # score of subject fidelity
    prompt: str  # score of prompt fidelity
    slack: float  # how far below the best prompt fidelity a checkpoint may be
    likeness: Callable[[Config, Path, Sequence[Config]], Tensor]
    """(a subject's config, the folder with its images, the configs of all) -> (images, subjects)."""


DINO_AND_CLIP = Scorer(
    dino_clip.evaluate, fidelity.Scores.load, fidelity.shown, "dino", "clip_t", 0.01, dino_clip.likeness
)
CLASSIFIER = Scorer(
    tiny_judge.evaluate, tiny_judge.JudgeScores.load, tiny_judge.shown, "likeness", "place", 0.1,
    tiny_judge.likeness,
)  # fmt: skip


def judge_of(cfg: Config) -> Scorer:
    """The classifier for the embedded base, unless the config names a DINO; else DINO and CLIP."""
    return CLASSIFIER if cfg.model.path == EMBEDDED and cfg.evaluation.dino is None else DINO_AND_CLIP


def evaluate(cfg: Config, beside: Path | None = None) -> Iterator[str]:
    """Score the run's adapter into `scores/` of its folder, and yield lines to print on rank 0.

    `beside` is the `scores.json` of another run, to show next to this one's.
    """
    dist.init()
    judge, out = judge_of(cfg), RunFolder(cfg.run_dir).scores
    with dist.agreed():
        if beside and cfg.subjects:
            raise ConfigError("--beside compares the scores of one subject; this config has several")
        other = judge.load(beside) if beside else None
    each = cfg.each_subject()
    folders = [out / f"{k}-{files.slug(one.subject.token or '')}" for k, one in enumerate(each, 1)]
    for one, folder in zip(each, folders if cfg.subjects else [out], strict=True):
        if scores := judge.evaluate(one, cfg.run_dir, folder, None):
            if cfg.subjects:
                yield f"{one.subject.token} {one.subject.class_word}"
            yield fidelity.table(judge.shown(scores), judge.shown(other) if other else None)
            yield f"contact sheet: {folder / SHEET}"
    if cfg.subjects and dist.is_main():
        found = [judge.likeness(one, folder, each) for one, folder in zip(each, folders, strict=True)]
        yield from confusion([str(one.subject.token) for one in each], found, out / CONFUSION)


def confusion(tokens: Sequence[str], likeness: Sequence[Tensor], file: Path) -> Iterator[str]:
    """Write which subject's photos the images of each subject are like, and yield it as a table.

    `likeness`: of each subject's images to each subject's photos, (images, subjects) each.
    """
    means = [of.mean(0).tolist() for of in likeness]
    nearest = [one_hot(of.argmax(1), len(tokens)).float().mean(0).tolist() for of in likeness]
    content = {"subjects": tokens, "likeness": means, "nearest": nearest}
    files.write_atomically(file, json.dumps(content, indent=1) + "\n")
    width = max(12, *(len(token) + 2 for token in tokens))
    yield "each subject's images (rows) and each one's photos: mean likeness, share that is nearest to them"
    yield "".join(f"{token:>{width}}" for token in ("", *tokens))
    for token, mean, share in zip(tokens, means, nearest, strict=True):
        cells = (f"{one:.2f} {100 * part:3.0f}%" for one, part in zip(mean, share, strict=True))
        yield f"{token:>{width}}" + "".join(f"{cell:>{width}}" for cell in cells)


@dataclass(frozen=True)
class Candidate:
    """An adapter of the run: a checkpoint, or an export whose checkpoint is gone."""

    name: str
    step: int | None  # None for such an export
    adapter: Path
    out: Path  # the folder for its scores
    exported: bool = False


def checkpoints(cfg: Config) -> Iterator[str]:
    """Score every checkpoint of the run, and its export; yield a table and a suggestion on rank 0.

    All of them share the base model's images. Writes `scores/checkpoints.json` and, if matplotlib is
    installed, `scores/checkpoints.png`.
    """
    dist.init()
    # Score each candidate.
    judge, run, base = judge_of(cfg), RunFolder(cfg.run_dir), Base.find(cfg.model)
    with dist.agreed():
        found = candidates(cfg, base, run)
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(found, 1):
        console.say(f"{one.name} ({number} of {len(found)})")
        scores = judge.evaluate(cfg, str(one.adapter), one.out, run.scores / "base")
        if scores:
            values = {name: value for name, value in asdict(scores).items() if value is not None}
            rows.append({"name": one.name, "step": one.step, "exported": one.exported, **values})
    # Write and show the table.
    with dist.agreed():
        lines = _publish(rows, judge, run.scores) if dist.is_main() else []
    if lines and len(found) < FEW:
        lines.append(f"only {len(found)} to choose from; for more, train with train.keep above "
                     f"{cfg.train.keep} and a smaller train.checkpoint_every")  # fmt: skip
    yield from lines


def candidates(cfg: Config, base: Base, run: RunFolder) -> list[Candidate]:
    """The checkpoints of a run, oldest first, and its export if that is not one of them.

    Raises ConfigError if there is neither, or a checkpoint is damaged.
    """
    paths = run.checkpoints()
    for path in paths:
        read_state(path)
    try:
        export = formats.find(run.path)
    except ConfigError:
        export = None  # the run is not done
    if not paths and export is None:
        raise ConfigError(f"{run.path} has neither a checkpoint nor an export; run: dbtrain train")
    source = _source(cfg, base, export, paths) if export else None
    found = [Candidate(f"step {step_of(path)}", step_of(path), path,
                       run.scores / path.name, path == source) for path in paths]  # fmt: skip
    if export and source is None:
        found.append(Candidate("export", None, export, run.scores, True))
    return found


def _source(cfg: Config, base: Base, export: Path, paths: Sequence[Path]) -> Path | None:
    """The checkpoint that was exported; None if it was deleted."""
    ours = formats.read(export, base.family, base.skeleton)
    for path in reversed(paths):
        theirs = formats.read(path, base.family, base.skeleton)
        if theirs.keys() == ours.keys() and all(
            mine.tensors.keys() == theirs[name].tensors.keys()
            and all(tensor.equal(theirs[name].tensors[key]) for key, tensor in mine.tensors.items())
            for name, mine in ours.items()
        ):
            return path
    return None


def suggestion(rows: Sequence[Mapping[str, Any]], judge: Scorer) -> tuple[Mapping[str, Any], str]:
    """(the suggested row, the reason): the best subject fidelity among rows with good prompt fidelity.

    Good means within the scorer's slack of the best. Of equal rows, the earlier one wins.
    """
    most = max(row[judge.prompt] for row in rows)
    good = [row for row in rows if row[judge.prompt] >= most - judge.slack]
    best = max(good, key=lambda row: row[judge.subject])
    return best, (
        f"suggested: {best['name']}, with the highest {judge.subject} ({best[judge.subject]:.3f}) of "
        f"the {len(good)} whose {judge.prompt} is within {judge.slack:g} of the best ({most:.3f})"
    )


def _publish(rows: Sequence[dict[str, Any]], judge: Scorer, folder: Path) -> list[str]:
    """Write the rows and their plot. Returns lines to print: each row's main scores, and the suggestion."""
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
    """Plot the rows by their two main scores, joined in order. Returns a line to print about it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return (
            f"{path} was not plotted: {reason(error)}; run: pip install 'dbtrain[benchmarks]' "
            "(dbtrain report plots the scores without it)"
        )
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(
        xlabel=f"{judge.prompt}: prompt fidelity", ylabel=f"{judge.subject}: subject fidelity"
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
