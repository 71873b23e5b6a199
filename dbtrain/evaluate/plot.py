"""A plot with Pillow alone: named points, by two numbers each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN, DOT = 640, 480, 64, 5  # px
PLAIN, CHOSEN, FAINT = "#1f4e79", "#c0392b", "#cccccc"


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    name: str
    chosen: bool = False


def scatter(points: Sequence[Point], across: str, up: str) -> Image.Image:
    """The points on a white page, joined in their order; the chosen one is red."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    xs, ys = ticks([point.x for point in points]), ticks([point.y for point in points])

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            MARGIN + (WIDTH - 2 * MARGIN) * (x - xs[0]) / (xs[-1] - xs[0]),
            HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (y - ys[0]) / (ys[-1] - ys[0]),
        )

    for x in xs:
        pen.line((*at(x, ys[0]), *at(x, ys[-1])), FAINT)
        pen.text((at(x, ys[0])[0], HEIGHT - MARGIN + 8), f"{x:.4g}", "black", font, "ma")
    for y in ys:
        pen.line((*at(xs[0], y), *at(xs[-1], y)), FAINT)
        pen.text((MARGIN - 8, at(xs[0], y)[1]), f"{y:.4g}", "black", font, "rm")
    pen.text((WIDTH / 2, HEIGHT - 12), across, "black", font, "ms")
    pen.text((8, 12), up, "black", font, "ls")
    pen.line([at(point.x, point.y) for point in points], "gray")
    for point in points:
        x, y = at(point.x, point.y)
        colour = CHOSEN if point.chosen else PLAIN
        pen.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), colour)
        pen.text((x, y - DOT - 3), point.name, colour, font, "ms")
    return page


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, four to a dozen, evenly spaced, from below the least value to above the greatest."""
    least, most = min(values), max(values)
    span = (most - least) or abs(most) or 1.0
    unit = 10 ** math.floor(math.log10(span))
    step = next(unit * size for size in (0.1, 0.2, 0.5, 1, 2) if span / (unit * size) <= 8)
    first, last = math.floor(least / step - 0.2), math.ceil(most / step + 0.2)
    return [number * step for number in range(first, last + 1)]
