"""Images in the page: thumbnails as data URIs, and the timelines of validation images."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from dbtrain.data.pictures import BROKEN, note_in
from dbtrain.report.run import Run
from dbtrain.runtime.errors import reason
from dbtrain.runtime.run_folder import SHEET, step_of

THUMB = 256  # px, longest side
SHOWN = (192, 512)  # px, bounds of the longest side of a validation image: smaller if there are many
PIXELS = 60 * SHOWN[1] ** 2  # of all validation images: about 3 MB
MOST_SHEET = (1600, 12000)  # px, most width and height of a contact sheet; WebP allows 16383
MOST_STEPS = 24  # most validations on the timeline
QUALITY = 88
Rows = dict[tuple[int, int], dict[int, Path]]  # (seed, run) -> step -> file


@dataclass(frozen=True)
class Picture:
    """An image in the page. If it cannot be read, `src` is empty and `problem` says why."""

    alt: str
    src: str = ""
    width: int = 0
    height: int = 0
    captions: Sequence[str] = ()
    path: Path | None = None  # of the file, for a link
    problem: str = ""


@dataclass(frozen=True)
class TimelineRow:
    """Images of one run and seed, one per step of the timeline; None where there is none."""

    run: int
    label: str
    pictures: list[Picture | None]


@dataclass
class Timeline:
    """All images of one prompt: one column per step, one row per run and seed."""

    prompt: str
    steps: list[int]  # shown
    all_steps: int  # how many there are
    rows: list[TimelineRow] = field(default_factory=list)


def embed(picture: Image.Image, alt: str, most: tuple[int, int], captions: Sequence[str] = ()) -> Picture:
    """An image as a WebP data URI, scaled down to `most`, (width, height) px, if it is larger."""
    small = picture.convert("RGB")
    small.thumbnail(most, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "WEBP", quality=QUALITY)
    src = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return Picture(alt, src, *small.size, captions)


def embed_file(path: Path, alt: str, most: tuple[int, int], captions: Sequence[str] = ()) -> Picture:
    """A PNG file as a data URI, or the problem if it is damaged or incomplete."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            shown = embed(picture, alt, most, captions)
    except BROKEN as error:
        problem = f"{path.name} cannot be read: {reason(error)}"
        return Picture(alt, captions=captions, path=path, problem=problem)
    return replace(shown, path=path)


def timelines(runs: Sequence[Run]) -> list[Timeline]:
    """For each prompt of the runs' validations, the images of all runs and seeds by step."""
    # Find the files.
    found: dict[str, Rows] = {}  # by prompt
    for at, run in enumerate(runs):
        for folder in run.names.validations():
            for path in sorted(folder.glob("*-seed*.png")):
                if name := re.fullmatch(r"(\d+)-seed(\d+)\.png", path.name):
                    prompt = _prompt(path) or _asked(run, int(name[1]))
                    found.setdefault(prompt, {}).setdefault((int(name[2]), at), {})[step_of(folder)] = path
    # Choose the steps to show, and from their number the size of the images.
    lines = []
    for prompt, rows in found.items():
        every = sorted({step for files in rows.values() for step in files})
        lines.append(Timeline(prompt, spread(every, MOST_STEPS), len(every)))
    most = side(sum(len(line.steps) * len(found[line.prompt]) for line in lines))
    # Embed the images.
    for line in lines:
        for (seed, at), files in sorted(found[line.prompt].items()):
            alts = {step: f"{line.prompt}: {runs[at].label}, step {step}, seed {seed}" for step in files}
            pictures = [
                embed_file(files[step], alts[step], (most, most)) if step in files else None
                for step in line.steps
            ]
            line.rows.append(TimelineRow(at, f"seed {seed}", pictures))
    return lines


def side(count: int) -> int:
    """Longest side in px for each of `count` images, so that the page stays small."""
    least, most = SHOWN
    return max(least, min(most, math.isqrt(PIXELS // max(count, 1))))


def spread(items: list[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spread, including the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def sheets(run: Run) -> list[Picture]:
    """The contact sheets of a run: samples, newest first, then scores."""
    found = sorted(run.names.samples.glob(f"*/{SHEET}"), reverse=True)
    found += [path for path in [run.names.scores / SHEET] if path.is_file()]
    return [
        embed_file(path, f"contact sheet {path.parent.relative_to(run.folder)} of {run.label}", MOST_SHEET,
                   [str(path.relative_to(run.folder))])
        for path in found
    ]  # fmt: skip


def _prompt(path: Path) -> str:
    """The prompt in an image's metadata; empty if there is none."""
    try:
        note = json.loads(note_in(path) or "{}")
    except ValueError:
        return ""
    prompt = note.get("prompt") if isinstance(note, dict) else None
    return prompt if isinstance(prompt, str) else ""


def _asked(run: Run, number: int) -> str:
    """Validation prompt `number` of the run's config."""
    prompts = run.cfg.validation.prompts
    return prompts[number] if number < len(prompts) else f"prompt {number}"
