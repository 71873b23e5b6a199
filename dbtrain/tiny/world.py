"""Photos for the quickstart, drawn on the spot: `python -m dbtrain.tiny.world FOLDER`.

Five pictures of one subject, a striped mug, in five places, sizes and positions.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 256  # px of a photo
FINE = 4  # drawn this much larger, then reduced: smooth edges

# Where each photo was taken: sky, ground; and the mug's centre and height there, as shares of the side.
PLACES = [
    ((135, 206, 235), (237, 201, 145), (0.50, 0.55), 0.55),  # beach
    ((200, 220, 240), (245, 248, 252), (0.40, 0.60), 0.45),  # snow
    ((120, 180, 240), (70, 150, 60), (0.60, 0.58), 0.50),  # grass
    ((20, 24, 60), (50, 50, 60), (0.45, 0.52), 0.60),  # city at night
    ((190, 170, 150), (140, 90, 50), (0.55, 0.60), 0.40),  # wooden table
]
STRIPES = ((220, 40, 60), (250, 220, 60), (30, 110, 190))


def photo(number: int) -> Image.Image:
    """Photo `number` of the mug, SIDE px square."""
    sky, ground, (x, y), height = PLACES[number % len(PLACES)]
    side = SIDE * FINE
    picture = Image.new("RGB", (side, side), sky)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0.6 * side, side, side), fill=ground)

    tall, wide = height * side, 0.8 * height * side
    left, top = x * side - wide / 2, y * side - tall / 2
    handle = (left + 0.8 * wide, top + 0.2 * tall, left + 1.3 * wide, top + 0.75 * tall)
    pen.ellipse((left, top + 0.92 * tall, left + wide, top + 1.08 * tall), fill=_mixed(ground, (0, 0, 0)))
    pen.ellipse(handle, outline=STRIPES[2], width=int(0.1 * wide))

    bands = 6
    for band in range(bands):
        edges = (top + tall * band / bands, top + tall * (band + 1) / bands)
        pen.rectangle((left, edges[0], left + wide, edges[1]), fill=STRIPES[band % len(STRIPES)])
    pen.ellipse((left, top - 0.08 * tall, left + wide, top + 0.08 * tall), fill=_mixed(STRIPES[2], (0, 0, 0)))
    pen.rectangle((left, top, left + 0.12 * wide, top + tall), fill=_mixed(STRIPES[2], (255, 255, 255)))
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _mixed(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple((a + b) // 2 for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(PLACES)):
        photo(number).save(folder / f"{number:02d}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
