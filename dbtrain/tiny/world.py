"""A cartoon world: seeded images of objects in places, with captions in plain English.

`python -m dbtrain.tiny.world FOLDER [SUBJECT]` renders five photos of a subject. A *subject* is an object
that no caption describes completely: it has two patterns of two colours each, and a mark.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from dbtrain.tiny.paint import COLOURS, KINDS, MARKS, PATTERNS, Look, Scene, render, source

PLACES = ("beach", "snow", "grass", "city", "table", "space")
PLACE_WORDS = {
    "beach": "on the beach", "snow": "in the snow", "grass": "on the grass",
    "city": "in the city at night", "table": "on a wooden table", "space": "in space",
}  # fmt: skip
PICTURES = 65_536  # images that the base and its tokenizer are trained on
CAPTIONS = 4  # per image; a training step uses one
IDENTIFIERS = ("sks", "xyz", "zwx", "ohwx")  # in no caption, so that they can name a subject


class Subject(NamedTuple):
    """What DreamBooth must learn: an object with two looks and a mark, its shape and colour."""

    kind: str
    upper: Look
    lower: Look
    mark: tuple[str, str]
    name: str  # its poses depend on this alone

    def scene(self, number: int, place: str | None = None) -> Scene:
        """Scene `number` of it in a random pose; 0 to 4 are its photos, the rest are held out."""
        rng = source("subject", self.name, number)
        place = place or PLACES[number % len(PLACES)]
        return _posed(rng, self.kind, self.upper, self.lower, self.mark, place)


# kind -> upper look, lower look, mark of the subject of that name
_NAMED = {
    "mug": (Look("checks", "purple", "yellow"), Look("stripes", "green", "white"), ("star", "red")),
    "ball": (Look("dots", "black", "pink"), Look("zigzag", "orange", "blue"), ("cross", "white")),
    "fish": (Look("stripes", "pink", "black"), Look("dots", "yellow", "green"), ("disc", "blue")),
    "car": (Look("zigzag", "white", "red"), Look("checks", "black", "yellow"), ("triangle", "green")),
    "boot": (Look("dots", "green", "orange"), Look("checks", "pink", "blue"), ("star", "white")),
    "robot": (Look("zigzag", "yellow", "blue"), Look("stripes", "red", "white"), ("disc", "black")),
    "house": (Look("checks", "orange", "white"), Look("dots", "blue", "yellow"), ("cross", "black")),
    "tree": (Look("stripes", "blue", "orange"), Look("zigzag", "pink", "white"), ("disc", "yellow")),
}  # fmt: skip
SUBJECTS = {kind: Subject(kind, *rest, name=kind) for kind, rest in _NAMED.items()}

Half = Literal["choosing", "proving"]


def half_of(look: Look) -> Half:
    """The half of all looks that a look belongs to: settings chosen on one are proved on the other."""
    text = f"{look.pattern} {look.first} {look.second}"
    return "choosing" if source("half", text).random() < 0.5 else "proving"


def drawn_subject(seed: int, number: int, half: Half) -> Subject:
    """Subject `number` of the endless list that `seed` draws; eight in a row are of all eight kinds.

    Its looks are of one half, so that the two halves share none, whatever their seeds.
    """
    kinds = list(source("drawn kinds", half, seed, number // len(KINDS)).permutation(list(KINDS)))
    rng = source("drawn", half, seed, number)
    patterns = [p for p in PATTERNS if p != "plain"]
    while True:
        colours = [str(c) for c in rng.choice(list(COLOURS), 5, replace=False)]
        upper = Look(str(rng.choice(patterns)), colours[0], colours[1])
        lower = Look(str(rng.choice(patterns)), colours[2], colours[3])
        mark = (str(rng.choice(list(MARKS))), colours[4])
        if half_of(upper) == half_of(lower) == half:
            kind = str(kinds[number % len(KINDS)])
            return Subject(kind, upper, lower, mark, f"{half}-{seed}-{number}")


def scene(number: int, split: str = "train") -> Scene:
    """Scene `number` of the infinite set called `split`, with any class, look, place, and pose."""
    rng = source(split, number)
    first, second = rng.choice(list(COLOURS), 2, replace=False)
    pattern = "plain" if rng.random() < 0.35 else str(rng.choice([p for p in PATTERNS if p != "plain"]))
    look = Look(pattern, str(first), str(second))
    kind, place = str(rng.choice(list(KINDS))), str(rng.choice(PLACES))
    return _posed(rng, kind, look, look, None, place)


def subject_scene(name: str, number: int, place: str | None = None) -> Scene:
    """Scene `number` of a subject in a random pose; 0 to 4 are its photos, the rest are held out."""
    return SUBJECTS[name].scene(number, place)


def random_subject_scene(subject: int, number: int) -> Scene:
    """Scene `number` of the made-up subject `subject`, to train the judge's likeness on."""
    rng = source("made-up", subject)
    names = list(COLOURS)
    patterns = [p for p in PATTERNS if p != "plain"]
    colours = [str(c) for c in rng.choice(names, 5, replace=True)]
    looks = [Look(str(rng.choice(patterns)), colours[0], colours[1]),
             Look(str(rng.choice(patterns)), colours[2], colours[3])]  # fmt: skip
    mark = (str(rng.choice(list(MARKS))), colours[4])
    rng_pose = source("made-up", subject, number)
    place = str(rng_pose.choice(PLACES))
    return _posed(rng_pose, str(rng.choice(list(KINDS))), looks[0], looks[1], mark, place)


def caption(scene: Scene, number: int) -> str:
    """A caption of a scene in plain English; it often omits attributes and the place."""
    rng = source("caption", number)
    words = []
    if rng.random() < 0.6:
        words.append(scene.upper.first)
    words.append(scene.kind)
    article = "an" if words[0][0] in "aeiou" else "a"
    text = f"{rng.choice(['a photo of ', 'a photo of ', 'a picture of ', ''])}{article} {' '.join(words)}"
    if scene.upper.pattern != "plain" and len(words) > 1 and rng.random() < 0.7:
        text += f" with {scene.upper.second} {scene.upper.pattern}"
    if rng.random() < 0.75:
        text += f" {PLACE_WORDS[scene.place]}"
    return text


def captions(scenes: Sequence[Scene]) -> list[str]:
    """CAPTIONS captions per scene, grouped by scene."""
    return [caption(scenes[k // CAPTIONS], k) for k in range(len(scenes) * CAPTIONS)]


def photos(name: str) -> list[Image.Image]:
    """The five photos of a subject."""
    return [render(subject_scene(name, number)) for number in range(5)]


def _posed(
    rng: np.random.Generator, kind: str, upper: Look, lower: Look, mark: tuple[str, str] | None, place: str
) -> Scene:
    """A scene with a random pose and background."""
    return Scene(
        kind, upper, lower, mark, place,
        size=float(rng.uniform(0.24, 0.36)), x=float(rng.uniform(0.36, 0.64)),
        y=float(rng.uniform(0.48, 0.66)), angle=float(rng.uniform(-0.22, 0.22)),
        mirrored=bool(rng.random() < 0.5), scenery=int(rng.integers(2**31)),
    )  # fmt: skip


def main(folder: Path, name: str = "mug") -> None:
    """Write the photos of a subject into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(photos(name)):
        photo.save(folder / f"{number:02d}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
