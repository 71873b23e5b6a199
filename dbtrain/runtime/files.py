"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dbtrain.runtime.errors import ConfigError


def expand(text: str | Path) -> Path:
    """A path with `~` resolved. Raises ConfigError if that user has no home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"cannot resolve '{text}': {error}") from error


def cache() -> Path:
    """Folder of what can be made again, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbtrain"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the block's OSError this path: a failed write() does not say where it failed."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def append(path: Path, text: str) -> None:
    """Add text to a file, or raise OSError that names it."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def write(path: Path, data: bytes | str) -> None:
    """Write a file that is on the disk when this returns, or raise OSError that names it."""
    with naming(path), open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace a file by new content, in one step: a reader or a kill sees the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):  # not by the hidden part's name
            write(part, data)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_folder_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that `fill` writes into; it gets its name only when it is complete."""
    part, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fill(part)
        for file in part.rglob("*"):
            _sync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(path.parent)


def sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header sorted: the library writes metadata in a random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def sync_folder(path: Path) -> None:
    """Put a folder's names on the disk: a rename survives a power cut only after this."""
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
