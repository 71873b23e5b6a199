"""Photos from cameras and phones: finding, checking, rotating, resizing and cropping them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dbtrain.config import Prepare
from dbtrain.data import sizes
from dbtrain.data.augment import UNCHANGED, Change
from dbtrain.data.color import to_srgb
from dbtrain.data.photo_files import MOST_PIXELS as MOST_PIXELS
from dbtrain.data.photo_files import listing, name_in, no_photos, opened
from dbtrain.data.photo_files import size as size
from dbtrain.data.sizes import Size
from dbtrain.data.sources import Source, folder_of
from dbtrain.runtime import files, rng
from dbtrain.runtime.console import say, warn
from dbtrain.runtime.errors import ConfigError


@dataclass(frozen=True)
class Crop:
    """A crop, px, of a photo that was resized to cover the crop's size.

    A crop that is turned is so about its center; `top` and `left` are where it is before.
    """

    top: int
    left: int
    flip: bool
    change: Change = UNCHANGED

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Crop:
        """The crop in the description of a row."""
        top, left = meta["crop"]
        return cls(top, left, meta["flip"], Change(**meta.get("augment", {})))

    def key(self) -> dict[str, Any]:
        """What the content of a row depends on; without changes, what it was before there were any."""
        change = self.change.about()
        plain = {"top": self.top, "left": self.left, "flip": self.flip}
        return plain | ({"augment": change} if change else {})


def find(folder: str, key: str, ignore: tuple[str, ...] = (), below: bool = False) -> list[Path]:
    """The photos in `folder`, the value of setting `key`, and with `below` of folders in it, sorted by path.

    Skips all other files, with a message unless their suffix is in `ignore`.
    Raises ConfigError if the folder does not exist, or if a photo is a dangling link.
    """
    source = Source.of(folder)
    if source and below:
        raise ConfigError(f"prepare.subfolders is true, but {key} is '{folder}', no folder; set it to false")
    root = source.folder() if source else files.expand(folder)
    if source and not root.is_dir():
        raise ConfigError(f"{key}: '{folder}' has not been unpacked as it is now; run: dbtrain prepare")
    if not root.is_dir():
        raise ConfigError(f"{key}: '{folder}' is not a directory")
    found = listing(root, below)
    ignore = (*ignore, ".txt") if source else ignore
    skipped = [name_in(root, entry) for entry in found.others if entry.suffix.lower() not in ignore]
    if skipped:
        say(f"{folder}: skipped {len(skipped)} files that are not photos: {', '.join(skipped[:5])}"
            + (" ..." if len(skipped) > 5 else ""))  # fmt: skip
    return found.photos


def there(cfg: Prepare, ignore: tuple[str, ...] = ()) -> list[Path]:
    """The photos of the subject, as `find` has them; [] if there are none."""
    return find(cfg.photos, "prepare.photos", ignore, cfg.subfolders)


def named(cfg: Prepare, paths: Iterable[Path]) -> dict[Path, str]:
    """What these photos of the subject are called in messages and patterns."""
    folder = folder_of(cfg.photos)
    return {path: name_in(folder, path) for path in paths}


def of_subject(cfg: Prepare) -> list[Path]:
    """The photos of the subject. Raises ConfigError if there are none."""
    photos = there(cfg, (".txt", ".json") if cfg.captions else ())
    if not photos:
        raise ConfigError(f"prepare.photos: {no_photos(folder_of(cfg.photos))}")
    return photos


def load(path: Path, tell: Callable[[str], object] = warn) -> Image.Image:
    """A photo as upright 8-bit sRGB: EXIF rotation and color profile applied, transparency over white.

    `tell` gets a line about a profile that cannot be used.
    """
    with opened(path) as photo:
        photo.load()
        ImageOps.exif_transpose(photo, in_place=True)
        return to_srgb(photo, lambda problem: tell(f"photo {path}: {problem}"))


def resized(height: int, width: int, size: Size, change: Change = UNCHANGED) -> tuple[int, int]:
    """(height, width) after a photo is resized to cover `size`, with the same aspect ratio.

    It is larger if the crop is turned, which then shows no border.
    """
    size = change.around(size)
    scale = sizes.scale(height, width, size)
    return max(size.height, round(height * scale)), max(size.width, round(width * scale))


def crops(photo_key: str, height: int, width: int, size: Size, cfg: Prepare, seed: int) -> list[Crop]:
    """The crops of `size` to store of one photo: its variants, with `flip` each mirrored too.

    They depend on the photo's content and `seed`, not on the other photos. Where a photo barely exceeds
    `size`, random crops repeat.
    """
    variants = []
    for variant in range(cfg.variants):
        change = Change.draw(cfg.augment, seed, photo_key, variant)
        tall, wide = resized(height, width, size, change)
        around = change.around(size)
        down, right = tall - around.height, wide - around.width
        top, left = round(down / 2), round(right / 2)
        if cfg.crop == "random":
            u = torch.rand(2, generator=rng.generator(seed, "crop", photo_key, variant)).tolist()
            top, left = int(u[0] * (down + 1)), int(u[1] * (right + 1))
        variants.append(
            (top + (around.height - size.height) // 2, left + (around.width - size.width) // 2, change)
        )
    flips = (False, True) if cfg.flip else (False,)
    return [Crop(top, left, flip, change) for top, left, change in variants for flip in flips]


def pixels(photo: Image.Image, crop: Crop, size: Size) -> Tensor:
    """One crop as input for the VAE, (3, height, width) in [-1, 1]."""
    values = torch.from_numpy(np.array(cropped(photo, crop, size)))  # (height, width, 3) uint8
    return values.permute(2, 0, 1).float() / 127.5 - 1.0


def cropped(photo: Image.Image, crop: Crop, size: Size) -> Image.Image:
    """One crop, of `size`, of a photo or of its mask."""
    tall, wide = resized(photo.height, photo.width, size, crop.change)
    small = photo.resize((wide, tall), Image.Resampling.LANCZOS)
    around = crop.change.around(size)
    top = crop.top - (around.height - size.height) // 2
    left = crop.left - (around.width - size.width) // 2
    part = crop.change.applied(small.crop((left, top, left + around.width, top + around.height)), size)
    return ImageOps.mirror(part) if crop.flip else part
