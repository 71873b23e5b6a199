"""Plan what the shards will contain, before anything is encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbtrain.config import Config, Prepare
from dbtrain.data import emphasis, masks, photos, shards, sizes
from dbtrain.data.emphasis import Emphasis
from dbtrain.data.shards import Manifest
from dbtrain.data.sizes import Size, Sized
from dbtrain.models.base import Base
from dbtrain.models.families.family import Family
from dbtrain.models.families.space import LatentSpace
from dbtrain.prepare import class_images, originals, prompts
from dbtrain.prepare.images import split as split_held_out
from dbtrain.prepare.subjects import parts
from dbtrain.runtime import hashing
from dbtrain.runtime.console import say
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key

SHARD_ROWS = 256  # most rows in a shard
SHARDS = 64  # most shards, unless SHARD_ROWS requires more
# Settings that older manifests lack, recorded if they are not the default.
LATER = (
    "buckets", "class_buckets", "augment", "mask", "mask_model", "caption", "subfolders", "repeats",
    "weights",
)  # fmt: skip


@dataclass
class _Row:
    """A planned row."""

    source: str  # the path of its image
    meta: dict[str, Any]  # its description
    times: int = 1  # how often this crop was drawn for the image
    emphasis: Emphasis = field(default_factory=Emphasis)  # it changes the manifest only, not the shard


@dataclass(frozen=True)
class Planned:
    """A planned shard: its file name, and the source and description of each row."""

    file: str
    sources: list[str]
    metas: list[dict[str, Any]]
    part: int  # the number of its subject, or class
    size: str | None  # of its images; None: the largest square
    repeats: list[int] = field(default_factory=list)  # of each row, as in a `shards.Shard`
    weights: list[float] = field(default_factory=list)


def request(cfg: Config, family: Family) -> dict[str, Any]:
    """The settings that determine the shards' content, as the manifest records them."""
    prepare = cfg.prepare
    assert prepare is not None
    settings = prepare.recorded()
    settings["class_pictures"] = not class_images.as_latents(family, prepare)
    if not prepare.has_class_images:  # the class settings have no effect
        for name in ("class_images", "class_held_out", "class_pictures", "sampling"):
            del settings[name]
    for name, setting in Prepare.model_fields.items():
        if name in LATER and settings[name] == setting.default:
            del settings[name]
    if cfg.subjects:
        settings["subjects"] = [one.model_dump(mode="json", exclude={"weight"}) for one in cfg.subjects]
    return settings


def plan_shards(
    base: Base, cfg: Config, every: Mapping[str, Sequence[Sequence[Sized]]]
) -> tuple[list[str], dict[str, str], dict[str, list[dict[str, Any]]]]:
    """Return (prompts, keys of the base's components, planned shards by role), JSON-able.

    `every`: the images of each of `parts`, by role.
    """
    first = cfg.prepare
    assert first is not None
    encoders = base.family.text_encoders
    vae = [base.family.vae] if base.family.vae else []
    components = {name: base.key(name) for name in (*vae, *encoders, *encoders.values())}
    encoder = f"{components['vae']} {first.vae_precision}" if vae else "pixels"
    space = cache(partial(base.family.space, base))
    texts: dict[str, int] = {}  # and their place in the table
    plans: dict[str, list[dict[str, Any]]] = {}
    settings = parts(cfg)
    split = [
        (role, number, settings[of][number], images)
        for of, several in every.items()
        for number, whole in enumerate(several)
        for role, images in split_held_out(of, whole, first, cfg.seed).items()
    ]
    for role, number, part, images in sorted(split, key=lambda one: one[0] in shards.HELD_OUT.values()):
        rows: dict[Size, list[_Row]] = {}
        prepare = part.prepare
        names = {path: path.name for path, _ in images}
        if role.startswith("instance"):
            names = photos.named(prepare, names)
        crops = prepare.model_copy(update=ONE_CROP.get(role, {}))
        for path, size in images:
            mine = rows.setdefault(size, [])
            mine_texts, mask = [prepare.class_prompt or ""], None
            if role.startswith("instance"):
                mask = masks.key_of(path) if prepare.mask else None
                mine_texts = prompts.of_photo(path, prepare, part.words, cfg.seed)
            if role in shards.HELD_OUT.values():
                del mine_texts[1:]
            words = [texts.setdefault(text, len(texts)) for text in mine_texts]
            if path.suffix == class_images.SUFFIX:
                mine.append(_latent_row(path, words, size, space(size)))
            else:
                mine += _rows(path, names[path], words, size, crops, cfg.seed, encoder, mask)
        if role == "instance":
            every_row = [row for mine in rows.values() for row in mine]
            how = {str(path): one for path, one in emphasis.of_photos(names, prepare).items()}
            sources, times = [row.source for row in every_row], [row.times for row in every_row]
            for row, one in zip(every_row, emphasis.of_rows(sources, times, how), strict=True):
                row.emphasis = one
        planned = plans.setdefault(role, [])
        for size, mine in rows.items():
            about = {"part": number, "size": None if size == Size.square(first.side) else str(size)}
            count = _shard_count(len(mine))
            planned += [_planned(role, len(planned) + k, mine[k::count], about) for k in range(count)]
    asked = [one.prepare.class_prompt for one in cfg.each_subject() if one.prepare]  # maybe without images
    empty = [shards.EMPTY] if cfg.data.prompt_dropout else []
    return list(dict.fromkeys([*texts, *filter(None, asked), *empty])), components, plans


# Variants augment the few training photos only.
ONE_CROP: dict[str, dict[str, Any]] = {
    "class": {"variants": 1, "flip": False, "augment": None},
    **{
        role: {"crop": "center", "variants": 1, "flip": False, "augment": None}
        for role in shards.HELD_OUT.values()
    },
}


def _rows(
    path: Path, name: str, words: list[int], size: Size, prepare: Prepare, seed: int, encoder: str,
    mask: str | None,
) -> list[_Row]:  # fmt: skip
    """Every stored crop of one image."""
    photo_key = hashing.sha256_of(path)
    height, width = photos.size(path)
    of_size = size.width if size.is_square else list(size)
    if sizes.scale(height, width, size) > 1:
        to = f"{size.width}" if size.is_square else f"{size.width} x {size.height}"
        say(f"{path} is {width} x {height} px and will be enlarged to {to} px")
    rows = []
    for crop, times in Counter(photos.crops(photo_key, height, width, size, prepare, seed)).items():
        where = [of_size, crop.key(), *([mask] if mask else [])]
        key = content_key([shards.VERSION, encoder, photo_key, where])
        meta = _meta(name, [height, width], crop, words, key)
        rows.append(_Row(str(path), meta | ({"mask": mask} if mask else {}), times))
    return rows


def _latent_row(path: Path, words: list[int], size: Size, space: LatentSpace) -> _Row:
    """A class image that is stored as a latent: neither cropped nor resized."""
    key = content_key(
        [shards.VERSION, class_images.LATENT, space.scale, space.shift, hashing.sha256_of(path)]
    )
    return _Row(str(path), _meta(path.name, list(size), photos.Crop(0, 0, False), words, key))


def _meta(
    name: str, original_size: list[int], crop: photos.Crop, words: list[int], key: str
) -> dict[str, Any]:
    """`words`: the places of its prompts in the table."""
    return {
        "source": name, "original_size": original_size, "crop": [crop.top, crop.left],
        "flip": crop.flip, "prompt": words[0], "key": key[:16],
        **({"prompts": words} if len(set(words)) > 1 else {}),
        **({"augment": change} if (change := crop.change.about()) else {}),
    }  # fmt: skip


def _shard_count(rows: int) -> int:
    """Number of shards for `rows`: a power of two, at least 4 rows each, at most SHARDS if they fit."""
    count = 1
    while count * 2 <= SHARDS and count * 8 <= rows:
        count *= 2
    while rows > count * SHARD_ROWS:
        count *= 2
    return count


def _planned(role: str, number: int, rows: list[_Row], about: Mapping[str, Any]) -> dict[str, Any]:
    metas = [row.meta for row in rows]
    file = f"{role}-{number:05d}-{content_key(metas)[:12]}.tar"
    found = {"sources": [row.source for row in rows], "metas": metas, **about}
    each = [row.emphasis for row in rows]
    for name, values in zip(("repeats", "weights"), zip(*each, strict=True), strict=True):
        found[name] = list(values) if set(values) != {1} else []
    return {"file": file, **found}


def check(cfg: Config, base: Base, manifest: Manifest) -> None:
    """Raise ConfigError unless this config's `prepare` section and base would produce these shards."""
    known = base.family.parts
    parts = [part for part, key in manifest.components.items() if part not in known or base.key(part) != key]
    if parts:
        raise ConfigError(
            f"{cfg.data.shards} was made for base model '{manifest.base}', but model.path is "
            f"'{cfg.model.path}', whose {' and '.join(parts)} differ; {shards.CURE}"
        )
    if (family := base.family.name) != manifest.family:
        raise ConfigError(
            f"{cfg.data.shards} was made for family '{manifest.family}', not '{family}'; {shards.CURE}"
        )
    space = base.family.space(base, Size.square(manifest.side))
    made_in = LatentSpace(manifest.latent_shape, manifest.latent_scale, manifest.latent_shift)
    if made_in != space:
        raise ConfigError(f"{cfg.data.shards} has {made_in}, but the base has {space}; {shards.CURE}")
    if cfg.data.prompt_dropout and shards.EMPTY not in manifest.prompts.texts:
        raise ConfigError(
            f"data.prompt_dropout is {cfg.data.prompt_dropout:g}, but {cfg.data.shards} was made without the "
            f"empty prompt; {shards.CURE}"
        )
    if cfg.prepare:
        now = request(cfg, base.family)
        made = manifest.request
        changed = [key for key in dict.fromkeys([*now, "subjects", *LATER]) if now.get(key) != made.get(key)]
        if changed:
            changes = ", ".join(f"prepare.{key} {made.get(key)!r}, now {now.get(key)!r}" for key in changed)
            raise ConfigError(f"{cfg.data.shards} was made with {changes}; {shards.CURE}")
        originals.check(cfg, manifest)


def check_prompts(shards_dir: str, base: Base, table: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless the base's denoiser and text encoders can read this prompt table.

    `shards_dir`: `data.shards`, for messages.
    """
    wanted = {f"condition.{name}": shape for name, shape in base.family.conditions(base).items()}
    wanted |= {f"ids.{name}": (None,) for name in base.family.text_encoders}
    for name, shape in wanted.items():
        there = tuple(table[name].shape[1:]) if name in table else None
        pairs = zip(shape, there or (), strict=False)
        fitting = tuple(found if size is None else size for size, found in pairs)
        if there is None or len(there) != len(shape) or there != fitting:
            raise ConfigError(
                f"the prompt table in {shards_dir} has {name} of {there or 'no shape'} per prompt, "
                f"which the base cannot read; {shards.CURE}"
            )
    if "condition.lengths" in wanted:
        lengths, rows = table["condition.lengths"], table["condition.prompt_embeds"].shape[1]
        if lengths.dtype != torch.int64 or lengths.min() < 1 or lengths.max() > rows:
            raise ConfigError(
                f"the prompt table in {shards_dir} has lengths {lengths.tolist()[:4]} of prompts that have "
                f"{rows} rows; {shards.CURE}"
            )
    for encoder in base.family.text_encoders:
        ids, words = table[f"ids.{encoder}"], base.setting(encoder, "vocab_size", int)
        longest = base.settings(encoder).get("max_position_embeddings", ids.shape[1])
        if ids.dtype != torch.int64 or ids.shape[1] > longest or ids.min() < 0 or ids.max() >= words:
            raise ConfigError(
                f"the prompt table in {shards_dir} has ids.{encoder} that its {words} words and "
                f"{longest} tokens do not have; {shards.CURE}"
            )
