"""What the shards shall hold: a pure list, made before anything is encoded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dbtrain.config import Config, Prepare
from dbtrain.data import photos, shards
from dbtrain.data.shards import Manifest
from dbtrain.models.base import Base
from dbtrain.models.families.family import Family, LatentSpace
from dbtrain.prepare import class_images
from dbtrain.runtime import hashing
from dbtrain.runtime.console import say
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key

SHARD_ROWS = 256  # most rows of a shard
SHARDS = 64  # most shards while they fit that


@dataclass(frozen=True)
class Planned:
    """A shard as it shall be: its file name, and source and description of each row."""

    file: str
    sources: list[str]
    metas: list[dict[str, Any]]


def request(prepare: Prepare, family: Family) -> dict[str, Any]:
    """The settings that shape the shards' content, as the manifest remembers them."""
    settings = prepare.model_dump(mode="json", exclude={"sampling": {"batch", "compile"}})
    settings["class_pictures"] = not class_images.as_latents(family, prepare)
    if prepare.class_prompt is None:  # then nothing depends on how class images would be made
        for name in ("class_images", "class_held_out", "class_pictures", "sampling"):
            del settings[name]
    return settings


# What shards of older versions were made with, which do not say so.
ONCE = {"class_pictures": True, "held_out": 0, "class_held_out": 0}


def plan_shards(
    base: Base, prepare: Prepare, seed: int, pictures: dict[str, list[Path]]
) -> tuple[list[str], dict[str, str], dict[str, list[dict[str, Any]]]]:
    """(prompts, keys of the base's components, planned shards of each role), JSON-able."""
    encoders = base.family.text_encoders
    vae = [base.family.vae] if base.family.vae else []
    components = {name: base.key(name) for name in (*vae, *encoders, *encoders.values())}
    encoder = f"{components['vae']} {prepare.vae_precision}" if vae else "pixels"
    space = base.family.space(base, prepare.resolution)
    texts: list[str] = []
    plans = {}
    for role, paths in _kept_back(pictures, prepare, seed).items():
        rows = []
        settings = prepare.model_copy(update=ONE_CROP.get(role, {}))
        for path in paths:
            text = prepare.class_prompt or ""
            if role.startswith("instance"):
                text = photos.caption(path) if prepare.captions else prepare.instance_prompt
            if text not in texts:
                texts.append(text)
            if path.suffix == class_images.SUFFIX:
                rows.append(_latent_row(path, texts.index(text), prepare.resolution, space))
            else:
                rows += _rows(path, texts.index(text), settings, seed, encoder)
        count = _shard_count(len(rows))
        plans[role] = [_planned(role, number, rows[number::count]) for number in range(count)]
    return texts, components, plans


# Variants and flips make much of few photos; class images are many.
ONE_CROP: dict[str, dict[str, Any]] = {
    "class": {"variants": 1, "flip": False},
    **{role: {"crop": "center", "variants": 1, "flip": False} for role in shards.HELD_OUT.values()},
}


def left(prepare: Prepare, role: str, count: int) -> int:
    """How many of `count` images of a role are trained on. Raises ConfigError if none is."""
    key = {"instance": "held_out", "class": "class_held_out"}[role]
    kept_back = getattr(prepare, key)
    if kept_back >= count:
        raise ConfigError(
            f"prepare.{key} is {kept_back}, of {count} {role} images: none is left to train on; "
            "keep fewer back"
        )
    return count - kept_back


def _kept_back(pictures: dict[str, list[Path]], prepare: Prepare, seed: int) -> dict[str, list[Path]]:
    """The pictures of each role, those that are held out under a role of their own.

    Which ones depends on their content and `seed`: another photo more changes the choice by one at most.
    """
    every = dict(pictures)
    for role, paths in pictures.items():
        if (role == "instance" and not prepare.held_out) or (role == "class" and not prepare.class_held_out):
            continue
        contents = {hashing.sha256_of(path) for path in paths}  # no twin of what is held out is trained on
        count = len(contents) - left(prepare, role, len(contents))
        turns = sorted(contents, key=lambda content: content_key([seed, "held out", content]))[:count]
        every[role] = [path for path in paths if hashing.sha256_of(path) not in turns]
        every[shards.HELD_OUT[role]] = [path for path in paths if hashing.sha256_of(path) in turns]
    return every


def _rows(path: Path, prompt: int, prepare: Prepare, seed: int, encoder: str) -> list[tuple[str, dict]]:
    """(image path, description) of every stored crop of one image."""
    photo_key = hashing.sha256_of(path)
    height, width = photos.size(path)
    if min(height, width) < prepare.resolution:
        say(f"{path} is {width} x {height} px and will be enlarged to {prepare.resolution} px")
    rows = []
    for crop in photos.crops(photo_key, height, width, prepare, seed):
        where = [prepare.resolution, asdict(crop)]
        key = content_key([shards.VERSION, encoder, photo_key, where])[:16]
        meta = {
            "source": path.name, "original_size": [height, width], "crop": [crop.top, crop.left],
            "flip": crop.flip, "prompt": prompt, "key": key,
        }  # fmt: skip
        rows.append((str(path), meta))
    return rows


def _latent_row(path: Path, prompt: int, side: int, space: LatentSpace) -> tuple[str, dict]:
    """(path, description) of a class image that was kept as a latent: whole, and of its own size."""
    key = content_key(
        [shards.VERSION, class_images.LATENT, space.scale, space.shift, hashing.sha256_of(path)]
    )
    meta = {
        "source": path.name, "original_size": [side, side], "crop": [0, 0], "flip": False,
        "prompt": prompt, "key": key[:16],
    }  # fmt: skip
    return str(path), meta


def _shard_count(rows: int) -> int:
    """A power of two, so that columns come out even; about four rows or more each, up to `SHARDS`."""
    count = 1
    while count * 2 <= SHARDS and count * 8 <= rows:
        count *= 2
    while rows > count * SHARD_ROWS:
        count *= 2
    return count


def _planned(role: str, number: int, rows: list[tuple[str, dict]]) -> dict[str, Any]:
    metas = [meta for _, meta in rows]
    file = f"{role}-{number:05d}-{content_key(metas)[:12]}.tar"
    return {"file": file, "sources": [source for source, _ in rows], "metas": metas}


def check(cfg: Config, base: Base, manifest: Manifest) -> None:
    """Raise ConfigError unless the shards are what this config's `prepare` makes with its base."""
    parts = [part for part, key in manifest.components.items() if base.key(part) != key]
    if parts:
        raise ConfigError(
            f"{cfg.data.shards} was made for base model '{manifest.base}', but model.path is "
            f"'{cfg.model.path}', whose {' and '.join(parts)} differ; {shards.CURE}"
        )
    if (family := base.family.name) != manifest.family:
        raise ConfigError(
            f"{cfg.data.shards} was made for family '{manifest.family}', not '{family}'; {shards.CURE}"
        )
    if cfg.prepare:
        asked = request(cfg.prepare, base.family)
        made = ONCE | manifest.request
        odd = [key for key in asked if asked[key] != made.get(key)]
        if odd:
            changes = ", ".join(f"prepare.{key} {made.get(key)!r}, now {asked[key]!r}" for key in odd)
            raise ConfigError(f"{cfg.data.shards} was made with {changes}; {shards.CURE}")
