"""Do masks help where other things are beside the subject? On the embedded base.

    python -m benchmarks.masks --work runs/masks

Every photo of a subject shows the same other thing too, always at the same place beside it. The quickstart's
config trains on these photos without masks and with masks of the subject, for as many steps, and the judge
compares its pictures with real ones of the subject alone. Run again, it continues where it stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from benchmarks import common, trainer
from benchmarks.choose_settings import FIGURES, HELD_OUT, Cell, Plan, photograph
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Config
from dbtrain.evaluate import tiny_judge
from dbtrain.evaluate.tiny_judge import JudgeScores
from dbtrain.runtime import console
from dbtrain.runtime.run_folder import SCORES
from dbtrain.sample.sample import Kept
from dbtrain.tiny import world
from dbtrain.tiny.paint import KINDS, Scene, render

RECIPES = {
    "no masks": (),
    "masks, background 0.1": ("prepare.mask=true",),
    "masks, background 0": ("prepare.mask=true", "loss.mask.background=0"),
}
ABOUT = """Medians over runs, with the least and the most. *Closed* is how much of the way from the base's
pictures of the class to real pictures of the subject alone the adapter's go; *place* and *kind* are the
shares of pictures with the place asked for and with the class; the others as in settings.md."""


def silhouette(scene: Scene) -> Image.Image:
    """Where the object of a scene is, white on black: what differs from the place without it."""
    seen, empty = (np.asarray(render(one), np.int16) for one in (scene, replace(scene, x=9.0)))
    inside = Image.fromarray((np.abs(seen - empty).max(2) > 8).astype(np.uint8) * 255)
    return inside.filter(ImageFilter.MedianFilter(3))  # without holes where colours are alike


def photograph_beside(subject: world.Subject, other: world.Subject, folder: Path) -> None:
    """Write photos of the subject with another thing beside it, and their masks."""
    folder.mkdir(parents=True, exist_ok=True)
    thing = replace(other.scene(0), size=0.2, x=0.2, y=0.3, angle=0.0, mirrored=False)
    for number in range(5):
        scene = replace(subject.scene(number), x=0.62)
        photo, mask, beside = render(scene), silhouette(scene), silhouette(thing)
        beside.paste(0, mask=mask)  # it is behind the subject
        photo.paste(render(thing), mask=beside)
        photo.save(folder / f"{number:02d}.png")
        mask.save(folder / f"{number:02d}.mask.png")


def train(plan: Plan, cell: Cell) -> JudgeScores:
    """Train a cell, unless that was done."""
    number = list(KINDS).index(cell.subject.kind)
    other = world.drawn_subject(0, number + 1, "choosing")
    photos = plan.work / cell.subject.name / "photos"
    how = Plan(plan.work / cell.recipe.replace(" ", "-"), plan.steps, plan.pictures,
               [*plan.overrides, *RECIPES[cell.recipe]])  # fmt: skip
    cfg: Config = how.config(Cell(cell.subject, cell.seed, "quickstart")).override(
        f"prepare.photos={photos}", f"prepare.class_dir={plan.work / 'class-images'}"
    )
    out = Path(cfg.run_dir) / "scored"
    if not (out / SCORES).exists():
        photograph_beside(cell.subject, other, photos)
        trainer.prepare(cfg)
        trainer.train(cfg)
        real = [render(cell.subject.scene(held_out)) for held_out in HELD_OUT]
        adapter = trainer.export(cfg, plan.steps[-1], out)
        alone = cfg.override(f"prepare.photos={photos.with_name('alone')}", "prepare.mask=false")
        photograph(cell.subject, alone)  # by which the judge knows the subject
        base = plan.work / "base" / cell.subject.kind
        tiny_judge.score(tiny_judge.draw(alone, str(adapter), out, base, Kept(), plan.pictures), real)
    return JudgeScores.load(out / SCORES)


def run(args: argparse.Namespace, work: Path) -> Result:
    plan = Plan(work, [args.steps], args.pictures, args.set)
    subjects = [world.drawn_subject(args.looks, number, "proving") for number in args.subjects]
    rows = []
    for recipe in RECIPES:
        every = [train(plan, Cell(subject, 0, recipe)) for subject in subjects]
        samples = {
            name: [getattr(scores, name) * (100 if unit == "%" else 1) for scores in every]
            for name, unit in FIGURES.items()
        }
        console.say(f"{recipe}: closed {', '.join(f'{closed:.0f}%' for closed in samples['closed'])}")
        rows.append(Row(
            label=recipe, config={"subjects": [subject.name for subject in subjects]},
            measures={name: Measure.of(FIGURES[name], values) for name, values in samples.items()},
            counts={"runs": len(every)},
        ))  # fmt: skip
    return common.result(args, "masks", "tiny", rows, ABOUT)


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "set")
    words.add_argument("--looks", type=int, default=30, metavar="SEED", help="draws a list of subjects")
    words.add_argument("--subjects", type=int, nargs="+", default=[0, 1, 2, 3], help="numbers in that list")
    words.add_argument("--steps", type=int, default=200)
    words.add_argument("--pictures", type=int, default=tiny_judge.SUBJECT_IMAGES, help="for each prompt")
    return words


if __name__ == "__main__":
    common.main(run, parser())
