"""Which images are stored at which sizes, and which are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dbtrain.config import Config, Prepare
from dbtrain.data import masks, photos, shards, sizes
from dbtrain.data.sizes import Size, Sized
from dbtrain.models.base import Base
from dbtrain.prepare import prompts
from dbtrain.prepare.subjects import parts
from dbtrain.runtime import dist, hashing, preemption
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key


def check_sizes(base: Base, prepare: Prepare) -> None:
    """Raise ConfigError if the base cannot have images of the sizes in the config."""
    listed = prepare.buckets if isinstance(prepare.buckets, tuple) else ()
    for size in (*map(Size.square, prepare.resolutions), *map(Size.parse, listed)):
        base.family.space(base, size)


def check_readable(cfg: Config, every: Sequence[Sequence[Path]]) -> None:
    """Read this rank's share of the photos, captions and masks. Raises ConfigError for unusable ones."""
    problems: list[str] = []
    for part, paths in zip(parts(cfg)["instance"], every, strict=True):
        for path in paths[dist.rank() :: dist.world()]:
            preemption.check()
            try:
                photos.load(path, str)  # what it tells is told when it is encoded
                prompts.of_photo(path, part.prepare, part.words, cfg.seed)
                if part.prepare.mask:
                    masks.load(path)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(*problems)


def of_subject(base: Base, prepare: Prepare, paths: Sequence[Path]) -> list[Sized]:
    """The photos of a subject, at each of their sizes. Reads their headers."""
    grids = base.family.grids(base)
    return [(path, size) for path in paths for size in sizes.for_photo(*photos.size(path), prepare, grids)]


def of_classes(base: Base, cfg: Config, every: Sequence[Sequence[Path]] | None = None) -> dict[Size, float]:
    """The sizes of class images and the share of each: those of the photos that are trained on.

    `every`: the photos of each subject, if they are known.
    """
    first, subjects = cfg.prepare, parts(cfg)["instance"]
    assert first
    if not first.class_buckets or (first.buckets is False and len(first.resolutions) == 1):
        return {Size.square(first.side): 1.0}
    found: dict[Size, float] = {}
    for number, part in enumerate(subjects):
        paths = every[number] if every else photos.of_subject(part.prepare)
        trained = split("instance", of_subject(base, first, paths), first, cfg.seed)["instance"]
        for _, size in trained:
            found[size] = found.get(size, 0.0) + part.weight / len(trained)
    return found


def left(prepare: Prepare, role: str, count: int) -> int:
    """How many of `count` images of a role are left to train on. Raises ConfigError if none are."""
    key = {"instance": "held_out", "class": "class_held_out"}[role]
    held_out = getattr(prepare, key)
    if held_out >= count:
        raise ConfigError(
            f"prepare.{key} is {held_out}, but there are only {count} {role} images, which leaves none to "
            "train on; hold out fewer"
        )
    return count - held_out


def split(role: str, images: Sequence[Sized], prepare: Prepare, seed: int) -> dict[str, list[Sized]]:
    """The images of a role, with held-out images under a role of their own.

    The choice depends on their content and `seed`: adding a photo changes it by one image at most. Class
    images of each size are left to train on.
    """
    contents = {hashing.sha256_of(path): size for path, size in images}  # copies of a photo stay together
    count = len(contents) - left(prepare, role, len(contents))
    if not count:
        return {role: list(images)}
    room = Counter(contents.values())
    chosen: set[str] = set()
    for content in sorted(contents, key=lambda content: content_key([seed, "held out", content])):
        spare = role == "instance" or room[contents[content]] > 1
        if spare and len(chosen) < count:
            room[contents[content]] -= 1
            chosen.add(content)
    if len(chosen) < count:
        raise ConfigError(
            f"prepare.class_held_out is {count}, which leaves none of the {len(contents)} class images to "
            f"train on at one of {len(room)} sizes; hold out {len(chosen)} or fewer"
        )
    return {
        role: [(path, size) for path, size in images if hashing.sha256_of(path) not in chosen],
        shards.HELD_OUT[role]: [(path, size) for path, size in images if hashing.sha256_of(path) in chosen],
    }
