"""The scores answer the paper's questions rightly where the answer is known: on renders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from dbtrain.evaluate import evaluate, tiny_judge
from dbtrain.evaluate.scores import frechet, table
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from dbtrain.sample.sample import Kept
from dbtrain.tiny import world
from dbtrain.tiny.judge import Judge
from dbtrain.tiny.paint import Scene, render
from tests.conftest import Make, dbtrain, draw_photo, train

MUGS = [s for s in (world.scene(n, "test") for n in range(800)) if s.kind == "mug"][:48]
OTHERS = [s for s in (world.scene(n, "other") for n in range(400)) if s.kind == "mug"][:24]
PROMPTED = "a photo of sks mug"


def drawn(scenes: Iterable[Scene]) -> list[Image.Image]:
    return [_drawn(scene) for scene in scenes]


_drawn = cache(render)  # several tests look at the same scenes


def of_subject(name: str, first: int, place: str | None = None, count: int = 8) -> list[Image.Image]:
    return drawn(world.subject_scene(name, first + k, place) for k in range(count))


def scores_of(
    kept: list[Image.Image], subject: list[Image.Image], wrong_places: int = 0
) -> tiny_judge.JudgeScores:
    """Scores of a run whose pictures are these; the base draws ordinary mugs."""
    base, real = drawn(MUGS), of_subject("mug", 100, count=32)
    places = list(world.PLACES)
    shown = places[wrong_places:] + places[:wrong_places]
    placed = [of_subject("mug", 300, place) for place in shown]
    return tiny_judge.judged(Judge.load(), "mug", world.photos("mug"), base, kept, subject, placed, real)


@pytest.mark.slow
def test_a_perfect_run() -> None:
    scores = scores_of(drawn(OTHERS), of_subject("mug", 200))
    assert scores.closed == pytest.approx(1, abs=0.1)
    assert scores.place > 0.95 and scores.kind > 0.95
    assert scores.drift <= 0.05 and scores.drift_base <= 0.05
    assert scores.diversity_kept == pytest.approx(1, abs=0.15)
    assert scores.class_change == pytest.approx(1, abs=0.25)


@pytest.mark.slow
def test_a_run_that_learnt_nothing_and_one_that_lost_its_class() -> None:
    mugs = drawn(MUGS)
    nothing = scores_of(mugs[:24], mugs)
    assert abs(nothing.closed) < 0.05
    lost = scores_of(of_subject("mug", 400, count=24), of_subject("mug", 200))
    assert lost.drift > 0.9
    assert lost.diversity_kept < 0.5 * nothing.diversity_kept
    assert lost.class_change is not None and lost.class_change > 1.5


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(2))


def washed_out(image: Image.Image) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(0.6)


def flat(image: Image.Image) -> Image.Image:
    return image.quantize(3).convert("RGB")


@pytest.mark.parametrize("degrade", [blurred, washed_out, flat])
def test_images_of_the_class_that_lost_their_quality_are_far_from_the_base_s(
    degrade: Callable[[Image.Image], Image.Image],
) -> None:
    """Other images of the class are not, and drift says nothing."""
    fresh = drawn(OTHERS)
    good, bad = (scores_of(kept, fresh) for kept in (fresh, [degrade(image) for image in fresh]))
    assert good.class_change is not None and bad.class_change is not None
    assert good.class_change < 1.15 < 1.3 < bad.class_change
    assert bad.drift <= 0.05


def test_photos_of_any_subject_of_the_world_can_be_judged(make: Make, tmp_path: Path) -> None:
    subject = world.drawn_subject(3, 1, "proving")
    (tmp_path / "photos").mkdir()
    for number in range(5):
        render(subject.scene(number)).save(tmp_path / "photos" / f"{number}.png")
    cfg = make(
        prepare__photos=str(tmp_path / "photos"), prepare__instance_prompt=f"a photo of sks {subject.kind}"
    )
    kind, photos = tiny_judge._subject(cfg)
    assert kind == subject.kind and len(photos) == 5
    real = [render(subject.scene(number)) for number in range(100, 132)]
    judge = Judge.load()
    told = judge.each_to_others(photos).mean().item()
    assert told == pytest.approx(judge.likeness(real, photos).mean().item(), abs=0.05), "needs no renders"
    assert judge.each_to_others(photos[:1]).item() == pytest.approx(1)


def test_a_subject_that_looks_like_another_is_seen(make: Make, tmp_path: Path) -> None:
    """Of three subjects, one is drawn as it is, one as the first, and one half and half."""
    several = []
    for token, kind in (("sks", "mug"), ("xyz", "ball"), ("zwx", "fish")):
        world.main(tmp_path / kind, kind)
        several.append({"token": token, "class_word": kind, "photos": str(tmp_path / kind)})
    cfg = make(
        subjects=several, subject={}, model__path="tiny", prepare__photos=str(tmp_path / "mug"),
        prepare__instance_prompt="a photo of {}", prepare__class_prompt="a photo of a {class}",
    )  # fmt: skip
    found = []
    for one, names in zip(cfg.each_subject(), (["mug"], ["mug"], ["fish", "mug"]), strict=True):
        folder = tmp_path / "scores" / str(one.subject.token)
        (folder / "subject").mkdir(parents=True)
        for seed in range(6):
            name = names[seed % len(names)]
            _drawn(world.subject_scene(name, 200 + seed)).save(folder / "subject" / f"00-00-seed{seed}.png")
        found.append(tiny_judge.likeness(one, folder, cfg.each_subject()))
    lines = list(evaluate.confusion(["sks", "xyz", "zwx"], found, tmp_path / "confusion.json"))
    written = json.loads((tmp_path / "confusion.json").read_text())
    assert written["nearest"] == [[1, 0, 0], [1, 0, 0], [0.5, 0, 0.5]]
    assert evaluate.bleed(found) == pytest.approx(0.5)
    assert written["likeness"][0][0] > 0.8 > 0.5 > written["likeness"][0][1]
    assert re.search(r"xyz +0\.\d\d 100%", lines[3]), lines


def test_the_frechet_distance_is_the_published_formula_and_takes_fewer_images_than_features() -> None:
    source = torch.Generator().manual_seed(0)
    one = (
        torch.randn(40, 6, generator=source, dtype=torch.double)
        @ torch.randn(6, 6, generator=source).double()
    )
    other = 0.5 + torch.randn(30, 6, generator=source, dtype=torch.double)
    product = one.T.cov() @ other.T.cov()
    root = torch.linalg.eigvals(product).sqrt().real.sum()
    formula = (
        (one.mean(0) - other.mean(0)).square().sum() + one.T.cov().trace() + other.T.cov().trace() - 2 * root
    )
    assert frechet(one, other) == pytest.approx(formula.item())
    assert frechet(one[:3], one[:3]) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_a_run_that_ignores_the_place() -> None:
    assert scores_of(of_subject("mug", 400), of_subject("mug", 200), wrong_places=1).place < 0.05


def test_the_table_shows_two_runs_side_by_side(tmp_path: Path) -> None:
    scores = tiny_judge.JudgeScores(0.1, 0.7, 0.9, 0.8, 0.9, 0.04, 0.0, 0.6, 0.9)
    text = table(tiny_judge.shown(scores), tiny_judge.shown(scores))
    assert "75%       75%" in next(line for line in text.splitlines() if line.startswith("of the way"))
    old = tmp_path / "old.json"
    old.write_text(json.dumps({k: v for k, v in asdict(scores).items() if v is not None}))
    assert tiny_judge.JudgeScores.load(old) == scores, "of a version without a class distance, and labels"
    assert dict(tiny_judge.shown(scores))["change of the class's images (1x: two seeds of the base)"] == "-"
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no scores"):
        tiny_judge.JudgeScores.load(tmp_path / "s.json")


@pytest.mark.slow
def test_evaluate_draws_judges_and_leaves_a_sheet(make: Make, tmp_path: Path) -> None:
    world.main(tmp_path / "photos", "mug")
    cfg = make(model__path="tiny", prepare__photos=str(tmp_path / "photos"),
               prepare__instance_prompt=PROMPTED, prepare__class_prompt="a photo of a mug",
               train__steps=1, sample__steps=1)  # fmt: skip
    prepare(cfg)
    run = train(cfg)
    first = dbtrain("evaluate", tmp_path / "c.yaml", ranks=2)
    assert first.returncode == 0 and "of the way from base to real" in first.stdout
    out = run / "scores"
    scores = tiny_judge.JudgeScores.load(out / "scores.json")
    assert scores.closed < 0.3, "one sampling step draws no mug"
    with Image.open(out / "sheet.png") as sheet:
        assert np.asarray(sheet).std() > 10
        assert sheet.height > 4 * 128
    assert len(list((out / "subject").glob("*seed*.png"))) == 7 * tiny_judge.SUBJECT_IMAGES
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*seed*.png")}
    again = dbtrain("evaluate", tmp_path / "c.yaml", "--beside", out / "scores.json")
    assert again.returncode == 0 and "expected" in again.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*seed*.png")}, "drawn again"
    assert tiny_judge.JudgeScores.load(out / "scores.json") == scores
    values = json.loads((out / "scores.json").read_text())
    assert values["place"] == scores.place
    assert values["labels"]["place"] == "share of the subject's images in the requested place"


@pytest.mark.slow
def test_checkpoints_are_compared_by_likeness_and_place(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_judge, "CLASS_IMAGES", 2)
    monkeypatch.setattr(tiny_judge, "SUBJECT_IMAGES", 1)
    world.main(tmp_path / "photos", "mug")
    cfg = make(model__path="tiny", prepare__photos=str(tmp_path / "photos"), sample__steps=1,
               prepare__instance_prompt=PROMPTED, train__steps=3)  # fmt: skip
    prepare(cfg)
    run = train(cfg)
    lines = list(evaluate.checkpoints(cfg))
    rows = json.loads((run / "scores" / "checkpoints.json").read_text())
    assert [(row["step"], row["exported"]) for row in rows] == [(2, False), (3, True)]
    assert all(
        row["likeness_real"] > 0.9 and row["likeness_base"] == rows[0]["likeness_base"] for row in rows
    )
    assert any("highest likeness" in line and "whose place is within 0.1" in line for line in lines)
    with Image.open(run / "scores" / "checkpoints.png") as plot:
        assert np.asarray(plot).std() > 10


def test_evaluate_refuses_what_it_cannot_judge(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ends in 'dog'"):
        tiny_judge.draw(make(), "none", tmp_path / "out", None, Kept())
    (tmp_path / "photos").mkdir()
    draw_photo(tmp_path / "photos" / "a.png", 1)
    cfg = make(prepare__photos=str(tmp_path / "photos"), prepare__instance_prompt=PROMPTED)
    with pytest.raises(ConfigError, match=r"do not show the embedded base's mug; .*tiny\.world"):
        tiny_judge.draw(cfg, "none", tmp_path / "out", None, Kept())
    world.main(tmp_path / "mug", "mug")
    cfg = make(model__path="tiny", prepare__photos=str(tmp_path / "mug"), prepare__instance_prompt=PROMPTED)
    with pytest.raises(ConfigError, match="adapter"):
        tiny_judge.draw(cfg, str(tmp_path / "run"), tmp_path / "out", None, Kept())
    assert not (tmp_path / "out").exists(), "before the base's images"
