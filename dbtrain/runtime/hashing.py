"""Hashes: keys made from content, the root of all random numbers, and checksums of files.

`sha256_of` reads a file once per process. `cached_sha256_of` is for large files such as a base model's
weights: it takes the hash from the Hub's cache, or from an earlier run while the file's real path, inode,
size, mtime and ctime are the same. The kernel sets the ctime; no program can set it back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from functools import lru_cache
from pathlib import Path

from dbtrain.runtime import files

logger = logging.getLogger("dbtrain")  # not `console`, which needs torch

# A file that changes twice within one tick of its file system's clock keeps its times. So a hash is cached
# only if the file has not changed for this long, which also allows for a file server whose clock is slow.
REST_S = 10.0
SMALL = 1 << 20  # bytes; hashing a smaller file is faster than looking up its hash
LARGE = 1 << 28  # bytes; hashing a larger file can take long enough to say so


def digest(*parts: str | int) -> bytes:
    """16 bytes that depend on `parts` alone. All random numbers derive from this."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def shuffled(count: int, *key: str | int) -> list[int]:
    """A permutation of range(count) that depends on `count` and `key` alone.

    Sorts by digest. The order of `random.shuffle` could change between Python versions.
    """
    return sorted(range(count), key=lambda i: digest(*key, i))


def content_key(value: object) -> str:
    """sha256 of a JSON-serializable value, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex. Reads it once per process while its size, mtime and ctime stay the same."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, mtime_ns: int, ctime_ns: int) -> str:
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()


def cached_sha256_of(file: Path) -> str:
    """sha256 of a large file, in hex, from the Hub's cache or an earlier run if known."""
    real = file.resolve()
    if name := _hub_blob(real):
        return name
    stat = real.stat()
    if stat.st_size < SMALL:
        return sha256_of(real)
    path, state = _entry_path(real), _state(real, stat)
    if known := _cached(path, state):
        return known
    if stat.st_size > LARGE:
        logger.info("reading %s (%s) for its checksum", file, files.size_text(stat.st_size))
    sha256 = sha256_of(real)
    at_rest = time.time() - max(stat.st_mtime, stat.st_ctime) > REST_S
    if path and at_rest and _state(real, real.stat()) == state:
        entry = {"file": state, "sha256": sha256}
        with contextlib.suppress(OSError):  # the cache is not writable: hash the file again next time
            files.write_atomically(path, json.dumps(entry | {"check": content_key(entry)}) + "\n")
    return sha256


def _hub_blob(real: Path) -> str | None:
    """The name of a blob in the Hub's cache: the sha256 of a large file (small files have a sha1)."""
    in_cache = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    return real.name if in_cache and re.fullmatch(r"[0-9a-f]{64}", real.name) else None


def _state(real: Path, stat: os.stat_result) -> list[str | int]:
    """Values of which at least one changes whenever the file changes."""
    return [str(real), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _entry_path(real: Path) -> Path | None:
    """The cache entry of a file, or None for a user without a home folder."""
    try:
        return files.cache() / "sha256" / f"{content_key(str(real))[:32]}.json"
    except RuntimeError:
        return None


def _cached(path: Path | None, state: list[str | int]) -> str | None:
    """The cached hash of a file in this state, or None if the entry is missing or damaged."""
    try:
        entry = json.loads(path.read_bytes()) if path else {}
        check = entry.pop("check", None)
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    valid = check == content_key(entry) and entry.get("file") == state
    return entry["sha256"] if valid else None
