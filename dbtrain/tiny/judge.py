"""A classifier for images of the cartoon world: what they show, where, and how much like a subject it is.

    judge = Judge.load()
    judge.read(images).places        # ["beach", "snow", ...]
    judge.likeness(images, photos)   # cosine to the photos' mean embedding, (images,)

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
TEXTURE = 10  # modules of the trunk up to and with its fourth convolution
SAME = 0.6  # minimum likeness of an image that counts as the subject


@dataclass(frozen=True)
class Reading:
    """The predicted attributes of each image."""

    kinds: list[str]
    places: list[str]
    colours: list[str]
    patterns: list[str]


class Judge(nn.Module):
    """A small convolutional network with one trunk, one head per attribute, and one for likeness."""

    def __init__(self) -> None:
        super().__init__()
        blocks, channels = [], 3
        for width, stride in ((32, 2), (64, 2), (96, 1), (128, 2), (160, 2)):
            conv = nn.Conv2d(channels, width, 3, stride, padding=1)
            blocks += [conv, nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.trunk = nn.Sequential(*blocks, nn.Flatten())
        self.shared = nn.Sequential(nn.Linear(160 * 16, 192), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(words)) for name, words in HEADS.items()})
        self.likeness_head = nn.Linear(192, LIKENESS)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of each head and a unit "likeness" (B, LIKENESS), for images (B, 3, H, W) in [-1, 1]."""
        features = self.shared(self.trunk(images))
        found = {name: head(features) for name, head in self.heads.items()}
        return found | {"likeness": normalize(self.likeness_head(features))}

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Judge:
        """Load the trained judge, by default the one that ships with dbtrain."""
        judge = cls()
        judge.load_state_dict({name: t.float() for name, t in safetensors.torch.load_file(path).items()})
        return judge.eval().requires_grad_(False)

    def read(self, images: Sequence[Image.Image]) -> Reading:
        """Return the most likely attributes of each image."""
        found = self(as_tensor(images))
        words = [[HEADS[name][i] for i in found[name].argmax(1).tolist()] for name in HEADS]
        return Reading(*words)

    def likeness(self, images: Sequence[Image.Image], photos: Sequence[Image.Image]) -> Tensor:
        """Cosine of each image's embedding to the mean of the photos', (images,) in [-1, 1]."""
        centre = normalize(self(as_tensor(photos))["likeness"].mean(0), dim=0)
        return self(as_tensor(images))["likeness"] @ centre

    def texture(self, images: Sequence[Image.Image]) -> Tensor:
        """Mean and deviation over each image of the fourth convolution's channels, (images, 256).

        Before its normalization and the heads, which were trained not to see blur and contrast.
        """
        found = self.trunk[:TEXTURE](as_tensor(images)).flatten(2)
        return torch.cat([found.mean(2), found.std(2)], 1)

    def each_to_others(self, photos: Sequence[Image.Image]) -> Tensor:
        """Cosine of each photo's embedding to the mean of the others', (photos,); 1 for a single photo."""
        found = self(as_tensor(photos))["likeness"]
        others = found.sum(0) - found if len(photos) > 1 else found
        return (found * normalize(others)).sum(1)


def as_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Images as the judge expects them, (B, 3, SIDE, SIDE) in [-1, 1]."""
    small = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    return normed(np.stack([np.asarray(image) for image in small]))


def normed(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
