"""Does DreamBooth work, and what does each setting do to the result? Asked on the embedded base.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.subject_fidelity --work runs/fidelity

Trains the quickstart's config on several subjects and seeds, with one change at a time, and lets the judge
say how like the subject the pictures are, whether the place is the one asked for, and what became of the
class (the questions of arXiv:2208.12242, section 4). Run again, it continues where it stopped. `--smoke` is
one run, which fails if DreamBooth does not work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks import common, trainer
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Config
from dbtrain.evaluate import tiny_judge
from dbtrain.evaluate.scores import table
from dbtrain.evaluate.tiny_judge import JudgeScores
from dbtrain.runtime import console, dist
from dbtrain.tiny import world
from dbtrain.tiny.paint import render

CONFIG = common.ROOT / "configs" / "quickstart.yaml"
LOWEST = {"closed": 0.5, "place": 0.6}  # less than this and DreamBooth does not work
USUAL, BARE, PREDICTION = "the quickstart's", "no class images", "prior by prediction"
CHANGES = {
    USUAL: (),
    "no prior": ("loss.prior_weight=0",),
    BARE: ("prepare.class_prompt=null",),
    PREDICTION: ("loss.prior=prediction",),
    "rank 4": ("adapter.rank=4",),
    "rank 64": ("adapter.rank=64",),
    "lr 3e-4": ("optim.lr=3e-4",),
    "lr 3e-3": ("optim.lr=3e-3",),
    "prior_weight 0.3": ("loss.prior_weight=0.3",),
    "prior_weight 3": ("loss.prior_weight=3",),
    "attention only": ("adapter.targets=attention",),
    "3 photos": (),
    "10 photos": (),
}  # name: what is put over the quickstart's settings
FIGURES = {
    "likeness": "", "closed": "%", "place": "%", "kind": "%", "drift": "%", "diversity": "",
    "likeness_base": "", "likeness_real": "",
}  # fmt: skip
ABOUT = """Medians over runs, with the least and the most. *Likeness* is the judge's cosine to the subject's
photos; *closed* is how much of the way from the base's pictures of the class to real pictures of the subject
the adapter's pictures go; *place* and *kind* are the shares of pictures with the place asked for and with the
class; *drift* is the share of class pictures that turned into the subject; *diversity* is the mean 1 - cosine
between class pictures."""


@dataclass(frozen=True)
class Cell:
    """One training run; its checkpoints are the shorter runs, because the learning rate is constant."""

    subject: str
    seed: int
    change: str

    @property
    def photos(self) -> int:
        return int(self.change.split()[0]) if self.change.endswith("photos") else 5


def settings(cell: Cell, work: Path, steps: Sequence[int], overrides: Sequence[str]) -> Config:
    """The quickstart's config, for this cell."""
    every = min(b - a for a, b in zip([0, *steps], steps, strict=False))
    data = f"{cell.subject}-seed{cell.seed}-{cell.photos}"
    data += {BARE: "-bare", PREDICTION: "-predicted"}.get(cell.change, "")
    return Config.load(CONFIG, [
        f"run_dir={_folder(cell, work)}", f"seed={cell.seed}", f"data.shards={work / f'shards-{data}'}",
        f"prepare.photos={work / f'photos-{cell.subject}-{cell.photos}'}",
        f"prepare.class_dir={work / 'class-images'}",
        f"prepare.instance_prompt=a photo of sks {cell.subject}",
        f"prepare.class_prompt=a photo of a {cell.subject}",
        f"train.steps={steps[-1]}", f"train.checkpoint_every={every}", f"train.keep={len(steps) * 100}",
        *CHANGES[cell.change], *overrides,
    ])  # fmt: skip


def _folder(cell: Cell, work: Path) -> Path:
    words = cell.change.replace(" ", "-").replace("'", "")
    return work / f"{cell.subject}-seed{cell.seed}-{words}"


def train(cell: Cell, work: Path, steps: Sequence[int], overrides: Sequence[str]) -> dict[int, JudgeScores]:
    """Train a cell; scores after each of `steps`, on rank 0 (an empty dict on the others)."""
    cfg = settings(cell, work, steps, overrides)
    with dist.agreed():
        if dist.is_main():
            folder = Path(cfg.prepare.photos)  # type: ignore[union-attr]
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(cell.photos):
                render(world.subject_scene(cell.subject, number)).save(folder / f"{number:02d}.png")
    trainer.prepare(cfg)
    trainer.train(cfg)
    found = {}
    for step in steps:
        out = _folder(cell, work) / f"step{step}"
        file = trainer.export(cfg, step, out)
        if scores := tiny_judge.evaluate(cfg, str(file), out, work / f"base-{cell.subject}"):
            found[step] = scores
    return found


def rows(results: Mapping[Cell, Mapping[int, JudgeScores]]) -> list[Row]:
    """A row a change and number of steps, over all runs; then one a subject, after the last of them."""
    found = []
    steps = sorted({step for scores in results.values() for step in scores})
    for change in dict.fromkeys(cell.change for cell in results):
        mine = [cell for cell in results if cell.change == change]
        for step in steps:
            found.append(_row(f"{change}, {step} steps", {cell: results[cell][step] for cell in mine}))
    for change, subject in dict.fromkeys((cell.change, cell.subject) for cell in results):
        mine = [cell for cell in results if (cell.change, cell.subject) == (change, subject)]
        found.append(_row(f"{subject}: {change}", {cell: results[cell][steps[-1]] for cell in mine}))
    return found


def _row(label: str, group: Mapping[Cell, JudgeScores]) -> Row:
    measures = {
        name: Measure.of(unit, [getattr(scores, name) * (100 if unit else 1) for scores in group.values()])
        for name, unit in FIGURES.items()
    }
    return Row(
        label=label, config={"runs": [f"{cell.subject}, seed {cell.seed}" for cell in group]},
        measures=measures, counts={"runs": len(group)},
    )  # fmt: skip


def run(args: argparse.Namespace, work: Path) -> Result:
    if not args.work:
        raise SystemExit("error: --work is missing; give a folder for the runs, which is kept")
    dist.init()
    steps = args.steps or [100, 200]
    if args.smoke:
        args.subjects, args.changes, args.seeds = args.subjects[:1], [USUAL], 1
        steps = [Config.load(CONFIG, args.set).train.steps]
    todo = [Cell(*one) for one in product(args.subjects, range(args.seeds), args.changes)]
    results = {}
    for number, cell in enumerate(todo, 1):
        console.say(f"run {number} of {len(todo)}: {cell.subject}, seed {cell.seed}, {cell.change}")
        if found := train(cell, work, steps, args.set):
            results[cell] = found
    if args.smoke:
        for scores in (scores for found in results.values() for scores in found.values()):
            console.say(table(tiny_judge.shown(scores)))
            low = [f"{name} {getattr(scores, name):.2f} < {least}" for name, least in LOWEST.items()
                   if getattr(scores, name) < least]  # fmt: skip
            if low:
                console.say(f"DreamBooth does not work: {', '.join(low)}")
                dist.finish(1)
                sys.exit(1)
    return common.result(args, "subject_fidelity", f"tiny-{args.device}", rows(results), ABOUT)


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "set")
    words.add_argument("--subjects", nargs="+", default=list(world.SUBJECTS), choices=list(world.SUBJECTS))
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--changes", nargs="+", default=[USUAL, "no prior"], choices=list(CHANGES))
    words.add_argument("--steps", type=int, nargs="+", help="default: 100 200; of --smoke: the config's")
    return words


if __name__ == "__main__":
    common.main(run, parser())
