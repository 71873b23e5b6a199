"""Photos from tables, WebDataset tars and the Hub: the same bytes and captions, in a folder, once."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dbtrain.data import captions, masks, photos, unpack
from dbtrain.data.sources import Source
from dbtrain.runtime.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(number: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (number * 40 % 256, 100, 50)).save(data, kind)
    return data.getvalue()


PICTURES = [picture(0), picture(1, "JPEG"), picture(2, "WEBP")]
TEXTS = ["a sks dog", "a dog, running", "ein Hund, größer"]


def members(path: Path, every: dict[str, bytes]) -> Path:
    """A tar of files."""
    with tarfile.open(path, "w") as tar:
        for name, data in every.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def files(folder: Path) -> list[Path]:
    (folder / "images").mkdir()
    paths = [folder / f"images/{number}.{kind}" for number, kind in enumerate(("png", "jpg", "webp"))]
    for path, data in zip(paths, PICTURES, strict=True):
        path.write_bytes(data)
    return paths


def as_csv(folder: Path) -> str:
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        table.writerows(
            (path.relative_to(folder), text) for path, text in zip(files(folder), TEXTS, strict=True)
        )
    return str(folder / "metadata.csv")


def as_lines(folder: Path) -> str:
    rows = zip(files(folder), TEXTS, strict=True)
    lines = [json.dumps({"file_name": str(path.relative_to(folder)), "words": text}) for path, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return f"{folder / 'metadata.jsonl'}?caption=words"


def as_parquet(folder: Path, name: str = "a.parquet") -> str:
    arrow = pytest.importorskip("pyarrow")
    images = [{"bytes": data, "path": f"x/{number}"} for number, data in enumerate(PICTURES)]
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"image": images, "text": TEXTS}), folder / name)
    return str(folder / name)


def as_bytes(folder: Path) -> str:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"photo": PICTURES, "prompt": TEXTS}), folder / "b.parquet")
    return str(folder / "b.parquet")


def as_tars(folder: Path) -> str:
    members(folder / "a-000.tar", {"x/0.png": PICTURES[0], "x/0.txt": TEXTS[0].encode(), "x/0.pkl": b"bad"})
    members(folder / "a-001.tar", {
        "1.json": json.dumps({"caption": TEXTS[1]}).encode(), "1.jpg": PICTURES[1], "1.pyd": b"bad",
        "2.webp": PICTURES[2], "2.txt": TEXTS[2].encode(),
    })  # fmt: skip
    return str(folder / "a-{000..001}.tar")


def as_url(folder: Path) -> str:
    pytest.importorskip("fsspec")
    members(folder / "a.tar", {name: data for k in range(3) for name, data in (
        (f"{k}.png", PICTURES[k]), (f"{k}.txt", TEXTS[k].encode()))})  # fmt: skip
    return f"file://{folder}/a.tar"


KINDS: dict[str, Callable[[Path], str]] = {
    "csv": as_csv, "jsonl": as_lines, "parquet": as_parquet, "parquet of bytes": as_bytes, "tars": as_tars,
    "url": as_url,
}  # fmt: skip


def unpacked(text: str) -> list[Path]:
    source = Source.of(text)
    assert source
    source.ensure()
    return photos.find(text, "prepare.photos")


@pytest.mark.parametrize("kind", KINDS)
def test_the_photos_are_the_same_bytes_with_their_captions(tmp_path: Path, kind: str) -> None:
    found = unpacked(KINDS[kind](tmp_path))
    assert [path.read_bytes() for path in found] == PICTURES
    assert [path.suffix for path in found] == [".png", ".jpg", ".webp"]
    assert [captions.captions(path, False)[0] for path in found] == TEXTS
    assert {path.name.partition(".")[2] for path in found[0].parent.iterdir()} == {
        "png",
        "jpg",
        "webp",
        "txt",
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_masks_beside_a_table_s_pictures_come_along(tmp_path: Path, kind: str) -> None:
    """Of every way to have one; a mask that is edited makes it another source."""
    text, folder = KINDS[kind](tmp_path), tmp_path / "images"
    (folder / "masks").mkdir()
    drawn = {0: "0.mask.png", 1: "masks/1.png"}
    for number, name in drawn.items():
        Image.new("L", (16, 12), 100 + number).save(folder / name)
    found = unpacked(text)
    assert [path.read_bytes() for path in found] == PICTURES, "masks are no photos"
    for number, name in drawn.items():
        mask = masks.file_of(found[number])
        assert mask and mask.read_bytes() == (folder / name).read_bytes()
    assert masks.file_of(found[2]) is None
    Image.new("L", (16, 12), 7).save(folder / drawn[0])
    source = Source.of(text)
    assert source and source.has_changed()


def test_a_mask_outside_a_table_s_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    text = as_csv(tmp_path / "in")
    Image.new("L", (16, 12)).save(tmp_path / "private.png")
    (tmp_path / "in/images/0.mask.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(ConfigError, match=r"names 'images/0\.mask\.png', which is outside"):
        unpacked(text)


def test_a_data_set_of_the_hub_is_read_with_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "owner/dogs").mkdir(parents=True)
    as_parquet(tmp_path, "owner/dogs/train.parquet")
    monkeypatch.chdir(tmp_path)  # where the library finds a folder of this name, as it finds one of its cache
    found = unpacked("hub:owner/dogs?split=train&caption=text")
    assert [path.read_bytes() for path in found] == PICTURES
    assert [captions.captions(path, False)[0] for path in found] == TEXTS
    with pytest.raises(ConfigError, match=r"cannot read 'hub:owner/dogs'"):
        unpacked("hub:owner/dogs?split=nope")
    with pytest.raises(ConfigError, match=r"no column 'x'; add \?image=NAME to it, with one of: image, text"):
        unpacked("hub:owner/dogs?image=x")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ConfigError, match=r"needs pyarrow; run: pip install 'dbtrain\[tables\]'"):
        unpacked(str(tmp_path / "a.parquet"))
    with pytest.raises(ConfigError, match=r"needs datasets; run: pip install 'dbtrain\[datasets\]'"):
        unpacked("hub:owner/dogs")


def test_it_is_unpacked_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = as_csv(tmp_path)
    source = Source.of(text)
    assert source and not source.has_changed()
    with pytest.raises(ConfigError, match=r"has not been unpacked as it is now; run: dbtrain prepare"):
        photos.find(text, "prepare.photos")
    first = unpacked(text)
    monkeypatch.setattr(unpack, "write", pytest.fail)
    assert unpacked(text) == first and not source.has_changed()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images/1.jpg").write_bytes(picture(9))
    assert source.has_changed()
    second = unpacked(text)
    assert [path.read_bytes() for path in second] == [PICTURES[0], picture(9), PICTURES[2]]
    assert not first[0].exists(), "what it was before is removed"


def test_a_killed_run_goes_on_with_the_tar_that_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = as_tars(tmp_path)
    opened: list[str] = []
    real = unpack._opened

    def stopping(name: str) -> Any:
        opened.append(name[-7:])
        if len(opened) == 2:
            raise KeyboardInterrupt
        return real(name)

    monkeypatch.setattr(unpack, "_opened", stopping)
    with pytest.raises(KeyboardInterrupt):
        unpacked(text)
    with pytest.raises(ConfigError, match="has not been unpacked"):
        photos.find(text, "prepare.photos")
    assert [path.read_bytes() for path in unpacked(text)] == PICTURES
    assert opened == ["000.tar", "001.tar", "001.tar"]


def link(folder: Path) -> str:
    with tarfile.open(folder / "a.tar", "w") as tar:
        about = tarfile.TarInfo("a.png")
        about.type, about.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(about)
    return str(folder / "a.tar")


def bomb(folder: Path) -> str:
    """A header that promises 2 GB."""
    about = tarfile.TarInfo("a.png")
    about.size = 2 << 30
    (folder / "a.tar").write_bytes(about.tobuf() + bytes(1024))
    return str(folder / "a.tar")


def outside(folder: Path) -> str:
    (folder / "in").mkdir()
    (folder / "private.png").write_bytes(PICTURES[0])
    (folder / "in/a.csv").write_text("image\n../private.png\n")
    return str(folder / "in/a.csv")


def linked(folder: Path) -> str:
    text = outside(folder)
    (folder / "in/b.png").symlink_to(folder / "private.png")
    (folder / "in/a.csv").write_text("image\nb.png\n")
    return text


def written(name: str, data: str) -> Callable[[Path], str]:
    return lambda folder: str(folder / name) if (folder / name).write_text(data) else ""


BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "traversal": (lambda f: str(members(f / "a.tar", {"../a.png": PICTURES[0]})), "a path out of its folder"),
    "absolute": (lambda f: str(members(f / "a.tar", {"/a.png": PICTURES[0]})), "a path out of its folder"),
    "link": (link, "which is not a plain file"),
    "bomb": (bomb, r"a\.png' of 2[\d.]* Gi?B; a picture has at most"),
    "outside": (outside, r"row 0 of a\.csv names '\.\./private\.png', which is outside"),
    "linked": (linked, r"names 'b\.png', which is outside"),
    "no column": (written("a.csv", "x,y\n1,2\n"), r"add \?image=NAME to it, with one of: x, y"),
    "no file": (written("a.csv", "image\nb.png\n"), r"names 'b\.png', which is not a file"),
    "no JSON": (written("a.jsonl", "{"), r"cannot read line 1 of .*a\.jsonl"),
    "no tar": (written("a.tar", "no tar"), r"a\.tar' cannot be read"),
    "nothing": (lambda f: str(members(f / "a.tar", {"a.txt": b"a"})), "has no photos"),
    "no picture": (lambda f: str(members(f / "a.tar", {"a.png": b"a"})), "has no photos"),
    "no such URL": (lambda f: f"file://{f}/b.tar", r"b\.tar' cannot be read: .*No such file"),
    "misspelled": (lambda f: str(members(f / "a.tar", {"a.png": PICTURES[0], "a.txt": b"caf\xe9"})),
                   r"caption a\.txt is not UTF-8 \(in Windows-1252 it reads 'café'\)"),
    "missing": (lambda f: str(f / "a.tar"), "does not exist"),
    "option": (lambda f: f"{f}/a.csv?imge=x", "has the option 'imge'; known are: image, caption"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_a_source_must_not_have_is_refused(tmp_path: Path, name: str) -> None:
    write, said = BAD[name]
    with pytest.raises(ConfigError, match=said):
        unpacked(write(tmp_path))
    assert not list(tmp_path.rglob("cache/**/photos/*.png"))


def test_masks_in_a_tar_lie_beside_their_photos(tmp_path: Path) -> None:
    members(tmp_path / "a.tar", {"0.png": PICTURES[0], "0.mask.png": picture(7), "1.png": PICTURES[1]})
    first, second = unpacked(str(tmp_path / "a.tar"))
    mask = masks.file_of(first)
    assert mask and mask.read_bytes() == picture(7) and masks.file_of(second) is None


def test_captions_in_a_tar_are_read_as_those_in_a_folder(tmp_path: Path) -> None:
    members(tmp_path / "a.tar", {"0.png": PICTURES[0], "0.txt": TEXTS[2].encode("utf-16")})
    (photo,) = unpacked(str(tmp_path / "a.tar"))
    assert captions.captions(photo, False) == (TEXTS[2],)


def test_names_are_made_safe_and_stay_in_order(tmp_path: Path) -> None:
    odd = ["b c/\x1b[2J.png", "ü" * 90 + ".png", "same/x.png", "other/x.png"]
    members(tmp_path / "a.tar", {name: picture(number) for number, name in enumerate(odd)})
    found = unpacked(str(tmp_path / "a.tar"))
    assert [path.read_bytes() for path in found] == [picture(number) for number in range(4)]
    assert all(path.name.isascii() and len(path.name) < 90 for path in found)


def test_a_folder_stays_a_folder(tmp_path: Path) -> None:
    (tmp_path / "dogs.csv").mkdir()
    assert Source.of(str(tmp_path)) is None and Source.of(str(tmp_path / "dogs.csv")) is None
