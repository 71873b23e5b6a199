"""Files that are either complete or absent."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dbtrain.runtime.errors import ConfigError, reason

TEXT_BYTES = 64 * 2**20  # most that is read of a JSON file; the largest vocabularies have a quarter of it
FILE_BYTES = 4 * 2**30  # most that is read into memory of one file of weights or latents

REMOTE = ("http", "https", "s3", "gs", "az", "hf")  # schemes that fsspec reads
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expand(text: str | Path) -> Path:
    """A path with `~` and environment variables resolved.

    Raises ConfigError if that user has no home folder, or if a variable is not set.
    """
    try:
        return Path(with_variables(str(text))).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"cannot resolve '{text}': {error}") from error


def with_variables(text: str) -> str:
    """Text with `$NAME` and `${NAME}` replaced. Raises ConfigError if a variable is not set."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(f"cannot resolve '{text}': the environment variable {name} is not set")
        return os.environ[name]

    return VARIABLE.sub(value, text)


def scheme_of(location: str) -> str:
    """The scheme of a URL or command; empty for a path."""
    scheme = location.partition(":")[0]
    return scheme if scheme in (*REMOTE, "file", "pipe") else ""


def folder_of(location: str) -> Path | None:
    """The folder on this machine that a path, or `file:` and a path, names; None for a URL or command."""
    scheme = scheme_of(location)
    if scheme == "file":
        return expand(unquote(urlsplit(location).path))
    return None if scheme else expand(location)


def weighted(text: str) -> tuple[str, float]:
    """A path, and the number after its last colon; 1 if there is none.

    Raises ValueError for one that is no finite number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or "/" in number or Path(text).exists():  # the colon belongs to the path
        return text, 1.0
    if not math.isfinite(weight := float(number)):
        raise ValueError(f"{number} is not finite")
    return path, weight


def cache() -> Path:
    """Our folder in the user's cache. Everything in it can be deleted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbtrain"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which may be anybody's.

    Raises ConfigError if it is not a regular file, too large, nested too deeply, or not an object.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing, or is not a regular file")
    if (size := path.stat().st_size) > TEXT_BYTES:
        raise ConfigError(f"{path} has {size_text(size)}; a JSON file has at most {size_text(TEXT_BYTES)}")
    return json_object(path.read_bytes(), str(path))


def json_object(text: str | bytes, name: str) -> dict[str, Any]:
    """The object in JSON text called `name`. Raises ConfigError if there is none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise ConfigError(f"cannot read {name}: {reason(error).partition(';')[0]}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} is not a JSON object")
    return values


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Set the path of an OSError that the block raises: a failed write() does not name its file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def append(path: Path, text: str) -> None:
    """Append text to a file. Raises an OSError that names the file."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def write(path: Path, data: bytes | str) -> None:
    """Write a file and flush it to the disk. Raises an OSError that names the file."""
    with naming(path), open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace a file in one step: a reader, or a rerun after a kill, finds the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):  # rather than the hidden temporary file
            write(part, data)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def remove_parts(folder: Path) -> None:
    """Remove what `write_atomically` left in a folder where it was killed. Nobody else may write there."""
    for part in folder.rglob(".*.[0-9]*.tmp"):
        part.unlink(missing_ok=True)


def write_folder_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Create or replace a folder that `fill` writes into. It gets its name once it is complete."""
    part, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fill(part)
        for file in part.rglob("*"):
            sync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    sync(path.parent)


def sorted_header(data: bytes, more: Mapping[str, str] | None = None) -> bytes:
    """The safetensors file with a sorted header: the library writes metadata in random order.

    `more`: further entries of its metadata.
    """
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    if more:
        entries["__metadata__"] = {**entries.get("__metadata__", {}), **more}
    header = json.dumps(entries, sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def sync(path: Path) -> None:
    """Flush a file or folder to the disk. A rename survives a power cut only once its folder is flushed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def slug(text: str) -> str:
    """A text as part of a file's name: at most 40 lowercase letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def size_text(count: float) -> str:
    """A number of bytes with its unit, e.g. 2.13 GB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
