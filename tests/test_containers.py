"""The container files, as far as can be seen without a builder: what they copy, and what they run.

No image is built here.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, its arguments) of the Dockerfile, in order."""
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", "")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line]


def definition() -> dict[str, list[str]]:
    """The lines of each section of the Apptainer file; the head is section ''."""
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for line in (LAUNCH / "dbtrain.def").read_text().splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            sections[name] = []
        elif line.strip() and not line.startswith("#"):
            sections[name].append(line.strip())
    return sections


def copied() -> list[tuple[str, str]]:
    """(source, target) of each file or folder that the Dockerfile copies."""
    found = []
    for words in (arguments.split() for instruction, arguments in dockerfile() if instruction == "COPY"):
        *sources, target = words
        found += [(one, f"{target}{one}" if target.endswith("/") else target) for one in sources]
    return found


def commands() -> list[str]:
    """Every command that the Dockerfile runs, one by one."""
    runs = [arguments for instruction, arguments in dockerfile() if instruction == "RUN"]
    return [" ".join(command.split()) for run in runs for command in run.split("&&")]


def staged(folder: Path) -> Path:
    """A folder with what the Dockerfile copies into the image, and nothing else."""
    for source, target in copied():
        place = folder / target
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / source, place)
    return folder


def test_what_is_copied_exists_and_is_in_the_build_context() -> None:
    ignore = [
        line for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line[0] != "#"
    ]
    assert ignore[0] == "*"
    for source, _ in copied():
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in ignore, source
    for line in ignore:
        assert not line.startswith("!") or (ROOT / line[1:]).exists(), line


def test_both_images_have_the_same_base_files_and_commands() -> None:
    sections = definition()
    assert f"From: {dict(dockerfile())['FROM']}" in sections[""]
    pairs = dict(line.split() for line in sections["files"])
    assert all(target == f"/src/{source}" and (ROOT / source).exists() for source, target in pairs.items())
    assert pairs.keys() == {source for source, _ in copied()} - {
        "launch/constraints.txt"
    }  # a layer of its own
    assert [line for line in sections["post"] if line != "cd /src"] == [
        command for command in commands() if not command.startswith("useradd")
    ]


def test_the_image_starts_dbtrain_as_a_plain_user() -> None:
    last = dict(dockerfile())
    assert json.loads(last["ENTRYPOINT"]) == ["dbtrain"]
    assert any(command.startswith("useradd") and command.endswith(last["USER"]) for command in commands())
    assert definition()["runscript"] == ['exec dbtrain "$@"']


def test_versions_are_pinned_and_none_is_of_a_build_without_cuda() -> None:
    pins = [
        line for line in (LAUNCH / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    ]
    for pin in pins:
        assert re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"[\d.]+\")?", pin), "no local version"
    assert any(pin.startswith("torch==") for pin in pins)
    for command in commands():
        if command.startswith("pip install"):
            assert "--constraint launch/constraints.txt" in command


def test_the_commands_are_valid_shell() -> None:
    sections = definition()
    parts = ["\n".join(sections[name]) for name in ("post", "environment", "runscript", "test")]
    for script in [*commands(), *(f"set -e\n{part}" for part in parts)]:  # Apptainer's shell has -e set
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--shell=sh", "-"], input=script, text=True, check=True)


@pytest.mark.slow
def test_the_copied_files_suffice_for_the_last_pip_command_without_dependencies(tmp_path: Path) -> None:
    """Runs it where only the copied files are, with this environment's build backend and no index."""
    source = staged(tmp_path / "src")
    last = [command for command in commands() if command.startswith("pip install")][-1]
    subprocess.run(
        [sys.executable, "-m", *shlex.split(last), "--no-deps", "--no-build-isolation", "--no-index",
         "--target", tmp_path / "installed"],
        cwd=source, check=True,
    )  # fmt: skip
    assert (tmp_path / "installed" / "dbtrain" / "launch" / "torchrun.sh").is_file()
    assert (tmp_path / "installed" / "bin" / "dbtrain").is_file()
