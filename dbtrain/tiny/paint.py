"""Render scenes of the cartoon world: objects, patterns, marks, and places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from dbtrain.runtime.hashing import digest

SIDE = 64  # px of an image
FINE = 4  # supersampling factor, for smooth edges
CANVAS = SIDE * FINE

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40), "orange": (247, 140, 30), "yellow": (250, 214, 50), "green": (46, 150, 70),
    "blue": (40, 90, 210), "purple": (130, 60, 180), "pink": (245, 130, 180), "white": (244, 244, 244),
    "black": (38, 38, 44),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How an object's surface is painted: a pattern of two colours; "plain" uses only the first."""

    pattern: str
    first: str
    second: str


@dataclass(frozen=True)
class Scene:
    """A complete description of an image: the same scene always gives the same pixels."""

    kind: str
    upper: Look
    lower: Look  # differs from `upper` for subjects only
    mark: tuple[str, str] | None  # shape and colour; subjects only
    place: str
    x: float  # centre, as a fraction of the side
    y: float
    size: float  # half the height, as a fraction of the side
    angle: float  # radians
    mirrored: bool
    scenery: int  # seed of the background's random details


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda u, v: np.zeros(u.shape, bool),
    "stripes": lambda u, v: np.floor(v * 3.5) % 2 == 1,
    "dots": lambda u, v: ((u * 2.6) % 1 - 0.5) ** 2 + ((v * 2.6) % 1 - 0.5) ** 2 < 0.085,
    "checks": lambda u, v: (np.floor(u * 3.2) + np.floor(v * 3.2)) % 2 == 1,
    "zigzag": lambda u, v: np.floor(v * 3 + np.abs((u * 3) % 2 - 1)) % 2 == 1,
}


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _oval(x: float, y: float, rx: float, ry: float) -> Points:
    turns = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return [(x + rx * float(np.cos(a)), y + ry * float(np.sin(a))) for a in turns]


def _star(x: float, y: float, r: float) -> Points:
    turns = [np.pi * (k / 5 - 0.5) for k in range(10)]
    return [
        (x + r * (1 - k % 2 * 0.55) * float(np.cos(a)), y + r * (1 - k % 2 * 0.55) * float(np.sin(a)))
        for k, a in enumerate(turns)
    ]


# Objects in a box of -1 ... 1, y down, drawn in order. "body" is painted with the look; everything else
# has a colour: a name, "shade" (a darker first colour), or "first".
KINDS: dict[str, list[tuple[str, Points]]] = {
    "mug": [
        ("first", _oval(0.62, 0.0, 0.36, 0.42)), ("hole", _oval(0.62, 0.0, 0.19, 0.25)),
        ("body", _box(-0.7, -0.75, 0.55, 0.9)), ("shade", _oval(-0.075, -0.75, 0.625, 0.16)),
    ],
    "ball": [("body", _oval(0, 0, 0.9, 0.9))],
    "house": [
        ("body", _box(-0.75, -0.15, 0.75, 0.95)), ("shade", [(-0.95, -0.1), (0, -0.95), (0.95, -0.1)]),
        ("brown", _box(-0.15, 0.4, 0.2, 0.95)), ("sky", _box(0.35, 0.1, 0.6, 0.4)),
    ],
    "fish": [
        ("shade", [(0.45, 0), (0.98, -0.5), (0.98, 0.5)]),
        ("shade", [(-0.1, -0.4), (0.15, -0.8), (0.4, -0.3)]),
        ("body", _oval(-0.15, 0, 0.75, 0.52)), ("light", _oval(-0.58, -0.12, 0.13, 0.13)),
        ("dark", _oval(-0.6, -0.12, 0.06, 0.06)),
    ],
    "car": [
        ("body", [(-0.98, 0.5), (-0.98, 0.02), (-0.6, -0.05), (-0.35, -0.5), (0.4, -0.5), (0.68, -0.05),
                  (0.98, 0.05), (0.98, 0.5)]),
        ("sky", [(-0.42, -0.08), (-0.25, -0.38), (0.0, -0.38), (0.0, -0.08)]),
        ("sky", [(0.1, -0.08), (0.1, -0.38), (0.32, -0.38), (0.5, -0.08)]),
        ("dark", _oval(-0.52, 0.5, 0.25, 0.25)), ("dark", _oval(0.52, 0.5, 0.25, 0.25)),
        ("light", _oval(-0.52, 0.5, 0.1, 0.1)), ("light", _oval(0.52, 0.5, 0.1, 0.1)),
    ],
    "tree": [
        ("brown", _box(-0.16, 0.2, 0.16, 0.98)), ("body", _oval(-0.4, 0.0, 0.48, 0.42)),
        ("body", _oval(0.4, 0.0, 0.48, 0.42)), ("body", _oval(0, -0.45, 0.55, 0.5)),
    ],
    "boot": [
        ("body", [(-0.35, -0.95), (0.35, -0.95), (0.38, 0.78), (-0.95, 0.78), (-0.95, 0.4), (-0.7, 0.2),
                  (-0.35, 0.1)]),
        ("dark", _box(-0.98, 0.75, 0.45, 0.95)), ("light", _box(-0.4, -0.98, 0.4, -0.8)),
    ],
    "robot": [
        ("grey", _box(-0.4, 0.6, -0.12, 0.98)), ("grey", _box(0.12, 0.6, 0.4, 0.98)),
        ("grey", _box(-0.85, -0.1, -0.55, 0.45)), ("grey", _box(0.55, -0.1, 0.85, 0.45)),
        ("body", _box(-0.55, -0.2, 0.55, 0.65)), ("first", _box(-0.42, -0.8, 0.42, -0.28)),
        ("light", _oval(-0.18, -0.55, 0.12, 0.12)), ("light", _oval(0.18, -0.55, 0.12, 0.12)),
        ("dark", _box(-0.03, -0.98, 0.03, -0.8)),
    ],
}  # fmt: skip
FIXED: dict[str, Colour] = {
    "brown": (110, 72, 40), "sky": (170, 215, 240), "light": (250, 250, 235), "dark": (35, 35, 40),
    "grey": (140, 145, 155),
}  # fmt: skip
MARKS: dict[str, Points] = {
    "star": _star(0, 0, 0.42),
    "cross": [(-0.12, -0.36), (0.12, -0.36), (0.12, -0.12), (0.36, -0.12), (0.36, 0.12), (0.12, 0.12),
              (0.12, 0.36), (-0.12, 0.36), (-0.12, 0.12), (-0.36, 0.12), (-0.36, -0.12), (-0.12, -0.12)],
    "triangle": [(0, -0.38), (0.4, 0.3), (-0.4, 0.3)],
    "disc": _oval(0, 0, 0.32, 0.32),
}  # fmt: skip
MARK_AT = {"mug": (-0.08, 0.12), "house": (-0.4, 0.25), "fish": (0.0, 0.0), "car": (0.0, 0.2),
           "tree": (0.0, -0.25), "boot": (0.0, 0.0), "robot": (0.0, 0.2), "ball": (0.0, 0.0)}  # fmt: skip


def source(*key: str | int) -> np.random.Generator:
    """Random numbers that depend on `key` alone."""
    return np.random.default_rng(int.from_bytes(digest("world", *key), "big"))


def render(scene: Scene) -> Image.Image:
    """Render a scene to an RGB image, SIDE px square."""
    image = _place(scene.place, source("scenery", scene.scenery))
    behind = image.copy()
    surface = _surface(scene, *_object_coordinates(scene))
    base = COLOURS[scene.upper.first]
    ink = FIXED | {"first": base, "shade": _mixed(base, (0, 0, 0), 0.45)}
    pen = ImageDraw.Draw(image)
    for paint, points in KINDS[scene.kind]:
        outline = _placed(points, scene)
        if paint in ("body", "hole"):
            mask = Image.new("L", image.size)
            ImageDraw.Draw(mask).polygon(outline, fill=255)
            image.paste(surface if paint == "body" else behind, (0, 0), mask)
        else:
            pen.polygon(outline, fill=ink[paint])
        pen.line([*outline, outline[0]], fill=_mixed(ink.get(paint, base), (0, 0, 0), 0.6), width=FINE)
    if scene.mark:
        x, y = MARK_AT[scene.kind]
        shape = [(x + px, y + py) for px, py in MARKS[scene.mark[0]]]
        pen.polygon(_placed(shape, scene), fill=COLOURS[scene.mark[1]], outline=(30, 30, 30), width=FINE)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _placed(points: Points, scene: Scene) -> Points:
    """Convert object coordinates to canvas pixels."""
    flip = -1 if scene.mirrored else 1
    cos, sin, scale = np.cos(scene.angle), np.sin(scene.angle), scene.size * CANVAS
    return [
        (
            float(scene.x * CANVAS + scale * (flip * u * cos - v * sin)),
            float(scene.y * CANVAS + scale * (flip * u * sin + v * cos)),
        )
        for u, v in points
    ]


def _object_coordinates(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Object coordinates (u, v) of every canvas pixel, (CANVAS, CANVAS) each."""
    rows, columns = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    dx = (columns - scene.x * CANVAS) / (scene.size * CANVAS)
    dy = (rows - scene.y * CANVAS) / (scene.size * CANVAS)
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    flip = -1 if scene.mirrored else 1
    return flip * (dx * cos + dy * sin), dy * cos - dx * sin


def _surface(scene: Scene, u: np.ndarray, v: np.ndarray) -> Image.Image:
    """The painted and shaded surface, everywhere on the canvas."""
    looks = (scene.upper, scene.lower)
    palette = np.array([COLOURS[c] for look in looks for c in (look.first, look.second)], np.float32)
    upper, lower = (PATTERNS[look.pattern](u + 4, v + 4) for look in looks)
    paint = palette[np.where(v < 0, upper, 2 + lower)]  # (CANVAS, CANVAS, 3)
    light = np.clip(1.05 - 0.22 * (u + 0.35) ** 2 - 0.08 * v, 0.6, 1.1)[..., None]
    return Image.fromarray((paint * light).clip(0, 255).astype(np.uint8))


def _mixed(one: Colour, other: Colour, amount: float) -> Colour:
    return tuple(round(a + (b - a) * amount) for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


def _place(name: str, rng: np.random.Generator) -> Image.Image:
    """A background, CANVAS px square, with random details from `rng`."""
    sky, ground = {
        "beach": ((130, 205, 240), (238, 205, 150)), "snow": ((205, 222, 240), (246, 249, 253)),
        "grass": ((150, 205, 250), (90, 170, 70)), "city": ((18, 20, 52), (52, 52, 62)),
        "table": ((205, 190, 170), (150, 98, 55)), "space": ((8, 6, 22), (8, 6, 22)),
    }[name]  # fmt: skip
    image = Image.new("RGB", (CANVAS, CANVAS), sky)
    pen = ImageDraw.Draw(image)
    horizon = int(rng.uniform(0.5, 0.66) * CANVAS)
    pen.rectangle((0, horizon, CANVAS, CANVAS), fill=ground)

    def spots(count: int, top: float, bottom: float, radius: float, colour: Colour) -> None:
        for x, y in zip(rng.uniform(0, CANVAS, count), rng.uniform(top, bottom, count), strict=True):
            r = radius * rng.uniform(0.6, 1.4)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    if name == "beach":
        pen.rectangle((0, horizon - 36, CANVAS, horizon), fill=(40, 130, 200))
        pen.rectangle((0, horizon - 4, CANVAS, horizon + 3), fill=(245, 250, 255))
        x = rng.uniform(20, 230)
        pen.ellipse((x - 22, 16, x + 22, 60), fill=(255, 235, 120))
    elif name == "snow":
        for x in rng.uniform(0, CANVAS, 4):
            pen.polygon([(x - 22, horizon), (x, horizon - 80), (x + 22, horizon)], fill=(70, 110, 100))
        spots(60, 0, CANVAS, 3, (255, 255, 255))
    elif name == "grass":
        x, y = rng.uniform(0, CANVAS), float(horizon + 30)
        pen.ellipse((x - 160, y - 70, x + 160, y + 70), fill=(105, 185, 80))
        for x, y in zip(rng.uniform(0, CANVAS, 50), rng.uniform(horizon, CANVAS, 50), strict=True):
            pen.line((x, y, x + rng.uniform(-4, 4), y - 14), fill=(50, 125, 45), width=3)
        spots(8, horizon + 10, CANVAS, 5, (250, 240, 120))
    elif name == "city":
        for left in range(-10, CANVAS, 36):
            top = int(horizon - rng.uniform(30, 130))
            pen.rectangle((left, top, left + 32, horizon), fill=(44, 44, 74))
            for wy in range(top + 8, horizon - 8, 16):
                for wx in (left + 6, left + 19):
                    if rng.random() < 0.6:
                        pen.rectangle((wx, wy, wx + 7, wy + 8), fill=(250, 220, 110))
    elif name == "table":
        for top in range(horizon, CANVAS, 24):
            pen.line((0, top, CANVAS, top + rng.uniform(-3, 3)), fill=(110, 68, 36), width=4)
        x = rng.uniform(20, 180)
        pen.rectangle((x, 20, x + 60, 90), fill=(235, 228, 215), outline=(150, 130, 110), width=4)
    else:
        spots(70, 0, CANVAS, 2.5, (255, 255, 240))
        x, y, r = rng.uniform(20, 236), rng.uniform(10, 70), rng.uniform(18, 34)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(190, 120, 90))
        pen.ellipse((x - r * 0.5, y - r * 0.8, x + r * 0.9, y + r * 0.5), fill=(210, 145, 110))
    return image
