"""Digests: names made from content, and the root of all randomness; the same on every machine."""

from __future__ import annotations

import hashlib
import json


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
