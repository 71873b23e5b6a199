"""A small picture world: seeded pictures of things in places, with captions in plain English.

`python -m dbtrain.tiny.world FOLDER [SUBJECT]` draws five photos of a subject. A *subject* is one
unusual thing that no caption can spell out: two two-colour patterns and a mark.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from dbtrain.tiny.paint import COLOURS, KINDS, MARKS, PATTERNS, Look, Scene, render, source

PLACES = ("beach", "snow", "grass", "city", "table", "space")
PLACE_WORDS = {
    "beach": "on the beach", "snow": "in the snow", "grass": "on the grass",
    "city": "in the city at night", "table": "on a wooden table", "space": "in space",
}  # fmt: skip
PICTURES = 65_536  # that the base and its tokenizer are trained on
CAPTIONS = 4  # of each picture; a training step takes one
IDENTIFIERS = ("sks", "xyz", "zwx", "ohwx")  # never in a caption: free to mean a subject


# name -> class, upper look, lower look, mark: what DreamBooth has to learn
SUBJECTS: dict[str, tuple[str, Look, Look, tuple[str, str]]] = {
    "mug": ("mug", Look("checks", "purple", "yellow"), Look("stripes", "green", "white"), ("star", "red")),
    "ball": ("ball", Look("dots", "black", "pink"), Look("zigzag", "orange", "blue"), ("cross", "white")),
    "fish": ("fish", Look("stripes", "pink", "black"), Look("dots", "yellow", "green"), ("disc", "blue")),
    "car": ("car", Look("zigzag", "white", "red"), Look("checks", "black", "yellow"), ("triangle", "green")),
    "boot": ("boot", Look("dots", "green", "orange"), Look("checks", "pink", "blue"), ("star", "white")),
    "robot": ("robot", Look("zigzag", "yellow", "blue"), Look("stripes", "red", "white"), ("disc", "black")),
    "house": ("house", Look("checks", "orange", "white"), Look("dots", "blue", "yellow"), ("cross", "black")),
    "tree": ("tree", Look("stripes", "blue", "orange"), Look("zigzag", "pink", "white"), ("disc", "yellow")),
}  # fmt: skip


def scene(number: int, split: str = "train") -> Scene:
    """Scene `number` of the endless set called `split`: any class, look, place and pose."""
    rng = source(split, number)
    first, second = rng.choice(list(COLOURS), 2, replace=False)
    pattern = "plain" if rng.random() < 0.35 else str(rng.choice([p for p in PATTERNS if p != "plain"]))
    look = Look(pattern, str(first), str(second))
    kind, place = str(rng.choice(list(KINDS))), str(rng.choice(PLACES))
    return _posed(Scene(kind, look, look, None, place, 0, 0, 0, 0, False, 0), rng)


def subject_scene(name: str, number: int, place: str | None = None) -> Scene:
    """Picture `number` of a subject, in some pose; 0 to 4 are its photos, the rest is held out."""
    kind, upper, lower, mark = SUBJECTS[name]
    rng = source("subject", name, number)
    somewhere = place or PLACES[number % len(PLACES)]
    return _posed(Scene(kind, upper, lower, mark, somewhere, 0, 0, 0, 0, False, 0), rng)


def random_subject_scene(subject: int, number: int) -> Scene:
    """Picture `number` of made-up subject `subject`: what a judge of likeness is trained on."""
    rng = source("made-up", subject)
    names = list(COLOURS)
    patterns = [p for p in PATTERNS if p != "plain"]
    colours = [str(c) for c in rng.choice(names, 5, replace=True)]
    looks = [Look(str(rng.choice(patterns)), colours[0], colours[1]),
             Look(str(rng.choice(patterns)), colours[2], colours[3])]  # fmt: skip
    mark = (str(rng.choice(list(MARKS))), colours[4])
    rng_pose = source("made-up", subject, number)
    place = str(rng_pose.choice(PLACES))
    made = Scene(str(rng.choice(list(KINDS))), looks[0], looks[1], mark, place, 0, 0, 0, 0, False, 0)
    return _posed(made, rng_pose)


def caption(scene: Scene, number: int) -> str:
    """A caption of a scene in plain English; attributes and place are often left out."""
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
    """CAPTIONS captions of each scene, those of a scene side by side."""
    return [caption(scenes[k // CAPTIONS], k) for k in range(len(scenes) * CAPTIONS)]


def photos(name: str) -> list[Image.Image]:
    """The five photos of a subject."""
    return [render(subject_scene(name, number)) for number in range(5)]


def _posed(scene: Scene, rng: np.random.Generator) -> Scene:
    size = rng.uniform(0.24, 0.36)
    return replace(
        scene, size=float(size), x=float(rng.uniform(0.36, 0.64)), y=float(rng.uniform(0.48, 0.66)),
        angle=float(rng.uniform(-0.22, 0.22)), mirrored=bool(rng.random() < 0.5),
        scenery=int(rng.integers(2**31)),
    )  # fmt: skip


def main(folder: Path, name: str = "mug") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(photos(name)):
        photo.save(folder / f"{number:02d}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
