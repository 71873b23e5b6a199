"""Captions: the text file beside each photo. Its text becomes a prompt, and prompts are published."""

from __future__ import annotations

import codecs
import os
import stat
import unicodedata
from pathlib import Path

from dbtrain.runtime.errors import ConfigError

MOST_BYTES = 8192  # of a caption; text encoders read some 77 tokens
SUFFIXES = (".txt", ".TXT")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Names that other programs give to a caption.
ELSEWHERE = ("{stem}.caption", "{stem}.cap", "{stem}.text", "{name}.txt", "{name}.caption", "{stem}.json")


def file_of(photo: Path) -> Path:
    """Where the caption of a photo is: `dog.txt`, or an existing `dog.TXT`, for `dog.jpg`."""
    paths = [photo.with_suffix(suffix) for suffix in SUFFIXES]
    return next((path for path in paths if os.path.lexists(path)), paths[0])


def caption(photo: Path) -> str:
    """The caption of a photo in one line, without control characters.

    Raises ConfigError if there is none, or if it is not a small text file in the photo's folder.
    """
    path = file_of(photo)
    if not os.path.lexists(path):
        raise ConfigError(_missing(photo, path))
    text = _decoded(path, _read(path))
    plain = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
    if not plain.split():
        raise ConfigError(f"caption {path} is empty; write one")
    return " ".join(plain.split())


def _missing(photo: Path, path: Path) -> str:
    names = [pattern.format(stem=photo.stem, name=photo.name) for pattern in ELSEWHERE]
    found = [name for name in names if (photo.parent / name).is_file()]
    what = f"prepare.captions is true, but photo {photo} has no caption {path.name}"
    if not found:
        return f"{what}; add it"
    return f"{what}, only {found[0]}; make it a text file of that name"


def _read(path: Path) -> bytes:
    """The bytes of a caption. Neither follows links out of its folder nor opens pipes and devices."""
    try:
        if not path.resolve().is_relative_to(path.parent.resolve()):
            raise ConfigError(f"caption {path} links to a file outside its folder; copy the text into it")
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise ConfigError(f"caption {path} is not a regular file; write a text file instead")
        if about.st_size > MOST_BYTES:
            raise ConfigError(
                f"caption {path} has {about.st_size} bytes; shorten it to {MOST_BYTES} or fewer"
            )
        with open(path, "rb") as file:
            return file.read(MOST_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        why = error.strerror if isinstance(error, OSError) else "its links form a circle"
        raise ConfigError(f"caption {path} cannot be read: {why}; replace it") from error


def _decoded(path: Path, data: bytes) -> str:
    """UTF-8, or UTF-16 with its mark. Other encodings are not guessed: a caption would be misspelled."""
    try:
        text = data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        guess = " ".join(data.decode("cp1252", "replace").split())[:40]
        raise ConfigError(
            f"caption {path} is not UTF-8 (in Windows-1252 it reads '{guess}'); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ConfigError(f"caption {path} has NUL characters, as no text in UTF-8 has; save it as UTF-8")
    return text
