"""`train.stop: best`: what is kept, exported and said, and that stopping and going on changes none of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dbtrain.adapters.formats import diffusers_file, peft_folder
from dbtrain.config import Config
from dbtrain.doctor import shards_and_run
from dbtrain.doctor.case import Case
from dbtrain.evaluate import scoring
from dbtrain.evaluate.choice import CLASSIFIER, DINO_AND_CLIP, HELD_OUT
from dbtrain.prepare import duration
from dbtrain.prepare.prepare import prepare
from dbtrain.report import run as report
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.run_folder import RunFolder, step_of
from dbtrain.tiny import world
from dbtrain.train import best, due, loop
from tests import eyes
from tests.conftest import Make, config_in, dbtrain, train

PROMPTS = ["a photo of a dog", "a sks dog in the snow"]


def settings(**changes: Any) -> dict[str, Any]:
    """A run that stops after a few steps, as random models see it."""
    return {
        "train__stop": "best", "train__patience": 2, "train__steps": 9, "train__keep": 1,
        "train__checkpoint_every": 9, "optim__lr": 0.05, "validation__every": 1,
        "validation__prompts": PROMPTS, "validation__images": 1, "evaluation__dino": str(eyes.dino()),
        "evaluation__clip": str(eyes.clip()), **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run_in(photos: Path, class_dir: Path, prepared: Path) -> Callable[..., Config]:
    return partial(config_in, photos=photos, class_dir=class_dir, data__shards=str(prepared))


@pytest.fixture(scope="module")
def whole(run_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that was not interrupted."""
    cfg = run_in(tmp_path_factory.mktemp("whole"), **settings())
    train(cfg)
    return cfg


@pytest.fixture(scope="module")
def by_loss(run_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Configs of runs that go by the loss on a held-out photo, which is fast."""
    folder = tmp_path_factory.mktemp("held-out")
    shards = {"data__shards": str(folder / "shards"), "prepare__held_out": 1}
    prepare(run_in(folder, **shards))
    return partial(run_in, **shards, **settings(validation__prompts=[], validation__timesteps=2))


def lines(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.table("validation").read_text().splitlines()]


def left(cfg: Config) -> dict[str, bytes]:
    """What follows from the scores: the decision, what is kept, and the export."""
    run = RunFolder(cfg.run_dir)
    paths = [run.best, run.table("validation"), run.table("metrics"), run.export / diffusers_file.FILE]
    paths += [path / "unet" / peft_folder.WEIGHTS for path in run.checkpoints()]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_it_stops_and_exports_the_best(whole: Config) -> None:
    run = RunFolder(whole.run_dir)
    found = lines(run)
    scored = [line for line in found if line["step"]]
    best, why = DINO_AND_CLIP.choose(scored)
    end = scored[-1]["step"]
    assert end < whole.train.steps and [line["step"] for line in found] == list(range(end + 1))
    assert run.read_best() == {
        "step": best["step"], "why": f"{why}; stopped at step {end}", "stopped": True
    }  # fmt: skip
    kept = [step_of(path) for path in run.checkpoints()]
    assert best["step"] in kept and end in kept and best["step"] != end
    assert set(kept) <= DINO_AND_CLIP.contenders(scored[:-1]) | {end}, "nothing that cannot win"
    card = (run.export / "README.md").read_text()
    assert f"| steps | {best['step']} of 4 images: the best, {why}; stopped at step {end} |" in card
    assert run.done.read_text().startswith(f"step {best['step']}\n")
    assert f"done, step {end} of 9; exported step {best['step']}, with the highest dino" in (
        report.read(run.path, "run").state
    )
    assert duration.Todo.of(whole, ["train"]).steps == 0


def test_a_second_call_does_nothing(whole: Config) -> None:
    run = RunFolder(whole.run_dir)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.safetensors")} | {run.done: 0}
    train(whole)
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*.safetensors")} | {
        run.done: 0
    }
    (found,) = [one for one in shards_and_run.run_folder(_case(whole)) if one.level == "warning"]
    assert "already trained to step" in found.what and "raise train.patience" in found.cure


def _case(cfg: Config) -> Case:
    from dbtrain.models.base import Base

    case = Case(cfg)
    case.base = Base.find(cfg.model)
    list(shards_and_run.shards(case))
    return case


def interrupted(cfg: Config, every: int) -> Config:
    """A run that stops after every so many steps, and goes on."""
    for step in range(every, cfg.train.steps, every):
        try:
            loop.train(cfg, step)
        except Preempted:
            continue
        break
    train(cfg)
    return cfg


@pytest.mark.slow
def test_images_are_scored_alike_in_a_run_that_was_interrupted(
    whole: Config, run_in: Callable[..., Config], tmp_path: Path
) -> None:
    assert left(interrupted(run_in(tmp_path, **settings()), 2)) == left(whole)


@pytest.mark.slow
def test_interruptions_and_less_patience_at_first_change_nothing(
    by_loss: Callable[..., Config], tmp_path: Path
) -> None:
    first = interrupted(by_loss(tmp_path, train__keep=20), 3)
    ended = len(lines(RunFolder(first.run_dir)))
    assert ended <= first.train.steps, "it stopped before the end"
    more = {"train__patience": 3, "train__keep": 20, "train__steps": 15}
    train(cfg := by_loss(tmp_path, **more))
    (tmp_path / "other").mkdir()
    train(straight := by_loss(tmp_path / "other", **more))
    assert len(lines(RunFolder(cfg.run_dir))) > ended
    assert left(cfg) == left(straight)


def test_without_the_setting_it_goes_on_to_the_end(
    whole: Config, run_in: Callable[..., Config], tmp_path: Path
) -> None:
    run = RunFolder(whole.run_dir)
    steps = step_of(run.checkpoints()[-1]) + 1
    cfg = run_in(tmp_path, **settings(train__stop="steps", train__steps=steps))
    shutil.copytree(run.path, cfg.run_dir)
    train(cfg)
    run = RunFolder(cfg.run_dir)
    assert not run.best.exists() and run.done.read_text().startswith(f"step {steps}\n")


@pytest.mark.parametrize(("kept", "wanted", "stops"), [((1, 2, 3, 4), 2, True), ((1, 4), 1, False),
    ((3, 4), 3, False), ((4,), 4, False)])  # fmt: skip
def test_only_steps_with_a_checkpoint_can_be_the_best(
    make: Make, kept: Sequence[int], wanted: int, stops: bool
) -> None:
    """Before `train.stop: best` is set, a run saves less often than it validates, and keeps the newest."""
    cfg, found = make(**settings()), scoring.Scoring(HELD_OUT, "the loss")
    run, key = RunFolder(cfg.run_dir), due.losses_key(cfg, {}, found)
    for step in kept:
        run.checkpoint(step).mkdir(parents=True)
    losses = (0.9, 0.3, 0.1, 0.2, 0.4)
    run.table("validation").write_text("".join(
        json.dumps({"step": step, "held_out_instance": loss, "key": key}) + "\n"
        for step, loss in enumerate(losses)
    ))  # fmt: skip
    assert best.decide(cfg, {}, found, 4) == stops
    assert run.read_best()["step"] == wanted  # type: ignore[index]
    assert best.contenders(cfg, {}, found) == {wanted}
    shutil.rmtree(run.checkpoint(wanted))
    assert best.decide(cfg, {}, found, 4) == stops, "deleted once it was exported"
    assert run.read_best()["step"] == wanted  # type: ignore[index]


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step(
    whole: Config, run_in: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = run_in(tmp_path, **settings())
    assert dbtrain("train", tmp_path / "c.yaml", ranks=2).returncode == 0
    one, two = RunFolder(whole.run_dir), RunFolder(cfg.run_dir)
    assert two.read_best()["step"] == one.read_best()["step"]  # type: ignore[index]
    for mine, theirs in zip(lines(two), lines(one), strict=True):
        assert mine["dino"] == pytest.approx(theirs["dino"], abs=1e-2)
        assert mine["step"] == theirs["step"] and mine["key"] == theirs["key"]


def test_what_it_goes_by(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier for the embedded base, else DINO and CLIP, else the held-out loss, else nothing."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert scoring.of(make(**settings()), False).rule == DINO_AND_CLIP
    world.main(tmp_path / "mugs", "mug")
    words = {"subject__class_word": "mug", "prepare__instance_prompt": "a photo of sks mug"}
    tiny = make(
        model__path="tiny", prepare__photos=str(tmp_path / "mugs"),
        validation__prompts=["a sks mug on the beach", "a sks mug", "a mug in space"], **words,
    )  # fmt: skip
    found = scoring.of(tiny, False)
    assert (found.rule, found.prompts) == (CLASSIFIER.over(2), [0, 1])
    assert found.said == "likeness and place of 4 validation images"
    photos = sorted((tmp_path / "mugs").glob("*.png"))
    beach = [path for n, path in enumerate(photos) if world.subject_scene("mug", n).place == "beach"]
    values = found.score([[beach[0], photos[1]], photos[2:4]])
    assert values["likeness"] > 0.9 and values["place"] == 0.5

    for changes, why in (
        ({"evaluation__dino": "nobody/nothing"}, "evaluation.dino: 'nobody/nothing' is not here; run dbtrain "
         "fetch --scoring"),
        ({"validation__prompts": ["a photo of a dog"]}, "no prompt of validation.prompts names the subject"),
    ):  # fmt: skip
        cfg = make(**settings(**changes))
        held_out = scoring.of(cfg, True)
        assert held_out.rule == HELD_OUT and why in held_out.said
        with pytest.raises(ConfigError, match="nothing to choose by") as problem:
            scoring.of(cfg, False)
        assert why in str(problem.value) and "prepare.held_out=1" in str(problem.value)


def test_several_subjects_are_scored_each_by_its_own_photos(make: Make, tmp_path: Path) -> None:
    for name in ("mug", "ball"):
        world.main(tmp_path / name, name)
    several = [
        {"token": token, "class_word": name, "photos": str(tmp_path / name)}
        for token, name in (("sks", "mug"), ("ohwx", "ball"))
    ]
    cfg = Config.from_dict(make(model__path="tiny").model_dump(mode="json") | {
        "subject": {}, "subjects": several,
        "prepare": {"instance_prompt": "a {}", "class_prompt": "a {class}", "resolution": 64},
        "validation": {"prompts": ["a {}"], "images": 2},
    })  # fmt: skip
    assert cfg.validation.prompts == ("a sks mug", "a ohwx ball")
    found = scoring.of(cfg, False)
    files = [sorted((tmp_path / name).glob("*.png"))[:2] for name in ("mug", "ball")]
    right, wrong = (found.score(order)["likeness"] for order in (files, files[::-1]))
    assert found.said == "likeness of 4 validation images" and right > 0.9 > 0.5 > wrong


def test_doctor_says_what_it_goes_by_and_warns(make: Make, prepared: Path) -> None:
    def found(**changes: Any) -> list[tuple[str, str]]:
        return [(one.level, one.what) for one in shards_and_run.stopping(Case(make(**settings(**changes))))]

    assert found() == [("ok", "at the best dino and clip_t of 1 validation image; at step 9 at the latest")]
    assert found(train__stop="steps") == []
    (short, _) = found(validation__every=3)
    assert short[0] == "warning" and "until step 9 at least" in short[1]
    (late, _) = found(optim__schedule="cosine")
    assert late[0] == "warning" and "optim.schedule is cosine" in late[1]
