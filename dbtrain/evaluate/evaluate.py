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
from statistics import fmean
from typing import Any

from torch import Tensor
from torch.nn.functional import one_hot

from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config
from dbtrain.evaluate import choice, dino_clip, encoders, tiny_judge
from dbtrain.evaluate import scores as fidelity
from dbtrain.evaluate.choice import Rule
from dbtrain.models.base import Base
from dbtrain.runtime import console, dist, files
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.run_folder import CONFUSION, SCORES, SHEET, RunFolder, adapter_in, read_state, step_of
from dbtrain.sample.sample import Kept

BLEED = "images of a subject that look more like another one"
FEW = 3  # fewer checkpoints than this are hardly a choice


@dataclass(frozen=True)
class Scorer:
    """How adapters are scored, and the rule that compares checkpoints."""

    draw: Callable[[Config, str, Path, Path | None, Kept], Any]  # the images, for `score`
    score: Callable[[Any], Any]  # the scores, on rank 0
    load: Callable[[Path], Any]  # the scores in a scores.json
    shown: Callable[[Any], list[tuple[str, str]]]  # (label, value) of each score
    rule: Rule
    likeness: Callable[[Config, Path, Sequence[Config]], Tensor]
    """(a subject's config, the folder with its images, the configs of all) -> (images, subjects)."""


DINO_AND_CLIP = Scorer(
    dino_clip.draw, dino_clip.score, fidelity.Scores.load, fidelity.shown, choice.DINO_AND_CLIP,
    dino_clip.likeness,
)  # fmt: skip
CLASSIFIER = Scorer(
    tiny_judge.draw, tiny_judge.score, tiny_judge.JudgeScores.load, tiny_judge.shown, choice.CLASSIFIER,
    tiny_judge.likeness,
)  # fmt: skip


def judge_of(cfg: Config) -> Scorer:
    """The classifier for the embedded base, unless the config names a DINO; else DINO and CLIP."""
    return CLASSIFIER if choice.uses_classifier(cfg) else DINO_AND_CLIP


def check(cfg: Config) -> None:
    """Find or download the models that score `cfg`. Raises ConfigError if they are not to be had."""
    if judge_of(cfg) is DINO_AND_CLIP:
        encoders.of(cfg.evaluation)


def evaluate(cfg: Config, beside: Path | None = None) -> Iterator[str]:
    """Score the run's adapter into `scores/` of its folder, and yield lines to print on rank 0.

    `beside` is the `scores.json` of another run, to show next to this one's.
    """
    dist.init()
    judge = judge_of(cfg)
    with dist.agreed():
        if beside and cfg.subjects:
            raise ConfigError("--beside compares the scores of one subject; this config has several")
        other = judge.load(beside) if beside else None
    kept = Kept()
    drawn = draw(cfg, kept)
    kept.free()
    yield from score(cfg, drawn, other)


def draw(cfg: Config, kept: Kept) -> list[Any]:
    """Generate what is missing to score the run's adapter: each subject's images, for `score`."""
    judge, each = judge_of(cfg), _each_subject(cfg, RunFolder(cfg.run_dir).scores)
    return [judge.draw(one, cfg.run_dir, folder, None, kept) for one, folder in each]


def score(cfg: Config, drawn: Sequence[Any], other: Any = None) -> Iterator[str]:
    """Score what `draw` gave, and yield lines to print on rank 0. `other`: scores to show beside."""
    judge, out = judge_of(cfg), RunFolder(cfg.run_dir).scores
    each, every = _each_subject(cfg, out), []
    for (one, folder), images in zip(each, drawn, strict=True):
        if scores := judge.score(images):
            every.append(scores)
            if cfg.subjects:
                yield f"{one.subject.token} {one.subject.class_word}"
            yield fidelity.table(judge.shown(scores), judge.shown(other) if other else None)
            yield f"contact sheet: {folder / SHEET}"
    if cfg.subjects and dist.is_main():
        found = [judge.likeness(one, folder, cfg.each_subject()) for one, folder in each]
        yield from confusion([one.token for one in cfg.subjects], found, out / CONFUSION)
        labels = json.loads((each[0][1] / SCORES).read_text())["labels"]
        values = _mean(every) | {"bleed": bleed(found), "labels": labels | {"bleed": BLEED}}
        files.write_atomically(out / SCORES, json.dumps(values, indent=1) + "\n")
        yield f"{BLEED}: {values['bleed']:.0%}"


def bleed(likeness: Sequence[Tensor]) -> float:
    """The share of images that are nearest to another subject's photos; `likeness` as for `confusion`."""
    return fmean((of.argmax(1) != subject).float().mean().item() for subject, of in enumerate(likeness))


def _mean(every: Sequence[Any]) -> dict[str, float]:
    """The means of several subjects' scores."""
    told = [{name: value for name, value in asdict(one).items() if value is not None} for one in every]
    return {name: fmean(of[name] for of in told) for name in told[0] if all(name in of for of in told)}


def _each_subject(cfg: Config, out: Path) -> list[tuple[Config, Path]]:
    """Each subject's config and folder: `out`, or one of its own in it if there are several."""
    if not cfg.subjects:
        return [(cfg, out)]
    names = [f"{number}-{files.slug(one.token)}" for number, one in enumerate(cfg.subjects, 1)]
    return [(one, out / name) for one, name in zip(cfg.each_subject(), names, strict=True)]


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

    All of them share the base model's images. Of several subjects, scores are the means. Writes
    `scores/checkpoints.json` and, if matplotlib is installed, `scores/checkpoints.png`.
    """
    dist.init()
    judge, run = judge_of(cfg), RunFolder(cfg.run_dir)
    with dist.agreed():
        found = candidates(cfg, Base.find(cfg.model), run)
    # Generate the images of each candidate.
    kept, drawn = Kept(), []
    for number, one in enumerate(found, 1):
        console.say(f"{one.name} ({number} of {len(found)})")
        parts = zip(_each_subject(cfg, one.out), _each_subject(cfg, run.scores / "base"), strict=True)
        drawn.append([
            judge.draw(part, str(one.adapter), out, base, kept) for (part, out), (_, base) in parts
        ])  # fmt: skip
    # Score each candidate, without the base in memory.
    kept.free()
    rows: list[dict[str, Any]] = []
    for one, images in zip(found, drawn, strict=True):
        each = [judge.score(part) for part in images]
        if all(each):
            rows.append({"name": one.name, "step": one.step, "exported": one.exported, **_mean(each)})
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
    adapters = {path: adapter_in(path, cfg.export.ema) for path in paths}
    try:
        export = formats.find(run.path)
    except ConfigError:
        export = None  # the run is not done
    if not paths and export is None:
        raise ConfigError(f"{run.path} has neither a checkpoint nor an export; run: dbtrain train")
    source = _source(base, export, adapters) if export else None
    found = [Candidate(f"step {step_of(path)}", step_of(path), adapters[path],
                       run.scores / path.name, path == source) for path in paths]  # fmt: skip
    if export and source is None:
        found.append(Candidate("export", None, export, run.scores, True))
    return found


def _source(base: Base, export: Path, adapters: Mapping[Path, Path]) -> Path | None:
    """The checkpoint that was exported; None if it was deleted."""
    ours = formats.read(export, base.family, base.skeleton)
    for path, adapter in reversed(list(adapters.items())):
        theirs = formats.read(adapter, base.family, base.skeleton)
        if theirs.keys() == ours.keys() and all(
            mine.tensors.keys() == theirs[name].tensors.keys()
            and all(tensor.equal(theirs[name].tensors[key]) for key, tensor in mine.tensors.items())
            for name, mine in ours.items()
        ):
            return path
    return None


def _publish(rows: Sequence[dict[str, Any]], judge: Scorer, folder: Path) -> list[str]:
    """Write the rows and their plot. Returns lines to print: each row's main scores, and the suggestion."""
    rule = judge.rule
    best, why = rule.choose(rows)
    rows = [row | {"suggested": row is best} for row in rows]
    files.write_atomically(folder / "checkpoints.json", json.dumps(rows, indent=1) + "\n")
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}  {rule.subject:>10}  {rule.prompt:>10}"]
    for row in rows:
        marks = [text for key, text in (("exported", "exported"), ("suggested", "<- suggested")) if row[key]]
        values = f"{row['name']:{width}}  {row[rule.subject]:10.3f}  {row[rule.prompt]:10.3f}"
        lines.append("  ".join([values, *marks]))
    return [*lines, f"suggested: {best['name']}, {why}", _plot(rows, rule, folder / "checkpoints.png")]


def _plot(rows: Sequence[Mapping[str, Any]], rule: Rule, path: Path) -> str:
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
        xlabel=f"{rule.prompt}: prompt fidelity", ylabel=f"{rule.subject}: subject fidelity"
    )
    axes.margins(0.15)  # room for names
    axes.plot([row[rule.prompt] for row in rows], [row[rule.subject] for row in rows], "o-", color="gray")
    for row in rows:
        axes.annotate(
            row["name"], (row[rule.prompt], row[rule.subject]), (0, 6), textcoords="offset points",
            ha="center", color="tab:red" if row["suggested"] else "tab:blue",
        )  # fmt: skip
    png = io.BytesIO()
    figure.savefig(png)
    files.write_atomically(path, png.getvalue())
    return f"plot: {path}"
