"""How often photos are seen and how much they count: folders' numbers, patterns, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import Prepare
from dbtrain.data import emphasis
from dbtrain.data.emphasis import Emphasis
from dbtrain.data.photo_files import folders, listing, name_in
from dbtrain.runtime.errors import ConfigError

NAMES = ("3_close/a.jpg", "3_close/b.png", "6_far/x/a.jpg", "6_far/2_y/a.jpg", "c.jpg")


def found(names: tuple[str, ...] = NAMES, **settings: Any) -> list[tuple[int, float]]:
    cfg = Prepare(photos="p", instance_prompt="x", subfolders=True, **settings)
    return [tuple(one) for one in emphasis.of_photos(dict(enumerate(names)), cfg).values()]


@pytest.mark.parametrize(("settings", "repeats"), [
    ({}, [3, 3, 6, 2, 1]),
    ({"repeats": {"3_close": 5}}, [5, 5, 6, 2, 1]),
    ({"repeats": {"3_close/": 5, "3_close/a.jpg": 7}}, [7, 5, 6, 2, 1]),
    ({"repeats": {"3_close/a.jpg": 7, "3_close": 5}}, [5, 5, 6, 2, 1]),  # the last wins
    ({"repeats": {"6_far": 9}}, [3, 3, 9, 9, 1]),
    ({"repeats": {"*/2_y": 9, "c.*": 4}}, [3, 3, 6, 9, 4]),
    ({"repeats": {"*.png": 8}}, [3, 8, 6, 2, 1]),
    ({"repeats": {"*": 7}}, [1, 1, 1, 1, 1]),  # proportions are what counts
])  # fmt: skip
def test_repeats_are_those_of_the_last_pattern_or_of_the_nearest_folder(
    settings: dict[str, Any], repeats: list[int]
) -> None:
    assert [count for count, _ in found(**settings)] == repeats


@pytest.mark.parametrize(("sources", "times", "repeats"), [
    ("aabb", (1, 1, 1, 1), [3, 3, 1, 1]),
    ("aab", (1, 1, 1), [3, 3, 2]),  # a has two sizes
    ("abbb", (8, 5, 2, 1), [24, 5, 2, 1]),  # all of a's random crops are the same
    ("aaabb", (1, 1, 1, 1, 1), [2, 2, 2, 1, 1]),
])  # fmt: skip
def test_a_photo_is_seen_as_often_whatever_its_rows(
    sources: str, times: tuple[int, ...], repeats: list[int]
) -> None:
    rows = emphasis.of_rows(sources, times, {"a": Emphasis(3), "b": Emphasis(1, 0.5)})
    assert [row.repeats for row in rows] == repeats
    assert [row.weight for row in rows] == [0.5 if source == "b" else 1 for source in sources]


def test_proportions_of_large_numbers_are_kept_nearly() -> None:
    assert emphasis.reduced([]) == [] and emphasis.reduced([4, 6]) == [2, 3]
    assert emphasis.reduced([7000, 700, 1]) == [1000, 100, 1]


def test_weights_are_1_or_that_of_the_last_pattern() -> None:
    weights = {"3_close": 0.5, "*.png": 2, "a [1].jpg": 3.0}
    assert [weight for _, weight in found((*NAMES, "a [1].jpg"), weights=weights)] == [0.5, 2, 1, 1, 1, 3]
    assert Emphasis(3, 0.5).about() == ["3 times an epoch", "loss × 0.5"] and not Emphasis().about()


@pytest.mark.parametrize(("settings", "problem"), [
    ({"repeats": {"3_clos": 2}}, r"^prepare\.repeats: '3_clos' matches no photo; did you mean '3_close'\?$"),
    ({"weights": {"*.gif": 2}}, r"^prepare\.weights: '\*\.gif' matches no photo; the folders are 3_close, "
                                r"6_far/x, 6_far, 6_far/2_y$"),
    ({"repeats": {"c.jpg": 2, "Q": 1}, "weights": {"W": 2}}, r"'Q' matches no photo; .*\n.*'W' matches no"),
])  # fmt: skip
def test_a_pattern_that_matches_nothing_is_named_with_what_is_there(
    settings: dict[str, Any], problem: str
) -> None:
    cfg = Prepare(photos="p", instance_prompt="x", **settings)
    with pytest.raises(ConfigError, match=problem):
        emphasis.check(cfg, NAMES)


def test_without_folders_the_photos_are_named() -> None:
    cfg = Prepare(photos="p", instance_prompt="x", repeats={"zzz": 2})
    with pytest.raises(ConfigError, match=r"the photos are 1\.jpg, 2\.jpg, .*, 5\.jpg and 1 more$"):
        emphasis.check(cfg, [f"{number}.jpg" for number in range(1, 7)])


def test_a_year_is_no_number_of_repeats() -> None:
    with pytest.raises(ConfigError, match=r"'2024_summer' has a name by which photos are seen 2024 times"):
        found(("2024_summer/a.jpg",))
    assert found(("2024_summer/a.jpg",), repeats={"2024_summer": 1}) == [(1, 1.0)]


@pytest.mark.parametrize("settings", [
    {"repeats": {"a": 0}}, {"repeats": {"a": 1.5}}, {"repeats": {"a": 1001}}, {"weights": {"a": 0}},
    {"weights": {"a": -1.0}}, {"weights": {"a": float("inf")}},
])  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"repeats\.a|weights\.a"):
        Prepare(photos="p", instance_prompt="x", **settings)


def test_folders_are_walked_once_whatever_links_there_are(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (root / "b" / "deep", root / ".hidden", root / "masks", root / "0_off", elsewhere):
        folder.mkdir(parents=True)
        (folder / "1.jpg").touch()
    (root / "1.jpg").touch()
    (root / "b" / "deep" / "loop").symlink_to(root)
    (root / "b" / "up").symlink_to(tmp_path)
    (root / "a").symlink_to(root / "b" / "deep")  # before it by name
    (root / "4_there").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root / "b")
    (root / "broken").symlink_to(tmp_path / "nowhere")
    os.symlink("circle", root / "circle")
    names = [name_in(root, path) for path in listing(root, below=True).photos]
    assert names == ["1.jpg", "4_there/1.jpg", "b/deep/1.jpg"]
    assert folders(root) == [root, root / "4_there", root / "b", root / "b" / "deep"]
    assert [path.name for path in listing(root).photos] == ["1.jpg"]
