"""The sizes of stored images: squares, or the shapes of the photos at about the same area.

Batches have one size each, so photos of nearly the same shape share one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dbtrain.config import Prepare

KEPT = 0.95  # least share of a photo's area, for sizes of another shape
THINNEST = 4  # limit of long side / short side; of a photo that is thinner, less is kept
AREAS = 1.35  # limit of an area / that of the square, and of the inverse


class Size(NamedTuple):
    """The size of an image, px."""

    height: int
    width: int

    @classmethod
    def square(cls, side: int) -> Size:
        return cls(side, side)

    @classmethod
    def parse(cls, text: str) -> Size:
        """The size that a setting such as `768x512` means, which is width x height."""
        width, height = map(int, text.split("x"))
        return cls(height, width)

    @property
    def is_square(self) -> bool:
        return self.height == self.width

    @property
    def area(self) -> int:
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


Sized = tuple[Path, Size]  # an image, and a size at which to store it


def for_photo(height: int, width: int, cfg: Prepare, grids: tuple[int, ...]) -> list[Size]:
    """The sizes in which to store a photo of `height` x `width` px, the smallest first.

    That is one for each resolution that does not enlarge it, or else the smallest. `grids`: see `closest`.
    """
    if isinstance(cfg.buckets, tuple):
        return [best([Size.parse(text) for text in cfg.buckets], height, width)]
    sizes = [closest(height, width, side, grids) if cfg.buckets else Size.square(side)
             for side in cfg.resolutions]  # fmt: skip
    return [size for size in sizes if scale(height, width, size) <= 1] or sizes[:1]


def scale(height: int, width: int, size: Size) -> float:
    """By how much a photo is resized so that it covers `size`."""
    return max(size.height / height, size.width / width)


def kept(height: int, width: int, size: Size) -> float:
    """The share of a photo's area in the largest crop of the shape of `size`."""
    wider = (width * size.height) / (height * size.width)
    return min(wider, 1 / wider)


def best(sizes: list[Size], height: int, width: int) -> Size:
    """The size that keeps most of a photo; the first of several."""
    return max(sizes, key=lambda size: round(kept(height, width, size), 6))


@lru_cache(maxsize=4096)
def closest(height: int, width: int, side: int, grids: tuple[int, ...]) -> Size:
    """The size for a photo that has about the area of a square of `side` px.

    One of `grids`, px, divides its sides: the first with which a size keeps enough of the photo. Of these
    sizes the closest in area; if none keeps enough, the one that keeps most.
    """
    square = Size.square(side)
    if kept(height, width, square) >= KEPT:
        return square

    def unlike(size: Size) -> tuple[float, float]:
        missing = max(0.0, KEPT - kept(height, width, size))
        return missing, abs(math.log(size.area / square.area))

    found = [min(_around(side, grid), key=unlike, default=square) for grid in grids]
    return next((size for size in found if unlike(size)[0] == 0), min(found, key=unlike))


@lru_cache(maxsize=64)
def _around(side: int, grid: int) -> list[Size]:
    """The sizes of about this square's area, and not too thin."""
    lengths = range(grid, THINNEST * side + 1, grid)
    return [
        Size(height, width)
        for height in lengths
        for width in lengths
        if max(height, width) <= THINNEST * min(height, width)
        and side**2 / AREAS <= height * width <= side**2 * AREAS
    ]


def quotas(shares: Mapping[Size, float], count: int) -> dict[Size, int]:
    """How many of `count` images have each size, in proportion to its share, and at least one of each."""
    total, sizes = sum(shares.values()), list(shares)
    exact = {size: max(1.0, count * share / total) for size, share in shares.items()}
    found = {size: math.floor(value) for size, value in exact.items()}
    by_rest = sorted(sizes, key=lambda size: (found[size] - exact[size], size))
    for number in range(count - sum(found.values())):
        found[by_rest[number % len(sizes)]] += 1
    while sum(found.values()) > count:
        found[max(sizes, key=lambda size: (found[size], size))] -= 1
    return found
