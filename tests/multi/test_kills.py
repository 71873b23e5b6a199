"""kill -9 at random moments of a whole run, then again until it is done: the files are as if undisturbed.

DBTRAIN_KILLS says how many moments are tried (30 before a release, fewer here). From 30 on, every family of
transformers is tried too, else one.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from dbtrain.runtime.run_folder import RunFolder, step_of
from tests import bases
from tests.conftest import Make, Started, dbtrain
from tests.runs import EXPORT, tree

KILLS = int(os.environ.get("DBTRAIN_KILLS", "6"))
TRANSFORMERS = [*bases.FLOW] if KILLS >= 30 else ["z-image"]
SETTINGS = {
    "prepare__class_images": 4, "prepare__sampling__batch": 2, "prepare__sampling__steps": 2,
    "prepare__crop": "random", "prepare__variants": 3, "train__steps": 12, "train__checkpoint_every": 1,
    "train__log_every": 1, "train__keep": 2, "export__formats": ["diffusers", "peft", "kohya"],
}  # fmt: skip


def begin(path: Path, home: Path, ranks: int) -> Started:
    names = ("run_dir", "data.shards", "prepare.class_dir")
    return Started("run", path, *(f"{name}={home / name}" for name in names), ranks=ranks)


def progress(home: Path) -> int:
    """How far a run is, by its files and the lines of its metrics: any number is passed but once."""
    metrics = home / "run_dir" / "metrics.jsonl"
    lines = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    files = [name for folder, _, names in os.walk(home) if "checkpoints" not in folder for name in names]
    return lines + sum(not name.startswith(".") for name in files)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "ranks"), [("tiny", 1), ("tiny", 2), *((name, 1) for name in TRANSFORMERS)])
def test_killed_at_any_moment(make: Make, tmp_path: Path, base: str, ranks: int) -> None:
    model: dict[str, Any] = {}
    if base != "tiny":
        model = {"model__path": str(bases.ALL[base]()), "prepare__resolution": bases.SIDES[base],
                 "export__formats": ["diffusers", "peft", "comfyui"]}  # fmt: skip
    make(**SETTINGS | model)
    path, whole = tmp_path / "c.yaml", tmp_path / "whole"
    assert begin(path, whole, ranks).end()[0] == 0
    moments = random.Random(f"kills {ranks}")
    for number in range((KILLS + 1) // 2 if base == "tiny" else 2):
        home = tmp_path / f"killed{number}"
        moment = moments.randrange(progress(whole) - 2)
        running = begin(path, home, ranks)
        running.wait_for(lambda home=home, moment=moment: progress(home) >= moment)  # type: ignore[misc]
        time.sleep(moments.uniform(0, 0.1))  # into what follows
        running.kill()
        done = begin(path, home, ranks)
        assert done.end()[0] == 0
        assert (home / "run_dir" / "DONE").read_bytes() == (whole / "run_dir" / "DONE").read_bytes()
        assert (home / "run_dir" / EXPORT).read_bytes() == (whole / "run_dir" / EXPORT).read_bytes()
        for folder in ("data.shards", "prepare.class_dir", "run_dir/export"):
            ours, theirs = (
                {k: v for k, v in tree(root / folder).items() if k.endswith((".tar", ".png", ".safetensors"))}
                for root in (home, whole)
            )
            assert ours == theirs
        hidden = [p.name for p in (home / "run_dir" / "checkpoints").iterdir() if p.name.startswith(".")]
        assert not hidden, "what a kill left is gone after the rerun"
        shutil.rmtree(home)


def test_two_runs_in_one_folder(make: Make, tmp_path: Path, prepared: Path) -> None:
    os.symlink(prepared, tmp_path / "shards")
    make(train__steps=100_000, train__checkpoint_every=20)
    first = Started("train", tmp_path / "c.yaml")
    first.wait_for(lambda: (tmp_path / "run" / "checkpoints").exists())
    second = dbtrain("train", tmp_path / "c.yaml")
    assert second.returncode == 2 and "is in use by another run (process" in second.stderr
    assert first.poll() is None, "the first one is not disturbed"
    first.kill()
    newest = max((step_of(path) for path in RunFolder(tmp_path / "run").checkpoints()), default=0)
    again = dbtrain("train", tmp_path / "c.yaml", "--until", newest + 1)
    assert again.returncode == 75, "the lock of a killed run is no obstacle"
    assert not (tmp_path / "run" / ".lock").exists()
