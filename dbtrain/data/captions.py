"""Captions: the file beside each photo. Its texts become prompts, and prompts are published."""

from __future__ import annotations

import codecs
import json
import os
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from dbtrain.runtime.errors import ConfigError, reason

MOST_BYTES = 8192  # of a caption; text encoders read some 77 tokens
SUFFIXES = (".txt", ".TXT", ".json")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Names that other programs give to a caption.
ELSEWHERE = ("{stem}.caption", "{stem}.cap", "{stem}.text", "{name}.txt", "{name}.caption")


def file_of(photo: Path) -> Path:
    """Where the captions of a photo are: `dog.txt`, or an existing `dog.TXT` or `dog.json`, for `dog.jpg`."""
    paths = [photo.with_suffix(suffix) for suffix in SUFFIXES]
    return next((path for path in paths if os.path.lexists(path)), paths[0])


def is_there(photo: Path) -> bool:
    """Whether a photo has a file for its captions."""
    return os.path.lexists(file_of(photo))


def without(photos: Sequence[Path]) -> list[Path]:
    """The photos without a caption. Raises ConfigError for one that has another program's."""
    found = [photo for photo in photos if not is_there(photo)]
    if problems := [_missing(photo, file_of(photo)) for photo in found if _elsewhere(photo)]:
        raise ConfigError(*problems)
    return found


def captions(photo: Path, lines: bool) -> tuple[str, ...]:
    """The captions of a photo, without control characters: one, or with `lines` one or more.

    Raises ConfigError if there is none, or if they are not in a small text or JSON file in the photo's
    folder.
    """
    path = file_of(photo)
    if not is_there(photo):
        raise ConfigError(_missing(photo, path))
    text = decoded(path, _read(path))
    texts = text.splitlines() if lines else [text]
    if path.suffix == ".json":
        texts = _in_json(path, text)
    found = tuple(dict.fromkeys(filter(None, map(in_one_line, texts))))
    if not found:
        raise ConfigError(f"caption {path} is empty; write one")
    if len(found) > 1 and not lines:
        raise ConfigError(f"caption {path} has {len(found)} captions; set prepare.captions to lines")
    return found


def in_one_line(text: str) -> str:
    """A text without line breaks, control characters and spaces in a row."""
    plain = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
    return " ".join(plain.split())


def _in_json(path: Path, text: str) -> list[str]:
    """The texts of a JSON list, which may be called `captions` in an object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"caption {path} is not JSON: {reason(error)}; correct it") from error
    if isinstance(value, dict):
        value = value.get("captions")
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f'caption {path} is no list of texts; write ["a caption", "another"]')
    return value


def _missing(photo: Path, path: Path) -> str:
    found = _elsewhere(photo)
    what = f"prepare.captions is set, but photo {photo} has no caption {path.name}"
    if not found:
        return f"{what}; add it"
    return f"{what}, only {found[0]}; make it a text file of that name"


def _elsewhere(photo: Path) -> list[str]:
    """The names of files in which another program has a photo's caption."""
    names = [pattern.format(stem=photo.stem, name=photo.name) for pattern in ELSEWHERE]
    return [name for name in names if (photo.parent / name).is_file()]


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


def decoded(path: Path, data: bytes) -> str:
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
