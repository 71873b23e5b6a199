"""Masks: which part of a photo is the subject. They are files beside the photos, or the photos' own alpha.

White is the subject. A mask has the photo's shape, and is cropped and turned as the photo is.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dbtrain.data.color import alpha, to_gray
from dbtrain.data.photo_files import MASK_FOLDER as FOLDER
from dbtrain.data.photo_files import MASKS, opened, size
from dbtrain.data.sizes import Size
from dbtrain.runtime import hashing
from dbtrain.runtime.errors import ConfigError

SHAPE = 0.02  # tolerated difference of two aspect ratios


def file_of(photo: Path) -> Path | None:
    """The file with the mask of a photo; None if there is none."""
    paths = [photo.with_name(photo.stem + end) for end in MASKS]
    paths.append(made_file(photo))
    return next((path for path in paths if path.is_file()), None)


def made_file(photo: Path) -> Path:
    """Where a mask is that was made for a photo."""
    return photo.parent / FOLDER / f"{photo.stem}.png"


def is_there(photo: Path) -> bool:
    """Whether a photo has a mask, or is transparent in parts."""
    if file_of(photo):
        return True
    with opened(photo) as picture:
        if not picture.has_transparency_data:  # by its header
            return False
        picture.load()
        return alpha(picture) is not None


def key_of(photo: Path) -> str:
    """What the mask of a photo depends on besides the photo: the content of its file, if it has one."""
    path = file_of(photo)
    return hashing.sha256_of(path)[:16] if path else "alpha"


def load(photo: Path) -> Image.Image:
    """The mask of a photo, 8-bit gray and upright, of the photo's size.

    Raises ConfigError if there is none, or if it is of another shape.
    """
    path, (tall, wide) = file_of(photo), size(photo)
    with opened(path or photo) as picture:
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        if not (mask := to_gray(picture) if path else alpha(picture)):
            raise ConfigError(
                f"prepare.mask is true, but photo {photo} has neither a mask {photo.stem}{MASKS[0]} beside "
                "it nor transparent parts; add a mask"
            )
    if not math.isclose(mask.width * tall, mask.height * wide, rel_tol=SHAPE):
        raise ConfigError(
            f"mask {path} is {mask.width} x {mask.height} px, of another shape than its photo of {wide} x "
            f"{tall} px; draw it on the photo"
        )
    return mask if mask.size == (wide, tall) else mask.resize((wide, tall), Image.Resampling.BILINEAR)


def reduced(mask: Image.Image, cells: Size) -> Tensor:
    """A cropped mask at the size of latents, (1, h, w) uint8: the share of each cell that is subject."""
    small = mask.resize((cells.width, cells.height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small))[None]
