"""How long a job takes: from what was measured, with the same settings, on the same kind of device."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import Config
from dbtrain.data.sources import Source
from dbtrain.prepare import duration
from dbtrain.prepare.duration import Speed, Todo
from dbtrain.runtime import pace
from tests.conftest import Make, draw_photo, train

GPU = "NVIDIA H100 80GB HBM3"
# Seconds per unit, seconds of warming up, units.
RATES = {
    "class image step": (0.5, 3.0, 40.0), "class image": (0.25, 0.0, 40.0), "encode": (0.125, 1.0, 40.0),
    "step": (2.0, 30.0, 40.0), "checkpoint": (4.0, 0.0, 2.0), "validation image step": (1.0, 0.0, 40.0),
    "validation image": (0.5, 0.0, 40.0), "validation image decode": (0.25, 0.0, 40.0),
    "loading for prepare": (10.0, 0.0, 1.0), "loading for train": (20.0, 0.0, 1.0),
    "loading for sample": (30.0, 0.0, 1.0),
}  # fmt: skip
TODO = Todo(class_images=10, encode=16, steps=100, validations=5, checkpoints=2, samples=8)


@pytest.fixture
def job(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Configs with prompts, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pace, "measured", {})

    def with_prompts(**changes: Any) -> Config:
        return make(**{"validation__prompts": ["a {}", "b {}"], "sample__prompts": ["a {}"]} | changes)

    return with_prompts


def keep(cfg: Config, ranks: int = 1, device: str = GPU, **rates: tuple[float, float, float]) -> Path:
    folder = duration._folder(cfg)
    assert folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{ranks}-{len(device)}.json"
    path.write_text(json.dumps({"device": device, "ranks": ranks, "rates": RATES | rates}))
    return path


def test_the_parts_add_up(job: Make) -> None:
    parts = Speed(GPU, 1, RATES).parts(job(), TODO)
    images = 5 * 2 * 2  # validations x prompts x images
    assert parts == {
        "class images": 10 * 2 * 0.5 + 3 + 10 * 0.25, "shards": 16 * 0.125 + 1,
        "training": 100 * 2 + 30 + 2 * 4,
        "validation": images * (2 * 1 + 0.5 + 0.25), "samples": 8 * (2 * 1 + 0.5 + 0.25), "loading": 60,
    }  # fmt: skip


def test_ranks_share_the_images_but_not_the_steps(job: Make) -> None:
    parts = Speed(GPU, 4, RATES).parts(job(), TODO)
    assert parts["shards"] == 4 * 0.125 + 1 and parts["training"] == 100 * 2 + 30 + 2 * 4


def test_held_out_images_cost_at_most_what_training_on_them_does(job: Make) -> None:
    cfg = job(validation__prompts=[], prepare__held_out=1, prepare__class_held_out=2)
    assert Speed(GPU, 1, RATES).parts(cfg, TODO)["validation"] == 5 * (3 * 8) / 4 * 2


def test_what_was_not_measured_is_unknown(job: Make) -> None:
    rates = {kind: rate for kind, rate in RATES.items() if not kind.startswith("class")}
    speed = Speed(GPU, 2, rates)
    assert math.isnan(speed.parts(job(), TODO)["class images"])
    told = speed.told(job(), TODO)
    assert told.startswith("at least 5 min 38 s: class images unknown, shards 2 s, training 3 min 58 s, ")
    assert told.endswith(f"; measured on {GPU}, 2 processes")
    assert Speed(GPU, 2, {}).told(job(), TODO) == ""


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "00:15:00"), (3600, "01:30:00"), (36_000, "12:45:00"), (76_464, "1-02:45:00"),
     (864_000, "12-12:15:00")],
)  # fmt: skip
def test_slurm_s_limit_has_a_margin_and_slurm_s_form(seconds: float, text: str) -> None:
    assert duration.slurm_time(seconds, stop_before_s=120) == text


def test_what_is_left_to_do(job: Make, prepared: Path, tmp_path: Path) -> None:
    changes = {"train__steps": 5, "validation__every": 2, "train__checkpoint_every": 2, "sample__images": 3,
               "prepare__class_images": 6, "prepare__class_dir": str(tmp_path / "none")}  # fmt: skip
    cfg = job(**changes, prepare__crop="random", prepare__variants=2)
    photos = len(list(Path(cfg.prepare.photos).glob("*.jpg"))) if cfg.prepare else 0
    assert Todo.of(cfg) == Todo(6, 2 * photos, 5, 4, 3, 6)
    assert Todo.of(cfg, ["train"]) == Todo(0, 0, 5, 4, 3, 0)
    (Path(cfg.run_dir) / "checkpoints" / "step-000004").mkdir(parents=True)
    assert Todo.of(cfg, ["train"]) == Todo(0, 0, 1, 1, 1, 0)
    (Path(cfg.run_dir) / "checkpoints" / "step-000005").mkdir()
    assert Todo.of(job(data__shards=str(prepared), train__steps=5, sample__prompts=[])) == Todo()


def test_a_run_remembers_its_speed_and_the_next_one_says_how_long_it_takes(
    job: Make, prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = job(data__shards=str(prepared))
    with caplog.at_level(logging.INFO, "dbtrain"):
        duration.announce(cfg, "train")
        assert caplog.messages == [], "nothing was measured"
        train(cfg)
        caplog.clear()
        other = job(
            data__shards=str(prepared), run_dir=str(tmp_path / "other"), train__steps=400, optim__lr=3e-4
        )
        duration.announce(other, *duration.JOB)
        duration.announce(cfg, "train")
    assert len(caplog.messages) == 1, "nothing is left of the first run"
    (speed,) = duration.speeds(cfg, ranks=1)
    assert speed.is_here and not speed.gpu
    assert {
        "step",
        "checkpoint",
        "validation image step",
        "validation image",
        "loading for train",
    } <= speed.rates.keys()
    assert caplog.messages[0] == speed.told(other, Todo.of(other)) and ": training " in caplog.messages[0]


def test_photos_that_are_not_unpacked_yet_are_not_counted(
    job: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw_photo(tmp_path / "0.png", 0)
    (table := tmp_path / "photos.csv").write_text("image\n0.png\n")
    cfg = job(prepare__photos=str(table))
    keep(cfg, device=duration.device())
    with caplog.at_level(logging.INFO, "dbtrain"):
        duration.announce(cfg, "prepare")  # which unpacks them later
        assert caplog.messages == []
        source = Source.of(str(table))
        assert source
        source.ensure()
        caplog.clear()
        duration.announce(cfg, "prepare")
    assert len(caplog.messages) == 1


def test_another_device_s_speed_is_not_this_one_s(job: Make, caplog: pytest.LogCaptureFixture) -> None:
    cfg = job()
    keep(cfg)
    keep(cfg, ranks=2, device=duration.device())
    with caplog.at_level(logging.INFO, "dbtrain"):
        duration.announce(cfg, "train")
    assert caplog.messages == []
    keep(cfg, device=duration.device())
    assert [speed.is_here for speed in duration.speeds(cfg, 1)] == [True, False]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"device": "x", "ranks": 1, "rates": {"step": 1}}'])
def test_a_damaged_record_is_none(job: Make, text: str) -> None:
    keep(cfg := job()).write_text(text)
    assert duration.speeds(cfg, 1) == []


def test_a_short_measurement_does_not_replace_a_long_one(job: Make) -> None:
    cfg = job()
    for seconds, steps in ((2.0, 30), (7.0, 10)):
        for kind, count in (("step", steps), ("encode", 4)):
            for _ in range(count):
                pace.add(kind, seconds)
        duration.remember(cfg, "train")
        assert pace.measured == {}
    (speed,) = duration.speeds(cfg, 1)
    assert {kind: speed.rates[kind][0] for kind in ("step", "encode")} == pytest.approx(
        {"step": 2.0, "encode": 7.0}
    )


def test_a_single_step_is_no_speed(job: Make) -> None:
    pace.add("step", 60.0)
    duration.remember(cfg := job(), "train")
    assert duration.speeds(cfg, 1) == []


@pytest.mark.parametrize(
    "changes, same",
    [
        ({"train__steps": 9, "optim__lr": 1e-5, "seed": 3, "prepare__instance_prompt": "x"}, True),
        ({"sample__steps": 50, "prepare__sampling": {"steps": 30, "precision": "fp32"}}, True),
        ({"prepare__resolution": 128}, False),
        ({"train__micro_batch": 2}, False),
        ({"adapter": {"rank": 8}}, False),
        ({"prepare__class_prompt": None}, False),
        ({"sample__guidance": 1.0}, False),
    ],
)
def test_a_speed_belongs_to_the_settings_that_matter(job: Make, changes: dict[str, Any], same: bool) -> None:
    assert (duration._folder(job(**changes)) == duration._folder(job())) == same
