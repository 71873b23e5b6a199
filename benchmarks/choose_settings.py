"""Which settings teach every subject without forgetting its class? Asked on the embedded base.

    python -m benchmarks.choose_settings --work runs/choosing
    python -m benchmarks.choose_settings --work runs/proving --half proving --recipes quickstart

Trains subjects whose looks are drawn from a seed with the quickstart's config and each recipe's overrides,
and lets the judge ask the questions of arXiv:2208.12242, section 4: is it the subject, in the place asked
for, and what became of the class? The looks of the two halves differ, whatever their seeds: what is chosen on
one is proved on the other. Run again, it continues where it stopped. `--smoke` is one run, which fails if
DreamBooth does not work.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
import yaml

from benchmarks import common, trainer
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Config
from dbtrain.evaluate import tiny_judge
from dbtrain.evaluate.scores import table
from dbtrain.evaluate.tiny_judge import JudgeScores
from dbtrain.runtime import console, dist
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import SCORES
from dbtrain.sample.sample import Kept
from dbtrain.tiny import world
from dbtrain.tiny.paint import render

CONFIG = common.ROOT / "configs" / "quickstart.yaml"
LOWEST = {"closed": 0.5, "place": 0.6}  # less than this and DreamBooth does not work
HELD_OUT = range(100, 132)  # renders of a subject that are not among its photos, by number
NO_EMA = ("train.ema=null", "export.ema=false")
RECIPES = {
    "quickstart": (),
    "no ema": NO_EMA,
    "no ema, lr 1e-3": (*NO_EMA, "optim.lr=1e-3"),
    "no ema, lr 1e-3, text_encoder_lr 3e-3": (*NO_EMA, "optim.lr=1e-3", "optim.text_encoder_lr=3e-3"),
    "no ema, cosine from 3e-3": (
        *NO_EMA,
        "optim.lr=3e-3",
        "optim.schedule=cosine",
        "optim.warmup_steps=10",
    ),
    "no ema, learned word": (*NO_EMA, "adapter.token={}"),
    "learned word": ("adapter.token={}",),
    "prior by images": ("loss.prior=images", "loss.prior_weight=1"),
    "prior by images, weight 2": ("loss.prior=images", "loss.prior_weight=2"),
    "prior by 128 images": ("loss.prior=images", "loss.prior_weight=1", "prepare.class_images=128"),
    "prior by prediction": ("loss.prior=prediction", "loss.prior_weight=0.5"),
    "prior by distillation, weight 0.5": ("loss.prior_weight=0.5",),
    "prior by distillation, weight 1": ("loss.prior_weight=1",),
    "no class images": ("prepare.class_prompt=null", "loss.prior=none"),
    "class images at guidance 3": ("prepare.sampling.guidance=3",),
    "frozen text encoder": ("adapter.text_encoder=null",),
    "no min_snr_gamma": ("loss.min_snr_gamma=null",),
    "prodigy": ("optim.name=prodigy", "optim.lr=1"),
    "lr 1e-3": ("optim.lr=1e-3",),
    "lr 4e-3": ("optim.lr=4e-3",),
    "rank 4": ("adapter.rank=4",),
    "rank 64": ("adapter.rank=64",),
    "attention only": ("adapter.targets=attention",),
}  # name: what is put over the quickstart's settings
FIGURES = {
    "closed": "%", "place": "%", "kind": "%", "drift": "%", "drift_base": "%", "class_change": "x",
    "diversity_kept": "%",
}  # fmt: skip
BARS: dict[str, Callable[[float], bool]] = {
    "closed": lambda share: share >= 85, "worst": lambda share: share >= 65,
    "place": lambda share: share >= 95, "drift": lambda share: share <= 5,
    "class_change": lambda times: times <= 1.5, "diversity_kept": lambda share: share >= 75,
}  # fmt: skip
ABOUT = """Medians over runs, with the least and the most; *mean* and *worst* are of *closed*: over all runs,
and over those of the subject with the least. *Closed* is how much of the way from the base's pictures of the
class to real pictures of the subject the adapter's go; *place* and *kind* are the shares of pictures with the
place asked for and with the class; *drift* is the share of class pictures that the judge takes for the
subject, and *drift_base* that of the base's own, of subjects that look much like their class;
*class_change* is the Fréchet distance of class pictures from the base's, in distances of two seeds of the
base; *diversity_kept* is the diversity of class pictures as a share of the base's. *Misses* names the bars
that a recipe misses on average: closed 85%, 65% of the worst subject, place 95%, drift 5%, class_change 1.5,
diversity_kept 75%."""


@dataclass(frozen=True)
class Cell:
    """One training run. Its checkpoints are shorter runs too if the learning rate is constant."""

    subject: world.Subject
    seed: int
    recipe: str

    def __str__(self) -> str:
        return f"{self.recipe}: {self.subject.kind} {self.subject.name}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """What all cells of a call have in common."""

    work: Path
    steps: Sequence[int]
    pictures: int  # of the subject, for each prompt
    overrides: Sequence[str]

    def folder(self, cell: Cell) -> Path:
        """Of a cell's run; it depends on all its settings."""
        config = yaml.safe_load(CONFIG.read_text())
        key = content_key([config, self.steps, self.pictures, RECIPES[cell.recipe], self.overrides])[:8]
        return self.work / cell.subject.name / f"{cell.recipe.replace(' ', '-')}-{cell.seed}-{key}"

    def config(self, cell: Cell) -> Config:
        """The quickstart's config, for this cell."""
        every = min(b - a for a, b in zip([0, *self.steps], self.steps, strict=False))
        out = self.folder(cell)
        return Config.load(CONFIG, [
            f"run_dir={out}", f"data.shards={out / 'shards'}", f"seed={cell.seed}",
            f"prepare.photos={self.work / cell.subject.name / 'photos'}",
            f"prepare.class_dir={self.work / 'class-images'}", f"subject.class_word={cell.subject.kind}",
            "validation.prompts=[]", "train.micro_batch=4", # one process: faster than two by two
            f"train.steps={self.steps[-1]}", f"train.checkpoint_every={every}",
            f"train.keep={len(self.steps) * 100}", *RECIPES[cell.recipe], *self.overrides,
        ])  # fmt: skip


def photograph(subject: world.Subject, cfg: Config) -> None:
    """Write the photos of a subject where `cfg` reads them."""
    photos = Path(cfg.prepare.photos)  # type: ignore[union-attr]
    photos.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        render(subject.scene(number)).save(photos / f"{number:02d}.png")


def train(plan: Plan, cell: Cell) -> dict[int, JudgeScores]:
    """Train a cell, unless that was done; scores after each of the plan's steps."""
    folders = {step: plan.folder(cell) / f"step{step}" for step in plan.steps}
    if not all((out / SCORES).exists() for out in folders.values()):
        cfg = plan.config(cell)
        photograph(cell.subject, cfg)
        trainer.prepare(cfg)
        trainer.train(cfg)
        real = [render(cell.subject.scene(number)) for number in HELD_OUT]
        base, kept = plan.work / "base" / cell.subject.kind, Kept()
        for step, out in folders.items():
            adapter = trainer.export(cfg, step, out)
            drawn = tiny_judge.draw(cfg, str(adapter), out, base, kept, plan.pictures)
            tiny_judge.score(drawn, real)
    return {step: JudgeScores.load(out / SCORES) for step, out in folders.items()}


def rows(results: Mapping[Cell, Mapping[int, JudgeScores]], by_subject: bool = False) -> list[Row]:
    """A row a recipe and number of steps, over all its runs; then one a subject, after the last step."""
    found = []
    steps = sorted({step for scores in results.values() for step in scores})
    for recipe in dict.fromkeys(cell.recipe for cell in results):
        mine = [cell for cell in results if cell.recipe == recipe]
        for step in steps:
            found.append(_row(f"{recipe}, {step} steps", {cell: results[cell][step] for cell in mine}))
    for recipe, subject in dict.fromkeys((cell.recipe, cell.subject) for cell in results if by_subject):
        mine = [cell for cell in results if (cell.recipe, cell.subject) == (recipe, subject)]
        label = f"{subject.kind} {subject.name}: {recipe}"
        found.append(_row(label, {cell: results[cell][steps[-1]] for cell in mine}))
    return found


def _row(label: str, group: Mapping[Cell, JudgeScores]) -> Row:
    samples = {
        name: [getattr(scores, name) * (100 if unit == "%" else 1) for scores in group.values()]
        for name, unit in FIGURES.items()
    }
    subjects = dict.fromkeys(cell.subject for cell in group)
    worst = min(
        mean(closed for cell, closed in zip(group, samples["closed"], strict=True) if cell.subject == subject)
        for subject in subjects
    )
    means = {name: mean(values) for name, values in samples.items()} | {"worst": worst}
    missed = [name for name, holds in BARS.items() if not holds(means[name])]
    return Row(
        label=label, config={"runs": [f"{cell.subject.name}, seed {cell.seed}" for cell in group]},
        measures={name: Measure.of(FIGURES[name], values) for name, values in samples.items()},
        counts={"runs": len(group), "mean": means["closed"], "worst": worst, "misses": ", ".join(missed)},
    )  # fmt: skip


def run(args: argparse.Namespace, work: Path) -> Result:
    if not args.work:
        raise SystemExit("error: --work is missing; give a folder for the runs, which is kept")
    steps = args.steps or [Config.load(CONFIG, args.set).train.steps]
    if args.smoke:
        args.subjects, args.seeds, args.recipes, args.workers = [0], 1, ["quickstart"], 1
    plan = Plan(work, steps, args.pictures, args.set)
    subjects = [world.drawn_subject(args.looks, number, args.half) for number in args.subjects]
    cells = [Cell(subject, seed, recipe)
             for seed, recipe, subject in product(range(args.seeds), args.recipes, subjects)]  # fmt: skip
    results = {}
    with _workers(args.workers) as each:
        for cell, scores in zip(cells, each(partial(train, plan), cells), strict=True):
            results[cell] = scores
            closed = ", ".join(f"{one.closed:.0%} closed after {step} steps" for step, one in scores.items())
            console.say(f"{len(results)} of {len(cells)}: {cell}: {closed}")
    if args.smoke:
        for one in (one for scores in results.values() for one in scores.values()):
            console.say(table(tiny_judge.shown(one)))
            low = [f"{name} {getattr(one, name):.2f} < {least}" for name, least in LOWEST.items()
                   if getattr(one, name) < least]  # fmt: skip
            if low:
                console.say(f"DreamBooth does not work: {', '.join(low)}")
                dist.finish(1)
                sys.exit(1)
    found = rows(results, by_subject=args.half == "proving")
    others = [recipe.replace(" ", "_") for recipe in args.recipes if recipe != "quickstart"]
    subject = "-".join([args.half, *others]) if len(args.recipes) == 1 else args.half
    return common.result(args, "choose_settings", subject, found, ABOUT)


@contextmanager
def _workers(count: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over as many processes of one thread each, or in this one."""
    if count == 1:
        yield map
        return
    method = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, method, torch.set_num_threads, (1,)) as pool:
        yield pool.map  # in order


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "set")
    words.add_argument("--half", default="choosing", choices=get_args(world.Half))
    words.add_argument("--looks", type=int, default=42, metavar="SEED", help="draws a list of subjects")
    words.add_argument("--subjects", type=int, nargs="+", default=list(range(8)), help="numbers in that list")
    words.add_argument("--seeds", type=int, default=3, help="training runs of each subject and recipe")
    words.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME",
                       help=", ".join(RECIPES))  # fmt: skip
    words.add_argument("--steps", type=int, nargs="+", help="score after these (default: the config's)")
    words.add_argument("--pictures", type=int, default=tiny_judge.SUBJECT_IMAGES, help="for each prompt")
    words.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    return words


if __name__ == "__main__":
    common.main(run, parser())
