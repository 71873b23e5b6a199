"""Unpack pictures and captions into a folder of files: the original bytes, under names of our own.

The pictures may be anybody's: their names are never paths, their sizes are limited, and only the header of
each is read, to tell its format.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from dbtrain.data import photo_files
from dbtrain.data.captions import MOST_BYTES as CAPTION_BYTES
from dbtrain.data.captions import decoded
from dbtrain.runtime import console, files, preemption
from dbtrain.runtime.errors import ConfigError, printable, reason

PICTURE_BYTES = 1 << 28  # most of one picture; phones write up to 100 MB
PICTURES = 10**6  # most of a tar or table
STEM = 60  # letters that are kept of a name
UNSAFE = re.compile(r"[^\w-]+", re.ASCII)
DONE = ".done-{:05d}"  # marks a part of a source that is unpacked
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "GIF": ".gif",
            "BMP": ".bmp", "JPEG2000": ".jp2"}  # fmt: skip
KINDS = {"HEIC": ".heic", "AVIF": ".avif"}
TEXTS = ("caption", "text", "prompt")  # names of captions


@dataclass(frozen=True)
class Item:
    """A picture of a source."""

    name: str  # in the source, for people
    data: bytes
    caption: str | None
    mask: bytes | None = None  # a PNG file


def write(parts: Iterable[Iterable[Item]], folder: Path) -> int:
    """Write each part's pictures and captions; return how many pictures there are.

    A part that is there from a killed run is not read again. Raises ConfigError for what no source may have.
    """
    skipped: list[str] = []
    cut: list[str] = []
    for number, items in enumerate(parts):
        done = folder / DONE.format(number)
        if done.exists():
            continue
        for count, item in enumerate(items):
            preemption.check()
            if count >= PICTURES:
                raise ConfigError(f"prepare.photos: over {PICTURES} pictures in a tar or table; split it")
            suffix = _suffix(item.data)
            if not suffix:
                skipped.append(item.name)
                continue
            stem = UNSAFE.sub("_", PurePosixPath(item.name).name.partition(".")[0])[:STEM]
            path = folder / f"{number:05d}-{count:06d}-{stem}{suffix}"
            if item.caption and item.caption.strip():
                text = item.caption.encode(errors="replace")
                cut += [item.name] if len(text) > CAPTION_BYTES else []
                short = text[:CAPTION_BYTES].decode(errors="ignore")
                _save(path.with_suffix(".txt"), short.encode())
            if item.mask:
                _save(path.with_name(path.stem + photo_files.MASKS[0]), item.mask)
            _save(path, item.data)
        os.sync()  # once, rather than for each of many small files
        files.write_atomically(done, "")
    for names, problem in ((skipped, "skipped, as they are no pictures"), (cut, "captions cut to 8 KB")):
        if names:
            more = " ..." if len(names) > 5 else ""
            console.say(f"{len(names)} {problem}: {printable(', '.join(names[:5]))}{more}")
    for number in range(len(list(folder.glob(".done-*")))):
        (folder / DONE.format(number)).unlink()
    return sum(photo_files.is_photo(path) for path in folder.iterdir())


def _save(path: Path, data: bytes) -> None:
    with files.naming(path):
        path.write_bytes(data)


def of_tars(names: Sequence[str], options: Mapping[str, str]) -> Iterator[Iterator[Item]]:
    """The pictures of WebDataset tars: members with the same name up to the first dot are one sample."""
    return (_of_tar(name) for name in names)


def _of_tar(name: str) -> Iterator[Item]:
    try:
        with _opened(name) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            key = ""
            sample: dict[str, bytes] = {}
            for member in tar:
                if not (found := _checked(name, member)):
                    continue
                if found[0] != key:
                    yield from _items(key, sample)
                    key, sample = found[0], {}
                suffix = found[1]
                if suffix in (".txt", ".json", *photo_files.MASKS, *photo_files.SUFFIXES):
                    data = tar.extractfile(member)
                    assert data
                    sample[suffix] = data.read()
            yield from _items(key, sample)
    except (MemoryError, ConfigError):
        raise
    except Exception as error:  # what fsspec reads from raises many kinds
        raise ConfigError(f"prepare.photos: '{name}' cannot be read: {reason(error)}") from error


def _checked(name: str, member: tarfile.TarInfo) -> tuple[str, str] | None:
    """(key, suffix) of a member; None for a folder or a hidden file. Raises ConfigError if it is unsafe."""
    path, where = PurePosixPath(member.name), f"prepare.photos: '{name}' has the member"
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"{where} {member.name[:80]!r}, a path out of its folder; do not use this file")
    if member.isdir() or path.name.startswith("."):
        return None
    if not member.isreg() or member.issparse():
        raise ConfigError(f"{where} {member.name[:80]!r}, which is not a plain file; remove it")
    if member.size > PICTURE_BYTES:
        raise ConfigError(
            f"{where} {member.name[:80]!r} of {files.size_text(member.size)}; "
            f"a picture has at most {files.size_text(PICTURE_BYTES)}"
        )
    stem, dot, suffix = path.name.partition(".")
    return str(path.with_name(stem)), (dot + suffix).lower()


def _items(key: str, sample: Mapping[str, bytes]) -> Iterator[Item]:
    """The picture of a sample, with the caption and the mask beside it."""
    for suffix, data in sample.items():
        if suffix in photo_files.SUFFIXES:
            yield Item(key + suffix, data, _caption(key, sample), sample.get(photo_files.MASKS[0]))
            return


def _caption(key: str, sample: Mapping[str, bytes]) -> str | None:
    if text := sample.get(".txt"):
        return decoded(Path(f"{key}.txt"), text)
    about = files.json_object(sample[".json"], f"{key}.json") if ".json" in sample else {}
    return next((str(about[name]) for name in TEXTS if about.get(name)), None)


def _opened(name: str) -> AbstractContextManager[IO[Any]]:
    """A local file, or one of a URL as a stream."""
    if not files.scheme_of(name):
        return open(name, "rb")
    try:
        import fsspec

        return fsspec.open(files.with_variables(name), "rb")
    except ImportError as error:
        raise ConfigError(
            f"prepare.photos: cannot open '{name}': {reason(error)}; run: pip install 'dbtrain[remote]'"
        ) from error


def _suffix(data: bytes) -> str:
    """The suffix of a file with this content; "" if it is no picture."""
    if kind := KINDS.get(photo_files.kind_in(data[: photo_files.HEADER])):
        return kind
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return SUFFIXES.get(picture.format or "", "")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""


_FORMATS = tuple(name for name in photo_files.FORMATS if name in SUFFIXES)
