"""The user's own files that shards are made from, and what changed of them since."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dbtrain.config import Config
from dbtrain.data import emphasis, masks, shards, sources
from dbtrain.data.emphasis import Emphasis
from dbtrain.data.photo_files import listing, name_in
from dbtrain.data.shards import Manifest
from dbtrain.prepare import own_images, prompts
from dbtrain.prepare.subjects import Part, parts
from dbtrain.runtime import hashing
from dbtrain.runtime.errors import ConfigError, printable

CHANGES = 4  # most changed files to name


def files_of(cfg: Config) -> dict[str, dict[str, shards.Original]]:
    """The user's own photos and class images, by role and name, where their folders can be reached.

    Those of a second subject are under `instance 2`, and so on.
    """
    found = {}
    for role, several in parts(cfg).items():
        for number, part in enumerate(several, 1):
            prepare = part.prepare
            if role == "class" and (len(several) > 1 or not prepare.class_dir):
                continue
            folder = own_images.root(prepare) if role == "class" else sources.folder_of(prepare.photos)
            if folder.is_dir():
                mine = role == "instance"
                paths = listing(folder, mine and prepare.subfolders).photos
                names = {
                    path: name_in(folder, path) for path in paths[: None if mine else prepare.class_images]
                }
                found[role if number == 1 else f"{role} {number}"] = {
                    printable(name): _original(path, name, role, part) for path, name in names.items()
                }
    return found


def _original(path: Path, name: str, role: str, part: Part) -> shards.Original:
    text, mask, how = None, None, Emphasis()
    if role == "instance":
        how = emphasis.of_photo(name, part.prepare)
        text = "\n".join(prompts.templates(path, part.prepare, part.words)) if part.prepare.captions else None
        mask = masks.key_of(path) if part.prepare.mask else None
    return shards.Original(sha256=hashing.sha256_of(path), caption=text, mask=mask, **how._asdict())


def check(cfg: Config, manifest: Manifest) -> None:
    """Raise ConfigError if the photos, captions or own class images changed since the shards were made.

    Folders that cannot be reached are not checked: training needs the shards only.
    """
    for part in parts(cfg)["instance"]:
        source = sources.Source.of(part.prepare.photos)
        if source and source.has_changed():
            raise ConfigError(
                f"{source.text} changed since {cfg.data.shards} was made from it; {shards.CURE}"
            )
    now = files_of(cfg) if manifest.sources else {}
    for role, made in manifest.sources.items():
        if changes := list(_changes(made, now.get(role, made))):
            more = f" and {len(changes) - CHANGES} more" if len(changes) > CHANGES else ""
            raise ConfigError(
                f"the {role} images changed since {cfg.data.shards} was made from them: "
                f"{', '.join(changes[:CHANGES])}{more}; {shards.CURE}"
            )


def _changes(made: dict[str, shards.Original], now: dict[str, shards.Original]) -> Iterator[str]:
    """What happened to each file."""
    for name in sorted(made.keys() | now.keys()):
        old, new = made.get(name), now.get(name)
        if old is None or new is None:
            yield f"{name} was {'added' if old is None else 'removed'}"
        elif old.sha256 != new.sha256:
            yield f"{name} was replaced"
        elif old.caption != new.caption:
            yield f"the caption of {name} was edited"
        elif old.mask != new.mask:
            yield f"the mask of {name} was edited"
        elif (old.repeats, old.weight) != (new.repeats, new.weight):
            yield f"{name} is seen more or less often, or counts more or less"
