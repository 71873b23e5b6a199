"""The oldest versions that pyproject.toml allows are ones that work."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_origin

import pytest
from packaging.version import Version

from dbtrain.config import config
from dbtrain.runtime.errors import ConfigError
from tests.conftest import ROOT, Done, dbtrain
from tests.session import once

# Package -> its first version that works, and what the one before does.
FLOORS = {
    "pydantic": ("2.11", "the oldest that was tried on Python 3.10"),
    "transformers": ("5.6", "up to 5.5.4 CLIP's weights are below `text_model.`, so `tiny` is incomplete"),
    "diffusers": ("0.41", "tried with transformers 5.6.0"),
    "huggingface_hub": ("1.32", "diffusers 0.41 needs it"),
    "safetensors": ("0.8", "diffusers 0.41 needs it"),
    "typer": ("0.16", "0.15 ends in a TypeError at `--help` with click 8.2"),
    "webdataset": ("1.0.2", "the first of 1.0"),
    "pillow": ("11.3", "the first whose wheels read AVIF"),
    "pyyaml": ("6.0.1", "the first with wheels for Python 3.12"),
}
TORCHS = ("peft",)  # they require torch, which stays as it is


@pytest.mark.parametrize("package", FLOORS)
def test_the_floor_is_a_version_that_works(package: str) -> None:
    floor, why = FLOORS[package]
    assert Version(declared()[package]) >= Version(floor), why


def declared() -> dict[str, str]:
    """The floor of each package that dbtrain requires."""
    (needed,) = re.findall(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    return dict(re.findall(r'"(\w+)>=([\d.]+)"', needed))


def pip(verb: str, *arguments: str) -> Done:
    line = [sys.executable, "-m", "pip", verb, "--quiet", "--only-binary=:all:", "--retries=0", *arguments]
    return subprocess.run(line, capture_output=True, text=True)


def install(folder: Path) -> None:
    """The floors of all packages but torch, with what they need themselves."""
    pins = {name: f"{name}=={floor}" for name, floor in declared().items() if name != "torch"}
    alone = [pins.pop(name) for name in TORCHS]
    for packages in (pins.values(), ("--no-deps", *alone)):
        done = pip("install", "--no-compile", f"--target={folder}", *packages)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def oldest(tmp_path: Path) -> Path:
    """A folder with the floors, to be first on the path."""
    if sys.version_info >= (3, 13):
        pytest.skip("numpy 2.0 has no wheels for Python 3.13")
    if (tried := pip("download", f"--dest={tmp_path}", "--no-deps", "packaging")).returncode:
        pytest.skip(f"pip reaches no package index: {tried.stderr.strip().splitlines()[-1]}")
    return once("floors", install)


@pytest.mark.slow
def test_the_floors_can_be_installed_together_and_train(oldest: Path, photos: Path, tmp_path: Path) -> None:
    def run(*args: object) -> Done:
        return dbtrain(*args, cold=True, PYTHONPATH=str(oldest))

    done = run("doctor", ROOT / "configs" / "quickstart.yaml", "optim.lrr=1")
    assert done.returncode == 2
    assert done.stdout.startswith("error    config           unknown key 'optim.lrr'\n")
    assert f"diffusers {declared()['diffusers']}" in done.stdout
    assert run("train", "--help").returncode == 0
    folders = {
        "run_dir": "run", "data.shards": "shards", "prepare.class_dir": "class", "prepare.photos": photos
    }  # fmt: skip
    few = ("prepare.class_images", "prepare.sampling.steps", "train.steps", "validation.images",
           "sample.images", "sample.steps")  # fmt: skip
    overrides = [f"{key}={tmp_path / folder}" for key, folder in folders.items()]
    done = run("run", ROOT / "configs" / "quickstart.yaml", *overrides, *(f"{key}=1" for key in few))
    assert done.returncode == 0
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "run" / "samples" / "step-000001" / "sheet.png").is_file()


def test_settings_are_listed_where_a_generic_is_called_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Python 3.10 `isinstance(tuple[str, ...], type)` is true, and `issubclass` then fails."""
    real: Callable[..., bool] = isinstance

    def as_in_3_10(value: Any, kind: Any) -> bool:
        return (kind is type and get_origin(value) is not None) or real(value, kind)

    monkeypatch.setattr(config, "isinstance", as_in_3_10, raising=False)
    with pytest.raises(ConfigError, match=r"did you mean 'train\.steps'"):
        config.Config.from_dict({"run_dir": "r", "data": {"shards": "s"}, "train": {"step": 4}})
