"""Stored crops of odd files show the colors of the scene, computed in float from published formulas."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from dbtrain.config import Prepare
from dbtrain.data import photos
from dbtrain.data.sizes import Size
from dbtrain.runtime.errors import ConfigError
from tests.data import profiles
from tests.data.profiles import ADOBE, P3, PROPHOTO, Array
from tests.data.test_color import JPEG, lab, over_white, png, saved

SIDE, WIDE = 64, 96
CLOSE = 2 / 255  # mean absolute difference
Write = Callable[[Path], object]


def scene() -> Array:
    """Smooth colors of a wide range with two blocks, which show how it is turned, (H, W, 3) in [0, 1]."""
    y, x = np.mgrid[0:SIDE, 0:WIDE]
    colors = np.stack([0.1 + 0.8 * x / WIDE, 0.15 + 0.6 * y / SIDE, 0.85 - 0.6 * x / WIDE], -1)
    colors[:24, 16:40], colors[-16:, -32:] = (0.85, 0.12, 0.2), (0.2, 0.8, 0.25)
    return colors


COLORS = scene()
DEEP = (COLORS * 65535).round()  # of 16 bits; few of them are multiples of 257
BYTES = (COLORS * 255).round().astype(np.uint8)
IMAGE = Image.fromarray(BYTES)
GRAY = COLORS.mean(-1)  # (H, W)
GRAYS = np.dstack([GRAY] * 3) * 255
ALPHA = np.tile(np.linspace(0, 255, WIDE).round().astype(np.uint8), (SIDE, 1))
BLACK = Image.new("RGB", IMAGE.size)
INDEXED = IMAGE.quantize(32)
INDEXED_COLORS = np.asarray(INDEXED.convert("RGB"), float)
INKS = np.dstack([255 - BYTES, np.full((SIDE, WIDE), 40, np.uint8)])


def deep_tiff(values: Array, gray: bool = False, order: str = "<", **tags: bytes) -> Write:
    """Writes an uncompressed TIFF of 16 bits per channel, which Pillow does not write."""

    def write(path: Path) -> None:
        channels = 1 if gray else 3
        data = values.astype(f"{order}u2").tobytes()
        more = tags.get("profile", b"")
        bits_at = 8 + len(data)
        profile_at = bits_at + 2 * channels
        ifd_at = profile_at + len(more) + len(more) % 2
        white_is_zero = b"inverted" in tags.get("kind", b"")
        entries = [
            (256, 3, 1, WIDE), (257, 3, 1, SIDE), (258, 3, channels, 16 if gray else bits_at), (259, 3, 1, 1),
            (262, 3, 1, (0 if white_is_zero else 1) if gray else 2), (273, 4, 1, 8), (277, 3, 1, channels),
            (278, 3, 1, SIDE), (279, 4, 1, len(data)),
        ]  # fmt: skip
        if more:
            entries.append((34675, 7, len(more), profile_at))
        table = struct.pack(f"{order}H", len(entries))
        for tag, kind, count, value in entries:
            short = kind == 3 and count == 1
            table += struct.pack(f"{order}HHI", tag, kind, count)
            table += struct.pack(f"{order}HH" if short else f"{order}I", *((value, 0) if short else (value,)))
        head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, ifd_at)
        bits = struct.pack(f"{order}{channels}H", *[16] * channels)
        path.write_bytes(head + data + bits + more.ljust(ifd_at - profile_at, b"\0") + table + bytes(4))

    return write


def adobe_inks(path: Path) -> None:
    """A CMYK JPEG as Photoshop writes it: an Adobe segment, and inverted inks, as Pillow writes them too."""
    data = io.BytesIO()
    Image.fromarray(INKS, "CMYK").save(data, "JPEG", **JPEG)
    assert b"Adobe" in data.getvalue()[:64]
    path.write_bytes(data.getvalue())


def managed(primaries: Array, gamma: float, kind: str, **options: object) -> tuple[Write, Array]:
    profile = profiles.rgb_profile(primaries, gamma)
    return saved(IMAGE, kind, icc_profile=profile, **options), profiles.shown(COLORS * 255, primaries, gamma)


def jp2(profile: bytes) -> Write:
    """Writes a JPEG 2000 file with a profile in its color box, which Pillow does not write."""

    def write(path: Path) -> None:
        data = io.BytesIO()
        IMAGE.save(data, "JPEG2000")
        content = b"\2\0\0" + profile
        old, new = b"\0\0\0\x0fcolr\1\0\0\0\0\0\x10", struct.pack(">I4s", 8 + len(content), b"colr") + content
        start, more = data.getvalue().index(b"jp2h") - 4, len(new) - len(old)
        size = int.from_bytes(data.getvalue()[start : start + 4], "big")
        whole = data.getvalue()[:start] + struct.pack(">I", size + more) + data.getvalue()[start + 4 :]
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, new))

    return write


def animated(kind: str, **options: object) -> Write:
    return saved(IMAGE, kind, save_all=True, append_images=[BLACK], **options)


PROFILE16 = profiles.rgb_profile(PROPHOTO, 1.8)
INKS_SHOWN = (255 - INKS[..., :3].astype(float)) * (1 - 40 / 255)  # without a profile: ink by ink
FILES: dict[str, tuple[Write, Array]] = {
    "rgb16.png": (png(DEEP, 16, 2), COLORS * 255),
    "rgb16.tif": (deep_tiff(DEEP), COLORS * 255),
    "gray16.png": (png(GRAY * 65535, 16, 0), GRAYS),
    "gray16.tif": (deep_tiff(GRAY * 65535, gray=True), GRAYS),
    "gray16-big-endian.tif": (deep_tiff(GRAY * 65535, gray=True, order=">"), GRAYS),
    "gray16-white-is-zero.tif": (deep_tiff((1 - GRAY) * 65535, gray=True, kind=b"inverted"), GRAYS),
    "prophoto16.tif": (deep_tiff(DEEP, profile=PROFILE16), profiles.shown(COLORS * 255, PROPHOTO, 1.8)),
    "linear16.tif": (deep_tiff(COLORS**2.2 * 65535, profile=profiles.rgb_profile(P3, 1.0)),
                     profiles.shown(COLORS * 255, P3, 2.2)),
    "displayp3.jpg": managed(P3, 2.2, "JPEG", **JPEG),
    "adobergb.jpg": managed(ADOBE, 563 / 256, "JPEG", **JPEG),
    "adobergb-progressive.jpg": managed(ADOBE, 563 / 256, "JPEG", progressive=True, **JPEG),
    "displayp3.jp2": (jp2(profiles.rgb_profile(P3, 2.2)), profiles.shown(COLORS * 255, P3, 2.2)),
    "displayp3.avif": managed(P3, 2.2, "AVIF", quality=100, subsampling="4:4:4"),
    "adobe-inks.jpg": (adobe_inks, INKS_SHOWN),
    "inks.tif": (saved(Image.fromarray(INKS, "CMYK"), "TIFF"), INKS_SHOWN),
    "inks-with-profile.jpg": (
        saved(Image.fromarray(INKS, "CMYK"), "JPEG", icc_profile=profiles.ink_profile(25), **JPEG),
        profiles.encoded(((100 - 25 * INKS.sum(-1, keepdims=True) / 255 + 16) / 116) ** 3 * np.ones(3)),
    ),
    "lab.tif": (saved(lab(IMAGE), "TIFF"), COLORS * 255),
    "palette-with-hole.png": (saved(INDEXED, "PNG", transparency=3),
                              np.where((np.asarray(INDEXED) == 3)[..., None], 255, INDEXED_COLORS)),
    "gray-with-alpha.png": (png(np.dstack([GRAY * 255, ALPHA]).round(), 8, 4), over_white(GRAYS, ALPHA)),
    "deep-with-alpha.png": (png(np.dstack([DEEP, ALPHA * 257.0]), 16, 6), over_white(COLORS * 255, ALPHA)),
    "animated.gif": (saved(INDEXED, "GIF", save_all=True, append_images=[BLACK]), INDEXED_COLORS),
    "animated.webp": (animated("WEBP", lossless=True), COLORS * 255),
    "animated.png": (animated("PNG"), COLORS * 255),
    "two.mpo.jpg": (animated("MPO", **JPEG), COLORS * 255),
}  # fmt: skip


def stored(path: Path) -> Array:
    """The center crop that the VAE is given of a photo, (SIDE, SIDE, 3) in [0, 1]."""
    cfg = Prepare(photos=str(path.parent), instance_prompt="a dog", resolution=SIDE)
    (crop,) = photos.crops("", *photos.size(path), Size.square(SIDE), cfg, 0)
    pixels = photos.pixels(photos.load(path, pytest.fail), crop, Size.square(SIDE))
    return (pixels.permute(1, 2, 0).numpy() + 1) / 2


def check(path: Path, shown: Array) -> None:
    """The crop is close to what a viewer shows of the scene there."""
    middle = (WIDE - SIDE) // 2
    error = np.abs(stored(path) - shown[:, middle:-middle] / 255).mean()
    assert error < CLOSE, f"{path.name}: {255 * error:.2f} / 255"


@pytest.mark.parametrize("name", FILES)
def test_the_stored_crop_of_an_odd_file_has_the_colors_of_the_scene(tmp_path: Path, name: str) -> None:
    write, shown = FILES[name]
    write(tmp_path / name)
    check(tmp_path / name, np.asarray(shown, float))


# EXIF orientation: how the upright scene is turned to what is stored.
TURNS: dict[int, Callable[[Array], Array]] = {
    1: lambda scene: scene,
    2: lambda scene: scene[:, ::-1],
    3: lambda scene: scene[::-1, ::-1],
    4: lambda scene: scene[::-1],
    5: lambda scene: scene.swapaxes(0, 1),
    6: lambda scene: np.rot90(scene),
    7: lambda scene: scene[::-1, ::-1].swapaxes(0, 1),
    8: lambda scene: np.rot90(scene, -1),
}  # fmt: skip
TURNED_KINDS: dict[str, dict[str, object]] = {
    "JPEG": JPEG, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}  # fmt: skip


@pytest.mark.parametrize("kind", TURNED_KINDS)
@pytest.mark.parametrize("orientation", TURNS)
def test_a_turned_photo_is_stored_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = Image.fromarray(np.ascontiguousarray(TURNS[orientation](BYTES)))
    path = tmp_path / f"a.{kind.lower()}"
    turned.save(path, kind, exif=exif, **TURNED_KINDS[kind])
    assert photos.size(path) == (SIDE, WIDE)
    check(path, COLORS * 255)


@pytest.mark.parametrize("orientation", TURNS)
def test_a_tiff_may_have_its_orientation_in_xmp_alone(tmp_path: Path, orientation: int) -> None:
    about = TiffImagePlugin.ImageFileDirectory_v2()
    about[700] = (
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF>'
    ).encode()
    turned = Image.fromarray(np.ascontiguousarray(TURNS[orientation](BYTES)))
    turned.save(tmp_path / "a.tif", tiffinfo=about)
    assert photos.size(tmp_path / "a.tif") == (SIDE, WIDE)
    check(tmp_path / "a.tif", COLORS * 255)


@pytest.mark.parametrize("orientation", TURNS)
def test_a_heic_file_is_turned_by_its_decoder_only(tmp_path: Path, orientation: int) -> None:
    """Its EXIF repeats how the picture was turned (ISO/IEC 23008-12), and must not turn it again."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    IMAGE.save(tmp_path / "a.heic", "HEIF", exif=exif, quality=100, chroma=444)
    check(tmp_path / "a.heic", COLORS * 255)


@pytest.mark.parametrize("primaries", [2, 12], ids=["none", "P3"])
def test_the_code_of_a_heic_file_counts(tmp_path: Path, primaries: int) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    path = tmp_path / "a.heic"
    IMAGE.save(path, "HEIF", quality=100, chroma=444, color_primaries=primaries, transfer_characteristics=13,
               matrix_coefficients=6, full_range_flag=1)  # fmt: skip
    check(path, profiles.shown(COLORS * 255, P3, None) if primaries == 12 else COLORS * 255)


def test_the_code_of_an_avif_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.avif"
    IMAGE.save(path, "AVIF", quality=100, subsampling="4:4:4")
    data = path.read_bytes()
    assert data.count(b"nclx\0\x01") == 1
    path.write_bytes(data.replace(b"nclx\0\x01", b"nclx\0\x0c"))  # Display P3
    check(path, profiles.shown(COLORS * 255, P3, None))


def test_a_jpeg_2000_file_cut_short_is_reported_by_its_name(tmp_path: Path) -> None:
    jp2(profiles.rgb_profile(P3, 2.2))(tmp_path / "a.jp2")
    data = (tmp_path / "a.jp2").read_bytes()
    for length in (60, 100, 400):
        (tmp_path / "a.jp2").write_bytes(data[:length])
        with pytest.raises(ConfigError, match=r"cannot read photo .*a\.jp2"):
            photos.load(tmp_path / "a.jp2")
