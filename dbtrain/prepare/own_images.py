"""The user's own class images."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dbtrain.config import Prepare
from dbtrain.data import photos, sizes
from dbtrain.data.photo_files import listing, subfolders
from dbtrain.data.sizes import Size, Sized
from dbtrain.data.sources import Source
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

ABOUT = "about.json"  # in a folder of generated images: what they depend on


def root(cfg: Prepare) -> Path:
    """The folder of the user's own class images; generated ones are in its subfolders."""
    if cfg.class_dir:
        return files.expand(cfg.class_dir)
    return files.cache() / "class-images"


def find_own(cfg: Prepare) -> list[Path]:
    """The user's own class images, at most `cfg.class_images`."""
    check_folder(cfg)
    if not cfg.class_dir or not root(cfg).exists():
        return []
    return photos.find(cfg.class_dir, "prepare.class_dir", ignore=(".txt",))[: cfg.class_images]


def check_folder(cfg: Prepare) -> None:
    """Raise ConfigError if `class_dir` is no folder, or that of the subject's photos."""
    if cfg.class_dir and (Source.of(cfg.class_dir) or files.scheme_of(cfg.class_dir)):
        raise ConfigError(
            f"prepare.class_dir is '{cfg.class_dir}', but class images are in a folder; unpack them, and "
            "set it to that"
        )
    if cfg.class_dir and root(cfg).resolve() == files.expand(cfg.photos).resolve():
        raise ConfigError(
            f"prepare.class_dir is '{cfg.class_dir}', the folder of prepare.photos: the subject's photos "
            "would be its class images; use another folder"
        )


def assigned(own: Sequence[Path], counts: Mapping[Size, int]) -> list[Sized]:
    """The user's own class images, each at the size that keeps most of it and is not yet full."""
    if len(counts) == 1:
        return [(path, size) for path in own for size in counts]
    room, found = dict(counts), []
    for path in own:
        size = sizes.best([size for size in room if room[size]], *photos.size(path))
        room[size] -= 1
        found.append((path, size))
    return found


def unused(cfg: Prepare) -> Iterator[str]:
    """Own class images that are probably meant, but not used: one problem with its cure for each folder."""
    folder = root(cfg)
    if not cfg.class_dir:
        return
    if not folder.exists():
        near = difflib.get_close_matches(folder.name, _with_photos(folder.parent), n=1, cutoff=0.8)
        if near:
            yield (
                f"prepare.class_dir '{cfg.class_dir}' does not exist, but '{near[0]}' beside it has photos, "
                "which are not used; correct the name"
            )
        return
    for inner, count in subfolders(folder).items():
        if not (inner / ABOUT).exists():  # not generated
            yield (
                f"prepare.class_dir: the {count} images in its folder '{inner.name}' are not used; move them "
                f"up to '{cfg.class_dir}', or use that folder"
            )
    if (count := len(listing(folder).photos)) > cfg.class_images:
        yield (
            f"prepare.class_dir has {count} images, but only the first {cfg.class_images} by name are used; "
            f"set prepare.class_images={count} to use all"
        )


def _with_photos(folder: Path) -> list[str]:
    """Names of the folders below `folder` that have photos."""
    return [inner.name for inner in subfolders(folder)] if folder.is_dir() else []
