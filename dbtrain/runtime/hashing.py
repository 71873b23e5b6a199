"""Hashes: names made from content, the root of all randomness, and checksums of files.

`sha256_of` reads a file once in a process. `cached_sha256_of` is for a base model's gigabytes: it takes
the hash from the Hub's cache, or from an earlier run as long as the file is in the same state. That state
is its real path, inode, size and both its times; the time of the inode's change is the kernel's own, which
no program can set back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from functools import lru_cache
from pathlib import Path

from dbtrain.runtime import files

# A file that changes twice within a tick of its file system's clock keeps its times: a hash is kept
# only if the file was at rest for this long, which also covers a server whose clock is behind.
REST_S = 10.0
SMALL = 1 << 20  # bytes; reading so few is faster than looking up a hash


def digest(*parts: str | int) -> bytes:
    """16 bytes that depend on `parts` alone: the root of all randomness here."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def shuffled(count: int, *key: str | int) -> list[int]:
    """A permutation of range(count) that depends on `count` and `key` alone.

    Sorted by digest, not `random.shuffle`, whose order no Python version promises to keep.
    """
    return sorted(range(count), key=lambda i: digest(*key, i))


def content_key(value: object) -> str:
    """sha256 of a JSON-able value, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex; read once while its size and times of change stay the same."""
    seen = path.stat()
    return _sha256(path, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, mtime_ns: int, ctime_ns: int) -> str:
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()


def cached_sha256_of(path: Path) -> str:
    """sha256 of a large file's bytes, in hex: from the Hub's cache or an earlier run where it is known."""
    real = path.resolve()
    if name := _hub_blob(real):
        return name
    seen = real.stat()
    if seen.st_size < SMALL:
        return sha256_of(real)
    kept, state = _place(real), _state(real, seen)
    if known := _kept(kept, state):
        return known
    sha256 = sha256_of(real)
    at_rest = time.time() - max(seen.st_mtime, seen.st_ctime) > REST_S
    if kept and at_rest and _state(real, real.stat()) == state:
        entry = {"file": state, "sha256": sha256}
        with contextlib.suppress(OSError):  # nothing can be written there: it is hashed again next time
            files.write_atomically(kept, json.dumps(entry | {"check": content_key(entry)}) + "\n")
    return sha256


def _hub_blob(real: Path) -> str | None:
    """The name of a blob in the Hub's cache, which is the sha256 of every large file (others: 40 digits)."""
    in_cache = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    return real.name if in_cache and re.fullmatch(r"[0-9a-f]{64}", real.name) else None


def _state(real: Path, seen: os.stat_result) -> list[str | int]:
    """What differs between two states of a file."""
    return [str(real), seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns]


def _place(real: Path) -> Path | None:
    """Where a file's hash is kept; nowhere for a user without a home folder."""
    try:
        return files.cache() / "sha256" / f"{content_key(str(real))[:32]}.json"
    except RuntimeError:
        return None


def _kept(place: Path | None, state: list[str | int]) -> str | None:
    """The hash kept for a file in this very state; None if there is none, or it is damaged."""
    try:
        entry = json.loads(place.read_bytes()) if place else {}
        check = entry.pop("check", None)
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    fits = check == content_key(entry) and entry.get("file") == state
    return entry["sha256"] if fits else None
