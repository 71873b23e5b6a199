"""Files that changed since prepare are noticed; files that are probably meant, but not used, are named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dbtrain.config import Config
from dbtrain.data import photos
from dbtrain.data.shards import Manifest
from dbtrain.doctor import doctor
from dbtrain.models.base import Base
from dbtrain.prepare import own_images, plan
from dbtrain.prepare.prepare import prepare
from dbtrain.report import report
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, printable
from dbtrain.runtime.run_folder import RunFolder
from tests.conftest import Make, at, dbtrain, draw_photo

ODD = (
    os.fsdecode(b"caf\xe9.png"),
    "a\x1b[2J\x07.png",
    "b\nerror: c.png",
    "d\u202egnp.png",
)  # names of photos


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of the test's own with photos and captions, and beside it one with class images."""
    folder = tmp_path / "photos"
    for name in ("photos", "dogs"):
        (tmp_path / name).mkdir()
    for number in range(3):
        draw_photo(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(f"sks dog {number}")
        draw_photo(tmp_path / "dogs" / f"{number}.png", 5 + number)
    return folder


@pytest.fixture
def cfg(make: Make, own: Path) -> Config:
    return make(prepare__photos=str(own), prepare__captions=True, prepare__class_images=3,
                prepare__class_dir=str(own.parent / "dogs"))  # fmt: skip


def check(cfg: Config) -> None:
    plan.check(cfg, Base.find(cfg.model), Manifest.read(at(Path(cfg.data.shards))))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "replaced": (lambda folder: draw_photo(folder / "1.png", 9),
                 r"instance images changed .*: 1\.png was replaced; rerun"),
    "removed": (lambda folder: (folder / "1.png").unlink(), r"1\.png was removed"),
    "added": (lambda folder: (draw_photo(folder / "4.png", 4), (folder / "4.txt").write_text("a")),
              r"4\.png was added"),
    "edited": (lambda folder: (folder / "1.txt").write_text("sks dog, sitting"),
               r"the caption of 1\.png was edited"),
    "swapped": (lambda folder: [(folder / f"{k}.txt").write_text(f"sks dog {1 - k}") for k in (0, 1)],
                r"the caption of 0\.png was edited, the caption of 1\.png was edited"),
    "class image": (lambda folder: draw_photo(folder.parent / "dogs" / "0.png", 1),
                    r"class images changed .*: 0\.png was replaced"),
    "all": (lambda folder: [path.rename(path.with_name(f"new{path.name}")) for path in folder.iterdir()],
            r"0\.png was removed, 1\.png was removed, .* and 2 more; rerun"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_since_prepare_is_named(cfg: Config, own: Path, name: str) -> None:
    prepare(cfg)
    check(cfg)
    change, said = CHANGES[name]
    change(own)
    with pytest.raises(ConfigError, match=said):
        check(cfg)
    prepare(cfg)
    check(cfg)


def test_train_refuses_old_shards_and_needs_no_photos(cfg: Config, own: Path) -> None:
    prepare(cfg)
    draw_photo(own / "1.png", 9)
    done = dbtrain("train", own.parent / "c.yaml", "train.steps=1")
    assert done.returncode == 2 and "1.png was replaced; rerun: dbtrain prepare" in done.stderr
    shutil.rmtree(own)
    check(cfg)


def test_generated_class_images_are_not_the_user_s(make: Make) -> None:
    cfg = make()
    prepare(cfg)
    assert len(Manifest.read(at(Path(cfg.data.shards))).sources["instance"]) >= 5
    assert Manifest.read(at(Path(cfg.data.shards))).sources["class"] == {}


def test_a_folder_of_the_kohya_scripts_is_pointed_at(make: Make, own: Path) -> None:
    shutil.copytree(own, own.parent / "train" / "10_sks dog")
    cfg = make(prepare__photos=str(own.parent / "train"))
    assert cfg.prepare
    with pytest.raises(ConfigError, match=r"but 3 in its folder '10_sks dog'; use that, or set prepare\."):
        photos.of_subject(cfg.prepare)


MISPLACED: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "misspelt": (lambda folder: None, {"class_dir": "dog"}, "does not exist, but 'dogs' beside it"),
    "subfolder": (lambda folder: shutil.copytree(folder / "dogs", folder / "dogs" / "more"), {},
                  "the 3 images in its folder 'more' are not used; move them up"),
    "too many": (lambda folder: None, {"class_images": 2}, "has 3 images, but only the first 2 by name"),
    "none": (lambda folder: None, {"class_images": 3}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MISPLACED)
def test_own_class_images_that_are_not_used_are_named(cfg: Config, own: Path, name: str) -> None:
    plant, settings, said = MISPLACED[name]
    plant(own.parent)
    assert cfg.prepare
    folder = own.parent / str(settings.get("class_dir", "dogs"))
    changed = cfg.prepare.model_copy(update=settings | {"class_dir": str(folder)})
    told = list(own_images.unused(changed))
    assert len(told) == bool(said) and said in "".join(told)


def test_photos_of_the_subject_are_no_class_images(make: Make, own: Path) -> None:
    (own.parent / "link").symlink_to(own)
    cfg = make(prepare__photos=str(own), prepare__class_dir=str(own.parent / "link"))
    with pytest.raises(ConfigError, match=r"the folder of prepare\.photos"):
        prepare(cfg)


def test_odd_names_go_all_the_way(cfg: Config, own: Path) -> None:
    """Such photos are prepared and shown; neither terminal nor page gets what steers them."""
    for number, name in enumerate(ODD):
        draw_photo(own / "new.png", number, (40, 30)).rename(own / name)  # so small that messages name it
        (own / name).with_suffix(".txt").write_text("a dog")
    done = dbtrain("prepare", own.parent / "c.yaml")
    check(cfg)
    run = RunFolder(cfg.run_dir)
    files.write_atomically(run.config, cfg.dump())
    told = "\n".join(doctor.table(doctor.check(own.parent / "c.yaml")))
    page = report.report([run.path]).read_text(encoding="utf-8")
    for text in (done.stderr, told, page):
        assert not set(text) & set("\x1b\x07\u202e")
        assert "\nerror: c.png" not in text or text is page
        for name in ODD:
            assert printable(name) in text or printable(name) in text.replace("\n", r"\x0a")
