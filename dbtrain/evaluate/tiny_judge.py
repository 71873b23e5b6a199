"""Scores of a run on the embedded base, by the classifier that comes with it, and a contact sheet.

They ask the DreamBooth paper's questions (Ruiz et al. 2022, arXiv:2208.12242, section 4) in miniature: is it
the subject, does the image follow the prompt, is the class unchanged and diverse.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config
from dbtrain.data import photos as images
from dbtrain.data.pictures import SheetRow, contact_sheet, save_png
from dbtrain.evaluate import prompts as subjects
from dbtrain.evaluate.scores import among, frechet
from dbtrain.runtime import dist, files
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import SCORES, SHEET
from dbtrain.sample.sample import NO_ADAPTER, Kept, Mix, sample
from dbtrain.tiny import world
from dbtrain.tiny.judge import SAME, Judge, as_tensor
from dbtrain.tiny.paint import KINDS

CLASS_IMAGES = 24  # of "a photo of a mug" with the adapter, and twice as many without
SUBJECT_IMAGES = 8  # of "a photo of sks mug", and of it in each place
FIRST_SEED = 1000
SHOWN = ("beach", "snow", "city", "table", "space")  # places on the sheet


@dataclass(frozen=True)
class JudgeScores:
    """Likeness is the cosine to the photos' mean embedding. Most other scores are shares of images."""

    likeness_base: float  # the base's images of the class: the start of training
    likeness: float  # "a photo of sks mug" with the adapter
    likeness_real: float  # the ceiling: each photo beside the others, or renders that are no photos
    place: float  # images in the place that the prompt names
    kind: float  # of all images in places, those that show the class
    drift: float  # images of the class, with the adapter, that show the subject
    drift_base: float  # the same without the adapter: the judge's own error
    diversity: float  # mean 1 - cosine between images of the class, with the adapter
    diversity_base: float
    class_distance: float | None = None  # Fréchet: images of the class, with the adapter, from the base's
    class_distance_base: float | None = None  # the same of two halves of the base's, with other seeds each

    @classmethod
    def load(cls, path: Path) -> JudgeScores:
        """The scores in a `scores.json`. Raises ConfigError if it has others, or cannot be read."""
        values = files.read_json(path)
        found = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        try:
            if wrong := [name for name, value in found.items() if not isinstance(value, float | None)]:
                raise TypeError(f"{wrong[0]} is not a number")
            return cls(**found)
        except TypeError as error:
            raise ConfigError(f"{path} has no scores of the embedded base's judge: {error}") from error

    @property
    def closed(self) -> float:
        """The share of the gap between the base and real images of the subject that the adapter closes."""
        return (self.likeness - self.likeness_base) / (self.likeness_real - self.likeness_base)

    @property
    def diversity_kept(self) -> float:
        """The diversity of the class as a share of the base's."""
        return self.diversity / self.diversity_base

    @property
    def class_change(self) -> float | None:
        """How far the class moved, in distances of two seeds of the base: 1 is not at all; None: unknown."""
        if self.class_distance is None or not self.class_distance_base:
            return None
        return self.class_distance / self.class_distance_base


# (name, unit, label) of each row of the table
TABLE = (
    ("likeness_base", "", "likeness of the base's images of the class"),
    ("likeness", "", "likeness of the adapter's images of the subject"),
    ("likeness_real", "", "likeness of real images of the subject"),
    ("closed", "%", "of the way from base to real"),
    ("place", "%", "of the subject's images in the requested place"),
    ("drift", "%", "of the class's images turned into the subject"),
    ("diversity_kept", "%", "of the base's diversity of the class"),
    ("class_change", "x", "change of the class's images (1x: two seeds of the base)"),
)
LABELS = {name: f"share {text}" if unit == "%" else text for name, unit, text in TABLE} | {
    "diversity": "mean 1 - cosine between images of the class",
    "class_distance": "Fréchet distance of the class's images from the base's",
    "class_distance_base": "Fréchet distance of two seeds of the base",
}


def shown(scores: JudgeScores) -> list[tuple[str, str]]:
    """(label, value) of each row of the table."""
    forms = {"": "{:.2f}", "%": "{:.0%}", "x": "{:.2f}x"}
    found = [(text, forms[unit], getattr(scores, name)) for name, unit, text in TABLE]
    return [(text, "-" if value is None else form.format(value)) for text, form, value in found]


@dataclass(frozen=True)
class Drawn:
    """Images to judge, in folders that `sample` filled."""

    kind: str  # the class
    photos: Sequence[Image.Image]
    prompts: Sequence[str]  # the subject by itself, and in each place
    of_class: str  # the prompt of the class
    out: Path
    base_out: Path


def draw(
    cfg: Config, adapter: str, out: Path, base_out: Path | None, kept: Kept, count: int | None = None
) -> Drawn:
    """Generate what is missing: the images of `adapter` in `out`, the base's in `base_out`.

    Several adapters can share `base_out`; None is a folder in `out`. `count`: images of the subject for each
    prompt, `SUBJECT_IMAGES` by default. Raises ConfigError if the photos are not of the base's world.
    """
    mix = Mix.parse(adapter)
    with dist.agreed():
        kind, photos = _subject(cfg)
        for path, _ in mix.parts:
            formats.find(path)  # raises now, not after generating the base's images
    subject, of_class = cfg.prepare.instance_prompt if cfg.prepare else "", f"a photo of a {kind}"
    prompts = [subject, *(f"{subject} {words}" for words in world.PLACE_WORDS.values())]
    base_out = base_out or out / "base"
    few, many, twice = (
        subjects.sampling(cfg, number, FIRST_SEED)
        for number in (count or SUBJECT_IMAGES, CLASS_IMAGES, 2 * CLASS_IMAGES)
    )
    sample(twice, [of_class], [NO_ADAPTER], base_out, kept)
    sample(many, [of_class], [mix], out / "class", kept)
    sample(few, prompts, [mix], out / "subject", kept)
    return Drawn(kind, photos, prompts, of_class, out, base_out)


def score(drawn: Drawn, real: Sequence[Image.Image] = ()) -> JudgeScores | None:
    """Judge images; returns the scores on rank 0, None on the others. Writes `scores.json` and `sheet.png`.

    `real`: as for `judged`.
    """
    if not dist.is_main():
        return None
    out, photos = drawn.out, drawn.photos
    base, adapted = (_images(folder, 0) for folder in (drawn.base_out, out / "class"))
    plain, *placed = (_images(out / "subject", prompt) for prompt in range(len(drawn.prompts)))
    scores = judged(Judge.load(), drawn.kind, photos, base, adapted, plain, placed, real)
    # The contact sheet, then the scores.
    by_place = dict(zip(world.PLACE_WORDS, placed, strict=True))
    rows = [
        SheetRow(photos[:5], "the photos"),
        SheetRow(base[:5], "base", f'"{drawn.of_class}"'),
        SheetRow([by_place[place][0] for place in SHOWN], "adapter", f'"{drawn.prompts[0]} ..."',
            [f"... {world.PLACE_WORDS[place]}" for place in SHOWN]),
        SheetRow(adapted[:5], "", f'"{drawn.of_class}"'),
    ]  # fmt: skip
    save_png(out / SHEET, contact_sheet(rows, least_cell=128))
    values = asdict(scores) | {"labels": LABELS}
    files.write_atomically(out / SCORES, json.dumps(values, indent=1) + "\n")
    return scores


def judged(
    judge: Judge,
    kind: str,
    photos: Sequence[Image.Image],
    base: Sequence[Image.Image],
    adapted: Sequence[Image.Image],
    plain: Sequence[Image.Image],
    placed: Sequence[Sequence[Image.Image]],
    real: Sequence[Image.Image] = (),
) -> JudgeScores:
    """The scores of images of the class (`base`, and `adapted`: with the adapter) and of the subject.

    The second half of `base` is of seeds that `adapted` has not, so that its distance to either is one of
    independent images. `plain`: the subject by itself; `placed`: the subject in each place of
    `world.PLACE_WORDS`; `real`: renders of the subject that are not among the photos, if its look is known.
    """
    readings = [judge.read(images) for images in placed]
    wanted = list(zip(world.PLACE_WORDS, readings, strict=True))
    count = sum(map(len, placed))
    first, second = (judge.texture(half) for half in (base[: len(base) // 2], base[len(base) // 2 :]))
    of_base, of_adapted = judge.likeness(base, photos), judge.likeness(adapted, photos)
    return JudgeScores(
        likeness_base=of_base.mean().item(),
        likeness=judge.likeness(plain, photos).mean().item(),
        likeness_real=(judge.likeness(real, photos) if real else judge.each_to_others(photos)).mean().item(),
        place=sum(reading.places.count(place) for place, reading in wanted) / count,
        kind=sum(reading.kinds.count(kind) for _, reading in wanted) / count,
        drift=(of_adapted > SAME).float().mean().item(),
        drift_base=(of_base > SAME).float().mean().item(),
        diversity=diversity(judge, adapted),
        diversity_base=diversity(judge, base),
        class_distance=frechet(judge.texture(adapted), second),
        class_distance_base=frechet(first, second),
    )


@torch.no_grad()
def likeness(cfg: Config, out: Path, subjects: Sequence[Config]) -> Tensor:
    """How like each subject's photos a subject's images in `out` are, (images, subjects)."""
    judge, pictures = Judge.load(), _images(out / "subject", 0)
    return torch.stack([judge.likeness(pictures, _subject(one)[1]) for one in subjects], 1)


def diversity(judge: Judge, images: Sequence[Image.Image]) -> float:
    """1 - the mean cosine between the embeddings of two different images."""
    return 1 - (among(judge(as_tensor(images))["likeness"]) or 0.0)


def _subject(cfg: Config) -> tuple[str, list[Image.Image]]:
    """(class of the run's subject, its photos). Raises ConfigError if the embedded base does not know it."""
    if cfg.prepare is None:
        raise ConfigError("evaluate needs the photos: the config has no prepare section")
    kind = cfg.prepare.instance_prompt.split()[-1]
    if kind not in KINDS:
        raise ConfigError(
            f"prepare.instance_prompt ends in '{kind}', but evaluate only knows the embedded base's "
            f"subjects: {', '.join(KINDS)}"
        )
    photos = [images.load(path) for path in images.there(cfg.prepare)]
    judge = Judge.load()
    if judge.read(photos).kinds.count(kind) <= len(photos) / 2 or judge.each_to_others(photos).mean() < SAME:
        raise ConfigError(
            f"the photos in {cfg.prepare.photos} do not show the embedded base's {kind}; "
            f"create its photos: python -m dbtrain.tiny.world {cfg.prepare.photos} {kind}"
        )
    return kind, photos


def _images(folder: Path, prompt: int) -> list[Image.Image]:
    """The images of one prompt in a folder that `sample` filled, by seed."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob(f"00-{prompt:02d}-seed*.png"))]
