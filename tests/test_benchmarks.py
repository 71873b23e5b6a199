"""The benchmarks run; the quality benchmark's short version fails if DreamBooth stops working."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError

from benchmarks import bases as random_bases
from benchmarks import (
    choose_settings,
    common,
    data,
    end_to_end,
    flops,
    ladder,
    prior,
    report,
    scaling,
    subject_fidelity,
    throughput,
    watch,
)
from benchmarks.common import Hardware, Measure, Result, Row
from benchmarks.subject_fidelity import Cell
from dbtrain.config import Adapter, Model
from dbtrain.evaluate.tiny_judge import JudgeScores
from dbtrain.models.base import Base
from dbtrain.runtime import console
from tests import bases
from tests.conftest import ROOT

GOOD = JudgeScores(
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


def test_what_each_setting_does_is_told_change_by_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_settings, "STEPS", (1, 2))
    names = ["rank 4", "3 photos"]
    asked = ["--work", str(tmp_path / "work"), "--subjects", "mug", "--changes", *names, *TINY]
    monkeypatch.setattr(sys, "argv", ["choose_settings", *asked])
    choose_settings.main()
    rows = json.loads((tmp_path / "work" / "settings.json").read_text())
    assert [(row["change"], row["steps"]) for row in rows] == [
        (name, step) for name in names for step in (1, 2)
    ]
    assert len(list((tmp_path / "work" / "photos-mug-3").iterdir())) == 3
    config = (tmp_path / "work" / "mug-rank-4" / "config.yaml").read_text()
    assert yaml.safe_load(config)["adapter"]["rank"] == 4
    text = (tmp_path / "work" / "settings.md").read_text()
    assert "| 3 photos | 2 |" in text and text.count("| rank 4 |") == 2


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


SMOKE = {
    throughput: ("throughput-tiny-cpu", "samples"), ladder: ("ladder-tiny-batch1-cpu-memory", "speed-up"),
    data: ("data-cpu", "data wait"), scaling: ("scaling-tiny-cpu", "CPU a sample"),
    end_to_end: ("end_to_end-tiny-cpu", "photos to adapter"), prior: ("prior-tiny-cpu", "class images"),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke runs are for CPUs")
@pytest.mark.parametrize("script", SMOKE, ids=lambda script: script.__name__.rpartition(".")[2])
def test_each_benchmark_runs_small(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, measure = SMOKE[script]
    monkeypatch.setattr(console, "start", lambda: None)  # this process has other tests to run
    monkeypatch.setattr("sys.argv", ["script", "--smoke", "--out", str(tmp_path)])
    common.main(script.run, script.parser())
    found = Result.read(tmp_path / f"{name}.json")
    timed = [row.measures[measure] for row in found.rows if measure in row.measures]
    assert timed and all(one.min > 0 for one in timed)
    assert found.smoke and found.command == f"python -m {script.__name__} --smoke"
    assert found.hardware.cpu and found.versions["torch"] and found.versions["dbtrain"]
    assert str(tmp_path) not in (tmp_path / f"{name}.json").read_text(), "figures, not paths"
    if script is scaling:  # one all-reduce of the adapter's gradient, and one of the wish to stop
        assert [row.counts["collectives a step"] for row in found.rows] == [0, 2]
        weights = 4 * 103_936  # as `train` says of the adapter
        assert found.rows[1].counts["bytes a step"] == weights + 8
    if script is throughput:
        assert found.rows[0].counts["host reads"] == 0


def test_the_flops_of_a_step_are_those_of_the_published_architectures(tmp_path: Path) -> None:
    """PERFORMANCE.md counted 1.7178 TFLOP for SD-1.5 at rank 8, and 859.5 M and 2567 M parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_bases, "_words", bases._words)
        found = {
            name: Base.find(Model(path=str(random_bases.outline(name, tmp_path))))
            for name in ("sd15", "sdxl")
        }
    parameters = {n: sum(p.numel() for p in base.skeleton("unet").parameters()) for n, base in found.items()}
    assert parameters == {"sd15": 859_520_964, "sdxl": 2_567_463_684}
    forward, both = flops.of_step(found["sd15"], 512, Adapter(rank=8))
    assert (round(forward / 1e12, 3), round(both / 1e12, 4)) == (0.806, 1.7178)


def test_random_bases_are_made_without_reading_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bases.sd()
    real = Base.find(Model(path=str(folder))).load("unet").state_dict()
    monkeypatch.setattr("safetensors.torch.load_file", None)
    base = random_bases.Random(str(folder), folder, None)
    one, again = (base.load("unet", torch.bfloat16).state_dict() for _ in range(2))
    assert {value.dtype for value in one.values()} == {torch.bfloat16}
    assert all(value.isfinite().all() and value.equal(again[name]) for name, value in one.items())
    assert {name: value.shape for name, value in one.items()} == {n: v.shape for n, v in real.items()}
    assert base.load("text_encoder")(torch.tensor([[0, 5, 1]]))[0].isfinite().all()
    assert base.load("scheduler").config.num_train_timesteps == 1000


def result(name: str, subject: str, *rows: Row, **changes: Any) -> Result:
    here = Hardware(cpu="a CPU", cores=2, memory_gib=8)
    return Result(name=name, subject=subject, command="c", smoke=False, config={}, hardware=here,
                  versions={"torch": "2"}, rows=rows).model_copy(update=changes)  # fmt: skip


def test_a_result_is_refused_unless_its_figures_are_its_samples(tmp_path: Path) -> None:
    wrong = {"unit": "s", "samples": [1, 2, 3], "median": 2, "min": 1, "max": 4}
    with pytest.raises(ValidationError, match="not those of the samples"):
        Measure.model_validate(wrong)
    first = result("prior", "x", Row(label="a", measures={"t": Measure.of("s", [1])}))
    second = result("prior", "x", Row(label="a", measures={"t": Measure.of("s", [3])}))
    assert second.added_to(first).rows[0].measures["t"].samples == (1, 3)
    with pytest.raises(SystemExit, match="another machine"):
        second.added_to(first.model_copy(update={"versions": {"torch": "3"}}))


def test_results_name_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--out", "/a/b", "--python", "/c/d/python", "--photos=/e/f"])
    args = argparse.Namespace(smoke=True, out=Path("/a/b"), python="/c/d/python", set=["x=1", "/g/h"])
    found = common.result(args, "prior", "x", [])
    assert found.command == "python -m benchmarks.prior --python python --photos=f"
    assert found.config == {"python": "python", "set": ["x=1", "h"]}


def test_rows_that_cannot_run_stay_in_the_ladder() -> None:
    args = ladder.parser().parse_args([])
    args.device = "cpu"
    for rung in ladder.LADDER:
        if rung.cuda:
            row = ladder._row(rung, {}, {}, args, 1.0)
            assert row.note == "not on this device: needs a CUDA GPU" and row.counts["predicted"]


def test_exposed_communication_is_what_no_operator_covers() -> None:
    def event(name: str, start: float, end: float) -> Any:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type="CPU")

    events = [
        event("gloo:all_reduce", 1000, 5000),
        event("aten::mm", 0, 2000),
        event("aten::add", 3000, 3500),
    ]
    assert watch.exposed(events) == {"collective_ms": 4.0, "exposed_ms": 2.5}


def test_the_report_says_what_is_missing_and_leaves_other_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "quickstart.json"
    other.write_text('{"likeness": 0.8}')
    row = Row(label="batch 1", config={"batch": 1}, measures={"class images": Measure.of("1/s", [1, 2, 3])})
    blank = Row(label="batch 64", config={"batch": 64}, note="out of memory")
    result("prior", "tiny-cpu", row, blank).write(tmp_path)
    monkeypatch.setattr(console, "start", lambda: None)
    monkeypatch.setattr("sys.argv", ["report", "--out", str(tmp_path)])
    report.main()
    assert {path.name for path in tmp_path.iterdir()} == {
        "quickstart.json", "performance.md", *(f"prior-tiny-cpu.{kind}" for kind in ("json", "md", "png"))
    }  # fmt: skip
    page = (tmp_path / "prior-tiny-cpu.md").read_text()
    assert "| batch 1 | 2 (1 to 3) 1/s |" in page and "batch 64: out of memory" in page
    text = (tmp_path / "performance.md").read_text()
    missing = text.partition("## Not measured")[2]
    assert "throughput, sd15-cuda" in missing and "*batch 64*: out of memory" in missing
    assert "no figures of any GPU" in missing and "prior, tiny-cpu" not in missing


def test_kept_results_are_whole_and_their_pages_up_to_date() -> None:
    found = report.read_all(common.RESULTS)
    assert (common.RESULTS / "performance.md").read_text() == report.summary(found)
    for one in found:
        assert not one.smoke and "/tmp" not in one.model_dump_json()
        plot = f"{one.file}.png" if one.name in report.PLOTS else None
        assert (common.RESULTS / f"{one.file}.md").read_text() == report.page(one, plot)
        few = {name for row in one.rows for name, m in row.measures.items() if len(m.samples) < common.LEAST}
        assert not few, f"{one.file}: fewer than {common.LEAST} repeats of {few}"
