"""Which settings teach every subject without forgetting its class? Searched on the embedded base.

    python -m benchmarks.choose_settings --work runs/choosing --half choosing --recipes quickstart ...

Trains subjects whose looks are drawn from a seed with the quickstart's config and each recipe's overrides.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import common, trainer
from dbtrain.config import Config
from dbtrain.evaluate import tiny_judge
from dbtrain.evaluate.tiny_judge import JudgeScores
from dbtrain.runtime.hashing import content_key
from dbtrain.tiny import world
from dbtrain.tiny.paint import render

CONFIG = common.ROOT / "configs" / "quickstart.yaml"
TE = "adapter.text_encoder={rank: %d, targets: %s}"
RECIPES: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "te8": ("adapter.text_encoder={rank: 8}",),
    "te8 snr5": ("adapter.text_encoder={rank: 8}", "loss.min_snr_gamma=5"),
    "te8 snr5 g1": ("adapter.text_encoder={rank: 8}", "loss.min_snr_gamma=5", "prepare.sampling.guidance=1"),
    "te8 3e-3 snr5 g1": (
        "adapter.text_encoder={rank: 8}", "optim.text_encoder_lr=3e-3", "loss.min_snr_gamma=5",
        "prepare.sampling.guidance=1",
    ),
    "te4 3e-3 snr5": ("adapter.text_encoder={rank: 4}", "optim.text_encoder_lr=3e-3", "loss.min_snr_gamma=5"),
}


@dataclass(frozen=True)
class Cell:
    half: world.Half
    looks: int
    subject: int
    seed: int
    recipe: str
    steps: tuple[int, ...]
    pictures: int = 4

    def drawn(self) -> world.Subject:
        return world.drawn_subject(self.looks, self.subject, self.half)


def settings(cell: Cell, work: Path) -> Config:
    subject = cell.drawn()
    every = min(b - a for a, b in zip([0, *cell.steps], cell.steps, strict=False))
    return Config.load(CONFIG, [
        f"run_dir={folder(cell, work)}", f"seed={cell.seed}",
        f"data.shards={work / 'shards' / f'{subject.name}-{cell.seed}'}-{content_key(cell.recipe)[:6]}",
        f"prepare.photos={work / 'photos' / subject.name}", f"prepare.class_dir={work / 'class-images'}",
        "subject.name=x", f"subject.class_word={subject.kind}",
        "validation.prompts=[]", "sample.batch=8", "train.micro_batch=4",
        f"train.steps={cell.steps[-1]}", f"train.checkpoint_every={every}", "train.keep=1000",
        *RECIPES[cell.recipe],
    ])  # fmt: skip


def folder(cell: Cell, work: Path) -> Path:
    key = content_key([*RECIPES[cell.recipe]])[:8]
    return work / cell.drawn().name / f"{cell.recipe.replace(' ', '-')}-{key}-seed{cell.seed}-{cell.steps[-1]}"


def make(cell: Cell, work: Path) -> dict[int, dict]:
    out = folder(cell, work)
    found = {}
    for step in cell.steps:
        path = out / f"step{step}" / "scores.json"
        if path.exists():
            found[step] = json.loads(path.read_text())
    if len(found) == len(cell.steps):
        return found
    out.mkdir(parents=True, exist_ok=True)
    clock = [time.process_time()]
    with (out / "said.txt").open("a") as said, redirect_stdout(said), redirect_stderr(said):
        cfg = settings(cell, work)
        subject = cell.drawn()
        photos = Path(cfg.prepare.photos)
        photos.mkdir(parents=True, exist_ok=True)
        for number in range(5):
            if not (photos / f"{number:02d}.png").exists():
                render(subject.scene(number)).save(photos / f"{number:02d}.png")
        trainer.prepare(cfg); clock.append(time.process_time())
        trainer.train(cfg); clock.append(time.process_time())
        real = [render(subject.scene(number)) for number in range(100, 132)]
        for step in cell.steps:
            to = out / f"step{step}"
            file = trainer.export(cfg, step, to)
            scores = tiny_judge.evaluate(cfg, str(file), to, work / "base" / subject.kind, real, cell.pictures)
            found[step] = asdict(scores)
        clock.append(time.process_time())
        (out / "clock.txt").write_text(" ".join(f"{b - a:.1f}" for a, b in zip(clock, clock[1:])) + "\n")
    return found


def start() -> None:
    torch.set_num_threads(1)



def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--work", type=Path)
    words.add_argument("--half", default="choosing")
    words.add_argument("--looks", type=int, default=0)
    words.add_argument("--subjects", type=int, default=8)
    words.add_argument("--first", type=int, default=0)
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--recipes", nargs="+", default=list(RECIPES))
    words.add_argument("--steps", type=int, nargs="+", default=[200])
    words.add_argument("--pictures", type=int, default=4)
    words.add_argument("--workers", type=int, default=2)
    args = words.parse_args()
    cells = [
        Cell(args.half, args.looks, subject, seed, recipe, tuple(args.steps), args.pictures)
        for recipe in args.recipes for seed in range(args.seeds) for subject in range(args.first, args.first + args.subjects)
    ]
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), start) as pool:
        jobs = {pool.submit(make, cell, work): cell for cell in cells}
        for job in as_completed(jobs):
            cell = jobs[job]
            for step, s in job.result().items():
                closed = (s["likeness"] - s["likeness_base"]) / (s["likeness_real"] - s["likeness_base"])
                print(f"{time.strftime('%H:%M:%S')} {cell.recipe:30} {cell.drawn().name:16} {cell.drawn().kind:6} s{cell.seed} {step:4} closed {100*closed:4.0f} place {100*s['place']:4.0f} drift {100*s['drift']:4.0f} div {100*s['diversity']/s['diversity_base']:4.0f} kind {100*s['kind']:.0f}", flush=True)


if __name__ == "__main__":
    main()
