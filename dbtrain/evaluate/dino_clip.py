"""The DreamBooth paper's protocol: generate the subject and its class, embed with DINO and CLIP, score.

The work is split over ranks. A rerun resumes where an earlier one was interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config, subject_words
from dbtrain.config.subject_words import SubjectWords
from dbtrain.data import photos as images
from dbtrain.data.pictures import SheetRow, contact_sheet, save_png
from dbtrain.evaluate import encoders
from dbtrain.evaluate import prompts as subject
from dbtrain.evaluate.encoders import Encoder
from dbtrain.evaluate.scores import TABLE, Scores, Seen, scored
from dbtrain.runtime import console, dist, files, hashing, preemption
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import SCORES, SHEET
from dbtrain.sample.sample import Kept, sample, without_and_with

SHOWN = 5  # images in a row of the sheet


@dataclass(frozen=True)
class Scenario:
    """Everything to score: the image files by what they show, and the encoders."""

    cfg: Config
    about: SubjectWords
    prompts: Sequence[tuple[str, str]]  # (generated, the same without the token)
    photos: Sequence[Path]
    dino: Encoder
    clip: Encoder
    out: Path
    base_out: Path

    @cached_property
    def groups(self) -> dict[str, list[Path]]:
        """Image files by field of `Seen`."""
        evaluation, prompts = self.cfg.evaluation, len(self.prompts)
        return {
            "photos": list(self.photos),
            "subject": self._generated(self.out / "subject", prompts, evaluation.images),
            "subject_base": self._generated(self.base_out / "subject", prompts, evaluation.images),
            "of_class": self._generated(self.out / "class", 1, evaluation.class_images),
            "of_class_base": self._generated(self.base_out / "class", 1, evaluation.class_images),
        }

    def _generated(self, folder: Path, prompts: int, count: int) -> list[Path]:
        seeds = range(self.cfg.evaluation.seed, self.cfg.evaluation.seed + count)
        return [folder / f"00-{prompt:02d}-seed{seed}.png" for prompt in range(prompts) for seed in seeds]

    def key(self) -> str:
        """A hash of everything that the scores depend on; reads all images."""
        content = {name: [hashing.sha256_of(path) for path in paths] for name, paths in self.groups.items()}
        return content_key([content, [text for _, text in self.prompts], self.dino.key(), self.clip.key()])


def draw(cfg: Config, adapter: str, out: Path, base_out: Path | None, kept: Kept) -> Scenario:
    """Generate what is missing: the images of `adapter` in `out`, the base's in `base_out`.

    Several adapters can share `base_out`; None is a folder in `out`. Raises ConfigError for what a user can
    fix before it generates anything.
    """
    scenario = _plan(cfg, adapter, out, base_out or out / "base")
    prompts, of_class = [text for text, _ in scenario.prompts], [scenario.about.class_prompt]
    ours = cfg.evaluation
    few, many = (subject.sampling(cfg, count, ours.seed) for count in (ours.images, ours.class_images))
    for mix, folder in zip(without_and_with(adapter), (scenario.base_out, out), strict=True):
        sample(few, prompts, [mix], folder / "subject", kept)
        sample(many, of_class, [mix], folder / "class", kept)
    return scenario


def score(scenario: Scenario) -> Scores | None:
    """Embed and score images; returns the scores on rank 0, None on the others.

    Writes `scores.json` and `sheet.png`, unless there are those of the same images and models.
    """
    out = scenario.out
    with dist.agreed():
        key = scenario.key() if dist.is_main() else ""
        existing = _existing(out, key) if dist.is_main() else None
    if dist.from_main(existing is not None):
        console.say(f"{out / SCORES} is up to date: nothing to do")
        return existing
    scores = _score(scenario)
    with dist.agreed():
        if scores:
            _write(scenario, scores, key)
    return scores


@torch.no_grad()
def likeness(cfg: Config, out: Path, subjects: Sequence[Config]) -> Tensor:
    """DINO's mean cosine of a subject's images in `out` to each subject's photos, (images, subjects)."""
    dino = encoders.of(cfg.evaluation)[0]
    embed = partial(encoders.embed, load=images.load, view=dino.view, network=encoders.dino_images(dino))
    pictures = embed(sorted((out / "subject").glob("??-??-seed*.png")))
    return torch.stack([(pictures @ embed(_photos(one)).T).mean(1) for one in subjects], 1)


def _photos(cfg: Config) -> list[Path]:
    """The subject's photos. Raises ConfigError if there are none."""
    found = images.there(cfg.prepare, (".txt",)) if cfg.prepare else []
    if not found:
        raise ConfigError("prepare.photos: no photos of the subject, which evaluate needs")
    return found


def _plan(cfg: Config, adapter: str, out: Path, base_out: Path) -> Scenario:
    """Find or download everything that is needed. One rank per node downloads."""
    with dist.agreed():
        about = subject_words.of(cfg.prepare, cfg.subject)
        prompts = subject.prompts(about, cfg.evaluation)
        photos = _photos(cfg)
        if dist.local_rank() == 0:
            encoders.of(cfg.evaluation)
        formats.find(adapter)  # raises now, not after generating the base's images
    with dist.agreed():
        dino, clip = encoders.of(cfg.evaluation)
    return Scenario(cfg, about, prompts, photos, dino, clip, out, base_out)


def _existing(out: Path, key: str) -> Scores | None:
    """The scores in `out`, if they have this key."""
    try:
        values = json.loads((out / SCORES).read_text())
        return Scores.of(values) if values["key"] == key and (out / SHEET).is_file() else None
    except (OSError, ValueError, TypeError, LookupError):
        return None  # missing or damaged: score again


def _score(scenario: Scenario) -> Scores | None:
    """The scores, on rank 0. Batches do not depend on the number of ranks, so neither do the scores."""
    # Embed this rank's batches.
    everything = [path for paths in scenario.groups.values() for path in paths]
    size = scenario.cfg.evaluation.batch
    batches = [everything[i : i + size] for i in range(0, len(everything), size)]
    with dist.agreed():
        dino = encoders.dino_images(scenario.dino)
        clip, embed_texts = encoders.clip_images_and_texts(scenario.clip)
        mine = []
        with console.bar(math.ceil(len(batches) / dist.world()), "embed", "batch", share=True) as bar:
            for batch in batches[dist.rank() :: dist.world()]:
                preemption.check()
                both = (scenario.dino.view, dino), (scenario.clip.view, clip)
                mine.append([encoders.embed(batch, images.load, *one).tolist() for one in both])
                bar.update()
    everyone = dist.gather_json(mine)
    if not dist.is_main():
        return None
    # Put the batches of all ranks in order again, and score.
    in_order = [everyone[k % dist.world()][k // dist.world()] for k in range(len(batches))]
    by_dino, by_clip = (
        _seen(scenario, [row for both in in_order for row in both[which]]) for which in (0, 1)
    )
    texts = torch.no_grad()(embed_texts)([text for _, text in scenario.prompts]).cpu()
    return scored(by_dino, by_clip, texts)


def _seen(scenario: Scenario, rows: Sequence[Sequence[float]]) -> Seen:
    """The embeddings of all files, split into groups."""
    vectors = torch.tensor(rows).split([len(paths) for paths in scenario.groups.values()])
    groups = dict(zip(scenario.groups, vectors, strict=True))
    for name in ("subject", "subject_base"):
        groups[name] = groups[name].unflatten(0, (len(scenario.prompts), -1))
    return Seen(**groups)


def _write(scenario: Scenario, scores: Scores, key: str) -> None:
    """Write `sheet.png`, then `scores.json`."""
    ours = scenario.cfg.evaluation
    values = {
        "judge": "dino and clip", **{name: v for name, v in asdict(scores).items() if v is not None},
        "photos": len(scenario.photos), "prompts": len(scenario.prompts), "images": ours.images,
        "class_images": ours.class_images, "dino_model": scenario.dino.name,
        "dino_preprocessing": str(scenario.dino.view), "clip_model": scenario.clip.name,
        "clip_preprocessing": str(scenario.clip.view), "key": key, "labels": dict(TABLE),
    }  # fmt: skip
    several = scenario.groups["subject"][:: ours.images][:SHOWN]
    rows = [
        SheetRow([ImageOps.fit(images.load(path), (256, 256)) for path in scenario.photos[:SHOWN]],
                 "the photos"),
        SheetRow([Image.open(path) for path in scenario.groups["of_class_base"][:SHOWN]], "base",
            f'"{scenario.about.class_prompt}"'),
        SheetRow([Image.open(path) for path in several], "adapter", "; ".join(
            f'"{text}"' for text, _ in scenario.prompts[:SHOWN])),
        SheetRow([Image.open(path) for path in scenario.groups["of_class"][:SHOWN]], "",
            f'"{scenario.about.class_prompt}"'),
    ]  # fmt: skip
    save_png(scenario.out / SHEET, contact_sheet(rows, least_cell=128))
    files.write_atomically(scenario.out / SCORES, json.dumps(values, indent=1) + "\n")
