"""Kept hashes: no byte read twice, and never an old hash for a changed file."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from dbtrain.runtime import files, hashing

BYTES = b"0123456789abcdef" * (hashing.SMALL // 16)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read whole, as by a process that knows nothing yet."""
    names: list[str] = []

    def reads(path: Path) -> str:
        names.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(hashing, "sha256_of", reads)
    return names


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights, and a cache of its own; files count as at rest at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "REST_S", -1.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(BYTES)
    return path


def right(path: Path) -> bool:
    return hashing.cached_sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def change_first_byte(path: Path) -> None:
    """Leaves size, inode and time of modification as they are."""
    was = path.stat()
    time.sleep(0.05)  # some ticks of the file system's clock
    with open(path, "r+b") as file:
        file.write(b"X")
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_ino, now.st_mtime_ns) == (was.st_size, was.st_ino, was.st_mtime_ns)


def entries() -> list[Path]:
    return list((files.cache() / "sha256").glob("*.json"))


def test_a_file_is_read_once(weights: Path, read: list[str]) -> None:
    assert right(weights) and right(weights)
    assert read == [weights.name]


def test_a_changed_file_is_never_given_its_old_hash(weights: Path, read: list[str]) -> None:
    assert right(weights)
    was = weights.stat()
    change_first_byte(weights)
    assert right(weights)
    other = weights.with_name("other")
    other.write_bytes(b"Y" + BYTES[1:])
    os.utime(other, ns=(was.st_atime_ns, was.st_mtime_ns))
    other.replace(weights)
    assert right(weights)
    weights.write_bytes(BYTES + b"longer")
    assert right(weights) and right(weights)
    assert len(read) == 4
    assert len(entries()) == 1  # the newest only


def test_the_hash_of_this_process_follows_a_change_with_the_old_times(weights: Path) -> None:
    assert right(weights)
    change_first_byte(weights)
    assert right(weights)


def test_a_link_that_points_elsewhere_is_another_file(weights: Path, read: list[str]) -> None:
    link, other = weights.with_name("link"), weights.with_name("other")
    other.write_bytes(b"Z" + BYTES[1:])
    link.symlink_to(weights)
    assert right(link) and right(weights)
    assert read == [weights.name]
    link.unlink()
    link.symlink_to(other)
    assert right(link)


def test_a_file_that_has_just_changed_is_read_again(
    weights: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "REST_S", 3600.0)  # it may change once more within a tick of the clock
    assert right(weights) and right(weights)
    assert len(read) == 2
    assert not entries()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(path: Path) -> str:
        change_first_byte(path)
        return hashlib.sha256(BYTES).hexdigest()

    with monkeypatch.context() as patch:
        patch.setattr(hashing, "sha256_of", reads)
        hashing.cached_sha256_of(weights)
    assert right(weights)


def _hash_of_another(entry: dict[str, Any]) -> str:
    return json.dumps(entry | {"sha256": "0" * 64})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: "",
        lambda entry: "[1]",
        lambda entry: "5",
        lambda entry: "{}",
        lambda entry: json.dumps(entry)[:-9],
        _hash_of_another,
        lambda entry: "\x00" * 40,
    ],
)
def test_a_damaged_entry_is_made_anew(weights: Path, read: list[str], spoil: Any) -> None:
    assert right(weights)
    (entry,) = entries()
    entry.write_text(spoil(json.loads(entry.read_text())))
    assert right(weights) and right(weights)
    assert len(read) == 2


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    weights: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.with_name("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights.with_name("file")))
    assert right(weights)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home folder")))
    assert right(weights)
    assert len(read) == 2


def hub(tmp_path: Path, data: bytes, name: str) -> Path:
    """A file as the Hub's client keeps it: a link in a snapshot to a blob."""
    blobs = tmp_path / "models--someone--model" / "blobs"
    folder = blobs.with_name("snapshots") / "main" / "unet"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    (blobs / name).write_bytes(data)
    link = folder / "model.safetensors"
    link.symlink_to(os.path.relpath(blobs / name, folder))
    return link


def test_a_large_file_of_the_hub_is_named_by_its_hash(weights: Path, read: list[str]) -> None:
    link = hub(weights.parent, BYTES, hashlib.sha256(BYTES).hexdigest())
    assert right(link)
    assert read == []


def test_a_small_file_of_the_hub_is_named_by_another_hash_and_read(weights: Path, read: list[str]) -> None:
    link = hub(weights.parent, b"{}", "b" * 40)  # git's sha1 of it
    assert right(link)
    assert read == ["b" * 40]


def test_a_name_that_looks_like_a_hash_proves_nothing_elsewhere(weights: Path, read: list[str]) -> None:
    path = weights.with_name("f" * 64)
    path.write_bytes(BYTES)
    assert right(path)
    assert read == [path.name]
