"""Which files are photos, and how large they are: read from their headers, without torch or numpy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image

from dbtrain.runtime.errors import ConfigError, reason

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # whatever the name says
LONGEST = 50  # most that the long side may be of the short one
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def is_photo(path: Path) -> bool:
    """Whether a file's name is that of a photo. Hidden files are not photos."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever a broken picture makes Pillow raise into one line that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise a dozen kinds on broken files
        raise ConfigError(f"cannot read photo {path}: {reason(error)}; replace or remove it") from error


def size(path: Path) -> tuple[int, int]:
    """(height, width) of a photo as it is seen, px; reads its header only."""
    with naming(path), Image.open(path, formats=FORMATS) as photo:
        width, height = photo.size
        sideways = photo.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    if max(height, width) > LONGEST * min(height, width):
        raise ConfigError(f"photo {path} is {width} x {height} px, too thin to crop; replace or remove it")
    return (width, height) if sideways else (height, width)
