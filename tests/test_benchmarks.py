"""The benchmarks run; the quality benchmark's short version fails if DreamBooth stops working."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from benchmarks import bases as random_bases
from benchmarks import (
    choose_settings,
    common,
    data,
    end_to_end,
    fleet,
    flops,
    ladder,
    memory,
    prior,
    prior_step,
    quantization,
    report,
    scaling,
    stopping,
    text_encoders,
    throughput,
    watch,
)
from benchmarks.choose_settings import Cell, Plan
from benchmarks.common import Hardware, Measure, Result, Row
from dbtrain.config import Adapter, Model
from dbtrain.evaluate import choice, tiny_judge
from dbtrain.evaluate.tiny_judge import JudgeScores
from dbtrain.models.base import Base
from dbtrain.models.families import sd
from dbtrain.runtime import console
from dbtrain.tiny import world
from tests import bases

FEW = ["prepare.class_images=2", "prepare.sampling.steps=2", "sample.steps=1", "validation.prompts=[]"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "start", lambda: None)  # this process has other tests to run


def benchmark(script: Any, patch: pytest.MonkeyPatch, *words: str | Path) -> None:
    """Run a benchmark in this process."""
    patch.setattr("sys.argv", ["script", *map(str, words)])
    common.main(script.run, script.parser() if hasattr(script, "parser") else common.parser(script.__doc__))


def few_pictures(patch: pytest.MonkeyPatch) -> None:
    """The judge sees two pictures of the class and one of each prompt."""
    patch.setattr(tiny_judge, "CLASS_IMAGES", 2)
    patch.setattr(tiny_judge, "SUBJECT_IMAGES", 1)


@pytest.mark.slow
def test_dreambooth_that_does_not_work_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no result; one that works does. What training reaches is in test_readme.py's quickstart."""
    words = ["--work", tmp_path / "work", "--out", tmp_path / "out", "--smoke", "--set", *FEW]
    words += ["train.steps=1", "optim.lr=1e-9"]
    few_pictures(monkeypatch)
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    with pytest.raises(SystemExit) as ended:
        benchmark(choose_settings, monkeypatch, *words)
    assert ended.value.code == 1 and not list((tmp_path / "out").glob("*.json"))
    assert any("of the way from base to real" in text for text in said)
    assert "DreamBooth does not work: closed" in said[-1]
    monkeypatch.setattr(choose_settings, "LOWEST", {"closed": -1.0, "place": 0.0})
    benchmark(choose_settings, monkeypatch, *words)
    assert list((tmp_path / "out").glob("*.json"))


@pytest.mark.slow
def test_recipes_are_compared_and_a_second_call_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_pictures(monkeypatch)
    words = [
        "--half",
        "proving",
        "--looks",
        "0",
        "--subjects",
        "0",
        "--seeds",
        "1",
        "--steps",
        "1",
        "--workers",
        "1",
    ]
    words += ["--recipes", "rank 4", "no class images"]
    words += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--set", *FEW]
    benchmark(choose_settings, monkeypatch, *words)
    (file,) = (tmp_path / "out").glob("*.json")
    about = world.drawn_subject(0, 0, "proving")
    name = f"{about.kind} {about.name}"
    labels = ["rank 4, 1 steps", "no class images, 1 steps", f"{name}: rank 4", f"{name}: no class images"]
    assert [row.label for row in Result.read(file).rows] == labels
    assert "--seeds 1 --steps 1 --workers 1 --recipes" in Result.read(file).command, "but not --work"
    assert len(list((tmp_path / "work" / about.name / "photos").iterdir())) == 5
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("state.json")}
    text = file.read_text()
    benchmark(choose_settings, monkeypatch, *words)
    assert stamps and {p: p.stat().st_mtime_ns for p in stamps} == stamps, "trained again"
    assert file.read_text() == text and str(tmp_path) not in text


def test_every_recipe_is_a_config_with_a_folder_of_its_own(tmp_path: Path) -> None:
    subject = world.drawn_subject(0, 0, "choosing")
    plan, other = (Plan(tmp_path, [200], 8, overrides) for overrides in ([], ["optim.lr=2e-3"]))
    cells = [Cell(subject, seed, recipe) for seed in (0, 1) for recipe in choose_settings.RECIPES]
    found = [plan.config(cell) for cell in cells]
    assert len({cfg.run_dir for cfg in found}) == len(cells)
    assert plan.folder(cells[0]) != other.folder(cells[0]), "overrides are settings too"
    for cfg in found:
        assert cfg.prepare is not None and cfg.prepare.class_pictures is True
        assert cfg.prepare.instance_prompt == f"a photo of sks {subject.kind}"


def test_a_row_of_the_table_of_recipes_is_over_all_runs() -> None:
    def scores(likeness: float, drift: float) -> JudgeScores:
        return JudgeScores(
            likeness_base=0.1, likeness=likeness, likeness_real=0.9, place=1.0, kind=0.9, drift=drift,
            drift_base=0.0, diversity=0.6, diversity_base=0.7, class_distance=4.0, class_distance_base=3.0,
        )  # fmt: skip

    subjects = [world.drawn_subject(0, number, "proving") for number in (0, 1)]
    results = {
        Cell(subject, seed, recipe): {
            100: scores(0.5 + 0.2 * seed + 0.1 * number, 0.1 if recipe == "rank 4" else 0.6),
            200: scores(0.9, 0.02),
        }
        for number, subject in enumerate(subjects)
        for seed in (0, 1)
        for recipe in ("rank 4", "lr 3e-3")
    }
    found = choose_settings.rows(results, by_subject=True)
    table = {row.label: row for row in found}
    row = table["rank 4, 100 steps"]
    assert row.measures["closed"].samples == pytest.approx((50, 75, 62.5, 87.5))
    assert row.counts["mean"] == pytest.approx(68.75) and row.counts["worst"] == pytest.approx(62.5)
    assert row.counts["runs"] == 4 and row.counts["misses"] == "closed, worst, drift"
    assert table["rank 4, 200 steps"].counts["misses"] == ""
    assert table["lr 3e-3, 100 steps"].measures["drift"].median == pytest.approx(60)
    last = table[f"{subjects[1].kind} {subjects[1].name}: lr 3e-3"]
    assert last.measures["drift"].samples == pytest.approx((2, 2)), "after all steps"
    assert last.config["runs"] == [f"{subjects[1].name}, seed 0", f"{subjects[1].name}, seed 1"]
    assert [row.label for row in choose_settings.rows(results)] == [row.label for row in found[:4]]


def test_where_a_run_stops_is_told_by_images_that_the_rule_has_not_seen() -> None:
    def rows(*likeness: float) -> list[dict[str, float]]:
        return [{"step": 10 * n, "likeness": value, "place": 1.0} for n, value in enumerate(likeness)]

    curve = stopping.Curve(
        choice.CLASSIFIER, rows(0, 0.5, 0.8, 0.82, 0.81, 0.9), rows(0.1, 0.4, 0.7, 0.9, 0.6, 0.8)
    )
    told = {"end": 40, "saved": 20, "exported": 30, "gained": 100, "place": 100}
    assert curve.outcome(2) == pytest.approx(told)
    assert curve.outcome(9) == pytest.approx(told | {"end": 50, "saved": 0, "exported": 50, "gained": 87.5})
    (row,) = stopping.rows({"mug": curve}, [2])
    assert row.label == "2 validations" and row.measures["saved"].median == pytest.approx(20)


SMOKE = {
    throughput: ("throughput-tiny-cpu", "samples"), ladder: ("ladder-tiny-batch1-cpu-memory", "speed-up"),
    data: ("data-cpu", "data wait"),
    end_to_end: ("end_to_end-tiny-cpu", "photos to adapter"),
    fleet: ("fleet-tiny-cpu", "subjects per hour"), prior: ("prior-tiny-cpu", "class images"),
    memory: ("memory-tiny-64-cpu", None), quantization: ("quantization-cpu", None),
    text_encoders: ("text_encoders-t5-cpu", "CPU time"), prior_step: ("prior_step-cpu", "step"),
}  # fmt: skip


@pytest.mark.usefixtures("forks")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke runs are for CPUs")
@pytest.mark.slow
@pytest.mark.parametrize("script", SMOKE, ids=lambda script: script.__name__.rpartition(".")[2])
def test_each_benchmark_runs_small(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, measure = SMOKE[script]
    monkeypatch.setattr(ladder, "LADDER", (ladder.LADDER[0], ladder.LADDER[8]))
    benchmark(script, monkeypatch, "--smoke", "--out", tmp_path)
    found = Result.read(tmp_path / f"{name}.json")
    timed = [row.measures[measure] for row in found.rows if measure in row.measures]
    assert (timed or not measure) and all(one.min > 0 for one in timed)
    assert found.smoke and found.command == f"python -m {script.__name__} --smoke"
    assert found.hardware.cpu and found.versions["torch"] and found.versions["dbtrain"]
    assert str(tmp_path) not in (tmp_path / f"{name}.json").read_text(), "figures, not paths"
    if script is throughput:
        assert found.rows[0].counts["host reads"] == 0
    if script is memory:
        for row in found.rows:
            told, seen = (float(row.counts[f"{kind}, MiB"] or 0) for kind in ("predicted", "measured"))
            assert abs(told / seen - 1) < memory.BOUND


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke runs are for CPUs")
def test_scaling_counts_what_two_processes_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark(scaling, monkeypatch, "--smoke", "--out", tmp_path)
    one, two = Result.read(tmp_path / "scaling-tiny-cpu.json").rows
    # One all-reduce of the adapter's gradient, and one of the wish to stop.
    assert [row.counts["collectives a step"] for row in (one, two)] == [0, 2]
    weights = 4 * 103_936  # as `train` says of the adapter
    assert two.counts["bytes a step"] == weights + 8
    assert one.measures["efficiency"].median == 100 and two.measures["efficiency"].min > 0


@pytest.mark.slow
def test_the_flops_of_a_step_are_those_of_the_published_architectures(tmp_path: Path) -> None:
    """859.5 M and 2567 M parameters, as published; 1.7178 TFLOP for SD-1.5 with LoRA of rank 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_bases, "tokenizer", lambda *_: bases.clip_words())
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
    base = random_bases.Random(str(folder), folder, None, sd.FAMILY)
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
    monkeypatch.setattr("sys.argv", ["x", "--out", "/a/b", "--base", "/c/d/model", "--photos=/e/f"])
    args = argparse.Namespace(smoke=True, out=Path("/a/b"), base="/c/d/model", set=["x=1", "/g/h"])
    found = common.result(args, "prior", "x", [])
    assert found.command == "python -m benchmarks.prior --base model --photos=f"
    assert found.config == {"base": "model", "set": ["x=1", "h"]}


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
