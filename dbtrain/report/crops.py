"""A run's training data: the photos, and the stored crops decoded to what training sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from dbtrain.config import Config, Model
from dbtrain.data import emphasis, photos, shards
from dbtrain.data.emphasis import Emphasis
from dbtrain.data.photos import Crop
from dbtrain.data.storage import Storage
from dbtrain.models.families import registry as families
from dbtrain.models.pretrained import DTYPES, Pretrained
from dbtrain.report.run import Run
from dbtrain.report.thumbs import THUMB, Picture, embed
from dbtrain.runtime import console, dist
from dbtrain.runtime.errors import ConfigError, os_problem

DECODED = (
    "What training sees: the mean of each stored posterior, decoded by the base's VAE. Crop positions are in "
    "pixels of the resized photo."
)
PHOTOS = 64  # most photos shown, shared among the data sets
LEAST_PHOTOS = 6  # that each data set shows of its own
LEAST_SIDE = 128  # px, of images if there are many data sets
FADED = 0.7  # of white over what is outside a mask
FEW = 4  # crops of the subject per class image shown
TITLES = {
    "instance": "Crops as trained", "class": "Class images as trained",
    shards.HELD_OUT["instance"]: "Photos held out", shards.HELD_OUT["class"]: "Class images held out",
}  # fmt: skip
Decode = Callable[[shards.Row], Image.Image]


@dataclass
class Part:
    """Images of one kind, how many there are in all, and why they cannot be shown, if so."""

    title: str
    pictures: list[Picture] = field(default_factory=list)
    total: int = 0
    problem: str = ""
    note: str = ""


@dataclass(frozen=True)
class DataSheet:
    """The data that some runs share."""

    labels: list[str]
    parts: list[Part]


def data_sheets(runs: Sequence[Run], crops: int) -> list[DataSheet]:
    """One sheet for each data set of the runs. `crops`: how many to decode, shared among them."""
    shared: dict[tuple, list[Run]] = {}
    for run in runs:
        prepare = run.cfg.prepare and run.cfg.prepare.model_dump_json()
        key = (run.cfg.data.shards, prepare, run.cfg.subjects, run.cfg.model)
        shared.setdefault(key, []).append(run)
    sets = [(same[0].cfg, [run.label for run in same]) for same in shared.values()]
    most, each = max(LEAST_PHOTOS, PHOTOS // len(sets)), -(-crops // len(sets))
    side = max(LEAST_SIDE, THUMB // len(sets))
    return [
        DataSheet(labels, [photos_of(cfg, most, side), *_stored(cfg, each, side)]) for cfg, labels in sets
    ]


def photos_of(cfg: Config, most: int, side: int = THUMB) -> Part:
    """The first `most` photos of the subject; `side`: their longest, in px."""
    part = Part("The photos")
    with _reporting(part):
        if cfg.prepare is None:
            raise ConfigError("the config has no 'prepare' section, and so no photos")
        found = []
        for one in filter(None, (one.prepare for one in cfg.each_subject())):
            names = photos.named(one, photos.there(one, (".txt",)))
            how = emphasis.of_photos(names, one)
            found += [(path, name, how[path].about()) for path, name in names.items()]
        part.total = len(found)
        part.pictures = [_photo(*each, side) for each in found[:most]]
    return part


@contextmanager
def _reporting(part: Part) -> Iterator[None]:
    """Turn an error in the block into the part's `problem`, so that the rest of the page is still made."""
    try:
        yield
    except ConfigError as problem:
        part.problem = str(problem)
    except OSError as problem:
        part.problem = os_problem(problem)
    except torch.OutOfMemoryError:
        part.problem = "not enough GPU memory to decode them; try again when the GPU is idle"


def _photo(path: Path, name: str, about: Sequence[str], side: int) -> Picture:
    try:
        photo = photos.load(path)
    except ConfigError as problem:
        return Picture(name, captions=[name], problem=str(problem))
    captions = [name, f"{photo.width} × {photo.height} px", *about]
    return embed(photo, f"photo {name}", (side, side), captions)


def _stored(cfg: Config, crops: int, side: int) -> list[Part]:
    """For each role of the shards, its first rows as images, or why they cannot be shown."""
    storage = Storage(cfg.data.shards, retries=1)
    unread = Part(TITLES["instance"])
    with _reporting(unread):
        manifest = shards.Manifest.read(storage)
    if unread.problem:
        return [unread]
    decode: Decode | None = None
    parts = []
    for role in manifest.roles:
        part = Part(TITLES[role], total=sum(manifest.rows(role)), note=DECODED if role == "instance" else "")
        with _reporting(part):
            rows = _rows(storage, manifest, role, crops if role == "instance" else -(-crops // FEW))
            if rows:
                decode = decode or _decoder(cfg.model)
                with console.bar(len(rows), f"decode {role}", "image") as bar:
                    for row, how in rows:
                        part.pictures.append(_crop(row, how, decode(row), manifest.prompts.texts, side))
                        bar.update()
        parts.append(part)
    return parts


def _rows(
    storage: Storage, manifest: shards.Manifest, role: str, most: int
) -> list[tuple[shards.Row, Emphasis]]:
    """The first `most` rows of a role, sorted by photo. Reads no more shards than that takes."""
    rows: list[tuple[shards.Row, Emphasis]] = []
    for shard in manifest.roles[role]:
        if len(rows) < most:
            found = shards.read(storage, shard, manifest)
            rows += [(row, shard.emphasis(number)) for number, row in enumerate(found)]
    return sorted(
        rows[:most], key=lambda one: (one[0].meta["source"], one[0].meta["crop"], one[0].meta["flip"])
    )


@lru_cache(maxsize=1)
def _decoder(model: Model) -> Decode:
    """A function that decodes the mean of a stored row to an image. Loads the base's VAE."""
    base = Pretrained.here(model)
    if base is None:
        raise ConfigError(f"model.path is '{model.path}', which is not on this machine")
    family = families.detect(base, model)
    vae = base.load(family.vae, DTYPES["fp32"]).to(dist.device()) if family.vae else None

    @torch.no_grad()
    def decode(row: shards.Row) -> Image.Image:
        mean = family.sample_posterior(row.tensors, torch.zeros(()))  # zero noise
        x0 = mean[None]  # (1, C, H, W)
        pixels = family.decode(vae, x0.to(dist.device())) if vae else x0
        values = ((pixels[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())

    return decode


def _crop(row: shards.Row, how: Emphasis, picture: Image.Image, prompts: Sequence[str], side: int) -> Picture:
    meta = row.meta
    (tall, wide), (top, left) = meta["original_size"], meta["crop"]
    mask, share = row.tensors.get(shards.MASK), ""
    if mask is not None:  # what is outside fades
        share = f"mask over {mask.float().mean() / 255:.0%}"
        whole = Image.fromarray(mask[0].numpy()).resize(picture.size)
        white = Image.new("RGB", picture.size, "white")
        picture = Image.composite(picture, Image.blend(picture, white, FADED), whole)
    others = len(set(meta.get("prompts", ()))) - 1
    more = f" (+{others} more)" if others > 0 else ""
    captions = [
        meta["source"],
        f"{picture.width} × {picture.height} of {wide} × {tall} px",
        f"crop at {left}, {top}{', mirrored' if meta['flip'] else ''}",
        *filter(None, [str(Crop.of(meta).change), share, *how.about()]),
        f"“{prompts[meta['prompt']]}”{more}",
    ]
    return embed(picture, f"{meta['source']} as trained", (side, side), captions)
