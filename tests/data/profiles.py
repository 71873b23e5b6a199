"""Color profiles (ICC.1:2001-04) written by hand, and what their numbers are in sRGB, by the formulas."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
D50 = (0.9642, 1.0, 0.8249)
# Columns are the XYZ of red, green and blue at D50 (Lindbloom, "RGB/XYZ Matrices").
SRGB = np.array([[0.43607, 0.38515, 0.14308], [0.22249, 0.71689, 0.06062], [0.01392, 0.09708, 0.71410]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
PROPHOTO = np.array([[0.79767, 0.13519, 0.03134], [0.28804, 0.71188, 0.00009], [0.0, 0.0, 0.82491]])
SWAPPED = SRGB[:, ::-1]  # red and blue exchanged: plain to see


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78,
            b"wtpt": b"XYZ \0\0\0\0" + _fixed(*D50), b"cprt": b"text" + bytes(8), **tags}  # fmt: skip
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s", start + len(body), 0x02400000, kind, space, pcs)
    head += struct.pack(">6H4s28x", 2024, 1, 1, 0, 0, 0, b"acsp") + _fixed(*D50)
    return head.ljust(128, b"\0") + table + body


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(value * 256))


def rgb_profile(primaries: Array, gamma: float) -> bytes:
    """A profile of three primaries, the columns of (3, 3) XYZ, and a gamma."""
    tags = {b"rgb"[k : k + 1] + b"XYZ": b"XYZ \0\0\0\0" + _fixed(*primaries[:, k]) for k in range(3)}
    tags |= {name: _gamma(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def gray_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _gamma(gamma)})


def ink_profile(lightness: float) -> bytes:
    """A CMYK profile: paper is white, and each full ink makes it darker by `lightness`, without a tint."""
    table = struct.pack(">2H", 0, 65535)
    grid = [100 - lightness * bin(inks).count("1") for inks in range(16)]
    values = b"".join(struct.pack(">3H", round(lab * 652.8), 0x8000, 0x8000) for lab in grid)
    lut = b"mft2\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += struct.pack(">2H", 2, 2) + table * 4 + values + table * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def encoded(linear: Array) -> Array:
    """sRGB's curve (IEC 61966-2-1), from light in [0, 1] to numbers in [0, 255]."""
    light = linear.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def shown(values: Array, primaries: Array, gamma: float | None) -> Array:
    """(..., 3) in [0, 255] of a profile as sRGB. At D50 both have the same white, so nothing is adapted.

    No `gamma`: sRGB's curve.
    """
    light = values / 255
    if gamma is None:
        light = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    else:
        light = light**gamma
    return encoded(light @ (np.linalg.inv(SRGB) @ primaries).T)
