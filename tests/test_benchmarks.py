"""The benchmarks run; the quality benchmark's short version fails if DreamBooth stops working."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import subject_fidelity
from benchmarks.subject_fidelity import Cell
from dbtrain.tiny.score import Scores
from tests.conftest import ROOT

GOOD = Scores(
    likeness_base=0.1, likeness=0.7, likeness_real=0.9, place=0.8, kind=0.9, drift=0.1, drift_base=0.0,
    diversity=0.6, diversity_base=0.7,
)  # fmt: skip
TINY = ["--set", "prepare.class_images=2", "prepare.sampling.steps=2", "sample.steps=1"]


def subject_fidelity_run(*arguments: str | Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *torchrun, "benchmarks/subject_fidelity.py", *map(str, arguments)], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    print(done.stdout, done.stderr, sep="\n")
    return done


@pytest.mark.slow
def test_dreambooth_works(tmp_path: Path) -> None:
    """Photos to scores with the quickstart's settings, on the embedded base."""
    done = subject_fidelity_run("--work", tmp_path, "--smoke")
    assert done.returncode == 0 and "of the way from base to real" in done.stderr


def test_the_short_version_notices_a_dreambooth_that_does_not_work(tmp_path: Path) -> None:
    done = subject_fidelity_run("--work", tmp_path, "--smoke", *TINY, "train.steps=1", "optim.lr=1e-9")
    assert done.returncode == 1
    assert re.search(r"DreamBooth does not work: closed -?0\.\d+ < 0\.5", done.stdout + done.stderr)


def test_table_plot_and_going_on(tmp_path: Path) -> None:
    few = ["--subjects", "ball", "--seeds", "1", "--ranks", "2", "--steps", "1", "2"]
    asked = ["--work", tmp_path / "work", "--out", tmp_path / "out", *few, *TINY]
    assert subject_fidelity_run(*asked).returncode == 0
    rows = json.loads((tmp_path / "out" / "subject_fidelity.json").read_text())
    assert [(row["prior"], row["rank"], row["steps"]) for row in rows] == [
        (prior, rank, steps) for prior, rank in ((True, 16), (False, 16), (True, 2)) for steps in (1, 2)
    ]
    text = (tmp_path / "out" / "subject_fidelity.md").read_text()
    assert "| no | 16 | 2 | 1 |" in text and "| ball |" in text and "torchrun" in text
    assert str(tmp_path) not in text.split("\n\n")[2], "machine, not paths"
    with Image.open(tmp_path / "out" / "subject_fidelity.png") as picture:
        assert picture.width > 1000
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("state.json")}
    assert subject_fidelity_run(*asked, ranks=1).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "trained again"
    assert json.loads((tmp_path / "out" / "subject_fidelity.json").read_text()) == rows


def test_the_published_figures_are_of_class_pictures(tmp_path: Path) -> None:
    cell = subject_fidelity.cells(["mug"], 1, [], 16)[0]
    assert subject_fidelity.settings(cell, tmp_path, [100], []).prepare.class_pictures is True


def test_the_table_averages_over_runs() -> None:
    results = {
        Cell(subject, seed, prior, 8): {
            100: replace(GOOD, place=0.6 + 0.2 * seed, drift=0.1 if prior else 0.6)
        }
        for subject in ("mug", "ball") for seed in (0, 1) for prior in (True, False)
    }  # fmt: skip
    text = subject_fidelity.markdown(results, [100], 8, "command")
    assert "| yes | 8 | 100 | 4 | 0.70 | 75% ± 0 | 70% ± 12 | 90% ± 0 | 10% ± 0 | 0.60 |" in text
    assert "| mug | 0.10 | 0.70 | 0.90 | 75% ± 0 | 70% ± 14 | 10% ± 0 | 60% ± 0 |" in text


def test_the_memory_benchmark_finds_predictions_right(tmp_path: Path) -> None:
    from benchmarks.common import Result

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--smoke", "--out", str(tmp_path)], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0
    (file,) = tmp_path.glob("*.json")
    rows = Result.read(file).rows
    assert len(rows) == 2 and "| fp32 |" in done.stdout
    for row in rows:
        told, seen = (float(row.counts[f"{kind}, MiB"] or 0) for kind in ("predicted", "measured"))
        assert abs(told / seen - 1) < 0.1
