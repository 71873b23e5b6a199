"""Does `train.stop: best` stop in time, and at a step that is as good as the best one? On the embedded base.

    python -m benchmarks.stopping --work runs/stopping

Trains the quickstart's config on each subject to the last step, once, with validations on the way. Half of
the images of each validation go to the scorer of `train.stop: best`, and its rule is replayed with several
values of `train.patience`: where would it have stopped, and which step would it have exported? The other
half, images that it has not seen, say how good that step is. Run again, it continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks import common, trainer
from benchmarks.choose_settings import Cell, Plan, photograph
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Config
from dbtrain.evaluate import scoring
from dbtrain.evaluate.choice import Rows, Rule
from dbtrain.runtime import dist
from dbtrain.runtime.run_folder import RunFolder, step_of
from dbtrain.tiny import world

PROMPTS = ["a photo of {}", *(f"a photo of {{}} {world.PLACE_WORDS[p]}" for p in ("beach", "snow", "city"))]
IMAGES = 2  # per prompt, that the rule sees; as many again judge
ABOUT = """*end* is the step at which the run stops, *saved* the share of the steps that it does not take;
*exported* is the best step by its rule. *gained* is how much likeness to the subject training has gained by
then, as a share of what it has gained at the step with the highest likeness of all, both on images that the
rule has not seen; *place* is the share of these that are in the place that the prompt names."""


@dataclass(frozen=True)
class Curve:
    """The scores of every validation of a run: those that the rule sees, and those that judge it."""

    rule: Rule
    seen: Rows
    judged: Rows

    def outcome(self, patience: int) -> dict[str, float]:
        """What a run with this patience does, as the table has it."""
        start, last = self.rule.value(self.seen[0]), len(self.seen)
        scored = self.seen[1:]
        ends = (n for n in range(1, last) if self.rule.stale(scored[:n], start) >= patience)
        count = next(ends, last - 1)
        best, end = self.rule.choose(scored[:count])[0]["step"], scored[count - 1]["step"]
        judged = {row["step"]: row for row in self.judged}
        base = judged[0]["likeness"]
        most = max(row["likeness"] for row in self.judged) - base
        return {
            "end": end, "saved": 100 * (1 - end / scored[-1]["step"]), "exported": best,
            "gained": 100 * (judged[best]["likeness"] - base) / most, "place": 100 * judged[best]["place"],
        }  # fmt: skip


UNITS = {"end": "", "saved": "%", "exported": "", "gained": "%", "place": "%"}


def curve(subject: world.Subject, work: Path, steps: int, every: int, overrides: Sequence[str]) -> Curve:
    """Train a subject, and score its validations."""
    cfg = Plan(work, [every, steps], 0, [
        f"validation.every={every}", f"validation.prompts={json.dumps(PROMPTS)}",
        f"validation.images={2 * IMAGES}", "sample.batch=8", *overrides,
    ]).config(Cell(subject, 0, "quickstart"))  # fmt: skip
    with dist.agreed():
        if dist.is_main():
            photograph(subject, cfg)
    trainer.prepare(cfg)
    trainer.train(cfg)
    half = cfg.override(f"validation.images={IMAGES}")
    by = scoring.of(half, holds_out=False)
    return Curve(by.rule, *(_rows(cfg, by, first) for first in (0, IMAGES)))


def _rows(cfg: Config, by: scoring.Scoring, first: int) -> Rows:
    """The scores of each validation, of the images from number `first` on."""
    seeds = range(cfg.sample.seed + first, cfg.sample.seed + first + IMAGES)
    return [
        {"step": step_of(folder),
         **by.score([[folder / f"{n:02d}-seed{seed}.png" for seed in seeds] for n in by.prompts])}
        for folder in RunFolder(cfg.run_dir).validations()
    ]  # fmt: skip


def rows(curves: Mapping[str, Curve], patiences: Sequence[int]) -> list[Row]:
    """A row for each patience, over all subjects."""
    found = []
    for patience in patiences:
        each = {name: one.outcome(patience) for name, one in curves.items()}
        found.append(Row(
            label=f"{patience} validation" + "s" * (patience > 1), config={"subjects": each},
            measures={key: Measure.of(unit, [one[key] for one in each.values()])
                      for key, unit in UNITS.items()},
            counts={f"mean {key}, %": round(fmean(one[key] for one in each.values()), 1)
                    for key in ("saved", "gained")},
        ))  # fmt: skip
    return found


def run(args: argparse.Namespace, work: Path) -> Result:
    if not args.work:
        raise SystemExit("error: --work is missing; give a folder for the runs, which is kept")
    dist.init()
    if args.smoke:
        args.subjects, args.steps, args.every, args.patience = args.subjects[:1], 4, 2, [1]
    subjects = [world.drawn_subject(args.looks, number, "choosing") for number in args.subjects]
    curves = {
        f"{one.kind} {one.name}": curve(one, work, args.steps, args.every, args.set) for one in subjects
    }
    return common.result(args, "stopping", f"tiny-{args.device}", rows(curves, args.patience), ABOUT)


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "set")
    words.add_argument("--subjects", type=int, nargs="+", default=list(range(8)))
    words.add_argument("--looks", type=int, default=0, help="seed from which the subjects are drawn")
    words.add_argument("--steps", type=int, default=400)
    words.add_argument("--every", type=int, default=50)
    words.add_argument("--patience", type=int, nargs="+", default=[1, 2, 3])
    return words


if __name__ == "__main__":
    common.main(run, parser())
