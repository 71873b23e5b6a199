"""What each setting does to the result: one change at a time from the quickstart's, on the embedded base.

    python -m benchmarks.choose_settings --work runs/settings

Steps, rank, learning rate, prior weight and number of photos, for an object, a vehicle and a
character. Run again, it goes on where it was; runs of one subject share its class images and its photos.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import peft
import torch

from benchmarks.subject_fidelity import CONFIG, figures, share
from dbtrain.config import Config
from dbtrain.evaluate import tiny_judge
from dbtrain.evaluate.tiny_judge import JudgeScores
from dbtrain.export.export import export
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime import console, dist
from dbtrain.tiny import world
from dbtrain.tiny.paint import render
from dbtrain.train.loop import train

SUBJECTS = ("mug", "car", "robot")
STEPS = (100, 200)
USUAL = "the quickstart's"
PHOTOS = 5


@dataclass(frozen=True)
class Change:
    """One setting that is not the quickstart's."""

    name: str  # as the table calls it
    overrides: tuple[str, ...] = ()
    photos: int = PHOTOS

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-").replace("'", "")


CHANGES = (
    Change(USUAL),
    Change("rank 4", ("adapter.rank=4",)),
    Change("rank 64", ("adapter.rank=64",)),
    Change("lr 3e-4", ("optim.lr=3e-4",)),
    Change("lr 3e-3", ("optim.lr=3e-3",)),
    Change("prior_weight 0.3", ("loss.prior_weight=0.3",)),
    Change("prior_weight 3", ("loss.prior_weight=3",)),
    Change("no class images", ("prepare.class_prompt=null",)),
    Change("3 photos", photos=3),
    Change("10 photos", photos=10),
    Change("attention only", ("adapter.targets=attention",)),
)


def run(change: Change, subject: str, work: Path, overrides: list[str]) -> dict[int, JudgeScores]:
    """Scores of one run after each of `STEPS`."""
    photos = work / f"photos-{subject}-{change.photos}"
    photos.mkdir(parents=True, exist_ok=True)
    for number in range(change.photos):
        render(world.subject_scene(subject, number)).save(photos / f"{number:02d}.png")
    run_dir = work / f"{subject}-{change.folder}"
    bare = change.name == "no class images"
    shards = work / f"shards-{subject}-{change.photos}{'-bare' if bare else ''}"
    cfg = Config.load(CONFIG, [
        f"run_dir={run_dir}", f"data.shards={shards}", f"prepare.photos={photos}",
        f"prepare.class_dir={work / 'class-images'}", f"prepare.instance_prompt=a photo of sks {subject}",
        f"prepare.class_prompt=a photo of a {subject}", f"train.steps={STEPS[-1]}",
        f"train.checkpoint_every={STEPS[0]}", "train.keep=100", *change.overrides, *overrides,
    ])  # fmt: skip
    prepare(cfg)
    train(cfg)
    found = {}
    for step in STEPS:
        out = run_dir / f"step{step}"
        scores = tiny_judge.evaluate(cfg, str(export(cfg, step, out)), out, work / f"base-{subject}")
        if scores:
            found[step] = scores
    return found


def markdown(results: dict[tuple[Change, str], dict[int, JudgeScores]], command: str) -> str:
    """A row a change and number of steps; means over subjects."""
    subjects = list(dict.fromkeys(subject for _, subject in results))
    several = len(subjects) > 1
    lines = [
        "# What each setting does, on the embedded base", "", f"`{command}`", "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores; "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}.", "",
        f"One change at a time from the quickstart's settings (rank 16, lr 1e-3, prior weight 1, 64 class "
        f"images, {PHOTOS} photos, batches of 4), one seed, "
        f"{'mean ± standard deviation over ' * several}{', '.join(subjects)}. *Closed*: how much of the way "
        "from the base's pictures of the class to real pictures of the subject; *drift*: share of class "
        "pictures that turned into the subject.", "",
        "| change | steps | closed | place right | drift | diversity of the class |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for change in dict.fromkeys(change for change, _ in results):
        for step in STEPS:
            f = figures([found[step] for (one, _), found in results.items() if one == change])
            told = {name: share(mean, spread if several else None) for name, (mean, spread) in f.items()}
            lines.append(
                f"| {change.name} | {step} | {told['closed']} | {told['place']} | {told['drift']} "
                f"| {f['diversity'][0]:.2f} |"
            )
    if not several:
        return "\n".join(lines) + "\n"
    lines += ["", f"After {STEPS[-1]} steps, subject by subject (closed, drift):", "",
              f"| change | {' | '.join(subjects)} |", f"|---|{'---|' * len(subjects)}"]  # fmt: skip
    for change in dict.fromkeys(change for change, _ in results):
        cells = [results[change, subject][STEPS[-1]] for subject in subjects]
        lines.append(
            f"| {change.name} | {' | '.join(f'{share(c.closed)}, {share(c.drift)}' for c in cells)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; kept, and gone on from")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(world.SUBJECTS))
    parser.add_argument("--changes", nargs="+", choices=[one.name for one in CHANGES], help="only these")
    parser.add_argument("--out", type=Path, help="folder of the table (default: --work)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="over the config's")
    args = parser.parse_args()
    console.start()
    dist.init()
    work, results = args.work.absolute(), {}
    chosen = [change for change in CHANGES if not args.changes or change.name in args.changes]
    for subject in args.subjects:
        for change in chosen:
            console.say(f"{subject}: {change.name}")
            results[change, subject] = run(change, subject, work, args.set)
    if dist.is_main():
        out = args.out or args.work
        out.mkdir(parents=True, exist_ok=True)
        rows = [
            {"change": change.name, "subject": subject, "steps": step} | asdict(scores)
            for (change, subject), found in results.items()
            for step, scores in found.items()
        ]
        (out / "settings.json").write_text(json.dumps(rows, indent=1) + "\n")
        command = " ".join(["python -m benchmarks.choose_settings", *sys.argv[1:]])
        (out / "settings.md").write_text(markdown(results, command))
        console.say(f"table: {out / 'settings.md'}")
    dist.finish(0)


if __name__ == "__main__":
    main()
