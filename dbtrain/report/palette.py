"""Colours of runs: as many as there are runs, all different, and legible on light and dark paper."""

from __future__ import annotations

import math

FIRST = 262  # degrees, the hue of the first run: blue
LEAST = 8  # hues, even if there are fewer runs
CHROMA = 0.16  # or as much of it as a screen can show
LIGHTNESS = {"light": (0.47, 0.56, 0.64), "dark": (0.73, 0.65, 0.82)}  # of neighbors in hue


def colours(count: int, theme: str) -> list[str]:
    """`count` hex colours. `theme` is light or dark.

    Hues are evenly spread in OKLCH (Björn Ottosson, "A perceptual color space for image processing", 2020);
    neighbors in hue differ in lightness, and runs that follow each other are far apart in hue.
    """
    hues = max(count, LEAST)
    stride = next(step for step in range(round(hues * 3 / 8), hues + 1) if math.gcd(step, hues) == 1)
    levels = LIGHTNESS[theme]
    found = []
    for place in (run * stride % hues for run in range(count)):
        last_beside_first = place == hues - 1 and place % 3 == 0
        level = levels[1] if last_beside_first else levels[place % 3]
        found.append(_hex(level, math.radians(FIRST + 360 * place / hues)))
    return found


def _hex(lightness: float, hue: float) -> str:
    """The sRGB colour with this lightness and hue, and the highest chroma up to CHROMA."""
    chroma = CHROMA
    while not all(0 <= channel <= 1 for channel in _linear(lightness, chroma, hue)):
        chroma -= 0.002
    rgb = _linear(lightness, chroma, hue)
    encoded = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in rgb)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in encoded)


def _linear(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """OKLCH to linear sRGB; channels beyond 0 to 1 cannot be shown."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3  # noqa: E741
    m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    )
