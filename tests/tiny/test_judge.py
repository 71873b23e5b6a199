"""The judge reads fresh renders rightly, and knows a subject from its class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.tiny import judge as training
from benchmarks.tiny.judge import measure
from dbtrain.tiny import world
from dbtrain.tiny.judge import WEIGHTS, Judge
from dbtrain.tiny.paint import render


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.mark.slow
def test_it_reads_class_and_place_of_fresh_renders(judge: Judge) -> None:
    figures = measure(judge, count=400)
    assert figures["kind"] >= 0.97
    assert figures["place"] >= 0.97
    own = figures["likeness of fresh pictures of a subject"]
    assert own > figures["likeness of pictures of its class"] + 0.3
    assert own > figures["likeness of other subjects"] + 0.3


def test_it_reads_a_picture_in_words(judge: Judge) -> None:
    scene = world.scene(7, split="test")
    reading = judge.read([render(scene), render(scene).resize((256, 256))])
    assert reading.kinds == [scene.kind] * 2
    assert reading.places == [scene.place] * 2


@pytest.mark.parametrize("name", world.SUBJECTS)
def test_each_subject_is_most_like_itself(judge: Judge, name: str) -> None:
    fresh = [render(world.subject_scene(name, number)) for number in range(200, 206)]
    likeness = {other: judge.likeness(fresh, world.photos(other)).mean() for other in world.SUBJECTS}
    assert max(likeness, key=lambda other: likeness[other]) == name


def test_it_is_small() -> None:
    assert WEIGHTS.stat().st_size <= 2 * 2**20


@pytest.mark.slow
def test_it_is_trained_by_its_own_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PICTURES": 64, "SUBJECTS": 40, "EACH": 2}.items():
        monkeypatch.setattr(training, name, value)
    fitted = training.fit(tmp_path, steps=2, batch=8)
    again = training.fit(tmp_path, steps=2, batch=8)  # resumed at its end: the same judge
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), again.parameters(), strict=True))
