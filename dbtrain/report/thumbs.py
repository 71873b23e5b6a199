"""Pictures inside the page: small ones, as data URIs, and the timeline of a run's validations."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dbtrain.data.pictures import BROKEN, TEXT_KEY
from dbtrain.report.run import Run
from dbtrain.runtime.errors import reason
from dbtrain.runtime.run_folder import SHEET, step_of

THUMB = 256  # px, longest side
SHOWN = (192, 512)  # px, longest side of a validation's pictures: the more there are, the smaller
PIXELS = 60 * SHOWN[1] ** 2  # of all of them: about 3 MB
MOST_SHEET = (1600, 12000)  # px, most width and height of a contact sheet; WebP holds no more than 16383
MOST_STEPS = 24  # most validations on the timeline
QUALITY = 88
Rows = dict[tuple[int, int], dict[int, Path]]  # (seed, run) -> step -> file


@dataclass(frozen=True)
class Picture:
    """A picture in the page. `src` is empty where it cannot be read, and `problem` says why."""

    alt: str
    src: str = ""
    width: int = 0
    height: int = 0
    captions: Sequence[str] = ()
    path: Path | None = None  # the file itself, for a link
    problem: str = ""


@dataclass(frozen=True)
class Row:
    """Pictures of one run and seed, one a step of the timeline; None where there is none."""

    run: int
    label: str
    pictures: list[Picture | None]


@dataclass
class Timeline:
    """All pictures of one prompt: a column a step, a row a run and seed.

    `all_steps`: how many there are, of which `steps` are shown.
    """

    prompt: str
    steps: list[int] = field(default_factory=list)
    all_steps: int = 0
    rows: list[Row] = field(default_factory=list)


def embed(picture: Image.Image, alt: str, most: tuple[int, int], captions: Sequence[str] = ()) -> Picture:
    """A picture as a WebP data URI, made smaller if it is larger than `most`, (width, height) px."""
    small = picture.convert("RGB")
    small.thumbnail(most, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "WEBP", quality=QUALITY)
    src = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return Picture(alt, src, *small.size, captions)


def embed_file(path: Path, alt: str, most: tuple[int, int], captions: Sequence[str] = ()) -> Picture:
    """A picture that this program wrote; one that is damaged, or half-written yet, says so."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            shown = embed(picture, alt, most, captions)
    except BROKEN as error:
        return Picture(
            alt, captions=captions, path=path, problem=f"{path.name} cannot be read: {reason(error)}"
        )
    return Picture(alt, shown.src, shown.width, shown.height, captions, path)


def timelines(runs: Sequence[Run]) -> list[Timeline]:
    """For each prompt that any run drew at its validations, the pictures of all runs and seeds by step."""
    found: dict[str, Rows] = {}  # by prompt
    for at, run in enumerate(runs):
        for folder in run.names.validations():
            for path in sorted(folder.glob("*-seed*.png")):
                if name := re.fullmatch(r"(\d+)-seed(\d+)\.png", path.name):
                    prompt = _prompt(path) or _asked(run, int(name[1]))
                    found.setdefault(prompt, {}).setdefault((int(name[2]), at), {})[step_of(folder)] = path
    lines = [_timeline(prompt, rows) for prompt, rows in found.items()]
    most = side(sum(len(line.steps) * len(rows) for line, rows in zip(lines, found.values(), strict=True)))
    for line, rows in zip(lines, found.values(), strict=True):
        for (seed, at), files in sorted(rows.items()):
            alts = {step: f"{line.prompt}: {runs[at].label}, step {step}, seed {seed}" for step in files}
            pictures = [
                embed_file(files[step], alts[step], (most, most)) if step in files else None
                for step in line.steps
            ]
            line.rows.append(Row(at, f"seed {seed}", pictures))
    return lines


def _timeline(prompt: str, rows: Rows) -> Timeline:
    """A prompt's timeline, without its pictures yet."""
    every = sorted({step for files in rows.values() for step in files})
    return Timeline(prompt, spread(every, MOST_STEPS), len(every))


def side(count: int) -> int:
    """Longest side of each of so many pictures, px, so that the page stays small."""
    least, most = SHOWN
    return max(least, min(most, math.isqrt(PIXELS // max(count, 1))))


def spread(items: list[int], most: int) -> list[int]:
    """At most `most` of them, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def sheets(run: Run) -> list[Picture]:
    """The contact sheets of a run's samples and scores, the newest samples first."""
    found = sorted(run.names.samples.glob(f"*/{SHEET}"), reverse=True)
    found += [path for path in [run.names.scores / SHEET] if path.is_file()]
    return [
        embed_file(path, f"contact sheet {path.parent.relative_to(run.folder)} of {run.label}", MOST_SHEET,
                   [str(path.relative_to(run.folder))])
        for path in found
    ]  # fmt: skip


def _prompt(path: Path) -> str:
    """The prompt that a picture says it was drawn from; empty if it says none."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            note = json.loads(getattr(picture, "text", {}).get(TEXT_KEY, "{}"))
    except BROKEN:
        return ""
    prompt = note.get("prompt") if isinstance(note, dict) else None
    return prompt if isinstance(prompt, str) else ""


def _asked(run: Run, number: int) -> str:
    """The prompt of this number in the run's config."""
    prompts = run.cfg.validation.prompts
    return prompts[number] if number < len(prompts) else f"prompt {number}"
