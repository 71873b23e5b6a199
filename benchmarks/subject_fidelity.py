"""Does DreamBooth work? The paper's questions (arXiv:2208.12242, section 4), answered on the embedded base.

    torchrun --standalone --nproc-per-node 2 benchmarks/subject_fidelity.py --work runs/fidelity

Trains the quickstart's config on several subjects and seeds, with and without prior preservation,
for several LoRA ranks and step counts, and lets the judge say how like the subject the pictures are,
whether the place is the one asked for, and what became of the class. Run again, it goes on where it
was. `--smoke` is one run, which fails if DreamBooth does not work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import diffusers
import peft
import torch

from dbtrain.config import Config
from dbtrain.evaluate import tiny_judge
from dbtrain.evaluate.scores import table
from dbtrain.evaluate.tiny_judge import JudgeScores
from dbtrain.export.export import export
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime import console, dist
from dbtrain.tiny import world
from dbtrain.train.loop import train

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SMOKE = {"closed": 0.5, "place": 0.6}  # less than this and DreamBooth does not work


@dataclass(frozen=True)
class Cell:
    """One training run; its checkpoints are the shorter runs, because the learning rate is constant."""

    subject: str
    seed: int
    prior: bool
    rank: int

    @property
    def name(self) -> str:
        return f"{self.subject}-seed{self.seed}-{'prior' if self.prior else 'noprior'}-rank{self.rank}"


def cells(subjects: Sequence[str], seeds: int, ranks: Sequence[int], default: int) -> list[Cell]:
    """With and without prior at the quickstart's rank, all seeds; other ranks with prior, seed 0."""
    runs = [Cell(s, k, prior, default) for k in range(seeds) for s in subjects for prior in (True, False)]
    return runs + [Cell(s, 0, True, rank) for rank in ranks if rank != default for s in subjects]


def settings(cell: Cell, work: Path, steps: Sequence[int], overrides: Iterable[str]) -> Config:
    """The quickstart's config, for this cell."""
    every = min(b - a for a, b in zip([0, *steps], steps, strict=False))
    return Config.load(CONFIG, [
        f"run_dir={work / cell.name}", f"seed={cell.seed}",
        f"data.shards={work / f'shards-{cell.subject}-seed{cell.seed}'}",
        f"prepare.photos={work / f'photos-{cell.subject}'}", f"prepare.class_dir={work / 'class-images'}",
        f"prepare.instance_prompt=a photo of sks {cell.subject}",
        f"prepare.class_prompt=a photo of a {cell.subject}",
        f"adapter.rank={cell.rank}", f"train.steps={steps[-1]}", f"train.checkpoint_every={every}",
        f"train.keep={len(steps) * 100}",
        *([] if cell.prior else ["loss.prior_weight=0"]),
        *overrides,
    ])  # fmt: skip


def run(cell: Cell, work: Path, steps: Sequence[int], overrides: Sequence[str]) -> dict[int, JudgeScores]:
    """Train a cell; scores after each of `steps`, on rank 0 (an empty dict on the others)."""
    cfg = settings(cell, work, steps, overrides)
    with dist.agreed():
        if dist.is_main():
            world.main(Path(cfg.prepare.photos), cell.subject)  # type: ignore[union-attr]
    prepare(cfg)
    train(cfg)
    found = {}
    for step in steps:
        out = work / cell.name / f"step{step}"
        file = export(cfg, step, out)
        scores = tiny_judge.evaluate(cfg, str(file), out, work / f"base-{cell.subject}")
        if scores:
            found[step] = scores
    return found


def share(value: float, spread: float | None = None) -> str:
    return f"{100 * value:.0f}%" + (f" ± {100 * spread:.0f}" if spread is not None else "")


def figures(group: Sequence[JudgeScores]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over runs of every score."""
    names = ["closed", *asdict(group[0])]
    values = {name: [getattr(scores, name) for scores in group] for name in names}
    return {name: (mean(v), stdev(v) if len(v) > 1 else 0.0) for name, v in values.items()}


Results = dict[Cell, dict[int, JudgeScores]]
ABOUT = """Mean ± standard deviation over runs (subjects × seeds). *Likeness* is the judge's cosine to the
subject's five photos; *closed* is how much of the way from the base's pictures of the class to real
pictures of the subject the adapter's pictures go; *drift* is the share of class pictures that turned
into the subject; *diversity* is the mean 1 - cosine between class pictures."""


def chosen(
    results: Results, step: int, prior: bool, rank: int, subject: str | None = None
) -> list[JudgeScores]:
    """Scores after `step` of all runs of one kind."""
    return [
        found[step]
        for cell, found in results.items()
        if (cell.prior, cell.rank) == (prior, rank) and subject in (None, cell.subject)
    ]


def markdown(results: Results, steps: Sequence[int], rank: int, command: str) -> str:
    """All tables of the result file."""
    machine = platform.processor() or platform.machine()
    lines = [
        "# Subject fidelity on the embedded base", "", f"`{command}`", "",
        f"{machine}, {os.cpu_count()} CPU cores; torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, peft {peft.__version__}.", "", ABOUT, "",
        "| prior | rank | steps | runs | likeness | closed | place right | class shown | drift | diversity |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for prior, of_rank in sorted({(cell.prior, cell.rank) for cell in results}, reverse=True):
        for step in steps:
            mine = chosen(results, step, prior, of_rank)
            f = figures(mine)
            lines.append(
                f"| {'yes' if prior else 'no'} | {of_rank} | {step} | {len(mine)} "
                f"| {f['likeness'][0]:.2f} | {share(*f['closed'])} | {share(*f['place'])} "
                f"| {share(*f['kind'])} | {share(*f['drift'])} | {f['diversity'][0]:.2f} |"
            )
    one = figures([next(iter(found.values())) for found in results.values()])
    lines += [
        "", f"The bare base: likeness {one['likeness_base'][0]:.2f}, drift {share(one['drift_base'][0])}, "
        f"diversity {one['diversity_base'][0]:.2f}. Real pictures of the subject: likeness "
        f"{one['likeness_real'][0]:.2f}.", "",
        f"Subject by subject, with prior preservation, rank {rank}, {steps[-1]} steps:", "",
        "| subject | base | adapter | real | closed | place right | drift | drift without prior |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for subject in dict.fromkeys(cell.subject for cell in results):
        f, g = (figures(chosen(results, steps[-1], prior, rank, subject)) for prior in (True, False))
        likeness = " | ".join(f"{f[name][0]:.2f}" for name in ("likeness_base", "likeness", "likeness_real"))
        lines.append(
            f"| {subject} | {likeness} | {share(*f['closed'])} | {share(*f['place'])} "
            f"| {share(*f['drift'])} | {share(*g['drift'])} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: Results, steps: Sequence[int], path: Path) -> None:
    """Subject fidelity, prompt fidelity and class drift over steps, a line for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("closed", "way closed to the real subject"), ("place", "place right"), ("drift", "class drift")
    )  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, panels, strict=True):
        for prior, rank in sorted({(cell.prior, cell.rank) for cell in results}, reverse=True):
            groups = [chosen(results, step, prior, rank) for step in steps]
            middle = [mean(getattr(scores, name) for scores in group) for group in groups]
            label = f"rank {rank}, {'with' if prior else 'without'} prior ({len(groups[0])} runs)"
            axis.plot(steps, middle, marker="o", ls="-" if prior else "--", label=label)
        axis.set(title=title, xlabel="steps", ylim=(-0.05, 1.05), xticks=steps)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; kept, and gone on from")
    parser.add_argument("--subjects", nargs="+", default=list(world.SUBJECTS), choices=list(world.SUBJECTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="*", help="LoRA ranks besides the quickstart's")
    parser.add_argument("--steps", type=int, nargs="*", help="step counts (default: 1/4, 1/2, all of them)")
    parser.add_argument("--out", type=Path, help="folder of table and plot (default: --work)")
    parser.add_argument("--smoke", action="store_true", help="one run; exit code 1 if it did not work")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="over the config's")
    args = parser.parse_args()
    console.start()
    dist.init()
    usual = Config.load(CONFIG, args.set)
    steps = args.steps or [usual.train.steps // 4, usual.train.steps // 2, usual.train.steps]
    work, rank = args.work.absolute(), usual.adapter.rank
    if args.smoke:
        cell = Cell(args.subjects[0], 0, True, rank)
        found = run(cell, work, steps[-1:], args.set)
        for scores in found.values():
            console.say(table(tiny_judge.shown(scores)))
            low = [f"{name} {getattr(scores, name):.2f} < {least}" for name, least in SMOKE.items()
                   if getattr(scores, name) < least]  # fmt: skip
            if low:
                console.say(f"DreamBooth does not work: {', '.join(low)}")
                dist.finish(1)
                sys.exit(1)
        dist.finish(0)
        return

    todo = cells(args.subjects, args.seeds, args.ranks or [], rank)
    results = {}
    for number, cell in enumerate(todo, 1):
        console.say(f"run {number} of {len(todo)}: {cell.name}")
        results[cell] = run(cell, work, steps, args.set)
    if dist.is_main():
        out = args.out or args.work
        out.mkdir(parents=True, exist_ok=True)
        rows = [
            asdict(cell) | {"steps": step} | asdict(scores)
            for cell, found in results.items()
            for step, scores in found.items()
        ]
        (out / "subject_fidelity.json").write_text(json.dumps(rows, indent=1) + "\n")
        command = " ".join(["torchrun --standalone --nproc-per-node", str(dist.world()), *sys.argv])
        (out / "subject_fidelity.md").write_text(markdown(results, steps, rank, command))
        plot(results, steps, out / "subject_fidelity.png")
        console.say(f"table and plot: {out / 'subject_fidelity.md'}, {out / 'subject_fidelity.png'}")
    dist.finish(0)


if __name__ == "__main__":
    main()
