"""Which files are photos, and their sizes, read from the headers. Needs neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image

from dbtrain.runtime.errors import ConfigError, reason

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # a file's suffix may differ from its format
LONGEST = 50  # limit of long side / short side
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def is_photo(path: Path) -> bool:
    """Whether a file is a photo, by its name. Hidden files are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn the errors that Pillow raises on a broken file into a ConfigError that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise many kinds
        raise ConfigError(f"cannot read photo {path}: {reason(error)}; replace or remove it") from error


def size(path: Path) -> tuple[int, int]:
    """(height, width) of an upright photo, px. Reads the header only."""
    with naming(path), Image.open(path, formats=FORMATS) as photo:
        width, height = photo.size
        sideways = photo.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    if max(height, width) > LONGEST * min(height, width):
        raise ConfigError(f"photo {path} is {width} x {height} px, too thin to crop; replace or remove it")
    return (width, height) if sideways else (height, width)
