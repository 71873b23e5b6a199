"""Colors: any picture that Pillow reads, as 8-bit sRGB over white.

The profile of a photo says what its numbers mean: read as sRGB, a photo in Display P3 loses some
15% of its chroma, one in ProPhoto RGB 29%.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

from dbtrain.data.profiles import profile_of
from dbtrain.runtime.errors import reason

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # color space of a profile: Pillow's mode
GRAYS = ("1", "L", "LA")  # modes without color and with 8 bits or fewer
KEPT = ("RGB", "CMYK", "LAB")  # modes that keep their channels until they are converted to sRGB
FLOAT_WHITES, INTEGER_WHITES = (1.0, 255.0, 65535.0), (65535.0, 2.0**31 - 1)
STRIP = 256  # rows


def to_srgb(photo: Image.Image, tell: Callable[[str], object]) -> Image.Image:
    """A loaded picture of any mode and depth as 8-bit sRGB, transparency over white.

    Its profile is applied with relative colorimetric intent. If that cannot be, `tell` is called
    with the reason, and the numbers count as sRGB.
    """
    profile = profile_of(photo, tell)
    transparency = alpha(photo)
    if _is_deep(photo) or photo.mode in GRAYS:
        colors = _shades(photo, profile, tell)
    else:
        opaque = photo if photo.mode in KEPT else photo.convert("RGBA").convert("RGB")
        colors = _managed(opaque, profile, tell)
    if transparency is None:
        return colors
    colors.putalpha(transparency)
    return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), colors).convert("RGB")


def _is_deep(photo: Image.Image) -> bool:
    """Whether a gray picture has more than 8 bits: integers of 16 or 32 bits, or floats."""
    return photo.mode == "F" or photo.mode.startswith("I")


def alpha(photo: Image.Image) -> Image.Image | None:
    """The opacity of a loaded picture, 0 to 255; None if it is opaque, also if it could be otherwise."""
    if not photo.has_transparency_data:
        return None
    hole = photo.info.get("transparency")
    if _is_deep(photo):
        found = Image.fromarray(np.where(np.asarray(photo) == hole, 0, 255).astype(np.uint8))
    else:
        if isinstance(hole, tuple) and max(hole) > 255:  # of a 16-bit picture, which Pillow reads as 8-bit
            photo.info["transparency"] = tuple(value >> 8 for value in hole)
        found = photo.convert("RGBA").getchannel("A")
    return found if found.getextrema() != (255, 255) else None


def to_gray(picture: Image.Image) -> Image.Image:
    """A loaded picture of any mode and depth as 8-bit gray, by its numbers alone."""
    return _shades(picture, b"", str).getchannel(0) if _is_deep(picture) else picture.convert("L")


def _managed(colors: Image.Image, profile: bytes, tell: Callable[[str], object]) -> Image.Image:
    """RGB, L, CMYK or LAB as sRGB."""
    if profile:
        try:
            return _converted(colors, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            tell(f"its color profile cannot be used ({reason(error)}), so its colors are read as sRGB")
    if colors.mode == "LAB":
        return _converted(colors, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    return colors.convert("RGB")


def _converted(colors: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """The colors as sRGB. Raises ValueError if the profile is for another color space."""
    space = profile.profile.xcolor_space.strip()
    mode = MODES.get(space)
    # LittleCMS's shortcut for gray is 7 levels too dark at the bottom of a linear profile.
    exact = ImageCms.Flags.NOOPTIMIZE if colors.mode == "L" else ImageCms.Flags.NONE
    if mode == "RGB" and colors.mode == "L":  # a gray photo often keeps its camera's profile
        colors = colors.convert("RGB")
    if mode != colors.mode:
        raise ValueError(f"it is for {space}, the photo is {colors.mode}")
    converted = ImageCms.profileToProfile(
        colors, profile, ImageCms.createProfile("sRGB"), outputMode="RGB", flags=exact,
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )  # fmt: skip
    assert converted is not None
    return converted


def _shades(photo: Image.Image, profile: bytes, tell: Callable[[str], object]) -> Image.Image:
    """A gray picture of any depth as sRGB.

    Its 256 shades are converted, and the values between them interpolated, so that a linear profile keeps
    the dark ones apart.
    """
    values = np.asarray(photo if _is_deep(photo) else photo.convert("L"))  # (H, W)
    shades = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    table = np.asarray(_managed(shades, profile, tell))[0]  # (256, 3)
    if photo.mode.startswith("I;16") and _black_is_one(photo):
        values = 65535 - values
    scale = 255 / _white(photo.mode, values) if _is_deep(photo) else 1.0
    colors = np.empty((*values.shape, 3), np.uint8)
    for top in range(0, len(values), STRIP):  # in strips, to save memory
        levels = np.nan_to_num(values[top : top + STRIP].astype(np.float64)) * scale
        for channel in range(3):
            shown = np.interp(levels, np.arange(256), table[:, channel])
            colors[top : top + STRIP, :, channel] = shown.round()
    return Image.fromarray(colors)


def _black_is_one(photo: Image.Image) -> bool:
    """Whether the highest value of a TIFF is black, which Pillow heeds up to 8 bits only."""
    return getattr(photo, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _white(mode: str, values: NDArray[Any]) -> float:
    """The value of white. Floats usually end at 1, integers at 65535, but a file does not say so."""
    whites = FLOAT_WHITES if mode == "F" else INTEGER_WHITES
    middle = float(np.nan_to_num(np.median(values)))
    return next((white for white in whites if middle <= white), whites[-1])
