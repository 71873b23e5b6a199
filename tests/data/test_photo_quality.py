"""What is told of photos: by real ones where there are any, and by drawn ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dbtrain.data.photo_quality import LEFT_OUT, MISSED, SHARP, alike, quality_of
from tests.conftest import REAL_PHOTOS, draw_photo


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    """All real photos, or drawn ones: no two the same."""
    folder = tmp_path_factory.mktemp("photos")
    if found := sorted(REAL_PHOTOS.glob("*/*.jpg")):
        return [Image.open(path).convert("RGB") for path in found]
    drawn = [draw_photo(folder / f"{number}.png", number) for number in range(5)]
    return [Image.open(path).resize((480, 400), Image.Resampling.NEAREST) for path in drawn]


@pytest.mark.slow
def test_photos_are_sharp_until_they_are_blurred(pictures: list[Image.Image]) -> None:
    for picture in pictures:
        radius = 0.02 * min(picture.size)
        assert quality_of(picture).sharpness > 3 * SHARP
        assert quality_of(picture.filter(ImageFilter.GaussianBlur(radius))).sharpness < SHARP / 2


@pytest.mark.slow
def test_a_sharp_subject_before_a_blurred_background_is_sharp() -> None:
    real = [Image.open(path).convert("RGB") for path in sorted(REAL_PHOTOS.glob("*/*.jpg"))]
    for picture in (_wide(105), *real):
        width, height = picture.size
        blurred = picture.filter(ImageFilter.GaussianBlur(0.02 * min(picture.size)))
        middle = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
        blurred.paste(picture.crop(middle), middle[:2])
        assert quality_of(blurred).sharpness > SHARP


def test_copies_are_alike_and_other_pictures_are_not(pictures: list[Image.Image]) -> None:
    qualities = [quality_of(picture) for picture in pictures]
    assert alike(qualities) == []
    for picture, one in zip(pictures, qualities, strict=True):
        width, height = picture.size
        packed = io.BytesIO()
        picture.save(packed, "JPEG", quality=40)
        trimmed = picture.crop((width // 50, height // 50, width - width // 50, height - height // 50))
        for copy in (Image.open(packed).convert("RGB"), picture.resize((width // 3, height // 3)), trimmed):
            assert alike([one, quality_of(copy)]) == [(0, 1)]
    assert alike([]) == []


def _wide(subject_at: int) -> Image.Image:
    """A checkered square on a plain picture of 3:2."""
    values = np.full((200, 300, 3), 128, np.uint8)
    board = np.indices((90, 90)).sum(0) // 6 % 2 * 255
    values[50:140, subject_at : subject_at + 90] = board[..., None]
    return Image.fromarray(values)


def test_a_subject_at_the_edge_is_missed_by_the_centre_crop() -> None:
    middle, right = quality_of(_wide(105)), quality_of(_wide(205))
    assert middle.missed < 0.05 and middle.left_out == pytest.approx(1 / 3) and middle.left_out < LEFT_OUT
    assert right.missed > MISSED and right.best > 0.8
    below = quality_of(_wide(205).transpose(Image.Transpose.ROTATE_270))
    assert below.missed == pytest.approx(right.missed, abs=0.02) and below.best > 0.8, "upright ones alike"
    assert quality_of(_wide(5)).best < 0.2


def test_pictures_of_a_few_pixels_are_no_trouble(tmp_path: Path) -> None:
    for size in ((1, 1), (1, 40), (3, 2), (12, 9)):
        one = quality_of(Image.new("RGB", size))
        assert one.sharpness == 0.0 and one.missed >= 0.0
