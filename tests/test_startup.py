"""What a start costs, in things that can be counted: modules imported, components loaded, bytes hashed."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dbtrain.models import sampler
from dbtrain.models.base import Base
from dbtrain.runtime import hashing
from dbtrain.runtime.imports import importing
from dbtrain.train.dreambooth import DreamBooth
from tests import bases
from tests.conftest import Make, finished

WEIGHTS = "*.safetensors"


def watched(tmp_path: Path, *args: object, code: int = 0, cold: bool = False) -> dict[str, Any]:
    """What a verb loaded and hashed, with a cache of the test's own; and imported, in a `cold` start."""
    report, cache = tmp_path / "report.json", str(tmp_path / "cache")
    line = [sys.executable, "-m", "tests.probe", str(report), *map(str, args)]
    assert finished(line, cold=cold, XDG_CACHE_HOME=cache).returncode == code
    return json.loads(report.read_text())


def among(modules: list[str], *names: str) -> list[str]:
    """The modules of these packages."""
    return [module for module in modules if any(f"{module}.".startswith(f"{name}.") for name in names)]


def as_in_the_hubs_cache(folder: Path, base: Path) -> Path:
    """A base as the Hub's client keeps it: links to blobs, those of weights named by their sha256."""
    blobs = folder / "models--someone--base" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = blobs.with_name("snapshots") / "main"
    for path in base.rglob("*"):
        if path.is_file():
            kind = hashlib.sha256 if path.match(WEIGHTS) else hashlib.sha1
            blob = blobs / kind(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            link = snapshot / path.relative_to(base)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_help_imports_none_of_the_big_libraries(tmp_path: Path) -> None:
    found = watched(tmp_path, "--help", cold=True)
    big = ("torch", "numpy", "pydantic", "yaml", "diffusers", "transformers", "peft", "huggingface_hub")
    assert among(found["modules"], *big) == []


def test_a_verb_says_what_begins_before_it_imports_torch(make: Make, tmp_path: Path) -> None:
    cfg, path = make(), tmp_path / "c.yaml"
    code = "import sys; sys.modules['torch'] = None; from dbtrain.__main__ import app; app()"
    for rank, lines in (
        ("0", [f"dbtrain train: {path}, run folder {cfg.run_dir}; loading libraries"]),
        ("1", []),
    ):
        done = finished([sys.executable, "-c", code, "train", str(path)], cold=True, RANK=rank)
        assert "import of torch halted" in done.stderr
        assert done.stderr.partition("Traceback")[0].splitlines() == lines


def test_loading_is_announced_before_it_begins(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = make(prepare__class_images=1, adapter__text_encoder={"rank": 2})
    monkeypatch.setattr(Base, "load", lambda base, *_: pytest.fail(caplog.messages[-1]))
    with caplog.at_level("INFO", "dbtrain"):
        base = Base.find(cfg.model)
        with pytest.raises(pytest.fail.Exception, match=r"^loading unet, vae, text_encoder of "):
            sampler.build(base, torch.float32, torch.device("cpu"))
        with pytest.raises(pytest.fail.Exception, match=r"^loading unet, text_encoder of "):
            DreamBooth.build(base, None, {}, cfg)


def test_a_checksum_that_takes_long_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hashing, "SMALL", 10)
    monkeypatch.setattr(hashing, "LARGE", 100)
    for size in (100, 101):
        (tmp_path / str(size)).write_bytes(bytes(size))
    with caplog.at_level("INFO", "dbtrain"):
        for size in (100, 101):
            hashing.cached_sha256_of(tmp_path / str(size))
    assert caplog.messages == [f"reading {tmp_path / '101'} (101 bytes) for its checksum"]


def test_shards_that_are_up_to_date_take_no_model_library(make: Make, prepared: Path, tmp_path: Path) -> None:
    make(data__shards=str(prepared))
    found = watched(tmp_path, "prepare", tmp_path / "c.yaml", cold=True)
    assert found["loaded"] == []
    assert among(found["modules"], "diffusers", "transformers", "peft", "tensorboard") == []


@pytest.mark.slow
def test_training_needs_no_weights_but_the_denoisers(make: Make, prepared: Path, tmp_path: Path) -> None:
    base = as_in_the_hubs_cache(tmp_path, bases.sd())
    for part in ("vae", "text_encoder"):
        for path in (base / part).glob(WEIGHTS):
            path.resolve().unlink()
    make(data__shards=str(prepared), model__path=str(base), train__steps=1)
    found = watched(tmp_path, "train", tmp_path / "c.yaml", cold=True)
    assert found["loaded"] == ["unet"]
    assert found["hashed"] == {}
    assert among(found["modules"], "diffusers.pipelines", "transformers.models.clip", "matplotlib") == []
    vaes = [name for name in found["modules"] if "autoencoder" in name]
    assert vaes == []


def test_trained_text_encoders_are_loaded_and_no_more(make: Make, prepared: Path, tmp_path: Path) -> None:
    make(data__shards=str(prepared), adapter__text_encoder={"rank": 2}, train__steps=1)
    assert watched(tmp_path, "train", tmp_path / "c.yaml")["loaded"] == ["unet", "text_encoder"]


def test_the_second_start_hashes_no_weights(make: Make, prepared: Path, tmp_path: Path) -> None:
    base = shutil.copytree(bases.sd(), tmp_path / "base")
    make(data__shards=str(prepared), model__path=str(base))
    first = watched(tmp_path, "train", tmp_path / "c.yaml", "--until", 1, code=75)
    parts = {str(path.relative_to(base)): path.stat().st_size for path in base.rglob(WEIGHTS)}
    assert {str(Path(name).relative_to(base)): size for name, size in first["hashed"].items()} == parts
    second = watched(tmp_path, "train", tmp_path / "c.yaml")
    assert sum(second["hashed"].values()) == 0


@pytest.mark.parametrize("on", [True, False])
def test_imports_leave_garbage_collection_as_it_was(on: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == on
    finally:
        (gc.enable if was else gc.disable)()
