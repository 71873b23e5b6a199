"""Reading tars that may come from anyone: nothing in them is trusted."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

from safetensors import SafetensorError

PARTS = ("safetensors", "json")  # members of a row
# What reading a tar raises; its numbers can be too large, and its headers nested.
BROKEN = (tarfile.TarError, SafetensorError, ValueError, LookupError, ArithmeticError, RecursionError)


def members(data: bytes, most: int) -> Iterator[tuple[bytes, bytes]]:
    """The two members of each row of a tar, in its order. Nothing is decompressed, decoded or expanded.

    Other members are not read. Raises ValueError, or what tarfile raises, for more than `most` rows.
    """
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            key, _, part = member.name.partition(".")
            row = found.setdefault(key, {})
            if part not in PARTS:
                continue
            file = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if file is None or not 0 <= member.size <= len(data):
                raise ValueError(f"its member '{member.name[:60]}' is not a plain file")
            if part in row or len(found) > most:
                raise ValueError(f"its member '{member.name[:60]}' is one too many")
            row[part] = file.read()
    for key, row in found.items():
        if len(row) < len(PARTS):
            raise ValueError(f"row '{key[:60]}' lacks its {min(set(PARTS) - row.keys())}")
        yield row["safetensors"], row["json"]
