"""sha256 of a base's files without reading gigabytes at every start: told by the Hub's cache, or kept.

A hash is kept with everything that changes when a file does: its real path, inode, size, and both
its times. The time of the inode's change is the kernel's own: no program can set it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

from dbtrain.runtime import files
from dbtrain.runtime.keys import content_key

# A file changed once more within a tick of its file system's clock keeps its times: a hash is kept
# only if the file was at rest for this long, which also covers a server whose clock is behind.
REST_S = 10.0
SMALL = 1 << 20  # bytes that are read sooner than a kept hash


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex; reads them only if it is not known."""
    real = path.resolve()
    if name := _hub_blob(real):
        return name
    seen = real.stat()
    if seen.st_size < SMALL:
        return files.sha256_of(real)
    kept, state = _place(real), _state(real, seen)
    if known := _kept(kept, state):
        return known
    sha256 = files.sha256_of(real)
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
