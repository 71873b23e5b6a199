"""Did DreamBooth work? What the judge says of a run on the embedded base, and a sheet to see it.

The DreamBooth paper's questions (Ruiz et al. 2022, arXiv:2208.12242, section 4) in miniature: is it
the very subject, does the rest of the prompt still count, is the class still itself and varied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from dbtrain.config import Config
from dbtrain.data import photos as images
from dbtrain.data.pictures import Row, contact_sheet, save_png
from dbtrain.evaluate.scores import side_by_side
from dbtrain.runtime import dist, files
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import SCORES, SHEET
from dbtrain.sample.sample import NO_ADAPTER, Mix, sample
from dbtrain.tiny import world
from dbtrain.tiny.judge import SAME, Judge, as_tensor
from dbtrain.tiny.paint import KINDS, render

CLASS_IMAGES = 24  # pictures of "a photo of a mug", without and with the adapter
SUBJECT_IMAGES = 8  # pictures of "a photo of sks mug", and of it in each place
HELD_OUT = range(100, 132)  # numbers of the subject's renders that no photo shows
FIRST_SEED = 1000
SHOWN = ("beach", "snow", "city", "table", "space")  # places on the sheet


@dataclass(frozen=True)
class Scores:
    """Likeness is a cosine to the photos' mean embedding; the rest are shares of the pictures."""

    likeness_base: float  # the base's pictures of the class: where training starts
    likeness: float  # "a photo of sks mug" with the adapter
    likeness_real: float  # renders of the subject that are no photo: the ceiling
    place: float  # pictures in the place that the prompt names
    kind: float  # of those, the share that shows the class
    drift: float  # pictures of the class, with the adapter, that show the subject
    drift_base: float  # the same without the adapter: the judge's own error
    diversity: float  # mean 1 - cosine between pictures of the class, with the adapter
    diversity_base: float

    @classmethod
    def load(cls, path: Path) -> Scores:
        """The scores in a `scores.json`. Raises ConfigError if it holds none."""
        try:
            values = json.loads(path.read_text())
            return cls(*(values[field.name] for field in fields(cls)))
        except (ValueError, TypeError, LookupError) as error:
            raise ConfigError(f"{path} holds no scores: {error}") from error

    @property
    def closed(self) -> float:
        """How much of the way from the base to real pictures of the subject the adapter goes."""
        return (self.likeness - self.likeness_base) / (self.likeness_real - self.likeness_base)


# name, unit, what it says: the scores as a table shows them
TABLE = (
    ("likeness_base", "", "likeness of the base's pictures of the class"),
    ("likeness", "", "likeness of the adapter's pictures of the subject"),
    ("likeness_real", "", "likeness of real pictures of the subject"),
    ("closed", "%", "of the way from base to real"),
    ("place", "%", "of the subject's pictures in the place asked for"),
    ("drift", "%", "of the class's pictures turned into the subject"),
    ("diversity_base", "", "diversity of the class, base"),
    ("diversity", "", "diversity of the class, adapter"),
)
LABELS = {name: f"share {text}" if unit else text for name, unit, text in TABLE}


def shown(scores: Scores) -> list[tuple[str, str]]:
    """(what it says, value) of every row of the table."""
    rows = []
    for name, unit, text in TABLE:
        value = getattr(scores, name)
        rows.append((text, f"{100 * value:.0f}%" if unit else f"{value:.2f}"))
    return rows


def evaluate(cfg: Config, adapter: str, out: Path, base_out: Path | None = None) -> Scores | None:
    """Draw, judge, and leave `scores.json` and `sheet.png` in `out`; on rank 0, None on the others.

    `base_out` keeps the bare base's pictures, for several runs to share. Pictures that are there
    already are not drawn again. Raises ConfigError if the photos are not of the small world.
    """
    dist.init()
    with dist.agreed():
        kind, photos = _subject(cfg)
    subject, of_class = cfg.prepare.instance_prompt if cfg.prepare else "", f"a photo of a {kind}"
    prompts = [subject, *(f"{subject} {words}" for words in world.PLACE_WORDS.values())]
    mix = Mix.parse(adapter)
    base_out = base_out or out / "base"
    few = _sampling(cfg, SUBJECT_IMAGES)
    many = _sampling(cfg, CLASS_IMAGES)
    sample(many, [of_class], [NO_ADAPTER], base_out)
    sample(many, [of_class], [mix], out / "class")
    sample(few, prompts, [mix], out / "subject")
    if not dist.is_main():
        return None
    base, kept = (_pictures(folder, 0) for folder in (base_out, out / "class"))
    plain, *placed = (_pictures(out / "subject", prompt) for prompt in range(len(prompts)))
    scores = judged(Judge.load(), kind, photos, base, kept, plain, placed)
    whole = asdict(scores) | {"labels": LABELS}
    files.write_atomically(out / SCORES, json.dumps(whole, indent=1) + "\n")
    order = list(world.PLACE_WORDS)
    rows = [
        Row(photos[:5], "the photos"),
        Row(base[:5], "base", f'"{of_class}"'),
        Row([placed[order.index(place)][0] for place in SHOWN], "adapter", f'"{subject} ..."',
            [f"... {world.PLACE_WORDS[place]}" for place in SHOWN]),
        Row(kept[:5], "", f'"{of_class}"'),
    ]  # fmt: skip
    save_png(out / SHEET, contact_sheet(rows, least_cell=128))
    return scores


def judged(
    judge: Judge,
    kind: str,
    photos: Sequence[Image.Image],
    base: Sequence[Image.Image],
    kept: Sequence[Image.Image],
    plain: Sequence[Image.Image],
    placed: Sequence[Sequence[Image.Image]],
) -> Scores:
    """Scores of pictures: of the class without and with the adapter, of the subject, and in each place."""
    readings = [judge.read(pictures) for pictures in placed]
    wanted = list(zip(world.PLACE_WORDS, readings, strict=True))
    count = sum(map(len, placed))
    like_base, like_kept = judge.likeness(base, photos), judge.likeness(kept, photos)
    return Scores(
        likeness_base=like_base.mean().item(),
        likeness=judge.likeness(plain, photos).mean().item(),
        likeness_real=judge.likeness(_held_out(kind), photos).mean().item(),
        place=sum(reading.places.count(place) for place, reading in wanted) / count,
        kind=sum(reading.kinds.count(kind) for _, reading in wanted) / count,
        drift=(like_kept > SAME).float().mean().item(),
        drift_base=(like_base > SAME).float().mean().item(),
        diversity=diversity(judge, kept),
        diversity_base=diversity(judge, base),
    )


def diversity(judge: Judge, pictures: Sequence[Image.Image]) -> float:
    """Mean 1 - cosine between the embeddings of two different pictures."""
    found = judge(as_tensor(pictures))["likeness"]
    same = found @ found.T
    return 1 - same[~torch.eye(len(same), dtype=torch.bool)].mean().item()


def table(scores: Scores, beside: Scores | None = None) -> str:
    """The scores as text, one line each, next to those of another run."""
    return side_by_side(shown(scores), shown(beside) if beside else None)


def _subject(cfg: Config) -> tuple[str, list[Image.Image]]:
    """The class of the run's subject, which is also its name, and its photos."""
    if cfg.prepare is None:
        raise ConfigError("evaluate needs the photos: the config has no prepare section")
    kind = cfg.prepare.instance_prompt.split()[-1]
    if kind not in KINDS:
        raise ConfigError(
            f"evaluate judges pictures of the embedded base's small world: {', '.join(KINDS)}; "
            f"prepare.instance_prompt ends in '{kind}'"
        )
    photos = [images.load(path) for path in images.find(cfg.prepare.photos, "prepare.photos")]
    if not photos or Judge.load().likeness(_held_out(kind), photos).mean().item() < SAME:
        raise ConfigError(
            f"the photos in {cfg.prepare.photos} do not show the small world's {kind}; "
            f"draw its photos: python -m dbtrain.tiny.world {cfg.prepare.photos} {kind}"
        )
    return kind, photos


@cache
def _held_out(kind: str) -> list[Image.Image]:
    """Renders of the subject that no photo shows."""
    return [render(world.subject_scene(kind, number)) for number in HELD_OUT]


def _sampling(cfg: Config, count: int) -> Config:
    settings = cfg.sample.model_copy(update={"images": count, "seed": FIRST_SEED})
    return cfg.model_copy(update={"sample": settings})


def _pictures(folder: Path, prompt: int) -> list[Image.Image]:
    """The pictures of one prompt in a folder that `sample` filled, by seed."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob(f"00-{prompt:02d}-seed*.png"))]
