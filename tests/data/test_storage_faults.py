"""What can happen to the files of a run: each harm ends in a clean recovery, or in a line that names it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dbtrain.config import Config
from dbtrain.data import shards
from dbtrain.data.shards import MANIFEST
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime import files, lock
from dbtrain.runtime.errors import ConfigError
from tests.conftest import Make, config_in, thinned, train
from tests.runs import EXPORT

STEPS = 6
Harm = Callable[[Path, Path], object]  # (run folder, shard folder)


class Boom:
    """Leaves a trace if it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (os.environ["BOOM"],)


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def last(run: Path) -> Path:
    return run / "checkpoints" / "step-000004"


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def replaced_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def reshard(folder: Path, data: bytes, **changes: object) -> None:
    """Put other bytes into the first instance shard of a new run, and let the manifest reshard for them."""
    shutil.rmtree(folder.parent / "run")
    manifest = json.loads((folder / MANIFEST).read_text())
    shard = manifest["roles"]["instance"][0]
    (folder / shard["file"]).write_bytes(data)
    shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes
    (folder / MANIFEST).write_text(json.dumps(manifest))


def tar(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def with_member(folder: Path, name: str, data: bytes) -> None:
    """Add a member to a shard; `{key}` in its name is the last row."""
    path = first(folder, "instance-*.tar")
    with tarfile.open(path) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive if m.isfile()]  # type: ignore[union-attr]
    reshard(folder, tar(*members, (name.format(key=members[-1][0].partition(".")[0]), data)))


def escaping(folder: Path) -> None:
    """A manifest whose shard lies outside its folder."""
    path = first(folder, "instance-*.tar")
    shutil.copy(path, folder.parent / "outside.tar")
    reshard(folder, path.read_bytes(), file="../outside.tar")


RECOVERED: dict[str, Harm] = {
    "state cut short": lambda run, _: cut(last(run) / "state.json"),
    "state missing": lambda run, _: (last(run) / "state.json").unlink(),
    "state of another step": lambda run, _: edit(last(run) / "state.json", step=3),
    "state without identity": lambda run, _: edit(last(run) / "state.json", identity=None),
    "state with a list of files": lambda run, _: edit(last(run) / "state.json", files=[]),
    "state that is a pickle": lambda run, _: (last(run) / "state.json").write_bytes(pickle.dumps(Boom())),
    "moments cut short": lambda run, _: cut(last(run) / "optimizer.safetensors"),
    "moments flipped": lambda run, _: flip(last(run) / "optimizer.safetensors"),
    "moments missing": lambda run, _: (last(run) / "optimizer.safetensors").unlink(),
    "adapter flipped": lambda run, _: flip(last(run) / "unet" / "adapter_model.safetensors"),
    "adapter cut short": lambda run, _: cut(last(run) / "unet" / "adapter_model.safetensors"),
    "adapter that is a pickle": lambda run, _: (last(run) / "unet" / "adapter_model.safetensors").write_bytes(
        pickle.dumps(Boom())
    ),
    "adapter's settings altered": lambda run, _: edit(last(run) / "unet" / "adapter_config.json", r=2),
    "checkpoint emptied": lambda run, _: emptied(last(run)),
    "checkpoint that is a file": lambda run, _: replaced_by_a_file(last(run)),
    "all checkpoints damaged": lambda run, _: [
        flip(path / "optimizer.safetensors") for path in (run / "checkpoints").glob("step-*")
    ],
    "a half-written checkpoint": lambda run, _: shutil.copytree(
        last(run), run / "checkpoints" / ".step-000005.tmp"
    ),
    "one that was being replaced": lambda run, _: os.rename(
        last(run), run / "checkpoints" / ".step-000004.old"
    ),
    "metrics spoilt": lambda run, _: (run / "metrics.jsonl").write_bytes(b"\0\xff{\n"),
    "a dead run's lock": lambda run, _: (run / ".lock").write_text('{"pid": 4194305, "token": "x"}'),
    "an empty lock": lambda run, _: (run / ".lock").write_text(""),
    "the folder of checkpoints gone": lambda run, _: shutil.rmtree(run / "checkpoints"),
    "the run folder gone": lambda run, _: shutil.rmtree(run),
    "a pickle in a shard": lambda _, folder: with_member(folder, "{key}.pyd", pickle.dumps(Boom())),
}
REFUSED: dict[str, tuple[Harm, str]] = {
    "shard missing": (lambda _, f: first(f, "class-*.tar").unlink(), "is missing; rerun: dbtrain prepare"),
    "shard cut short": (lambda _, f: cut(first(f, "instance-*.tar")), "truncated or altered; rerun"),
    "shard flipped": (lambda _, f: flip(first(f, "instance-*.tar"), 700), "does not match the manifest"),
    "shard that is a folder": (lambda _, f: replaced_by_a_folder(first(f, "class-*.tar")), "is missing"),
    "shard of other rows": (lambda _, f: reshard(f, shards.pack([])), "not match the rows in the manifest"),
    "shard of garbage": (lambda _, f: reshard(f, b"garbage" * 100), "cannot be read|rows in the manifest"),
    "shard with a member that leaves its folder": (
        lambda _, f: with_member(f, "../../../outside.txt", b"x"), "cannot be read"
    ),
    "shard outside the folder": (lambda _, f: escaping(f), "damaged or of another version"),
    "manifest missing": (lambda _, f: (f / MANIFEST).unlink(), "has no manifest.json"),
    "manifest cut short": (lambda _, f: cut(f / MANIFEST), "damaged or of another version"),
    "manifest of no images": (lambda _, f: edit(f / MANIFEST, roles={}), "damaged or of another version"),
    "manifest of another version": (lambda _, f: edit(f / MANIFEST, version=99), "damaged or of another"),
    "prompts missing": (lambda _, f: first(f, "prompts-*").unlink(), "prompt table .* is missing"),
    "prompts flipped": (lambda _, f: flip(first(f, "prompts-*")), "prompt table .* was altered"),
    "prompts that are a pickle": (
        lambda _, f: first(f, "prompts-*").write_bytes(pickle.dumps(Boom())), "prompt table .* was altered"
    ),
    "another subject's shards": (
        lambda _, f: edit(f / MANIFEST, request=json.loads((f / MANIFEST).read_text())["request"]
                          | {"instance_prompt": "a photo of sks cat"}),
        "was made with prepare.instance_prompt",
    ),
    "fewer class images": (lambda _, f: one_class_shard(f), "cannot be continued: data.shards was"),
    "metrics that are a folder": (
        lambda run, _: replaced_by_a_folder(run / "metrics.jsonl"), "Is a directory"
    ),
    "run folder that is a file": (lambda run, _: replaced_by_a_file(run), "Not a directory|File exists"),
}  # fmt: skip


def one_class_shard(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["roles"]["class"] = manifest["roles"]["class"][:1]
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path, class_dir: Path) -> Path:
    """A run of four steps with its shards, and one of six that nothing happened to."""
    home = tmp_path_factory.mktemp("trained")
    cfg = config_in(home, photos, class_dir, train__steps=STEPS)
    prepare(cfg)
    shutil.copytree(train(cfg), home / "whole")
    shutil.rmtree(home / "run")
    train(config_in(home, photos, class_dir, train__steps=4))
    return home


@pytest.fixture
def copied(make: Make, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    for name in ("run", "shards"):
        shutil.copytree(trained / name, tmp_path / name)
    monkeypatch.setenv("BOOM", str(tmp_path / "boom"))
    for name, seconds in (("DEAD_S", 0.1), ("POLL_S", 0.02)):  # no owner of a lock is alive here
        monkeypatch.setattr(lock, name, seconds)
    return make(train__steps=STEPS)


@pytest.mark.parametrize("harm", thinned(RECOVERED.values(), 20), ids=RECOVERED)
def test_a_clean_recovery(copied: Config, tmp_path: Path, trained: Path, harm: Harm) -> None:
    harm(tmp_path / "run", tmp_path / "shards")
    run = train(copied)
    assert (run / EXPORT).read_bytes() == (trained / "whole" / EXPORT).read_bytes()
    assert not (tmp_path / "boom").exists(), "something was unpickled"


@pytest.mark.parametrize(("harm", "told"), REFUSED.values(), ids=REFUSED)
def test_a_clear_refusal(copied: Config, tmp_path: Path, harm: Harm, told: str) -> None:
    harm(tmp_path / "run", tmp_path / "shards")
    before = sorted(path.name for path in (tmp_path / "run").glob("checkpoints/*"))
    with pytest.raises((ConfigError, OSError), match=told):
        train(copied)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoints/*")) == before
    assert not list(tmp_path.parent.rglob("outside.txt"))
    assert not (tmp_path / "boom").exists(), "something was unpickled"


@pytest.mark.parametrize("call", thinned(range(1, 8), 3))
def test_a_disk_that_is_full_at_any_write_of_a_save(
    copied: Config, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    real, calls = files.write, iter(range(1, 100))

    def write(path: Path, data: bytes | str) -> None:
        if "checkpoints" in path.parts and next(calls) == call:
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(files, "write", write)
    try:
        train(copied)
    except ConfigError as problem:
        assert "No space left on device" in str(problem)
        assert (tmp_path / "run" / "checkpoints" / "step-000004" / "state.json").exists()
    monkeypatch.setattr(files, "write", real)
    assert (train(copied) / EXPORT).read_bytes() == (trained / "whole" / EXPORT).read_bytes()


def test_a_config_from_a_stranger_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"):
        path.write_text(f"run_dir: {tag} ['{tmp_path / 'boom'}']\n")
        with pytest.raises(ConfigError, match="is not a valid config"):
            Config.load(path)
    path.write_text("run_dir: x\nmodel: {path: tiny}\ndata: {shards: s}\n")
    call = f"!!python/object/apply:os.mkdir ['{tmp_path / 'boom'}']"
    with pytest.raises(ConfigError, match="the value is not valid YAML"):
        Config.load(path, [f"train.steps={call}"])
    assert Config.load(path, [f"run_dir={call}"]).run_dir == call, "text is never read as YAML"
    assert not (tmp_path / "boom").exists()
