"""A judge of pictures of the small world: what a picture shows, where, and how like a subject it is.

    judge = Judge.load()
    judge.read(pictures).places        # ["beach", "snow", ...]
    judge.likeness(pictures, photos)   # cosine to the photos' mean embedding, (pictures,)

`python -m dbtrain.tiny.judge --work FOLDER` trains it on renders and measures it on fresh ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, normalize

from dbtrain.runtime import files, rng
from dbtrain.tiny import world
from dbtrain.tiny.fit import Stage, drawn
from dbtrain.tiny.paint import COLOURS, KINDS, PATTERNS, SIDE, Scene, render

WEIGHTS = Path(__file__).parent / "judge.safetensors"
HEADS = {"kind": tuple(KINDS), "place": world.PLACES, "colour": tuple(COLOURS), "pattern": tuple(PATTERNS)}
LIKENESS = 64  # width of the embedding
SHARPNESS = 10.0  # inverse temperature of the contrastive loss
SAME = 0.6  # likeness from which a picture counts as one of the subject
UNKNOWN = -100  # label that cross_entropy leaves out

PICTURES = 16_384  # training renders
SUBJECTS, EACH = 2_048, 6  # made-up subjects, and renders of each


@dataclass(frozen=True)
class Reading:
    """What the judge sees in each picture."""

    kinds: list[str]
    places: list[str]
    colours: list[str]
    patterns: list[str]


class Judge(nn.Module):
    """A small convolutional network: one trunk, a head for each attribute, one for likeness."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128, 160)
        strides = (2, 2, 1, 2, 2)
        blocks = []
        for i, stride in enumerate(strides):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1)
            blocks += [conv, nn.GroupNorm(8, widths[i + 1]), nn.SiLU()]
        self.trunk = nn.Sequential(*blocks, nn.Flatten())
        self.shared = nn.Sequential(nn.Linear(160 * 16, 192), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(words)) for name, words in HEADS.items()})
        self.likeness_head = nn.Linear(192, LIKENESS)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of each head and unit "likeness" (B, LIKENESS), for images (B, 3, H, W) in [-1, 1]."""
        features = self.shared(self.trunk(images))
        found = {name: head(features) for name, head in self.heads.items()}
        return found | {"likeness": normalize(self.likeness_head(features))}

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Judge:
        """The judge that comes with the package."""
        judge = cls()
        judge.load_state_dict({name: t.float() for name, t in safetensors.torch.load_file(path).items()})
        return judge.eval().requires_grad_(False)

    def read(self, pictures: Sequence[Image.Image]) -> Reading:
        found = self(as_tensor(pictures))
        words = [[HEADS[name][i] for i in found[name].argmax(1).tolist()] for name in HEADS]
        return Reading(*words)

    def likeness(self, pictures: Sequence[Image.Image], photos: Sequence[Image.Image]) -> Tensor:
        """Cosine of each picture's embedding to the mean of the photos', (pictures,) in [-1, 1]."""
        centre = normalize(self(as_tensor(photos))["likeness"].mean(0), dim=0)
        return self(as_tensor(pictures))["likeness"] @ centre


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures as the judge wants them, (B, 3, SIDE, SIDE) in [-1, 1]."""
    small = [picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for picture in pictures]
    return normed(np.stack([np.asarray(picture) for picture in small]))


def normed(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


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
    parser = argparse.ArgumentParser(prog="python -m dbtrain.tiny.judge", description=__doc__)
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
