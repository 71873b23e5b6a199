"""Captions are small text files beside their photos; whatever else has their name is refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dbtrain.data.captions import MOST_BYTES, captions
from dbtrain.runtime.errors import ConfigError


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder / "a.png"


def test_a_caption_is_the_text_beside_its_photo_in_one_line(photo: Path) -> None:
    (photo.parent / "a.txt").write_text("a photo\n of  sks dog \n")
    assert captions(photo, False) == ("a photo of sks dog",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_say_what_they_are_are_read(photo: Path, encoding: str) -> None:
    (photo.parent / "a.txt").write_bytes("a café ☕".encode(encoding))
    assert captions(photo, False) == ("a café ☕",)


def test_windows_names_are_read(photo: Path) -> None:
    (photo.parent / "a.TXT").write_text("a dog")
    assert captions(photo, False) == ("a dog",)


def test_control_characters_are_left_out(photo: Path) -> None:
    (photo.parent / "a.txt").write_text("a \x1b[31mred\x07 dog")
    assert captions(photo, False) == ("a [31mred dog",)


def test_a_link_within_the_folder_is_followed(photo: Path) -> None:
    (photo.parent / "all").write_text("a dog")
    (photo.parent / "a.txt").symlink_to("all")
    assert captions(photo, False) == ("a dog",)


def written(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def beside(name: str) -> Callable[[Path], object]:
    return lambda path: path.with_name(name).write_text("a dog")


def circle(path: Path) -> None:
    path.symlink_to("b.txt")
    path.with_name("b.txt").symlink_to(path.name)


def stolen(path: Path) -> None:
    (path.parents[1] / "id_rsa").write_text("secret")
    path.symlink_to("../id_rsa")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {  # what is planted as a.txt, what is said of it
    "missing": (lambda path: None, r"has no caption a\.txt; add it"),
    "other program": (beside("a.caption"), r"no caption a\.txt, only a\.caption; make it"),
    "whole name": (beside("a.png.txt"), r"no caption a\.txt, only a\.png\.txt; make it"),
    "empty": (written(b" \n"), r"a\.txt is empty; write one"),
    "cp1252": (written("a café".encode("cp1252")), r"not UTF-8 \(in Windows-1252 it reads 'a café'\); save"),
    "UTF-16 cut": (written(b"\xff\xfe\xff"), r"not UTF-8"),
    "UTF-16 without mark": (written("a dog".encode("utf-16-le")), r"has NUL characters.*; save it as UTF-8"),
    "NUL": (written(b"a dog\0rm"), r"has NUL characters"),
    "large": (written(b"dog " * 2_500_000), rf"has 10000000 bytes; shorten it to {MOST_BYTES}"),
    "pipe": (os.mkfifo, r"a\.txt is not a regular file"),
    "folder": (Path.mkdir, r"a\.txt is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), r"links to a file outside its folder"),
    "secret": (stolen, r"links to a file outside its folder"),
    "dangling": (lambda path: path.symlink_to("nothing"), r"a\.txt cannot be read: No such file"),
    "circle": (circle, r"a\.txt cannot be read: (Too many levels|its links)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_caption_is_said(photo: Path, name: str) -> None:
    plant, said = BAD[name]
    plant(photo.parent / "a.txt")
    with pytest.raises(ConfigError, match=said):
        captions(photo, False)
