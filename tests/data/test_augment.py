"""Variants of photos: what they show, by formulas, and what they depend on."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from dbtrain.config import Augment, Prepare
from dbtrain.data import photos
from dbtrain.data.augment import UNCHANGED, Change
from dbtrain.data.photos import Crop
from dbtrain.data.sizes import Size

SQUARE = Size.square(64)
ALL: dict[str, float] = {"rotate": 10.0, "hue": 8.0, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}


def settings(**changed: Any) -> Prepare:
    return Prepare(photos="x", instance_prompt="a", resolution=64, **changed)


def crops(
    height: int = 90, width: int = 140, size: Size = SQUARE, seed: int = 0, **changed: Any
) -> list[Crop]:
    return photos.crops("key", height, width, size, settings(**changed), seed)


def wave(height: int, width: int) -> np.ndarray:
    """A smooth pattern without a period, (H, W, 3) in [0, 255], as a function of x / width and y / height."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    return pattern(x / width, y / height)


def pattern(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 128 + 60 * np.stack([np.sin(5 * x + 2 * y), np.cos(4 * y - x), np.sin(3 * x * y + 1)], -1)


def shown(photo: Image.Image, crop: Crop, size: Size = SQUARE) -> np.ndarray:
    """The crop as given to the VAE, (H, W, 3) in [0, 255]."""
    return ((photos.pixels(photo, crop, size) + 1) * 127.5).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [SQUARE, Size(48, 80)], ids=str)
@pytest.mark.parametrize("angle", [-45.0, -7.3, -0.01, 3.0, 20.0, 45.0])
def test_a_turned_crop_shows_what_is_at_its_place_and_no_border(size: Size, angle: float) -> None:
    change = Change(rotate=angle)
    height, width = 300, 420
    tall, wide = photos.resized(height, width, size, change)
    around = change.around(size)
    assert (
        tall >= around.height and wide >= around.width and min(tall - around.height, wide - around.width) <= 1
    )
    for top, left in ((0, 0), (tall - around.height, wide - around.width)):  # at the edges
        corner = top + (around.height - size.height) // 2, left + (around.width - size.width) // 2
        crop = Crop(*corner, False, change)
        assert (shown(Image.new("RGB", (width, height), "white"), crop, size) == 255).all()
        got = shown(Image.fromarray(wave(height, width).round().astype(np.uint8)), crop, size)
        y, x = np.mgrid[0 : size.height, 0 : size.width] + 0.5
        down, right = y - size.height / 2, x - size.width / 2
        cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        x = corner[1] + size.width / 2 + cos * right - sin * down
        y = corner[0] + size.height / 2 + sin * right + cos * down
        assert np.abs(got - pattern(x / wide, y / tall)).mean() < 1.5


def test_a_turned_crop_is_as_large_as_can_be() -> None:
    """Of a square turned by 45 degrees, the largest square has half its diagonal."""
    tall, wide = photos.resized(1000, 1000, SQUARE, Change(rotate=45))
    assert tall == wide and 64 * np.sqrt(2) <= tall <= 64 * np.sqrt(2) + 2


def test_colors_change_by_the_formulas() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(60, 180, (64, 64, 3), dtype=np.uint8))
    values = np.asarray(photo, float)
    luma = values @ [0.299, 0.587, 0.114]
    want = {
        "brightness": 1.2 * values,
        "contrast": luma.mean() + 1.2 * (values - luma.mean()),
        "saturation": luma[..., None] + 1.2 * (values - luma[..., None]),
    }
    for name, expected in want.items():
        got = shown(photo, Crop(0, 0, False, Change(**{name: 1.2})))
        assert np.abs(got - expected.clip(0, 255)).max() <= 0.51, name


def test_hue_turns_around_gray() -> None:
    """Red towards yellow; a gray stays, and so does the luma."""
    photo = Image.new("RGB", (64, 64), (160, 90, 90))
    photo.paste((120, 120, 120), (0, 0, 32, 64))
    got = shown(photo, Crop(0, 0, False, Change(hue=10)))
    assert np.abs(got[:, :32] - 120).max() <= 0.51
    red = got[0, 40]
    hue = 360 * colorsys.rgb_to_hsv(*red / 255)[0]
    assert 5 < hue < 20
    assert abs(red @ [0.299, 0.587, 0.114] - np.array([160, 90, 90]) @ [0.299, 0.587, 0.114]) < 1


def test_variants_are_within_the_limits_and_depend_on_photo_number_and_seed_only() -> None:
    made = crops(variants=40, augment=ALL)
    for name, limit in ALL.items():
        around = getattr(UNCHANGED, name)
        values = [getattr(crop.change, name) - around for crop in made]
        assert -limit <= min(values) < -limit / 2 and limit / 2 < max(values) <= limit
    assert made == crops(variants=40, augment=ALL)
    assert made[:10] == crops(variants=10, augment=ALL)
    assert not {crop.change for crop in made} & {
        crop.change for crop in crops(variants=40, augment=ALL, seed=1)
    }
    assert [crop.change.rotate for crop in made] == [
        crop.change.rotate for crop in crops(variants=40, augment={"rotate": 10.0})
    ]


def test_crops_stay_inside_with_both_random_position_and_turn() -> None:
    for size in (SQUARE, Size(48, 80)):
        for crop in crops(size=size, variants=30, crop="random", augment=ALL, flip=True):
            tall, wide = photos.resized(90, 140, size, crop.change)
            around = crop.change.around(size)
            top, left = (
                crop.top - (around.height - size.height) // 2,
                crop.left - (around.width - size.width) // 2,
            )
            assert 0 <= top <= tall - around.height and 0 <= left <= wide - around.width


def test_without_changes_keys_are_what_they_were() -> None:
    (crop,) = crops()
    assert crop.key() == {"top": 0, "left": 18, "flip": False}
    assert Change.draw(None, 0, "key", 0) == UNCHANGED and str(UNCHANGED) == ""


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="augment changes nothing"):
        Augment()
    with pytest.raises(ValidationError, match="use crop: random, or augment"):
        settings(variants=2)
    assert settings(variants=2, augment={"rotate": 1.0}).variants == 2
