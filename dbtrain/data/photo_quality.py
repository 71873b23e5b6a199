"""What can be told of photos without knowing their subject: sharpness, likeness, where their details lie.

The limits were measured on 20 photos of four subjects (Ruiz et al. 2022's, 690 to 1024 px) and on copies
of them; they say so beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 256  # px of the short side at which sharpness and details are measured
TILES = 8  # sharpness is that of the sharpest tenth of 8 x 8 tiles: a background may be out of focus
# Photos: 445 to 7600. The same, blurred with a Gaussian of 0.5% of their side: 20 to 107; of 0.3%: 58 to 650.
SHARP = 110.0
# Copies of a photo, recompressed, made 5 times smaller, brighter, or cut by 2% on all sides: up to 9 of 64
# bits apart, and their colours correlate by 0.968 or more. Different photos: 15 bits or more, 0.82 at most.
# Both, as bits say little of a subject before a plain wall.
BITS, COLOURS = 10, 0.94
MINIATURE = 16  # px of the side at which colours are compared
# Share of a photo's edges that another square holds more than the one in the centre. 60 strips of 3:2, cut
# from anywhere: 0.07 or less for three of four, 0.22 at most.
MISSED = 0.15
LEFT_OUT = 0.4  # share of a photo's area outside the centre square: 16:9 leaves out 0.44, 3:2 a third


@dataclass(frozen=True)
class PhotoQuality:
    """What one photo looks like."""

    height: int
    width: int
    sharpness: float
    bits: NDArray[np.bool_]  # (64,)
    colours: NDArray[np.float64]  # (MINIATURE * MINIATURE * 3,), of mean 0 and norm 1
    left_out: float  # share of the area outside the centre square
    missed: float  # share of the edges that the best square has more than the one in the centre
    best: float  # where that square lies: 0 left or top, 1 right or bottom


def quality_of(photo: Image.Image) -> PhotoQuality:
    """What an upright RGB photo looks like."""
    width, height = photo.size
    scale = min(1.0, SIDE / min(width, height))  # a small one is not enlarged: that would blur it
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey = photo.convert("L")
    values = np.asarray(grey.resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    missed, best = _squares(values)
    left_out = 1 - min(height, width) / max(height, width)
    return PhotoQuality(
        height, width, sharpness(values), difference_bits(grey), miniature(photo), left_out, missed, best
    )


def sharpness(values: NDArray[np.float32]) -> float:
    """Variance of the Laplacian of a grey picture, (H, W) in [0, 255], in the sharpest tenth of its tiles.

    Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy"; the tiles are ours.
    """
    if min(values.shape) < 2 + TILES:
        return 0.0
    centre = values[1:-1, 1:-1]
    around = values[1:-1, :-2] + values[1:-1, 2:] + values[:-2, 1:-1] + values[2:, 1:-1]
    rows = np.array_split(around - 4 * centre, TILES)
    tiles = [tile.var() for row in rows for tile in np.array_split(row, TILES, axis=1)]
    return float(np.percentile(tiles, 90))


def difference_bits(grey: Image.Image) -> NDArray[np.bool_]:
    """dHash, (64,): whether each cell of an 8 x 9 miniature is darker than the one to its right."""
    small = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return (small[:, 1:] > small[:, :-1]).ravel()


def miniature(photo: Image.Image) -> NDArray[np.float64]:
    """A photo's colours, small, without its brightness and contrast; zero for a plain one."""
    small = photo.resize((MINIATURE, MINIATURE), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float64)
    values = (values - values.mean((0, 1))).ravel()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def alike(qualities: list[PhotoQuality]) -> list[tuple[int, int]]:
    """Pairs of photos, by number, that show the same picture."""
    if not qualities:
        return []
    bits = np.stack([one.bits for one in qualities]).astype(np.int16)
    colours = np.stack([one.colours for one in qualities])
    same = ((bits[:, None] != bits[None]).sum(-1) <= BITS) & (colours @ colours.T >= COLOURS)
    return [(int(a), int(b)) for a, b in np.argwhere(np.triu(same, k=1))]


def _squares(values: NDArray[np.float32]) -> tuple[float, float]:
    """(edges that the best square along the long side has more than the centre's, that square's place)."""
    upright = values if values.shape[1] >= values.shape[0] else values.T
    side, room = upright.shape[0], upright.shape[1] - upright.shape[0]
    if side < 2 or not room:
        return 0.0, 0.5
    edges = np.hypot(*np.gradient(upright)).sum(0)
    total = np.concatenate([[0.0], np.cumsum(edges)])
    held = (total[side:] - total[: room + 1]) / max(total[-1], 1e-9)
    best = int(held.argmax())
    return float(held[best] - held[room // 2]), best / room
