"""How the judge of the embedded base is trained and measured: `python -m benchmarks.tiny.judge`.

With `--work FOLDER` it is trained on renders first, and resumed by running the same command again. The
figures are of renders that its training never saw.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from benchmarks.tiny.fit import Stage, drawn
from dbtrain.runtime import files, rng
from dbtrain.tiny import world
from dbtrain.tiny.judge import HEADS, SAME, WEIGHTS, Judge, as_tensor, normed
from dbtrain.tiny.paint import Scene, render

SHARPNESS = 10.0  # inverse temperature of the contrastive loss
UNKNOWN = -100  # label that cross_entropy leaves out

PICTURES = 16_384  # training renders
SUBJECTS, EACH = 2_048, 6  # made-up subjects, and renders of each


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The truth of each head, (scenes,) int64; a subject's two looks have no one colour or pattern."""
    rows = [
        (HEADS["kind"].index(s.kind), HEADS["place"].index(s.place),
         UNKNOWN if s.mark else HEADS["colour"].index(s.upper.first),
         UNKNOWN if s.mark else HEADS["pattern"].index(s.upper.pattern))
        for s in scenes
    ]  # fmt: skip
    return dict(zip(HEADS, torch.tensor(rows).unbind(1), strict=True))


def roughened(images: Tensor, source: torch.Generator) -> Tensor:
    """Images as a small generator might draw them: some blurred, all a little off in colour and noisy."""
    count = len(images)
    blurred = avg_pool2d(images, 3, 1, padding=1, count_include_pad=False)
    halved = interpolate(avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
    choice = torch.rand(count, 1, 1, 1, generator=source)
    images = torch.where(choice < 0.25, blurred, torch.where(choice < 0.4, halved, images))
    gain = 1 + 0.15 * torch.randn(count, 3, 1, 1, generator=source)
    shift = 0.08 * torch.randn(count, 3, 1, 1, generator=source)
    return images * gain + shift + 0.05 * torch.randn(images.shape, generator=source)


def fit(work: Path, steps: int, batch: int = 64) -> Judge:
    """Train a judge on renders: attributes on scenes, likeness on pairs of pictures of made-up subjects."""
    scenes = [world.scene(number) for number in range(PICTURES)]
    pairs = [world.random_subject_scene(s, k) for s in range(SUBJECTS) for k in range(EACH)]
    pictures = drawn(work / "judge-scenes.npy", scenes)
    subjects = drawn(work / "judge-subjects.npy", pairs)
    scene_labels, pair_labels = labels(scenes), labels(pairs)
    with rng.seeded("tiny", "judge"):
        judge = Judge()
    stage = Stage(work / "judge", judge, steps, warmup=500, lr=1e-3, decay=0.995)

    def loss_of(step: int) -> Tensor:
        source = rng.generator("tiny", "judge", step)
        some = torch.randint(PICTURES, (batch,), generator=source)
        who = torch.randperm(SUBJECTS, generator=source)[: batch // 2]
        first, other = torch.rand(batch // 2, EACH, generator=source).argsort(1)[:, :2].unbind(1)
        both = torch.cat([who * EACH + first, who * EACH + other])
        pixels = np.concatenate([pictures[some.numpy()], subjects[both.numpy()]])
        found = judge(roughened(normed(pixels), source))
        truth = {name: torch.cat([scene_labels[name][some], pair_labels[name][both]]) for name in HEADS}
        attributes = sum(cross_entropy(found[name], truth[name], ignore_index=UNKNOWN) for name in HEADS)
        one, two = found["likeness"][batch:].chunk(2)
        same = SHARPNESS * one @ two.T  # (subjects, subjects): the diagonal are two pictures of one
        mine = torch.arange(batch // 2)
        return attributes + cross_entropy(same, mine) + cross_entropy(same.T, mine)

    stage.fit(loss_of)
    return judge.eval().requires_grad_(False)


def measure(judge: Judge, count: int = 2_000) -> dict[str, float]:
    """Share of fresh renders that each head reads rightly, and how likeness tells subjects apart."""
    scenes = [world.scene(number, split="test") for number in range(count)]
    pictures = [render(scene) for scene in scenes]
    found, truth = judge(as_tensor(pictures)), labels(scenes)
    figures = {name: (found[name].argmax(1) == truth[name]).float().mean().item() for name in HEADS}
    own, of_class, others = [], [], []
    for name, (kind, *_) in world.SUBJECTS.items():
        photos = world.photos(name)
        fresh = [render(world.subject_scene(name, number)) for number in range(100, 120)]
        own.append(judge.likeness(fresh, photos))
        like = [picture for picture, scene in zip(pictures, scenes, strict=True) if scene.kind == kind]
        of_class.append(judge.likeness(like, photos))
        for rival in world.SUBJECTS.keys() - {name}:
            others.append(judge.likeness(world.photos(rival), photos))
    groups = {"fresh pictures of a subject": own, "pictures of its class": of_class, "other subjects": others}
    for what, likeness in groups.items():
        figures[f"likeness of {what}"] = torch.cat(likeness).mean().item()
    for what, likeness in groups.items():
        figures[f"likeness of {what} above {SAME}"] = (torch.cat(likeness) > SAME).float().mean().item()
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny.judge", description=__doc__)
    parser.add_argument("--work", type=Path, help="train: folder of what is resumed from")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args(arguments)
    if args.work:
        judge = fit(args.work, args.steps)
        state = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
        files.write_atomically(args.out, safetensors.torch.save(state))
    for name, value in measure(Judge.load(args.out)).items():
        print(f"| {name} | {value:.3f} |")


if __name__ == "__main__":
    main()
