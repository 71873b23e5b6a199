"""Resize, CenterCrop, RandomCrop, RandomHorizontalFlip, ToTensor, Normalize, Compose, for PIL images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


PIL_NAMES = {mode: mode.name.removesuffix("_EXACT") for mode in InterpolationMode}


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """The short side becomes `size` px, the long one is rounded down; (height, width) is taken as it is."""

    def __init__(
        self, size: int | Sequence[int], interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> None:
        self.size = (size,) if isinstance(size, int) else tuple(size)
        self.resample = Image.Resampling[PIL_NAMES[interpolation]]

    def __call__(self, image: Image.Image) -> Image.Image:
        if len(self.size) == 2:
            height, width = self.size
        else:
            short, long = sorted(image.size)
            other = int(self.size[0] * long / short)
            width, height = (self.size[0], other) if image.width <= image.height else (other, self.size[0])
        if (width, height) == image.size:
            return image
        return image.resize((width, height), self.resample)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])


def _cut(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


class CenterCrop:
    """The middle, (height, width) px, of an image that is at least that large."""

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = _pair(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if image.width < width or image.height < height:
            raise NotImplementedError(f"cropping {image.size} to {(width, height)}: padding is not offered")
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return _cut(image, top, left, height, width)


class RandomCrop:
    """A part, (height, width) px, wherever torch's global generator puts it."""

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = _pair(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if image.width < width or image.height < height:
            raise ValueError(f"cannot crop {(width, height)} out of {image.size}")
        if (image.width, image.height) == (width, height):
            return image
        top = int(torch.randint(0, image.height - height + 1, size=(1,)))
        left = int(torch.randint(0, image.width - width + 1, size=(1,)))
        return _cut(image, top, left, height, width)


class RandomHorizontalFlip:
    """Mirrored with probability `p`, by torch's global generator."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image) if float(torch.rand(1)) < self.p else image


class ToTensor:
    """(channels, height, width) in [0, 1], fp32, of an 8-bit picture."""

    def __call__(self, image: Image.Image) -> Tensor:
        values = np.array(image, copy=True)
        if values.dtype != np.uint8:
            raise NotImplementedError(f"a picture of mode {image.mode}")
        values = values[:, :, None] if values.ndim == 2 else values
        return torch.from_numpy(values).permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    """(values - mean) / std, channel by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def __call__(self, values: Tensor) -> Tensor:
        return values.sub(self.mean).div(self.std)
