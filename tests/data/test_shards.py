"""Shards: the same rows give the same bytes, any WebDataset reader opens them, harm is found."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset as wds

from dbtrain.data import shards
from dbtrain.data.shards import Manifest, Row
from dbtrain.runtime.errors import ConfigError
from tests.conftest import at


def rows(count: int) -> list[Row]:
    source = torch.Generator().manual_seed(0)

    def latents() -> dict[str, torch.Tensor]:
        return {name: torch.randn(4, 2, 2, generator=source) for name in ("mean", "std")}

    return [Row(latents(), {"key": f"{number}", "prompt": number}) for number in range(count)]


def stored(folder: Path, data: bytes) -> shards.Shard:
    import hashlib

    (folder / "s.tar").write_bytes(data)
    return shards.Shard(
        file="s.tar", bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), keys=("0", "1", "2")
    )


def test_rows_come_back_bit_for_bit(tmp_path: Path) -> None:
    written = rows(3)
    read = shards.read(at(tmp_path), stored(tmp_path, shards.pack(written)))
    assert [row.meta for row in read] == [row.meta for row in written]
    for one, other in zip(read, written, strict=True):
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in other.tensors)


def test_the_same_rows_give_the_same_bytes() -> None:
    assert shards.pack(rows(3)) == shards.pack(rows(3))


def test_a_plain_webdataset_reader_opens_real_shards(prepared: Path) -> None:
    paths = sorted(map(str, prepared.glob("*.tar")))
    samples = list(wds.WebDataset(paths, shardshuffle=False))
    keys = [sample["__key__"] for sample in samples]
    assert len(set(keys)) == len(keys) == 13, "keys tell rows of mixed shards apart"
    for sample in samples:
        tensors = safetensors.torch.load(sample["safetensors"])
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {"mean": (4, 8, 8), "std": (4, 8, 8)}
        assert len(json.loads(sample["json"])["original_size"]) == 2


@pytest.mark.parametrize("harm", ["missing", "short", "flipped", "not a tar"])
def test_harm_is_named_with_its_cure(tmp_path: Path, harm: str) -> None:
    data = shards.pack(rows(3))
    shard = stored(tmp_path, b"x" * 2000 if harm == "not a tar" else data)
    path = tmp_path / "s.tar"
    if harm == "missing":
        path.unlink()
    if harm == "short":
        path.write_bytes(data[:-1])
    if harm == "flipped":
        path.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    with pytest.raises(ConfigError, match=r"s\.tar .*rerun: dbtrain prepare"):
        shards.read(at(tmp_path), shard)


@pytest.mark.parametrize("change", [{"flavour": "new"}, {"version": 2}], ids=str)
def test_a_manifest_of_another_version_is_refused(
    prepared: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    """Version 1 has colors that were read without their profile."""
    text = json.loads((prepared / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(text | change))
    with pytest.raises(ConfigError, match="another version"):
        Manifest.read(at(tmp_path))


def test_every_missing_file_is_listed_at_once(prepared: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(at(prepared))
    with pytest.raises(ConfigError) as caught:
        manifest.check_files(at(tmp_path))
    assert len(caught.value.problems) == sum(len(every) for every in manifest.roles.values()) + 1


def test_a_tar_holds_nothing_of_the_machine_it_was_made_on() -> None:
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(shards.pack(rows(1)))) as tar:
        assert {(member.mtime, member.uname, member.gname) for member in tar} == {(0, "", "")}
