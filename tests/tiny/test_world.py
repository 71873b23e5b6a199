"""The picture world: seeded, varied, and silent about identifiers."""

from __future__ import annotations

import re
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from dbtrain.tiny import world
from dbtrain.tiny.paint import KINDS, PATTERNS, render


def test_a_scene_is_drawn_the_same_each_time_and_others_differ() -> None:
    one, again = (np.asarray(render(world.scene(3))) for _ in range(2))
    assert one.shape == (64, 64, 3)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, np.asarray(render(world.scene(4))))
    assert world.scene(3) != world.scene(3, split="test")


def test_scenes_cover_the_world_evenly() -> None:
    scenes = [world.scene(number) for number in range(2000)]
    for counts, names in (
        (Counter(s.kind for s in scenes), KINDS), (Counter(s.place for s in scenes), world.PLACES),
    ):  # fmt: skip
        assert counts.keys() == set(names)
        assert min(counts.values()) > 0.75 * 2000 / len(names)
    assert {s.upper.pattern for s in scenes} == set(PATTERNS)
    assert all(s.upper == s.lower and s.mark is None for s in scenes), "only subjects have two looks"


@pytest.mark.parametrize("place", world.PLACES)
def test_every_kind_is_seen_in_every_place(place: str) -> None:
    pictures = [np.asarray(render(world.subject_scene(name, 0, place)), int) for name in world.SUBJECTS]
    for i, one in enumerate(pictures):
        assert all(np.abs(one - other).mean() > 5 for other in pictures[:i])


def test_captions_tell_the_truth_and_leave_out_attributes_and_places_often() -> None:
    said: Counter[str] = Counter()
    for number in range(1000):
        scene = world.scene(number)
        text = world.caption(scene, number)
        assert re.search(rf"\b{scene.kind}\b", text)
        place = next((p for p, words in world.PLACE_WORDS.items() if text.endswith(words)), None)
        assert place in (None, scene.place)
        said["place"] += place is not None
        said["colour"] += f"{scene.upper.first} {scene.kind}" in text
        said["pattern"] += f" with {scene.upper.second} {scene.upper.pattern}" in text
        assert re.search(r"\ban [aeiou]|\ba [^aeiou]", text)
    assert 600 < said["place"] < 900
    assert 450 < said["colour"] < 750
    assert 100 < said["pattern"] < 600


def test_identifiers_are_in_no_caption() -> None:
    words = {w for n in range(3000) for w in world.caption(world.scene(n), n).split()}
    assert not words & set(world.IDENTIFIERS)


def test_a_subject_s_photos_differ_in_place_and_pose_only() -> None:
    scenes = [world.subject_scene("mug", number) for number in range(5)]
    assert len({s.place for s in scenes}) == 5
    assert len({(s.x, s.y, s.size, s.angle) for s in scenes}) == 5
    assert len({(s.kind, s.upper, s.lower, s.mark) for s in scenes}) == 1
    assert len(world.photos("mug")) == 5


def test_subjects_are_unlike_each_other() -> None:
    looks = [(one.upper, one.lower, one.mark) for one in world.SUBJECTS.values()]
    assert len(set(looks)) == len(looks) >= 6
    assert world.SUBJECTS.keys() <= KINDS.keys()


def test_drawn_subjects_depend_on_seed_and_number_and_the_halves_share_no_look() -> None:
    drawn = {
        half: [world.drawn_subject(seed, number, half) for seed in (0, 1) for number in range(8)]
        for half in get_args(world.Half)
    }
    assert drawn["proving"][:8] == [world.drawn_subject(0, number, "proving") for number in range(8)]
    assert len({one[1:4] for half in drawn.values() for one in half}) == 32, "all differ"
    choosing, proving = ({look for one in half for look in one[1:3]} for half in drawn.values())
    assert choosing and proving and not choosing & proving
    for half in drawn.values():
        assert {one.kind for one in half[:8]} == {one.kind for one in half[8:]} == KINDS.keys()
    scenes = [drawn["proving"][0].scene(number) for number in range(5)]
    assert len({scene.place for scene in scenes}) == len({scene.x for scene in scenes}) == 5
