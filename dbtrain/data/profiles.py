"""Color profiles: the embedded one, or one made of what else a picture says about its numbers.

PNGs can have a code (cICP) or primaries and a gamma (cHRM, gAMA); the profile of most cameras' Adobe RGB is
a mark in EXIF. AVIF and HEIC files can have a code too (nclx).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from dbtrain.data import boxes

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]  # numbers in [0, 1] -> light in [0, 1]
D50 = (0.9642, 1.0, 0.8249)  # white of profiles, XYZ
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
# Chromaticities (x, y) of white, red, green and blue, as in PNG's cHRM.
D65 = (0.3127, 0.3290)
SRGB = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
ADOBE = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
# Codes of ITU-T H.273 that photos have: primaries, and transfer characteristics.
PRIMARIES = {1: SRGB, 9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
             12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)}  # fmt: skip
POINTS = 4096  # of a curve
ASSUMED = {1: 13, 2: 13, 6: 13, 14: 13, 15: 13}  # curves of video and none: every viewer takes sRGB's
HALF = 0.45455  # gamma that encoders write for sRGB's curve, which it resembles


def made(points: Sequence[float], curve: Curve) -> bytes:
    """A profile (ICC.1:2001-04) of white, red, green and blue, (x, y) each, and the curve of all three.

    Raises ValueError or LinAlgError if they are no primaries.
    """
    x, y = np.array(points, float).reshape(4, 2).T
    xyz = np.stack([x, y, 1 - x - y])  # columns: white, red, green, blue
    white, colors = xyz[:, 0] / y[0], xyz[:, 1:]
    adapted = np.diag(BRADFORD @ D50 / (BRADFORD @ white)) @ BRADFORD
    matrix = np.linalg.solve(BRADFORD, adapted @ (colors * np.linalg.solve(colors, white)))
    levels = curve(np.linspace(0, 1, POINTS))
    if not (np.abs(matrix).max() < 4 and np.isfinite(levels).all()):
        raise ValueError("not primaries")
    table = struct.pack(">I", POINTS) + (levels * 65535).round().astype(">u2").tobytes()
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 1) + bytes(79), b"cprt": b"text" + bytes(5)}
    tags[b"wtpt"] = _xyz(D50)
    for channel, color in zip((b"r", b"g", b"b"), matrix.T, strict=True):
        tags |= {channel + b"XYZ": _xyz(color), channel + b"TRC": b"curv\0\0\0\0" + table}
    body, entries = b"", struct.pack(">I", len(tags))
    for name, data in tags.items():
        entries += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(entries) + len(body)
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (head + _xyz(D50)[8:]).ljust(128, b"\0") + entries + body


def _xyz(values: Sequence[float] | Array) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def power(gamma: float) -> Curve:
    return lambda values: values**gamma


def srgb(values: Array) -> Array:
    """sRGB's curve (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


CURVES: dict[int, Curve] = {4: power(2.2), 5: power(2.8), 8: power(1.0), 13: srgb}


def profile_of(photo: Image.Image, tell: Callable[[str], object]) -> bytes:
    """The ICC profile of a picture; b"" if it has none, or is in sRGB.

    A PNG's code counts most, then an embedded profile, then what else it says, as in the PNG specification.
    The code of an AVIF or HEIC file counts if there is no profile, as in HEIF's.
    `tell` gets a line about what cannot be used.
    """
    info = photo.info
    embedded, code = _in_boxes(photo)
    embedded = info.get("icc_profile") or embedded
    if code := _code_of(photo) or (b"" if embedded else code):
        if code[0] in PRIMARIES and code[1] in CURVES and code[2:] == b"\0\1":
            return b"" if code[:2] == b"\1\x0d" else made(PRIMARIES[code[0]], CURVES[code[1]])
        tell(f"its color code {'/'.join(map(str, code))} is not known, as those of HDR are not")
    if embedded:
        return embedded
    if photo.format == "PNG" and "srgb" not in info and ("gamma" in info or "chromaticity" in info):
        return _of_numbers(info.get("chromaticity", SRGB), info.get("gamma"), tell)
    if _interop(photo).get(ExifTags.Interop.InteropIndex) == "R03":
        return made(ADOBE, power(563 / 256))
    return b""


def _interop(photo: Image.Image) -> dict[int, Any]:
    """The part of the EXIF data that names a color space; {} if there is none."""
    try:
        return photo.getexif().get_ifd(ExifTags.IFD.Interop)
    except KeyError:  # Pillow before 13
        return {}


def _in_boxes(photo: Image.Image) -> tuple[bytes, bytes]:
    """(profile, code) in the boxes of a JPEG 2000, AVIF or HEIC file; b"" for what there is not."""
    if photo.format not in boxes.AROUND or not getattr(photo, "filename", ""):
        return b"", b""
    with open(photo.filename, "rb") as file:  # type: ignore[attr-defined]
        color = boxes.color_of(file, photo.format)
    if photo.format == "JPEG2000":
        return (color[3:] if color[:1] == b"\2" else b""), b""
    if color[:4] != b"nclx" or len(color) < 10:
        return b"", b""
    primaries, curve = struct.unpack(">2H", color[4:8])
    known = {2: 1}.get(primaries, primaries), ASSUMED.get(curve, curve)
    return b"", bytes([*(min(number, 255) for number in known), 0, 1])


def _code_of(photo: Image.Image) -> bytes:
    """The content of a PNG's cICP chunk, which Pillow does not read; b"" if there is none."""
    if photo.format != "PNG" or not getattr(photo, "filename", ""):
        return b""
    with open(photo.filename, "rb") as file:  # type: ignore[attr-defined]
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"PLTE"):
            size = int.from_bytes(head[:4], "big")
            if head[4:] == b"cICP" and size == 4:
                return file.read(4)
            file.seek(size + 4, 1)  # and its checksum
    return b""


def _of_numbers(points: Sequence[float], gamma: float | None, tell: Callable[[str], object]) -> bytes:
    """The profile of a PNG's cHRM and gAMA."""
    about_srgb = np.allclose(points, SRGB, atol=0.002)
    if about_srgb and (gamma is None or abs(gamma - HALF) < 0.001):
        return b""
    try:
        with np.errstate(divide="raise", invalid="raise"):
            return made(points, srgb if gamma is None else power(1 / gamma))
    except (ArithmeticError, ValueError, np.linalg.LinAlgError, struct.error):
        tell(f"its primaries or gamma cannot be used ({points}, {gamma}), so its colors are read as sRGB")
        return b""
