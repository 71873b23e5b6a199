"""Variants of a photo: turned a little, in slightly other colors. Each is stored, not drawn at every step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dbtrain.config import Augment
from dbtrain.data.sizes import Size
from dbtrain.runtime import rng

LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue: Rec. ITU-R BT.601
# Rows: luma and two axes of chroma at right angles, in which hue is an angle (YIQ, FCC 1953).
YIQ = np.stack([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True)
class Change:
    """What one variant differs in. The defaults change nothing."""

    rotate: float = 0.0  # degrees, counterclockwise
    hue: float = 0.0  # degrees
    brightness: float = 1.0  # factors
    contrast: float = 1.0
    saturation: float = 1.0

    @classmethod
    def draw(cls, cfg: Augment | None, seed: int, photo_key: str, variant: int) -> Change:
        """Each change, uniform within its limit. It depends on no other photo, variant or limit."""
        if cfg is None:
            return UNCHANGED
        values = {}
        for field in fields(cls):
            assert isinstance(field.default, float)
            u = torch.rand(
                (), generator=rng.generator(seed, "augment", photo_key, variant, field.name)
            ).item()
            values[field.name] = round(field.default + (2 * u - 1) * getattr(cfg, field.name), 4)
        return cls(**values)

    def about(self) -> dict[str, float]:
        """What changes, as a row's description has it; {} if nothing does."""
        return {name: value for name, value in asdict(self).items() if value != getattr(UNCHANGED, name)}

    def __str__(self) -> str:
        return ", ".join(SAID[name](value) for name, value in self.about().items())

    def around(self, size: Size) -> Size:
        """The smallest upright size, px, that a turned crop of `size` fits into, about the same center."""
        turn = abs(math.radians(self.rotate))
        height = size.height * math.cos(turn) + size.width * math.sin(turn)
        width = size.width * math.cos(turn) + size.height * math.sin(turn)
        return Size(_grown(size.height, height), _grown(size.width, width))

    def applied(self, part: Image.Image, size: Size) -> Image.Image:
        """The crop of `size` in a part of a photo that has the size `around` it."""
        if self.rotate:
            down, right = (part.height - size.height) // 2, (part.width - size.width) // 2
            turned = part.rotate(self.rotate, Image.Resampling.BICUBIC)
            part = turned.crop((right, down, right + size.width, down + size.height))
        recolors = part.mode == "RGB" and self._colors()  # masks keep their values
        return Image.fromarray(self._recolored(np.asarray(part))) if recolors else part

    def _colors(self) -> bool:
        return bool(self.about().keys() - {"rotate"})

    def _recolored(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) with all changes of color at once, so that they are rounded once."""
        turn = -math.radians(self.hue)  # red towards yellow, as in HSV
        chroma = self.saturation * np.array(
            [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
        )
        within = np.eye(3)
        within[1:, 1:] = chroma
        matrix = np.linalg.solve(YIQ, within @ YIQ)
        colors = values @ matrix.T
        middle = (values @ LUMA).mean()
        colors = self.brightness * (middle + self.contrast * (colors - middle))
        return colors.round().clip(0, 255).astype(np.uint8)


UNCHANGED = Change()
SAID = {
    "rotate": "turned by {:+.1f}°".format,
    "hue": "hue {:+.1f}°".format,
    "brightness": "brightness × {:.2f}".format,
    "contrast": "contrast × {:.2f}".format,
    "saturation": "saturation × {:.2f}".format,
}


def _grown(length: int, least: float) -> int:
    """`length` plus an even number of pixels, at least `least`."""
    return length + 2 * math.ceil(round((least - length) / 2, 6)) if least > length else length
