"""prepare: what the shards hold, and that only what is needed is ever done."""

from __future__ import annotations

import errno
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from dbtrain.config import Model
from dbtrain.data import prompt_table, shards
from dbtrain.data.shards import Manifest
from dbtrain.models import encoder_plan
from dbtrain.models.base import Base
from dbtrain.prepare import class_images
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.memory import GIB
from tests import bases
from tests.conftest import Make, at, draw_photo


@pytest.fixture
def photo_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        draw_photo(folder / f"{number}.png", number)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.iterdir())}


def rows(folder: Path, role: str) -> list[shards.Row]:
    return [row for shard in Manifest.read(at(folder)).roles[role] for row in shards.read(at(folder), shard)]


def test_shards_hold_the_vae_s_moments(make: Make, photo_dir: Path) -> None:
    folder = prepare(make(prepare__photos=str(photo_dir), prepare__class_prompt=None))
    vae = AutoencoderKL.from_pretrained(bases.sd(), subfolder="vae")
    for row in rows(folder, "instance"):
        photo = Image.open(photo_dir / row.meta["source"]).resize((77, 64), Image.Resampling.LANCZOS)
        top, left = row.meta["crop"]
        pixels = torch.from_numpy(np.array(photo.crop((left, top, left + 64, top + 64)))).permute(2, 0, 1)
        with torch.no_grad():
            posterior = vae.encode(pixels[None].float() / 127.5 - 1).latent_dist
        torch.testing.assert_close(row.tensors["mean"], posterior.mean[0])
        torch.testing.assert_close(row.tensors["std"], posterior.std[0])
        assert row.meta["original_size"] == [80, 96]


def test_the_prompt_table_is_the_pipeline_s_own_embedding(make: Make, photo_dir: Path) -> None:
    folder = prepare(make(prepare__photos=str(photo_dir)))
    manifest = Manifest.read(at(folder))
    table = prompt_table.read(at(folder), manifest.prompts)
    assert manifest.prompts.texts == ("a photo of sks dog", "a photo of a dog")
    pipe = StableDiffusionPipeline.from_pretrained(bases.sd(), dtype=torch.float32)
    for number, text in enumerate(manifest.prompts.texts):
        want, _ = pipe.encode_prompt(text, "cpu", 1, False)
        torch.testing.assert_close(table["condition.prompt_embeds"][number], want[0])
    assert table["ids.text_encoder"].shape == (2, 32)


def test_a_limit_of_memory_changes_no_byte_and_makes_nothing_anew(
    make: Make, photo_dir: Path, encoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Of the prompt table and of class images, whose prompt is encoded layer by layer too."""
    base = Base.find(Model(path=str(bases.sd())))
    gib = 0.9 * sum(encoder_plan.sizes(base, base.family.text_dtype).values()) / GIB

    def made(name: str, limit: float | None) -> dict[str, bytes]:
        folder = prepare(make(
            prepare__photos=str(photo_dir), prepare__class_images=2, prepare__memory_gib=limit,
            data__shards=str(photo_dir.parent / name),
            prepare__class_dir=str(photo_dir.parent / f"class-{name}"),
        ))  # fmt: skip
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    caplog.set_level(logging.INFO, "dbtrain")
    whole, parts = made("whole", None), made("parts", gib)
    assert caplog.text.count("groups of layers") == 2, "the class prompt, then the table"
    assert [name for name in whole if parts[name] != whole[name]] == ["manifest.json"], "it has the folder"
    encoded.clear()
    assert made("parts", None) == parts and not encoded


def test_running_again_does_no_work(make: Make, photo_dir: Path, encoded: list[str]) -> None:
    cfg = make(prepare__photos=str(photo_dir))
    folder = prepare(cfg)
    assert len(encoded) == 4 + 8
    before = snapshot(folder)
    encoded.clear()
    prepare(cfg)
    assert not encoded
    assert snapshot(folder) == before


def test_a_changed_photo_is_the_only_one_encoded(make: Make, photo_dir: Path, encoded: list[str]) -> None:
    cfg = make(prepare__photos=str(photo_dir))
    folder = prepare(cfg)
    before = snapshot(folder)
    encoded.clear()
    draw_photo(photo_dir / "2.png", 9)
    prepare(cfg)
    assert encoded == ["2.png"]
    after = snapshot(folder)
    assert {name for name in after if name.startswith("class")} <= before.keys()
    assert len(Manifest.read(at(folder)).roles["instance"]) == 1


def test_replaced_shards_stay_until_the_next_change(make: Make, photo_dir: Path) -> None:
    """A run may be reading them."""
    cfg = make(prepare__photos=str(photo_dir), prepare__class_prompt=None)
    folder = prepare(cfg)
    (old,) = Manifest.read(at(folder)).roles["instance"]
    before = [row.meta for row in shards.read(at(folder), old)]
    draw_photo(photo_dir / "2.png", 9)
    for _ in range(2):  # a call that changes nothing deletes nothing
        prepare(cfg)
        assert [row.meta for row in shards.read(at(folder), old)] == before
    draw_photo(photo_dir / "2.png", 8)
    prepare(cfg)
    assert not (folder / old.file).exists() and len(list(folder.glob("instance-*"))) == 2


def test_a_new_and_a_removed_photo(make: Make, photo_dir: Path, encoded: list[str]) -> None:
    cfg = make(prepare__photos=str(photo_dir), prepare__class_prompt=None)
    folder = prepare(cfg)
    encoded.clear()
    draw_photo(photo_dir / "9.png", 9)
    (photo_dir / "0.png").unlink()
    prepare(cfg)
    assert encoded == ["9.png"]
    assert sorted(row.meta["source"] for row in rows(folder, "instance")) == [
        "1.png",
        "2.png",
        "3.png",
        "9.png",
    ]


def test_a_changed_prompt_encodes_no_image(make: Make, photo_dir: Path, encoded: list[str]) -> None:
    folder = prepare(make(prepare__photos=str(photo_dir)))
    before = {name: stat for name, stat in snapshot(folder).items() if name.endswith(".tar")}
    encoded.clear()
    prepare(make(prepare__photos=str(photo_dir), prepare__instance_prompt="a picture of xyz dog"))
    assert not encoded
    assert Manifest.read(at(folder)).prompts.texts[0] == "a picture of xyz dog"
    assert {name: stat for name, stat in snapshot(folder).items() if name.endswith(".tar")} == before


def test_a_changed_crop_encodes_the_photos_only(make: Make, photo_dir: Path, encoded: list[str]) -> None:
    prepare(make(prepare__photos=str(photo_dir), prepare__class_prompt=None))
    encoded.clear()
    folder = prepare(make(prepare__photos=str(photo_dir), prepare__class_prompt=None, prepare__flip=True))
    assert len(encoded) == 4  # the mirrored ones
    assert len(rows(folder, "instance")) == 8


def test_another_vae_encodes_everything(
    make: Make, photo_dir: Path, tmp_path: Path, encoded: list[str]
) -> None:
    prepare(make(prepare__photos=str(photo_dir), prepare__class_prompt=None))
    encoded.clear()
    model = shutil.copytree(bases.sd(), tmp_path / "model")
    config = model / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.18215", "0.2"))
    prepare(make(prepare__photos=str(photo_dir), prepare__class_prompt=None, model__path=str(model)))
    assert len(encoded) == 4


def test_turning_the_prior_off_drops_the_class_shards(
    make: Make, photo_dir: Path, encoded: list[str]
) -> None:
    folder = prepare(make(prepare__photos=str(photo_dir)))
    encoded.clear()
    prepare(make(prepare__photos=str(photo_dir), prepare__class_prompt=None))
    assert not encoded
    assert list(Manifest.read(at(folder)).roles) == ["instance"]


@pytest.mark.parametrize("harm", ["altered", "removed", "cut"])
def test_a_damaged_shard_is_written_again(make: Make, photo_dir: Path, encoded: list[str], harm: str) -> None:
    cfg = make(prepare__photos=str(photo_dir), prepare__class_prompt=None)
    folder = prepare(cfg)
    good = {name: data for name, (_, data) in snapshot(folder).items()}
    path = next(folder.glob("instance-*"))
    encoded.clear()
    if harm == "removed":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + b"x" if harm == "altered" else data[:-1])
    prepare(cfg)
    assert len(encoded) == 4
    assert {name: data for name, (_, data) in snapshot(folder).items()} == good


def test_an_altered_prompt_table_is_mended(make: Make, photo_dir: Path) -> None:
    cfg = make(prepare__photos=str(photo_dir), prepare__class_prompt=None)
    folder = prepare(cfg)
    path = next(folder.glob("prompts-*"))
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    prepare(cfg)
    assert path.read_bytes() == good


def test_what_a_killed_prepare_left_is_used(make: Make, photo_dir: Path, encoded: list[str]) -> None:
    cfg = make(prepare__photos=str(photo_dir), prepare__class_prompt=None)
    folder = prepare(cfg)
    (folder / "manifest.json").unlink()  # it is written last
    half = folder / ".instance-00000-0123456789ab.tar.7.tmp"
    half.write_bytes(b"half")
    encoded.clear()
    prepare(cfg)
    assert not encoded
    assert not half.exists()


def test_other_people_s_files_are_left_alone(make: Make, photo_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("mine-00000.tar", "instance-notes.tar", "prompts-old.safetensors"):
        (tmp_path / "shards" / name).write_text("mine")
    folder = prepare(make(prepare__photos=str(photo_dir), prepare__class_prompt=None))
    assert (folder / "mine-00000.tar").exists()
    assert (folder / "instance-notes.tar").exists()
    assert (folder / "prompts-old.safetensors").exists()


def test_captions_give_each_photo_its_prompt(make: Make, photo_dir: Path) -> None:
    for number in range(4):
        (photo_dir / f"{number}.txt").write_text(f"a photo of sks dog, number {number % 2}\n")
    folder = prepare(make(prepare__photos=str(photo_dir), prepare__class_prompt=None, prepare__captions=True))
    texts = Manifest.read(at(folder)).prompts.texts
    assert texts == ("a photo of sks dog, number 0", "a photo of sks dog, number 1")
    for row in rows(folder, "instance"):
        assert row.meta["prompt"] == int(row.meta["source"][0]) % 2


def test_random_variants_are_stored_with_their_crops(make: Make, photo_dir: Path) -> None:
    folder = prepare(
        make(prepare__photos=str(photo_dir), prepare__class_prompt=None, prepare__crop="random",
             prepare__variants=4)
    )  # fmt: skip
    stored = rows(folder, "instance")
    assert len(stored) == 16
    assert len({tuple(row.meta["crop"]) for row in stored}) > 4


AS_PICTURES = pytest.mark.parametrize("pictures", [False, True], ids=["latents", "pictures"])


@AS_PICTURES
def test_class_images_are_kept_and_shared(
    make: Make, photo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: bool
) -> None:
    """Once complete, they are only read: others' may be read-only."""
    settings = {"prepare__photos": str(photo_dir), "prepare__class_dir": str(tmp_path / "mine"),
                "prepare__class_pictures": pictures}  # fmt: skip
    prepare(make(**settings))
    (folder,) = (tmp_path / "mine").iterdir()
    made = snapshot(folder)

    def never(*args: object) -> None:
        raise AssertionError("the class images are there already")

    monkeypatch.setattr(class_images.sampler, "build", never)
    prepare(make(**settings, data__shards=str(photo_dir.parent / "others")))
    assert snapshot(folder) == made and len(made) == 9


@AS_PICTURES
def test_generation_goes_on_after_a_kill_and_gives_the_same_set(
    make: Make, photo_dir: Path, tmp_path: Path, pictures: bool
) -> None:
    cfg = make(prepare__photos=str(photo_dir), prepare__class_dir=str(tmp_path / "mine"),
               prepare__class_pictures=pictures)  # fmt: skip
    prepare(cfg)
    folder = next(path for path in (tmp_path / "mine").iterdir() if path.is_dir())
    good = {name: data for name, (_, data) in snapshot(folder).items()}
    assert len(good) == 8 + 1
    assert len(set(good.values())) == 9, "every image differs"
    for number in (3, 7):
        (folder / f"{number:05d}.{'png' if pictures else 'safetensors'}").unlink()
    prepare(cfg)
    assert {name: data for name, (_, data) in snapshot(folder).items()} == good


@pytest.mark.parametrize(
    "change",
    [
        {"prepare__class_prompt": "a dog"},
        {"prepare__sampling__steps": 3},
        {"prepare__sampling__guidance": 2.0},
        {"prepare__resolution": 32},
    ],
    ids=str,
)
def test_class_images_are_keyed_by_what_they_depend_on(
    make: Make, photo_dir: Path, tmp_path: Path, change: dict
) -> None:
    settings = {"prepare__photos": str(photo_dir), "prepare__class_dir": str(tmp_path / "mine"),
                "prepare__class_images": 1}  # fmt: skip
    prepare(make(**settings))
    prepare(make(**settings | change))
    assert len([path for path in (tmp_path / "mine").iterdir() if path.is_dir()]) == 2


@AS_PICTURES
def test_your_own_class_images_come_first(
    make: Make, photo_dir: Path, tmp_path: Path, pictures: bool
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for number in range(3):
        draw_photo(mine / f"real{number}.jpg", number)
    folder = prepare(
        make(prepare__photos=str(photo_dir), prepare__class_dir=str(mine), prepare__class_images=5,
             prepare__class_pictures=pictures)
    )  # fmt: skip
    stored = {row.meta["source"]: row.tensors for row in rows(folder, "class")}
    kind = "png" if pictures else "safetensors"
    assert sorted(stored) == [f"00000.{kind}", f"00001.{kind}", "real0.jpg", "real1.jpg", "real2.jpg"]
    encoded = {name for name, tensors in stored.items() if tensors["std"].any()}
    assert encoded == {name for name in stored if not name.endswith("safetensors")}
    folder = prepare(
        make(prepare__photos=str(photo_dir), prepare__class_dir=str(mine), prepare__class_images=2)
    )
    assert sorted(row.meta["source"] for row in rows(folder, "class")) == ["real0.jpg", "real1.jpg"]


@pytest.mark.parametrize("place", ["hub:owner/dogs", "https://example.org/dogs", "dogs.tar"])
def test_class_images_are_in_a_folder(make: Make, photo_dir: Path, place: str) -> None:
    with pytest.raises(ConfigError, match=f"class_dir is '{place}', but class images are in a folder"):
        prepare(make(prepare__photos=str(photo_dir), prepare__class_dir=place))


def test_what_cannot_be_encoded_is_told_before_class_images_are_generated(
    make: Make, photo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_images, "ensure", None)
    whole = (photo_dir / "1.png").read_bytes()
    (photo_dir / "1.png").write_bytes(whole[: len(whole) // 2])
    for name in "012":
        (photo_dir / f"{name}.txt").write_text("a sks dog")
        Image.new("L", (96, 80)).save(photo_dir / f"{name}.mask.png")
    Image.new("L", (96, 80)).save(photo_dir / "3.mask.png")
    Image.new("L", (80, 80)).save(photo_dir / "2.mask.png")
    cfg = make(prepare__photos=str(photo_dir), prepare__captions=True, prepare__mask=True)
    with pytest.raises(ConfigError) as found:
        prepare(cfg)
    first, second, third = found.value.problems
    assert "cannot read photo" in first and "1.png" in first
    assert "2.mask.png is 80 x 80 px" in second and "3.png has no caption 3.txt" in third
    with pytest.raises(ConfigError, match="/proc"):
        prepare(make(prepare__photos=str(tmp_path / "photos"), data__shards="/proc/shards"))


def test_a_full_disk_ends_the_encoding(
    make: Make, photo_dir: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    cfg = make(prepare__photos=str(photo_dir), prepare__class_prompt=None, prepare__variants=4,
               prepare__crop="random")  # fmt: skip
    monkeypatch.setattr("dbtrain.prepare.prepare.files.write_atomically", full)
    with pytest.raises(ConfigError, match="No space left on device") as found:
        prepare(cfg)
    assert len(found.value.problems) == 1 and 0 < len(encoded) <= 8 < 16


def test_bf16_encodes_close_to_fp32(make: Make, photo_dir: Path) -> None:
    cfg = make(prepare__photos=str(photo_dir), prepare__class_prompt=None)
    exact = {row.meta["source"]: row.tensors["mean"] for row in rows(prepare(cfg), "instance")}
    half = make(prepare__photos=str(photo_dir), prepare__class_prompt=None, prepare__vae_precision="bf16")
    for row in rows(prepare(half), "instance"):
        assert row.tensors["mean"].dtype == torch.float32
        torch.testing.assert_close(row.tensors["mean"], exact[row.meta["source"]], atol=0.05, rtol=0.05)


def test_class_images_and_square_photos_are_stored_once(make: Make, tmp_path: Path) -> None:
    """Random crops of a square are all the same, and class images are many already."""
    folder = tmp_path / "square"
    folder.mkdir()
    draw_photo(folder / "a.png", 1, size=(80, 80))
    shards = prepare(
        make(prepare__photos=str(folder), prepare__crop="random", prepare__variants=5, prepare__flip=True)
    )
    assert len(rows(shards, "instance")) == 2
    assert len(rows(shards, "class")) == 8
