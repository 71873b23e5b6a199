"""Photo files: their names, formats and headers. Needs neither torch nor numpy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin

from dbtrain.runtime.errors import ConfigError, reason

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif", ".avif", ".tif", ".tiff", ".gif",
    ".bmp", ".jp2",
)  # fmt: skip
MASKS = (".mask.png", "-masklabel.png")  # ends of the names of masks; the second is OneTrainer's
MASK_FOLDER = "masks"  # in a folder of photos: masks with the names of their photos
# A file's suffix may differ from its format. Formats that run other programs (EPS) are not read.
FORMATS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "GIF", "BMP", "JPEG2000")
LONGEST = 50  # limit of long side / short side
MOST_PIXELS = 1 << 28  # Pillow takes 4 bytes for each; phones write up to 200 megapixels
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
HEADER = 64  # bytes that say what a file is
OFF = re.compile(r"0+_")  # begins the name of a folder that kohya's scripts leave out: 0 times

# What a file is by its first bytes, and how to read it if Pillow alone does not.
BRANDS = {  # of ISO base media files, ISO/IEC 23008-12 and AV1 Image File Format
    b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"heim": "HEIC",
    b"heis": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC",
}  # fmt: skip
UNREADABLE = {
    "HEIC": "run: pip install 'dbtrain[heif]', or export it as JPEG",
    "AVIF": "run: pip install -U pillow (11.3 or newer reads it), or export it as JPEG",
    "JPEG XL": "export it as JPEG or PNG",
}

Image.MAX_IMAGE_PIXELS = MOST_PIXELS
# Editors keep their project in a PNG's text, which is not used here. Their total stays limited.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


@dataclass(frozen=True)
class Listing:
    """The content of a folder of photos, sorted by path."""

    photos: list[Path]
    others: list[Path]  # files that are neither
    masks: list[Path]  # of photos, by their names


def listing(folder: Path, below: bool = False) -> Listing:
    """List a folder, and with `below` those below it. Only regular files are photos: no pipes or devices.

    Raises ConfigError if a photo is a link whose target does not exist.
    """
    entries = sorted(entry for one in (folders(folder) if below else [folder]) for entry in one.iterdir())
    for entry in entries:
        if entry.is_symlink() and not entry.exists() and is_photo(entry):
            raise ConfigError(f"photo {entry} links to {entry.readlink()}, which does not exist")
    photos = [entry for entry in entries if is_photo(entry) and entry.is_file()]
    masks = [entry for entry in entries if is_mask(entry) and entry.is_file()]
    known = {*photos, *masks}
    others = [entry for entry in entries if entry not in known and not entry.is_dir()]
    return Listing(photos, others, masks)


def folders(root: Path) -> list[Path]:
    """A folder and those below it, sorted. Each is there once, also where links lead to it again.

    Hidden ones, those of masks, and those that are to be seen 0 times are left out.
    """
    above, found = root.resolve().parents, dict[Path, Path]()  # by where they really are
    todo, links = [root], list[Path]()
    while todo or links:
        folder = todo.pop() if todo else links.pop(0)
        if (real := folder.resolve()) in found or real in above:
            continue
        found[real] = folder
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not is_left_out(entry):
                (links if entry.is_symlink() else todo).append(entry)
    return sorted(found.values())


def is_left_out(folder: Path) -> bool:
    """Whether a folder below that of photos is none of theirs, by its name."""
    return folder.name.startswith(".") or folder.name == MASK_FOLDER or bool(OFF.match(folder.name))


def name_in(folder: Path, path: Path) -> str:
    """What a photo is called: its path relative to the folder of the photos."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def subfolders(folder: Path, below: bool = False) -> dict[Path, int]:
    """The folders in `folder` that have photos, and how many; with `below`, also in theirs."""
    counts = {entry: _count(entry, below) for entry in sorted(folder.iterdir()) if entry.name[0] != "."}
    return {entry: count for entry, count in counts.items() if count}


def no_photos(folder: Path) -> str:
    """What to tell the user about a folder without photos: other trainers have them in subfolders."""
    for inner, count in subfolders(folder).items():
        if is_left_out(inner):
            continue
        return (
            f"there are no photos in '{folder}', but {count} in its folder '{inner.name}'; use that, or set "
            "prepare.subfolders to true for all of its folders"
        )
    return f"there are no photos in '{folder}'; add some, e.g. as JPEG or PNG"


def _count(folder: Path, below: bool) -> int:
    """How many photos a folder has, with `below` also those in it; 0 if it is none, or cannot be listed."""
    with suppress(OSError):
        every = folders(folder) if below else [folder]
        return sum(is_photo(entry) and entry.is_file() for one in every for entry in one.iterdir())
    return 0


def is_photo(path: Path) -> bool:
    """Whether a file is a photo, by its name. Neither hidden files nor masks of photos are."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not is_mask(path)


def is_mask(path: Path) -> bool:
    """Whether a file is the mask of a photo, by its name."""
    return path.name.lower().endswith(MASKS)


def check_names(photos: Sequence[Path], beside: Callable[[Path], Path]) -> None:
    """Raise ConfigError if two photos have the same file `beside` them."""
    by_file: dict[Path, Path] = {}
    problems = [
        f"photos {first} and {photo.name} would both have {beside(photo)}; rename one of them"
        for photo in photos
        if (first := by_file.setdefault(beside(photo), photo)) != photo
    ]
    if problems:
        raise ConfigError(*problems)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a photo, of which only the header has been read.

    Errors that Pillow raises on a broken file, there or in the block, become a ConfigError that names it.
    """
    kind = ""
    try:
        kind = kind_of(path)
        with Image.open(path, formats=_formats(kind)) as photo:
            width, height = photo.size
            if width * height > MOST_PIXELS:
                raise ConfigError(_too_large(path))
            yield photo
    except (MemoryError, ConfigError):
        raise
    except Image.DecompressionBombError as error:
        raise ConfigError(_too_large(path)) from error
    except Exception as error:  # Pillow's plugins raise many kinds
        if kind in UNREADABLE and isinstance(error, Image.UnidentifiedImageError):
            raise ConfigError(f"photo {path} is a file of format {kind}; {UNREADABLE[kind]}") from error
        raise ConfigError(f"cannot read photo {path}: {reason(error)}; replace or remove it") from error


def _too_large(path: Path) -> str:
    return f"photo {path} has more than {MOST_PIXELS // 10**6} megapixels; make it smaller"


def _formats(kind: str) -> list[str]:
    """The formats that can be read here. HEIF is one of them if pillow-heif is installed."""
    if kind == "HEIC":
        with suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def kind_of(path: Path) -> str:
    """HEIC, AVIF or JPEG XL, whatever the file is called; "" for others."""
    with open(path, "rb") as file:
        return kind_in(file.read(HEADER))


def kind_in(header: bytes) -> str:
    """The same by a file's first HEADER bytes."""
    if header.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    if header[4:8] != b"ftyp":
        return ""
    brands = [header[8:12], *(header[at : at + 4] for at in range(16, min(header[3], HEADER), 4))]
    return next((kind for brand, kind in BRANDS.items() if brand in brands), "")


def size(path: Path) -> tuple[int, int]:
    """(height, width) of an upright photo, px. Reads the header only."""
    with opened(path) as photo:
        width, height = photo.size
        orientation = ExifTags.Base.Orientation
        # Pillow turns TIFFs by their own tag, though not by that of XMP, and says their upright size.
        turned = isinstance(photo, TiffImagePlugin.TiffImageFile) and orientation in photo.tag_v2
        sideways = not turned and photo.getexif().get(orientation) in SIDEWAYS
    if max(height, width) > LONGEST * min(height, width):
        raise ConfigError(f"photo {path} is {width} x {height} px, too thin to crop; replace or remove it")
    return (width, height) if sideways else (height, width)
