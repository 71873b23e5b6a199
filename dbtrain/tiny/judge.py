"""A judge of pictures of the small world: what a picture shows, where, and how like a subject it is.

    judge = Judge.load()
    judge.read(pictures).places        # ["beach", "snow", ...]
    judge.likeness(pictures, photos)   # cosine to the photos' mean embedding, (pictures,)

Trained and measured by `python -m benchmarks.tiny.judge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from dbtrain.tiny import world
from dbtrain.tiny.paint import COLOURS, KINDS, PATTERNS, SIDE

WEIGHTS = Path(__file__).parent / "judge.safetensors"
HEADS = {"kind": tuple(KINDS), "place": world.PLACES, "colour": tuple(COLOURS), "pattern": tuple(PATTERNS)}
LIKENESS = 64  # width of the embedding
SAME = 0.6  # likeness from which a picture counts as one of the subject


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
