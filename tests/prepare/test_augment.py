"""Shards of variants: which images they are of, and what is encoded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dbtrain.config import Config
from dbtrain.data import photos, shards
from dbtrain.data.emphasis import Emphasis
from dbtrain.data.photos import Crop
from dbtrain.data.shards import Manifest
from dbtrain.data.sizes import Size
from dbtrain.prepare.prepare import prepare
from dbtrain.report import crops
from dbtrain.tiny import world
from dbtrain.tiny.paint import render
from tests import bases
from tests.conftest import Make, at


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos of the embedded base's mug."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        render(world.subject_scene("mug", number)).resize((150, 120)).save(tmp_path / f"photos/{number}.png")
    return tmp_path / "photos"


def rows(cfg: Config, role: str) -> list[shards.Row]:
    storage = at(Path(cfg.data.shards))
    return [row for shard in Manifest.read(storage).roles[role] for row in shards.read(storage, shard)]


def test_only_the_photos_trained_on_vary(make: Make, folder: Path, encoded: list[str]) -> None:
    def cfg(**limits: Any) -> Config:
        return make(prepare__photos=str(folder), prepare__class_images=2, prepare__held_out=1,
                    prepare__variants=4, prepare__augment=limits)  # fmt: skip

    prepare(cfg(rotate=10, brightness=0.2))
    assert len(encoded) == 2 * 4 + 1 + 2
    varied = rows(cfg(rotate=10, brightness=0.2), "instance")
    assert len({row.meta["key"] for row in varied}) == 8
    assert all(row.meta["augment"].keys() == {"rotate", "brightness"} for row in varied)
    others = rows(cfg(rotate=10), "class") + rows(cfg(rotate=10), shards.HELD_OUT["instance"])
    assert len(others) == 3 and not any("augment" in row.meta for row in others)

    # Nothing is encoded twice, and a change of the limits encodes the variants only.
    encoded.clear()
    prepare(cfg(rotate=10, brightness=0.2))
    assert not encoded
    prepare(cfg(rotate=5, brightness=0.2))
    assert len(encoded) == 2 * 4


def test_more_variants_and_photos_encode_those_only(make: Make, folder: Path, encoded: list[str]) -> None:
    def cfg(variants: int) -> Config:
        return make(prepare__photos=str(folder), prepare__class_prompt=None, prepare__variants=variants,
                    prepare__augment={"saturation": 0.2, "rotate": 5}, prepare__flip=True)  # fmt: skip

    prepare(cfg(2))
    encoded.clear()
    prepare(cfg(3))
    assert len(encoded) == 3 * 2
    encoded.clear()
    render(world.subject_scene("mug", 9)).save(folder / "9.png")
    prepare(cfg(3))
    assert encoded == ["9.png"] * 6


def test_the_report_shows_variants_as_trained(make: Make, folder: Path) -> None:
    """Through the embedded base's VAE, which was trained."""
    cfg = make(model__path="tiny", prepare__photos=str(folder), prepare__class_prompt=None,
               prepare__variants=3, prepare__augment={"rotate": 20, "brightness": 0.3})  # fmt: skip
    prepare(cfg)
    decode = crops._decoder(cfg.model)
    for row in rows(cfg, "instance"):
        photo = photos.load(folder / row.meta["source"])
        picture = decode(row)

        def alike(crop: Crop, photo: Image.Image = photo, shown: Image.Image = picture) -> float:
            given = photos.pixels(photo, crop, Size.square(64)).permute(1, 2, 0).numpy()
            return np.corrcoef(given.ravel(), np.asarray(shown).ravel())[0, 1]

        crop = Crop.of(row.meta)
        assert alike(crop) > 0.9 and alike(crop) > alike(Crop(0, 8, False))
        shown = crops._crop(row, Emphasis(), picture, ["a mug"], 64)
        turn, bright = row.meta["augment"]["rotate"], row.meta["augment"]["brightness"]
        assert shown.captions[3] == f"turned by {turn:+.1f}°, brightness × {bright:.2f}"


def test_sdxl_s_ids_are_those_of_the_photo_before_it_is_turned(make: Make, folder: Path) -> None:
    cfg = make(model__path=str(bases.sdxl()), prepare__photos=str(folder), prepare__class_prompt=None,
               prepare__crop="random", prepare__variants=4, prepare__augment={"rotate": 15})  # fmt: skip
    prepare(cfg)
    for row in rows(cfg, "instance"):
        assert row.meta["original_size"] == [120, 150]
        crop = Crop.of(row.meta)
        tall, wide = photos.resized(120, 150, Size.square(64), crop.change)
        assert 0 <= crop.top <= tall - 64 and 0 <= crop.left <= wide - 64
