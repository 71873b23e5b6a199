"""The DreamBooth paper's protocol: draw the subject and its class, look at them with DINO and CLIP, score.

Each step is split over ranks, and gone on from where it was interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image, ImageOps

from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config
from dbtrain.data import photos as images
from dbtrain.data.pictures import Row, contact_sheet, save_png
from dbtrain.evaluate import encoders
from dbtrain.evaluate import prompts as subject
from dbtrain.evaluate.encoders import Encoder
from dbtrain.evaluate.scores import TABLE, Scores, Seen, scored
from dbtrain.runtime import console, dist, files, hashing, preemption
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import SCORES, SHEET
from dbtrain.sample.sample import sample, without_and_with

SHOWN = 5  # pictures in a row of the sheet


@dataclass(frozen=True)
class Scenario:
    """All that is looked at: files by what they show, and the models that look."""

    cfg: Config
    about: subject.Subject
    prompts: Sequence[tuple[str, str]]  # (drawn, without the token)
    photos: Sequence[Path]
    dino: Encoder
    clip: Encoder
    out: Path
    base_out: Path

    @cached_property
    def groups(self) -> dict[str, list[Path]]:
        """Files of the pictures, by the names that `Seen` has for them."""
        drawn, of_class = len(self.prompts), 1
        return {
            "photos": list(self.photos),
            "subject": self._drawn(self.out / "subject", drawn, self.cfg.evaluation.images),
            "subject_base": self._drawn(self.base_out / "subject", drawn, self.cfg.evaluation.images),
            "of_class": self._drawn(self.out / "class", of_class, self.cfg.evaluation.class_images),
            "of_class_base": self._drawn(self.base_out / "class", of_class, self.cfg.evaluation.class_images),
        }

    def _drawn(self, folder: Path, prompts: int, count: int) -> list[Path]:
        seeds = range(self.cfg.evaluation.seed, self.cfg.evaluation.seed + count)
        return [folder / f"00-{prompt:02d}-seed{seed}.png" for prompt in range(prompts) for seed in seeds]

    def about_models(self) -> dict[str, str]:
        """What the figures depend on besides the pictures."""
        return {
            "dino_model": self.dino.name, "dino_preprocessing": str(self.dino.view),
            "clip_model": self.clip.name, "clip_preprocessing": str(self.clip.view),
        }  # fmt: skip

    def key(self) -> str:
        """A name for everything that the scores depend on; reads all pictures."""
        content = {name: [hashing.sha256_of(path) for path in paths] for name, paths in self.groups.items()}
        return content_key([content, [text for _, text in self.prompts], self.dino.key(), self.clip.key()])


def evaluate(cfg: Config, adapter: str, out: Path, base_out: Path | None = None) -> Scores | None:
    """Draw, embed, score, and leave `scores.json` and `sheet.png` in `out`; on rank 0, None on the others.

    Drawing and embedding are split over ranks. `base_out` keeps the bare base's pictures, for several
    adapters to share. What is there already, of the very same pictures and models, is not done again.
    Raises ConfigError for what a user can fix, before anything is drawn.
    """
    dist.init()
    scenario = _plan(cfg, adapter, out, base_out or out / "base")
    prompts, of_class = [text for text, _ in scenario.prompts], [scenario.about.class_prompt]
    few, many = (_sampling(cfg, count) for count in (cfg.evaluation.images, cfg.evaluation.class_images))
    for mix, folder in zip(without_and_with(adapter), (scenario.base_out, out), strict=True):
        sample(few, prompts, [mix], folder / "subject")
        sample(many, of_class, [mix], folder / "class")
    with dist.agreed():
        key = scenario.key() if dist.is_main() else ""
        made = _made(out, key) if dist.is_main() else None
    if dist.from_main(made is not None):
        console.say(f"{out / 'scores.json'} is up to date: nothing to do")
        return made
    scores = _look(scenario)
    with dist.agreed():
        if scores:
            _write(scenario, scores, key)
    return scores


def _plan(cfg: Config, adapter: str, out: Path, base_out: Path) -> Scenario:
    """What is to be done; models are downloaded by one rank a node."""
    ours = cfg.evaluation

    def models() -> tuple[Encoder, Encoder]:
        return encoders.dino(ours.dino or encoders.DINO), encoders.clip(ours.clip or encoders.CLIP)

    with dist.agreed():
        about = subject.of(cfg.prepare, ours)
        prompts = subject.prompts(about, ours)
        photos = images.find(cfg.prepare.photos, "prepare.photos", ignore=(".txt",)) if cfg.prepare else []
        if not photos:
            raise ConfigError("evaluate needs the subject's photos: there are none in prepare.photos")
        if dist.local_rank() == 0:
            models()
        formats.find(adapter)  # now, not after the base's pictures
    with dist.agreed():
        dino, clip = models()
    return Scenario(cfg, about, prompts, photos, dino, clip, out, base_out)


def _sampling(cfg: Config, count: int) -> Config:
    settings = cfg.sample.model_copy(update={"images": count, "seed": cfg.evaluation.seed})
    return cfg.model_copy(update={"sample": settings})


def _made(out: Path, key: str) -> Scores | None:
    """The scores that are there, if they are of this key."""
    try:
        values = json.loads((out / SCORES).read_text())
        return Scores.of(values) if values["key"] == key and (out / SHEET).is_file() else None
    except (OSError, ValueError, TypeError, LookupError):
        return None  # none, or damaged: they are made again


def _look(scenario: Scenario) -> Scores | None:
    """The scores, on rank 0. Batches are the same for any number of ranks, and so are their sums."""
    everything = [path for paths in scenario.groups.values() for path in paths]
    size = scenario.cfg.evaluation.batch
    batches = [everything[i : i + size] for i in range(0, len(everything), size)]
    with dist.agreed():
        dino = encoders.dino_pictures(scenario.dino)
        clip, read = encoders.clip_pictures_and_texts(scenario.clip)
        mine = []
        with console.bar(math.ceil(len(batches) / dist.world()), "look", "batch", share=True) as bar:
            for batch in batches[dist.rank() :: dist.world()]:
                preemption.check()
                both = (scenario.dino.view, dino), (scenario.clip.view, clip)
                mine.append([encoders.embed(batch, images.load, *one).tolist() for one in both])
                bar.update()
    everyone = dist.gather_json(mine)
    if not dist.is_main():
        return None
    turns = [everyone[k % dist.world()][k // dist.world()] for k in range(len(batches))]
    by_dino, by_clip = (_seen(scenario, [row for both in turns for row in both[which]]) for which in (0, 1))
    texts = torch.no_grad()(read)([text for _, text in scenario.prompts]).cpu()
    return scored(by_dino, by_clip, texts)


def _seen(scenario: Scenario, rows: Sequence[Sequence[float]]) -> Seen:
    """Embeddings of all files, taken apart again."""
    vectors = torch.tensor(rows).split([len(paths) for paths in scenario.groups.values()])
    found = dict(zip(scenario.groups, vectors, strict=True))
    for name in ("subject", "subject_base"):
        found[name] = found[name].unflatten(0, (len(scenario.prompts), -1))
    return Seen(**found)


def _write(scenario: Scenario, scores: Scores, key: str) -> None:
    ours = scenario.cfg.evaluation
    counts = {"photos": len(scenario.photos), "prompts": len(scenario.prompts), "images": ours.images,
              "class_images": ours.class_images}  # fmt: skip
    values = {name: value for name, value in asdict(scores).items() if value is not None}
    whole = {"judge": "dino and clip", **values, **counts, **scenario.about_models(), "key": key,
             "labels": dict(TABLE)}  # fmt: skip
    several = scenario.groups["subject"][:: ours.images][:SHOWN]
    rows = [
        Row([ImageOps.fit(images.load(path), (256, 256)) for path in scenario.photos[:SHOWN]], "the photos"),
        Row([Image.open(path) for path in scenario.groups["of_class_base"][:SHOWN]], "base",
            f'"{scenario.about.class_prompt}"'),
        Row([Image.open(path) for path in several], "adapter", "; ".join(
            f'"{text}"' for text, _ in scenario.prompts[:SHOWN])),
        Row([Image.open(path) for path in scenario.groups["of_class"][:SHOWN]], "",
            f'"{scenario.about.class_prompt}"'),
    ]  # fmt: skip
    save_png(scenario.out / SHEET, contact_sheet(rows, least_cell=128))
    files.write_atomically(scenario.out / SCORES, json.dumps(whole, indent=1) + "\n")
