"""The wheel and the sdist hold what they should, and an installed wheel works outside the checkout."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import dbtrain
from dbtrain.prepare import init
from tests.conftest import ROOT, draw_photo

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("package")]
BUILDER = ("build.py", "fit.py", "measure.py", "parts.py", "model_readme.md")  # of the embedded base


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, made by the build backend that pyproject.toml names."""
    folder = tmp_path_factory.mktemp("dist")
    backend = "import sys, hatchling.build as b; b.build_wheel(sys.argv[1]); b.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", backend, folder], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return dist / f"dbtrain-{dbtrain.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel],
        check=True,
    )
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # Folders named by a .pth file come last, and .pth files in them are not read: no editable install.
    (site_packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return python.parent


def call(installed: Path, folder: Path, *args: object) -> str:
    """What `dbtrain ARGS` prints, called in a folder outside the checkout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [installed / "dbtrain", *map(str, args)], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**env, "XDG_CACHE_HOME": str(folder / "cache")},
    )  # fmt: skip
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0
    return done.stdout


def test_the_wheel_holds_the_package_its_data_and_no_builder_code(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path for path in (ROOT / "dbtrain").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert "dbtrain/py.typed" in names
    assert "dbtrain/tiny/judge.safetensors" in names
    assert "dbtrain/tiny/model/unet/diffusion_pytorch_model.safetensors" in names
    assert {f"dbtrain/configs/{example.name}" for example in init.examples().values()} <= names
    assert not names & {f"dbtrain/tiny/{name}" for name in BUILDER}
    info = f"dbtrain-{dbtrain.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"dbtrain", info}


def test_the_wheel_holds_the_launch_scripts_that_init_copies(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("dbtrain/launch/")}
    copied = {path.name for pattern in init.LAUNCH for path in (ROOT / "launch").glob(pattern)}
    assert names == {f"dbtrain/launch/{name}" for name in (*copied, "constraints.txt")}


def test_the_metadata_names_licence_and_version(wheel: Path) -> None:
    info = f"dbtrain-{dbtrain.__version__}.dist-info"
    lines = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode().splitlines()
    assert f"Version: {dbtrain.__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines


def test_the_sdist_holds_what_a_wheel_is_built_from_and_the_tests(dist: Path) -> None:
    top = f"dbtrain-{dbtrain.__version__}"
    with tarfile.open(dist / f"{top}.tar.gz") as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "launch/Dockerfile", "launch/test.sh"} <= names
    assert {"configs/sd15.yaml", "dbtrain/tiny/judge.safetensors", "tests/test_package.py"} <= names
    assert {name.split("/")[0] for name in names if "/" in name} == {
        "benchmarks", "configs", "dbtrain", "docs", "launch", "tests",
    }  # fmt: skip


def test_an_installed_wheel_trains_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    """From photos to an adapter, with the embedded base, in a folder that holds photos only."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        draw_photo(tmp_path / "photos" / f"{number}.jpg", number)
    assert call(installed, tmp_path, "--version").strip() == dbtrain.__version__
    assert "doctor" in call(installed, tmp_path, "--help")
    call(installed, tmp_path, "init", "mug", "photos", "--base", "tiny", "--word", "mug")
    assert (tmp_path / "launch" / "torchrun.sh").is_file()
    few = ["train.steps=2", "prepare.class_images=2", "prepare.sampling.steps=2", "sample.images=1"]
    call(installed, tmp_path, "run", "configs/mug.yaml", *few, "validation.prompts=[]", "sample.steps=2")
    run = tmp_path / "runs" / "mug"
    assert (run / "DONE").is_file()
    assert (run / "export" / "pytorch_lora_weights.safetensors").is_file()
    call(installed, tmp_path, "report", run)
    assert "uPlot" in (run / "report.html").read_text()
