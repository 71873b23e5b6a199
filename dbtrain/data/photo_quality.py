"""Quality of photos, whatever their subject: sharpness, near-duplicates, details outside the center crop.

The limits were measured on 20 photos of four subjects from Ruiz et al. 2022, 690 to 1024 px, and on
edited copies of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 256  # px of the short side when sharpness and edges are measured
TILES = 8  # the sharpest tenth of 8 x 8 tiles counts, because a background may be out of focus
# Photos: 445 to 7600. Blurred with a Gaussian of 0.5% of the side: 20 to 107; of 0.3%: 58 to 650.
SHARP = 110.0
# Copies of a photo (recompressed, 5 times smaller, brighter, or cropped by 2% on all sides) differ in 9 of 64
# bits or fewer, and their colors correlate by 0.968 or more. Different photos: 15 bits or more, 0.82 or less.
# Both limits apply, because the bits of a subject in front of a plain wall say little.
BITS, COLORS = 10, 0.94
MINIATURE = 16  # px of the side when colors are compared
# Share of a photo's edges that the best square has more than the center square. 60 random 3:2 crops: at
# most 0.07 for three quarters of them, at most 0.22 for all.
MISSED = 0.15
LEFT_OUT = 0.4  # share of a photo's area outside the center square: 0.44 for 16:9, a third for 3:2


@dataclass(frozen=True)
class PhotoQuality:
    """Measurements of one photo."""

    height: int
    width: int
    sharpness: float
    bits: NDArray[np.bool_]  # (64,)
    colors: NDArray[np.float64]  # (MINIATURE * MINIATURE * 3,), of mean 0 and norm 1
    left_out: float  # share of the area outside the center square
    missed: float  # share of the edges that the best square has more than the center square
    best: float  # position of the best square: 0 left or top, 1 right or bottom


def quality_of(photo: Image.Image) -> PhotoQuality:
    """Measure an upright RGB photo."""
    width, height = photo.size
    scale = min(1.0, SIDE / min(width, height))  # enlarging a small photo would blur it
    size = max(1, round(width * scale)), max(1, round(height * scale))
    gray = photo.convert("L")
    values = np.asarray(gray.resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    missed, best = _squares(values)
    left_out = 1 - min(height, width) / max(height, width)
    return PhotoQuality(
        height, width, sharpness(values), difference_bits(gray), miniature(photo), left_out, missed, best
    )


def sharpness(values: NDArray[np.float32]) -> float:
    """Variance of the Laplacian of a gray image, (H, W) in [0, 255]: the 90th percentile over its tiles.

    Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy", but for the tiles.
    """
    if min(values.shape) < 2 + TILES:
        return 0.0
    center = values[1:-1, 1:-1]
    around = values[1:-1, :-2] + values[1:-1, 2:] + values[:-2, 1:-1] + values[2:, 1:-1]
    rows = np.array_split(around - 4 * center, TILES)
    tiles = [tile.var() for row in rows for tile in np.array_split(row, TILES, axis=1)]
    return float(np.percentile(tiles, 90))


def difference_bits(gray: Image.Image) -> NDArray[np.bool_]:
    """dHash, (64,): whether each cell of an 8 x 9 thumbnail is darker than the one to its right."""
    small = np.asarray(gray.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return (small[:, 1:] > small[:, :-1]).ravel()


def miniature(photo: Image.Image) -> NDArray[np.float64]:
    """A thumbnail's colors without brightness and contrast, of norm 1; zero for a uniform image."""
    small = photo.resize((MINIATURE, MINIATURE), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float64)
    values = (values - values.mean((0, 1))).ravel()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def alike(qualities: list[PhotoQuality]) -> list[tuple[int, int]]:
    """Pairs of indices of photos that are near-duplicates."""
    if not qualities:
        return []
    bits = np.stack([one.bits for one in qualities])
    colors = np.stack([one.colors for one in qualities])
    found = []
    for a in range(len(bits)):  # all pairs at once would take gigabytes for thousands of photos
        same = ((bits[a + 1 :] != bits[a]).sum(-1) <= BITS) & (colors[a + 1 :] @ colors[a] >= COLORS)
        found += [(a, a + 1 + int(b)) for b in np.flatnonzero(same)]
    return found


def _squares(values: NDArray[np.float32]) -> tuple[float, float]:
    """(edges that the best square has more than the center square, position of the best square)."""
    upright = values if values.shape[1] >= values.shape[0] else values.T
    side, room = upright.shape[0], upright.shape[1] - upright.shape[0]
    if side < 2 or not room:
        return 0.0, 0.5
    edges = np.hypot(*np.gradient(upright)).sum(0)
    total = np.concatenate([[0.0], np.cumsum(edges)])
    shares = (total[side:] - total[: room + 1]) / max(total[-1], 1e-9)
    best = int(shares.argmax())
    return float(shares[best] - shares[room // 2]), best / room
