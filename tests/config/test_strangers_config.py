"""A config from a stranger, and folders that would overwrite one another."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import Config
from dbtrain.runtime.errors import ConfigError
from tests.hostile import CODE, Refused

START = "run_dir: r\nmodel: {path: tiny}\ndata: {shards: s}\n"
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "a Python tag": ("run_dir: !!python/object/apply:os.mkdir ['canary']", "not determine a constructor"),
    "a bomb of anchors": (START + BOMB, "has more than 20000 values, or repeats itself"),
    "a list in itself": (START + "seed: &a [*a]", "has more than 20000 values, or repeats itself"),
    "a mapping in itself": (START + "prepare: &a {photos: *a}", "20000 values, or repeats itself"),
    "many values": (START + "sample: {prompts: [" + "x," * 30_000 + "]}", "has more than 20000 values"),
    "deep lists": ("[" * 20_000, "is not a valid config"),
    "deep mappings": ("{a: " * 20_000, "is not a valid config"),
    "a key that is a list": (START + "? [a, b]\n: 1", "the key on line 4 is not text"),
    "a key that is a mapping": (START + "? {a: b}\n: 1", "the key on line 4 is not text"),
    "5,000 digits": (START + "seed: " + "9" * 5000, "is not a valid config"),
    "400 digits": (START + "seed: " + "9" * 400, "seed is 999"),
    "a date that is none": (START + "seed: 2024-99-99", "seed is '2024-99-99'"),
    **{
        f"a {tag} that is none": (START + f"seed: !!{tag} {text}", "line 4 has a value that its tag")
        for tag, text in (("timestamp", "abc"), ("bool", "maybe"), ("float", "''"))
    },
    "a key that is no bool": (START + "!!bool maybe: 1", "line 4 has a value that its tag"),
    "binary that is none": (START + "seed: !!binary 'é'", "is not a valid config"),
    "not UTF-8": (b"run_dir: \xff\xfe", "is not a valid config"),
    "control characters": (START + "prepare: {photos: 'a\x1b[2Jb'}", "is not a valid config"),
    "a megabyte of text": (START + "# " + "x" * 2**21, "has more than 1048576 characters"),
    "no text": ("\x00" * 99, "is not a valid config"),
    "a NUL in a path": ('run_dir: "a\\0b"\nmodel: {path: tiny}\ndata: {shards: s}', "run_dir is 'a"),
    "infinite numbers": (START + "optim: {lr: .inf}", "optim.lr is inf"),
    "ranks of billions": (START + "adapter: {rank: 1000000000}", "adapter.rank is 1000000000"),
    "batches of billions": (START + "train: {global_batch: 1000000000000}", "train.global_batch is"),
    "a side of billions": (
        START + "prepare: {photos: p, instance_prompt: a, resolution: 1000000000}", "prepare.resolution is"
    ),
    "billions of class images": (
        START + "prepare: {photos: p, instance_prompt: a, class_images: 1000000000}", "prepare.class_images"
    ),
    "billions of crops": (
        START + "prepare: {photos: p, instance_prompt: a, crop: random, variants: 1000000000}", "variants is"
    ),
    "a shell command": (START.replace("shards: s", "shards: 'pipe:touch canary'"), "runs a command"),
}  # fmt: skip


def opened(path: Path) -> None:
    from dbtrain.data.shards import Manifest
    from dbtrain.data.storage import Storage

    Manifest.read(Storage(Config.load(path).data.shards))


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_config_is_refused(name: str, tmp_path: Path, refused: Refused) -> None:
    text, told = TEXTS[name]
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "mine.py").write_text(CODE)
    refused(lambda: opened(tmp_path / "c.yaml"), told)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: (path.touch(), os.truncate(path, 2**40)), "has more than 1048576 characters"),
        (Path.mkdir, "cannot read config .* Is a directory"),
    ],
    ids=["FIFO", "endless", "terabyte", "folder"],
)
def test_a_config_that_is_no_text_file_is_refused(
    made: Callable[[Path], Any], told: str, tmp_path: Path, refused: Refused
) -> None:
    made(tmp_path / "c.yaml")
    refused(lambda: Config.load(tmp_path / "c.yaml"), told)


FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "shards are the photos": ({"shards": "photos"}, "data.shards is .*photos, in prepare.photos"),
    "shards in the photos": (
        {"shards": "photos/shards"},
        "shards is .*photos/shards, in prepare.photos",
    ),
    "by a link": ({"shards": "link/shards"}, "shards is .*photos/shards, in prepare.photos"),
    "by ..": ({"shards": "other/../photos"}, "data.shards is .*photos, in prepare.photos"),
    "by file:": ({"shards": "file:photos"}, "data.shards is .*photos, in prepare.photos"),
    "run is the photos": ({"run_dir": "photos"}, "run_dir is .*photos, in prepare.photos"),
    "run in the photos": ({"run_dir": "photos/a/b"}, "run_dir is .*photos/a/b, in prepare.photos"),
    "shards are the run": ({"shards": "run"}, "data.shards and run_dir are both .*run; use two folders"),
    "shards are the class images": ({"shards": "class"}, "data.shards is .*class, in prepare.class_dir"),
    "run is the class images": ({"run_dir": "class"}, "run_dir is .*class, in prepare.class_dir"),
    "photos that a run deletes": ({"photos": "run/samples/x"}, "prepare.photos is .*, where a run deletes"),
    "shards that a run deletes": ({"shards": "run/export"}, "data.shards is .*, where a run deletes files"),
    "class images that a run deletes": (
        {"class_dir": "run/validation"},
        "class_dir is .*, where a run dele",
    ),
}


def paths(
    shards: str = "shards", run_dir: str = "run", photos: str = "photos", class_dir: str = "class"
) -> dict:
    prepare = {"photos": photos, "instance_prompt": "a", "class_dir": class_dir}
    return {"run_dir": run_dir, "model": {"path": "tiny"}, "prepare": prepare, "data": {"shards": shards}}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_overwrite_one_another_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, told = FOLDERS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to("photos")
    with pytest.raises(ConfigError, match=told) as caught:
        Config.from_dict(paths(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{}, {"shards": "run/shards"}, {"photos": "run/photos"}, {"shards": "s3://bucket/photos"},
     {"run_dir": "."}, {"run_dir": "circle/run"}, {"shards": "class/shards"}, {"shards": "photos-shards"}],
    ids=str,
)  # fmt: skip
def test_folders_that_do_not_are_fine(
    changes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or fail later, in one line, as a folder below a link to itself does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    Config.from_dict(paths(**changes))
