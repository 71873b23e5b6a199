"""Photos of every kind come out upright, in RGB and at the right crop."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbtrain.config import Prepare
from dbtrain.data import photos
from dbtrain.data.photos import Crop
from dbtrain.data.sizes import Size
from tests.conftest import REAL_PHOTOS, draw_photo

SQUARE = Size.square(32)


def settings(**changes: object) -> Prepare:
    return Prepare(**({"photos": "p", "instance_prompt": "x", "resolution": 32} | changes))  # type: ignore[arg-type]


def test_photos_are_found_sorted_and_others_skipped_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.JPG", "a.png", "c.webp", "d.bmp", "e.jpeg", ".hidden.png"):
        draw_photo(tmp_path / name, 1)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "folder.png").mkdir()
    caplog.set_level("INFO", logger="dbtrain")
    photos.say.__self__.propagate = True  # type: ignore[attr-defined]
    assert [p.name for p in photos.find(str(tmp_path), "prepare.photos")] == [
        "a.png",
        "b.JPG",
        "c.webp",
        "d.bmp",
        "e.jpeg",
    ]
    assert "skipped 2 files" in caplog.text
    assert "notes.md" in caplog.text


def test_only_regular_files_are_photos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw_photo(tmp_path / "a.png", 1)
    (tmp_path / "b.png").symlink_to("a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    caplog.set_level("INFO", logger="dbtrain")
    photos.say.__self__.propagate = True  # type: ignore[attr-defined]
    assert [p.name for p in photos.find(str(tmp_path), "prepare.photos")] == ["a.png", "b.png"]
    assert "skipped 2 files that are not photos: endless.png, pipe.png" in caplog.text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (40, 20), "red")
    upright.paste("blue", (0, 0, 20, 20))  # blue on the left
    stored = upright
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    for turn in turns.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "p.png", exif=exif)
    loaded = photos.load(tmp_path / "p.png")
    assert photos.size(tmp_path / "p.png") == (20, 40)
    assert loaded.size == (40, 20)
    assert loaded.getpixel((5, 10)) == (0, 0, 255)
    assert loaded.getpixel((35, 10)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("p.jpg" if mode == "CMYK" else "p.png")
    grey = {"I;16": 128 * 257, "1": 1, "RGBA": (128, 128, 128, 255), "LA": (128, 255), "RGB": (128,) * 3}
    if mode == "CMYK":
        Image.new("RGB", (16, 16), (128,) * 3).convert("CMYK").save(path)
    elif mode == "P":
        Image.new("RGB", (16, 16), (128,) * 3).quantize().save(path)
    else:
        Image.new(mode, (16, 16), grey.get(mode, 128)).save(path)
    loaded = photos.load(path)
    assert loaded.mode == "RGB"
    want = 255 if mode == "1" else 128
    assert np.abs(np.asarray(loaded).astype(int) - want).max() <= 3


def test_transparency_goes_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "p.png")
    assert photos.load(tmp_path / "p.png").getpixel((3, 3)) == (255, 255, 255)
    indexed = Image.new("P", (16, 16), 0)
    indexed.putpalette([255, 0, 0] * 256)
    indexed.save(tmp_path / "q.png", transparency=0)
    assert photos.load(tmp_path / "q.png").getpixel((3, 3)) == (255, 255, 255)


def test_center_crop_keeps_the_middle() -> None:
    photo = Image.new("RGB", (96, 32), "black")
    photo.paste("white", (32, 0, 64, 32))
    (crop,) = photos.crops("key", 32, 96, SQUARE, settings(), seed=0)
    assert crop == Crop(0, 32, False)
    assert photos.pixels(photo, crop, SQUARE).min() == 1.0


def test_the_short_side_is_resized() -> None:
    assert photos.resized(100, 50, SQUARE) == (64, 32)
    assert photos.resized(33, 1000, SQUARE) == (32, 970)
    photo = Image.new("RGB", (50, 100), "red")
    assert photos.pixels(photo, Crop(10, 0, False), SQUARE).shape == (3, 32, 32)


def test_random_crops_are_inside_differ_and_depend_on_photo_and_seed_only() -> None:
    cfg = settings(crop="random", variants=4)
    crops = photos.crops("key", 64, 200, SQUARE, cfg, seed=0)
    assert len(set(crops)) > 1
    assert all(crop.top == 0 and 0 <= crop.left <= 100 - 32 for crop in crops)
    assert crops == photos.crops("key", 64, 200, SQUARE, cfg, seed=0)
    assert crops != photos.crops("other", 64, 200, SQUARE, cfg, seed=0)
    assert crops != photos.crops("key", 64, 200, SQUARE, cfg, seed=1)


def test_flips_are_stored_beside_each_crop() -> None:
    crops = photos.crops("key", 64, 200, SQUARE, settings(crop="random", variants=3, flip=True), seed=0)
    assert [crop.flip for crop in crops] == [False, True] * 3
    photo = Image.new("RGB", (64, 32))
    photo.paste("white", (0, 0, 20, 32))
    plain, mirrored = (photos.pixels(photo, Crop(0, 0, flip), SQUARE) for flip in (False, True))
    assert (plain == mirrored.flip(-1)).all()
    assert not (plain == mirrored).all()


def test_pixels_span_minus_one_to_one() -> None:
    photo = Image.new("RGB", (32, 32), "black")
    photo.paste("white", (0, 0, 16, 32))
    values = photos.pixels(photo, Crop(0, 0, False), SQUARE)
    assert (values.min(), values.max()) == (-1.0, 1.0)


@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="needs the real photos")
def test_real_photos_load() -> None:
    for path in sorted(REAL_PHOTOS.rglob("*.jpg")):
        photo = photos.load(path)
        assert photos.size(path) == (photo.height, photo.width)
