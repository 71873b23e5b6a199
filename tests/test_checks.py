"""launch/test.sh: which checks it makes, and that --quick makes some of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, finished

RECORD = """#!/bin/sh
echo "${0##*/}" "$@" >>"$(dirname "$0")/../../calls"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The script with an environment of programs that only write down how they are called."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("ruff", "mypy", "python"):
        (programs / name).write_text(RECORD)
        (programs / name).chmod(0o755)
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "test.sh", tmp_path / "launch")
    (tmp_path / "launch" / "venv.sh").write_text("")
    return tmp_path


def calls(checkout: Path, *arguments: str, code: int = 0) -> list[str]:
    done = subprocess.run(["bash", "launch/test.sh", *arguments], cwd=checkout)
    assert done.returncode == code
    lines = (checkout / "calls").read_text().splitlines()
    (checkout / "calls").unlink()
    return lines


def test_style_types_and_tests_are_checked_and_arguments_are_pytest_s(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_PROCESSES", "3")
    style = ["ruff check .", "ruff format --check ."]
    pytest_ = "python -m pytest --numprocesses=3 --dist=loadgroup"
    made = calls(checkout, "-k", "lora")
    assert made[:2] == style and sorted(made[2:]) == ["mypy", f"{pytest_} -k lora"]  # side by side
    assert calls(checkout, "--quick", "-x") == [*style, f"{pytest_} -m not slow -x"]
    monkeypatch.delenv("TEST_PROCESSES")
    assert re.search(r"--numprocesses=[1-8] ", "".join(calls(checkout)[2:]))


@pytest.mark.parametrize("program", ["ruff", "mypy", "python"])
def test_a_check_that_fails_fails_all(checkout: Path, program: str) -> None:
    (checkout / ".venv" / "bin" / program).write_text(f"{RECORD}echo what is wrong; exit 3\n")
    done = subprocess.run(["bash", "launch/test.sh"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 3 and "what is wrong" in done.stdout


@pytest.mark.parametrize("more", [[], ["-m", "not slow"]], ids=["all", "quick"])
def test_quick_leaves_out_what_is_slow(more: list[str]) -> None:
    line = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *more]
    done = finished([*line, "tests/multi/test_kills.py"])
    assert done.returncode == 0
    assert "test_two_runs_in_one_folder" in done.stdout
    assert ("test_killed_at_any_moment" in done.stdout) == (not more)
