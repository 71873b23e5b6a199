"""Images in the page: thumbnails as data URIs, samples, and the timelines of validation images."""

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

from dbtrain.data.pictures import BROKEN, TEXT_KEY
from dbtrain.report.run import Run
from dbtrain.runtime.errors import reason
from dbtrain.runtime.run_folder import SHEET, step_of, steps_in

THUMB = 256  # px, longest side
SHOWN = (96, 384)  # px, bounds of the longest side of a validation image: smaller if there are many
PIXELS = 24 * SHOWN[1] ** 2  # of all validation images: about 1 MB
MOST_SHEET = (1200, 12000)  # px, most width and height of a contact sheet; WebP allows 16383
MOST_STEPS = 24  # most validations on the timeline
MOST_SHOWN = 320  # most validation images, as far as each row keeps LEAST_STEPS
LEAST_STEPS = 3
PROMPTS = 2  # of the generated images that are shown first
WITH_ADAPTER = "01"  # how files of a run's samples begin; 00: those without
QUALITY = 76
NAMED = re.compile(r"\d+-seed\d+\.png")  # a validation image: prompt and seed
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


@dataclass(frozen=True)
class Sample:
    """What a run makes of one prompt."""

    prompt: str
    pictures: list[Picture]


@dataclass
class Timeline:
    """Images of one prompt: one column per step, one row per run and seed."""

    prompt: str
    seed: int | None  # of all its images; None: of several
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


def samples(run: Run, most: int, side: int, first: int = PROMPTS) -> list[Sample]:
    """The first images of each of the `first` prompts with the adapter, `most` in all.

    They are the newest of `sample`, or else of validation; `side` is their longest, in px.
    """
    found: dict[str, list[Path]] = {}
    for path in _generated(run):
        found.setdefault(_prompt(path), []).append(path)
    prompts = list(found.items())[:first]
    each = most // max(1, len(prompts))
    shown = []
    for prompt, paths in prompts:
        alts = [f"{prompt}: {run.label}, seed {_by_number(path)[-1]}" for path in paths[:each]]
        images = [embed_file(path, alt, (side, side)) for path, alt in zip(paths, alts, strict=False)]
        shown.append(Sample(prompt, images))
    return shown


def _generated(run: Run) -> list[Path]:
    """The newest images of a run, by prompt and seed."""
    for folder in reversed(steps_in(run.names.samples)):
        if paths := sorted(folder.glob(f"{WITH_ADAPTER}-*-seed*.png"), key=_by_number):
            return paths
    return [path for folder in run.names.validations()[-1:] for path in _validation_images(folder)]


def _validation_images(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*.png") if NAMED.fullmatch(path.name)), key=_by_number)


def _by_number(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def timelines(runs: Sequence[Run], by_seed: bool = False) -> list[Timeline]:
    """The images of the runs' validations by step, for each prompt.

    `by_seed`: several timelines of a prompt, one per seed, if several runs have it.
    """
    # Choose the steps to show, and from their number the size of the images.
    found = _found(runs, by_seed)
    most = min(MOST_STEPS, max(LEAST_STEPS, MOST_SHOWN // max(1, sum(map(len, found.values())))))
    lines = []
    for (prompt, shared), rows in found.items():
        every = sorted({step for files in rows.values() for step in files})
        lines.append(Timeline(prompt, shared, spread(every, most), len(every)))
    size = side(sum(len(line.steps) * len(found[line.prompt, line.seed]) for line in lines))
    # Embed the images.
    for line in lines:
        for (seed, at), files in found[line.prompt, line.seed].items():
            alts = {step: f"{line.prompt}: {runs[at].label}, step {step}, seed {seed}" for step in files}
            pictures = [
                embed_file(files[step], alts[step], (size, size)) if step in files else None
                for step in line.steps
            ]
            line.rows.append(TimelineRow(at, f"seed {seed}", pictures))
    return lines


def _found(runs: Sequence[Run], by_seed: bool) -> dict[tuple[str, int | None], Rows]:
    """The files of each timeline, by its prompt and seed, as `timelines` splits them."""
    by_prompt: dict[str, Rows] = {}
    for at, run in enumerate(runs):
        for folder in run.names.validations():
            for path in _validation_images(folder):
                number, seed = _by_number(path)
                prompt = _prompt(path) or _asked(run, number)
                by_prompt.setdefault(prompt, {}).setdefault((seed, at), {})[step_of(folder)] = path
    found: dict[tuple[str, int | None], Rows] = {}
    for prompt, rows in by_prompt.items():
        shared = by_seed and len({at for _, at in rows}) > 1
        for (seed, at), files in sorted(rows.items()):
            found.setdefault((prompt, seed if shared else None), {})[seed, at] = files
    return found


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
    several = sorted(run.names.scores.glob(f"[0-9]*-*/{SHEET}"))  # of subjects
    found += [path for path in [run.names.scores / SHEET, *several] if path.is_file()]
    return [
        embed_file(path, f"contact sheet {path.parent.relative_to(run.folder)} of {run.label}", MOST_SHEET,
                   [str(path.relative_to(run.folder))])
        for path in found
    ]  # fmt: skip


def _prompt(path: Path) -> str:
    """The prompt in an image's metadata, read without its pixels; empty if there is none."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            note = json.loads(picture.info.get(TEXT_KEY) or "{}")
    except BROKEN:
        return ""
    prompt = note.get("prompt") if isinstance(note, dict) else None
    return prompt if isinstance(prompt, str) else ""


def _asked(run: Run, number: int) -> str:
    """Validation prompt `number` of the run's config."""
    prompts = run.cfg.validation.prompts
    return prompts[number] if number < len(prompts) else f"prompt {number}"
