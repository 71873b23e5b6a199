"""Pictures as cameras, phones, editors and web sites write them look as a color-managed viewer shows them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from dbtrain.data import color, photo_files, photos
from dbtrain.runtime.errors import ConfigError
from tests.data import profiles
from tests.data.profiles import ADOBE, P3, PROPHOTO, SWAPPED, Array

Picture = tuple[Callable[[Path], object], Array]  # writes a file; what a viewer shows of it, (H, W, 3)


def scene(height: int = 32, width: int = 48) -> Array:
    """Smooth colors with two blocks, (H, W, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    colors = np.stack([40 + 160 * x / width, 60 + 120 * y / height, 200 - 120 * x / width], -1)
    colors[:8, :8], colors[-8:, -8:] = (220, 30, 40), (40, 200, 60)
    return colors.round().astype(np.uint8)


SCENE = scene()
PLAIN = Image.new("RGB", (48, 32), (180, 120, 90))
IMAGE, GRAY = Image.fromarray(SCENE), SCENE[..., 0]
GRAYS = np.dstack([GRAY] * 3)
ALPHA = np.tile(np.linspace(0, 255, 48).round().astype(np.uint8), (32, 1))


def png(array: Array, depth: int, kind: int, **chunks: bytes) -> Callable[[Path], object]:
    """Writes a PNG of (H, W[, C]) values with chunks that Pillow does not write."""

    def write(path: Path) -> None:
        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        height, width = array.shape[:2]
        rows = array.astype(">u2" if depth == 16 else "u1").reshape(height, -1)
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
        more = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
        data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + more + data + chunk(b"IEND", b""))

    return write


def saved(image: Image.Image, kind: str, **options: Any) -> Callable[[Path], object]:
    return lambda path: image.save(path, kind, **options)


def over_white(colors: Array, alpha: Array) -> Array:
    return colors * (alpha[..., None] / 255) + 255 - alpha[..., None].astype(float)


def with_hole(values: Array, hole: Any) -> tuple[Array, Array]:
    """(values with their upper half replaced, what is shown where `hole` is transparent)."""
    full = values.copy()
    full[:16] = hole
    grays = full if full.ndim == 3 else np.dstack([full] * 3)
    return full, np.concatenate([np.full_like(grays[:16], 255), grays[16:]])


def managed(primaries: Array, gamma: float, kind: str, **options: Any) -> Picture:
    profile = profiles.rgb_profile(primaries, gamma)
    return saved(IMAGE, kind, icc_profile=profile, **options), profiles.shown(SCENE, primaries, gamma)


def lab(image: Image.Image) -> Image.Image:
    """A picture as its CIE Lab numbers."""
    change = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    converted = ImageCms.applyTransform(image, change)
    assert converted is not None
    return converted


JPEG = {"quality": 97, "subsampling": 0}
SWAP = profiles.rgb_profile(SWAPPED, 2.2)
SWAPPED_SCENE = profiles.shown(SCENE, SWAPPED, 2.2)
HOLE8, HOLE8_SHOWN = with_hole(GRAY, 7)
COLOR_HOLE, COLOR_HOLE_SHOWN = with_hole(SCENE, (1, 2, 3))
DEEP_HOLE = np.concatenate([np.full((16, 48), 1000), GRAY[16:].astype(int) * 257])
INDEXED = IMAGE.quantize(16)
INDEXED_COLORS = np.asarray(INDEXED.convert("RGB"))
RAMP = np.tile(np.arange(32)[:, None] * 40, (1, 48))  # 16-bit shades, dark ones of a linear profile
INKS = np.zeros((32, 48, 4), np.uint8)
INKS[:, 16:32, 0], INKS[:, 32:, 0], INKS[:, 32:, 3] = 255, 255, 255
LIGHTNESS = np.repeat([100.0, 75.0, 50.0], 16)[None, :, None] * np.ones((32, 48, 3))
INKS_SHOWN = profiles.encoded(((LIGHTNESS + 16) / 116) ** 3)
TURNED = Image.fromarray(np.ascontiguousarray(np.rot90(SCENE)))
EXIF = Image.Exif()
EXIF[0x0112] = 6

ADOBE_PLAIN = profiles.shown(np.asarray(PLAIN), ADOBE, 563 / 256)


def marked(index: str, orientation: int = 1) -> Image.Exif:
    """EXIF as cameras write it: R03 is for Adobe RGB, R98 for sRGB."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x8769] = {0xA001: 1 if index == "R98" else 65535, 0xA005: {1: index, 2: b"0100"}}
    return exif


def numbers(*values: float) -> bytes:
    """The content of gAMA and cHRM."""
    return struct.pack(f">{len(values)}I", *(round(value * 100_000) for value in values))


PICTURES: dict[str, Picture] = {
    # Profiles.
    "displayp3.png": managed(P3, 2.2, "PNG"),
    "adobergb.tif": managed(ADOBE, 2.19921875, "TIFF"),
    "prophoto.png": managed(PROPHOTO, 1.8, "PNG"),
    "swapped.webp": managed(SWAPPED, 2.2, "WEBP", lossless=True),
    "swapped.avif": managed(SWAPPED, 2.2, "AVIF", quality=100, subsampling="4:4:4"),
    "swapped-alpha.png": (saved(Image.fromarray(np.dstack([SCENE, ALPHA])), "PNG", icc_profile=SWAP),
                          over_white(SWAPPED_SCENE, ALPHA)),
    "swapped-palette.png": (saved(INDEXED, "PNG", icc_profile=SWAP),
                            profiles.shown(INDEXED_COLORS, SWAPPED, 2.2)),
    "turned-and-swapped.png": (saved(TURNED, "PNG", icc_profile=SWAP, exif=EXIF), SWAPPED_SCENE),
    "gray-with-rgb.png": (
        saved(Image.fromarray(GRAY), "PNG", icc_profile=profiles.rgb_profile(P3, 1.0)),
        profiles.encoded(GRAYS / 255),
    ),
    "gray-linear.png": (saved(Image.fromarray(GRAY), "PNG", icc_profile=profiles.gray_profile(1.0)),
                        profiles.encoded(GRAYS / 255)),
    "gray16-linear.png": (
        png(RAMP, 16, 0, iCCP=b"x\0\0" + zlib.compress(profiles.gray_profile(1.0))),
        profiles.encoded(np.dstack([RAMP] * 3) / 65535),
    ),
    "inks.jpg": (saved(Image.fromarray(INKS, "CMYK"), "JPEG", icc_profile=profiles.ink_profile(25), **JPEG),
                 INKS_SHOWN),
    "lab.tif": (saved(lab(PLAIN), "TIFF"), np.asarray(PLAIN)),
    # Declared without a profile.
    "adobergb-r03.jpg": (saved(PLAIN, "JPEG", exif=marked("R03"), **JPEG), ADOBE_PLAIN),
    "srgb-r98.jpg": (saved(PLAIN, "JPEG", exif=marked("R98"), **JPEG), np.asarray(PLAIN)),
    "turned-r03.jpg": (saved(PLAIN.resize((32, 48)), "JPEG", exif=marked("R03", 6), **JPEG), ADOBE_PLAIN),
    "r03-and-profile.jpg": (saved(PLAIN, "JPEG", exif=marked("R03"), icc_profile=SWAP, **JPEG),
                            profiles.shown(np.asarray(PLAIN), SWAPPED, 2.2)),
    "gama-linear.png": (png(SCENE, 8, 2, gAMA=numbers(1.0)), profiles.shown(SCENE, profiles.SRGB, 1.0)),
    "gama-gray.png": (png(GRAY, 8, 0, gAMA=numbers(1.0)), profiles.encoded(GRAYS / 255)),
    "gama-usual.png": (png(SCENE, 8, 2, gAMA=numbers(0.45455)), SCENE),
    "gama-and-srgb.png": (png(SCENE, 8, 2, gAMA=numbers(1.0), sRGB=b"\0"), SCENE),
    "gama-and-profile.png": (
        png(SCENE, 8, 2, gAMA=numbers(1.0), iCCP=b"x\0\0" + zlib.compress(SWAP)), SWAPPED_SCENE
    ),
    "chrm-adobergb.png": (
        png(SCENE, 8, 2, gAMA=numbers(1 / 2.2),
            cHRM=numbers(0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)),
        profiles.shown(SCENE, ADOBE, 2.2),
    ),
    "chrm-prophoto.png": (  # of another white, D50
        png(SCENE, 8, 2, gAMA=numbers(1 / 1.8),
            cHRM=numbers(0.3457, 0.3585, 0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001)),
        profiles.shown(SCENE, PROPHOTO, 1.8),
    ),
    "cicp-displayp3.png": (png(SCENE, 8, 2, cICP=bytes([12, 13, 0, 1])), profiles.shown(SCENE, P3, None)),
    "cicp-p3-linear16.png": (
        png(SCENE.astype(int) * 257, 16, 2, cICP=bytes([12, 8, 0, 1])), profiles.shown(SCENE, P3, 1.0)
    ),
    "cicp-srgb-and-profile.png": (
        png(SCENE, 8, 2, cICP=bytes([1, 13, 0, 1]), iCCP=b"x\0\0" + zlib.compress(SWAP)), SCENE
    ),
    # Depths and transparency.
    "rgb16.png": (png(SCENE.astype(int) * 257, 16, 2), SCENE),
    "gray16.png": (png(GRAY.astype(int) * 257, 16, 0), GRAYS),
    "grayalpha16.png": (png(np.dstack([GRAY, ALPHA]).astype(int) * 257, 16, 4), over_white(GRAYS, ALPHA)),
    "gray8-hole.png": (png(HOLE8, 8, 0, tRNS=struct.pack(">H", 7)), HOLE8_SHOWN),
    "gray16-hole.png": (png(DEEP_HOLE, 16, 0, tRNS=struct.pack(">H", 1000)), HOLE8_SHOWN),
    "rgb16-hole.png": (png(COLOR_HOLE.astype(int) * 257, 16, 2, tRNS=struct.pack(">3H", 257, 514, 771)),
                       COLOR_HOLE_SHOWN),
    "float.tif": (saved(Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF"), GRAYS),
    "float-of-255.tif": (saved(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), GRAYS),
    "int32.tif": (saved(Image.fromarray(GRAY.astype(np.int32) * 257), "TIFF"), GRAYS),
    # Containers: what is in a file counts, not its name.
    "tiff-named.jpg": (saved(IMAGE, "TIFF"), SCENE),
    "jp2-named.jpg": (saved(IMAGE, "JPEG2000"), SCENE),
    "avif-named.jpg": (saved(IMAGE, "AVIF", quality=100, subsampling="4:4:4"), SCENE),
    "photo.gif": (saved(INDEXED, "GIF", save_all=True, append_images=[Image.new("P", (48, 32))]),
                  INDEXED_COLORS),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_looks_as_a_viewer_shows_it(tmp_path: Path, name: str) -> None:
    write, want = PICTURES[name]
    write(tmp_path / name)
    (path,) = photos.find(str(tmp_path), "prepare.photos")
    got = photos.load(path)
    assert photos.size(path) == (got.height, got.width) == (32, 48)
    assert np.abs(np.asarray(got) - np.asarray(want, float)).max() <= (4 if "avif" in name else 3)


def test_a_picture_in_srgb_is_unchanged(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    IMAGE.save(tmp_path / "a.png", icc_profile=profile)
    assert (np.asarray(photos.load(tmp_path / "a.png")) == SCENE).all()


@pytest.mark.parametrize(
    ("profile", "why"),
    [(SWAP[:200], "cannot"), (b"no profile", "cannot"), (profiles.ink_profile(25), "it is for CMYK")],
    ids=["cut", "nonsense", "of another space"],
)
def test_a_broken_profile_is_reported_and_left_out(tmp_path: Path, profile: bytes, why: str) -> None:
    told: list[str] = []
    IMAGE.save(tmp_path / "a.png", icc_profile=profile)
    assert (np.asarray(photos.load(tmp_path / "a.png", told.append)) == SCENE).all()
    assert len(told) == 1 and "a.png: its color profile cannot be used" in told[0] and why in told[0]


@pytest.mark.parametrize(
    ("chunks", "told", "shown"),
    [
        ({"cICP": bytes([9, 16, 0, 1])}, "its color code 9/16/0/1 is not known", SCENE),
        ({"cICP": bytes([12, 13, 0, 0])}, "12/13/0/0 is not known", SCENE),
        ({"cICP": bytes([9, 18, 0, 1]), "iCCP": b"x\0\0" + zlib.compress(SWAP)}, "9/18/0/1", SWAPPED_SCENE),
        ({"gAMA": numbers(0)}, "its primaries or gamma cannot be used", SCENE),
        ({"cHRM": numbers(*[0.3] * 8)}, "its primaries or gamma cannot be used", SCENE),
        ({"cHRM": numbers(*[0] * 8)}, "its primaries or gamma cannot be used", SCENE),
        ({"cHRM": b"\xff" * 32}, "its primaries or gamma cannot be used", SCENE),
    ],
    ids=["PQ", "narrow range", "HLG with a profile", "no gamma", "one point", "zeros", "beyond"],
)
def test_colors_that_cannot_be_told_are_reported(
    tmp_path: Path, chunks: dict[str, bytes], told: str, shown: Array
) -> None:
    said: list[str] = []
    png(SCENE, 8, 2, **chunks)(tmp_path / "a.png")
    got = np.asarray(photos.load(tmp_path / "a.png", said.append))
    assert np.abs(got - np.asarray(shown, float)).max() <= 3
    assert len(said) == 1 and told in said[0]


def header(*brands: bytes) -> bytes:
    return struct.pack(">I4s4s4x", 16 + 4 * (len(brands) - 1), b"ftyp", brands[0]) + b"".join(brands[1:])


@pytest.mark.parametrize(
    ("data", "kind", "cure"),
    [
        (header(b"heic", b"mif1", b"heic"), "HEIC", r"pip install 'dbtrain\[heif\]'"),
        (header(b"mif1", b"mif1", b"heix"), "HEIC", r"pip install 'dbtrain\[heif\]'"),
        (header(b"mif1", b"mif1", b"avif"), "AVIF", "pip install -U pillow"),
        (b"\xff\x0a" + b"\0" * 60, "JPEG XL", "export it as JPEG or PNG"),
    ],
)
def test_what_cannot_be_read_is_called_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, kind: str, cure: str
) -> None:
    monkeypatch.setattr(photo_files, "_formats", lambda kind: ["JPEG", "PNG"])  # neither plugin is installed
    (tmp_path / "a.jpg").write_bytes(data)
    for read in (photos.load, photos.size):
        with pytest.raises(ConfigError, match=rf"a\.jpg is a file of format {kind}; .*{cure}"):
            read(tmp_path / "a.jpg")


def test_heic_is_read_with_pillow_heif(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = IMAGE.copy()
    picture.info["icc_profile"] = SWAP
    pillow_heif.from_pillow(picture).save(str(tmp_path / "a.heic"), quality=100, chroma=444)
    (path,) = photos.find(str(tmp_path), "prepare.photos")
    assert np.abs(np.asarray(photos.load(path)) - SWAPPED_SCENE).mean() < 2


def test_a_png_with_a_long_text_is_read(tmp_path: Path) -> None:
    """ComfyUI keeps its workflow in the pictures that it makes."""
    text = PngInfo()
    text.add_itxt("workflow", "node " * 400_000, zip=True)
    IMAGE.save(tmp_path / "a.png", pnginfo=text)
    assert photos.size(tmp_path / "a.png") == (32, 48)
    assert (np.asarray(photos.load(tmp_path / "a.png")) == SCENE).all()


def huge(path: Path, width: int, height: int) -> None:
    """A white PNG of 1 bit per pixel, compressed to some KB."""
    Image.new("1", (width, height), 1).save(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_photo_of_200_megapixels_is_read_and_a_bomb_is_not(tmp_path: Path) -> None:
    huge(tmp_path / "phone.png", 16320, 12240)
    assert photos.size(tmp_path / "phone.png") == (12240, 16320)
    png(np.zeros((1, 1)), 8, 0)(tmp_path / "bomb.png")
    data = bytearray((tmp_path / "bomb.png").read_bytes())
    for side in (17_000, 100_000):
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        (tmp_path / "bomb.png").write_bytes(data)
        with pytest.raises(ConfigError, match=r"bomb\.png has more than 268 megapixels; make it smaller"):
            photos.load(tmp_path / "bomb.png")


def test_deep_pictures_are_converted_in_strips() -> None:
    values = np.linspace(0, 65535, 600 * 4).reshape(600, 4).astype(np.uint16)
    got = np.asarray(color.to_srgb(Image.fromarray(values), print))
    assert (got == (values / 257).round()[..., None]).all()
