"""What the boxes of a JPEG 2000, AVIF or HEIC file say about its colors, which Pillow does not read.

A box is its size, its type and its content, which is often more boxes (ISO/IEC 15444-1, annex I, and
ISO/IEC 23008-12).
"""

from __future__ import annotations

import io
import struct
from typing import IO

# The boxes in which the color box is, and how many bytes of each come before its own boxes.
ITEM = ((b"meta", 4), (b"iprp", 0), (b"ipco", 0))
AROUND = {"JPEG2000": ((b"jp2h", 0),), "AVIF": ITEM, "HEIF": ITEM}  # by Pillow's formats
MOST = 1 << 24  # bytes that are read of a box


def color_of(file: IO[bytes], kind: str) -> bytes:
    """The content of the first color box of a file of a format in AROUND; b"" if there is none."""
    for name, skipped in AROUND[kind]:
        file = io.BytesIO(_content(file, name)[skipped:])
    return _content(file, b"colr")


def _content(file: IO[bytes], wanted: bytes) -> bytes:
    """The content of the first box of a type; b"" if there is none."""
    while len(head := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        left = int.from_bytes(file.read(8), "big") - 16 if size == 1 else size - 8
        if name == wanted and left > 0:
            return file.read(min(left, MOST))
        if left < 0:  # the box goes to the end of the file
            break
        file.seek(left, io.SEEK_CUR)
    return b""
