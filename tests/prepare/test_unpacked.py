"""prepare, doctor and train with photos that are not a folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import Config
from dbtrain.data.shards import Manifest
from dbtrain.data.sources import Source
from dbtrain.models.base import Base
from dbtrain.prepare import plan
from dbtrain.prepare.prepare import prepare
from dbtrain.report import crops
from dbtrain.runtime.errors import ConfigError
from tests.conftest import Make, at, dbtrain, draw_photo


def tar(path: Path, count: int, first: int = 0) -> Path:
    """A tar of photos with captions."""
    with tarfile.open(path, "w") as file:
        for number in range(first, first + count):
            draw_photo(path.with_suffix(".png"), number)
            members = {"png": path.with_suffix(".png").read_bytes(), "txt": f"sks dog {number}".encode()}
            for suffix, data in members.items():
                about = tarfile.TarInfo(f"{number}.{suffix}")
                about.size = len(data)
                file.addfile(about, io.BytesIO(data))
    return path


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tar(tmp_path / "dog.tar", 3)


def config(make: Make, photos: Path, **values: Any) -> Config:
    return make(prepare__photos=str(photos), prepare__class_prompt=None, prepare__captions=True, **values)


def check(cfg: Config) -> None:
    plan.check(cfg, Base.find(cfg.model), Manifest.read(at(Path(cfg.data.shards))))


def test_only_what_changed_is_unpacked_and_encoded(make: Make, photos: Path, encoded: list[str]) -> None:
    cfg = config(make, photos)
    prepare(cfg)
    manifest = Manifest.read(at(Path(cfg.data.shards)))
    assert manifest.prompts.texts == ("sks dog 0", "sks dog 1", "sks dog 2") and len(encoded) == 3
    check(cfg)
    encoded.clear()
    prepare(cfg)
    assert not encoded

    # A changed source is noticed, and its new pictures alone are encoded.
    tar(photos, 4)
    with pytest.raises(
        ConfigError, match=r"dog\.tar changed since .* was made from it; rerun: dbtrain prepare"
    ):
        check(cfg)
    prepare(cfg)
    assert len(encoded) == 1
    check(cfg)

    # Training needs the shards only.
    photos.unlink()
    check(cfg)


def test_doctor_checks_local_photos_and_fetches_no_others(make: Make, photos: Path) -> None:
    cfg = config(make, photos)
    done = dbtrain("doctor", photos.parent / "c.yaml")
    assert "3 of 3 in" in done.stdout and "3 of 3 photos have a caption" in done.stdout, done.stdout
    assert Source.of(cfg.prepare.photos).folder().is_dir()  # type: ignore[union-attr]
    url = "https://127.0.0.1:9/dog.tar"
    done = dbtrain("doctor", photos.parent / "c.yaml", f"prepare.photos={url}")
    assert f"not checked: prepare will fetch {url}" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_the_report_shows_its_photos(make: Make, photos: Path) -> None:
    cfg = config(make, photos)
    assert "has not been unpacked" in crops.photos_of(cfg, 8).problem
    prepare(cfg)
    part = crops.photos_of(cfg, 8)
    assert part.total == 3 and all(picture.src for picture in part.pictures)


@pytest.mark.slow
def test_two_ranks_unpack_once_and_train(make: Make, photos: Path) -> None:
    config(make, photos)
    done = dbtrain("run", photos.parent / "c.yaml", "train.steps=2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("unpacked 3 photos") == 1


@pytest.mark.slow
def test_subjects_may_have_sources_of_their_own(make: Make, photos: Path) -> None:
    tar(photos.parent / "cat.tar", 2, first=7)
    cfg = config(make, photos)
    several = cfg.override(
        "subjects=" + str([
            {"token": "sks", "class_word": "dog", "photos": str(photos)},
            {"token": "xyz", "class_word": "cat", "photos": str(photos.parent / "cat.tar")},
        ])
    )  # fmt: skip
    prepare(several)
    assert sum(Manifest.read(at(Path(cfg.data.shards))).rows("instance")) == 5
