"""Several subjects in one adapter: their words, their images in the shards, and their turns in training."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from dbtrain.config import Config
from dbtrain.data import shards
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.order import Order, RankSlice, Turns
from dbtrain.data.shards import Manifest
from dbtrain.models.families import registry as families
from dbtrain.prepare import originals, plan, subjects
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from tests.conftest import at, config_in, draw_photo

PROMPTS = {"prepare__instance_prompt": "a photo of {}", "prepare__class_prompt": "a photo of a {class}"}


def three(folder: Path) -> list[dict[str, object]]:
    """Two dogs and a cat, the cat twice as often."""
    several = []
    for number, (token, kind, count) in enumerate((("sks", "dog", 3), ("xyz", "dog", 2), ("zwx", "cat", 2))):
        photos = folder / f"photos-{token}"
        photos.mkdir(exist_ok=True)
        for k in range(count):
            draw_photo(photos / f"{k}.png", 10 * number + k)
        several.append({"token": token, "class_word": kind, "photos": str(photos)})
    return [*several[:2], several[2] | {"weight": 2.0}]


@pytest.fixture
def several(tmp_path: Path, class_dir: Path) -> Callable[..., Config]:
    def config(**changes: object) -> Config:
        values = {
            "subjects": three(tmp_path),
            "subject": {},
            **PROMPTS,
            "prepare__class_images": 2,
            **changes,
        }
        return config_in(tmp_path, tmp_path / "photos-sks", class_dir, **values)

    return config


Several = Callable[..., Config]


def test_prompts_are_filled_for_each_subject_and_stay_so(several: Several) -> None:
    cfg = several(sample__prompts=["a {} in the snow", "a {class}", "a photo"])
    kept = [one.sample.prompts for one in cfg.each_subject()]
    assert kept[2] == ("a zwx cat in the snow", "a cat", "a photo") and "a zwx cat in the snow" not in kept[0]
    assert cfg.sample.prompts == (
        "a sks dog in the snow", "a xyz dog in the snow", "a zwx cat in the snow",
        "a dog", "a cat", "a photo",
    )  # fmt: skip
    each = cfg.each_subject()
    assert [one.prepare.instance_prompt for one in each if one.prepare] == [
        "a photo of sks dog", "a photo of xyz dog", "a photo of zwx cat",
    ]  # fmt: skip
    assert cfg.prepare and each[0].prepare == cfg.prepare and each[0].subject == cfg.subject
    assert cfg.override("train.steps=9").override("train.steps=4") == cfg


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("prepare.photos=elsewhere", "prepare.photos is 'elsewhere', but each of subjects has its own"),
        ("subject.token=abc", "subject.token is 'abc', but each of subjects has its own"),
        ("prepare=null", "subjects need a prepare section"),
        ("subjects=[{token: a, class_word: b, photos: p}, {token: a, class_word: c, photos: q}] & "
         "prepare.photos=p", "'a' is the token of more than one"),
        ("subjects=[{token: a, class_word: b}]", "'subjects.0.photos' is missing"),
        ("subjects=[{token: a, class_word: b, photos: p, wieght: 2}]", "unknown key 'subjects.0.wieght'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(several: Several, tmp_path: Path, override: str, told: str) -> None:
    several()
    with pytest.raises(ConfigError) as caught:
        Config.load(tmp_path / "c.yaml", override.split(" & "))
    assert any(told in problem for problem in caught.value.problems), caught.value.problems


def test_shards_have_every_subject_and_each_class_once(several: Several) -> None:
    cfg = several()
    folder = prepare(cfg)
    manifest = Manifest.read(at(folder))
    rows = {
        role: [(shard.part, manifest.prompts.texts[row.meta["prompt"]])
               for shard in manifest.roles[role] for row in shards.read(at(folder), shard, manifest)]
        for role in manifest.roles
    }  # fmt: skip
    assert Counter(rows["instance"]) == {
        (0, "a photo of sks dog"): 3, (1, "a photo of xyz dog"): 2, (2, "a photo of zwx cat"): 2,
    }  # fmt: skip
    assert Counter(rows["class"]) == {(0, "a photo of a dog"): 2, (1, "a photo of a cat"): 2}
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(cfg) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before, "encoded again"
    # Another photo of one subject leaves the others' rows as they are; one subject less is noticed.
    draw_photo(Path(cfg.subjects[1].photos) / "9.png", 40)
    with pytest.raises(ConfigError, match=r"instance 2 images changed.*9.png was added"):
        originals.check(cfg, manifest)
    fewer = Config.from_dict(cfg.model_dump(mode="json") | {
        "subjects": [one.model_dump(mode="json") for one in cfg.subjects[:2]]
    })  # fmt: skip
    assert plan.request(fewer, families.get("sd")) != manifest.request


def test_subjects_take_turns_by_weight(several: Several) -> None:
    cfg = several()
    folder, share = prepare(cfg), RankSlice(4, 2)
    manifest = Manifest.read(at(folder))
    assert subjects.weights(cfg) == {"instance": (1.0, 1.0, 2.0), "class": (2.0, 2.0)}
    stream = LatentStream(at(folder), manifest, share, {"instance": 1.0, "class": 1.0}, seed=3,
                          weights=subjects.weights(cfg))  # fmt: skip
    texts = [manifest.prompts.texts[prompt] for _ in range(24) for prompt in next(stream).prompts]
    stream.close()
    instance = [text for k in range(0, len(texts), 4) for text in texts[k : k + 2]]
    assert Counter(instance) == {"a photo of sks dog": 12, "a photo of xyz dog": 12, "a photo of zwx cat": 24}
    assert all(first != second for first, second in pairwise(text for text in texts if " a " in text[8:]))


def test_shares_do_not_depend_on_the_shapes_of_photos(several: Several, tmp_path: Path) -> None:
    """Of subjects by their weights, and of the photos of each."""
    cfg = several(prepare__buckets=True, prepare__class_prompt=None, prepare__class_images=0)
    for name in ("photos-sks/2.png", "photos-xyz/0.png", "photos-zwx/0.png", "photos-zwx/1.png"):
        draw_photo(tmp_path / name, int(name[11:-4]) + len(name), (160, 80))
    share, manifest = RankSlice(1, 1), Manifest.read(at(prepare(cfg)))
    stream = LatentStream(at(Path(cfg.data.shards)), manifest, share, {"instance": 1.0}, seed=3,
                          weights=subjects.weights(cfg))  # fmt: skip
    found = Counter((manifest.prompts.texts[batch.prompts[0]], stream.source("instance", position))
                    for position, batch in zip(range(2400), stream, strict=False))  # fmt: skip
    stream.close()
    wanted = {("sks dog", 3): 200, ("xyz dog", 2): 300, ("zwx cat", 2): 600}
    for (subject, photos), count in wanted.items():
        mine = [found[f"a photo of {subject}", f"{k}.png"] for k in range(photos)]
        assert mine == pytest.approx([count] * photos, rel=0.03)


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0), (1.0, 3.0), (0.3, 0.7, 0.25), (1.0, 2.0, 3.0, 4.0), (1e-6, 1.0)]
)
def test_any_stretch_has_each_subject_s_share(weights: tuple[float, ...]) -> None:
    rows = tuple(range(1, len(weights) + 1))
    parts = [Order((count,), 1, 1, f"instance {number}") for number, count in enumerate(rows)]
    order = Turns([[k] for k in range(len(weights))], parts, weights)
    found = [order.locate(position) for position in range(2400)]
    for part, weight in enumerate(weights):
        share = max(weight / sum(weights), 1 / 1000)
        hits = [location.shard == part for location in found]
        for start, end in ((0, 7), (5, 100), (93, 1290), (0, 2400)):
            assert abs(sum(hits[start:end]) - share * (end - start)) <= 2, (part, start, end)
        mine = [location for location in found if location.shard == part]
        epochs = Counter((one.epoch, one.row) for one in mine)
        assert set(epochs.values()) <= {1}, "a row twice in an epoch"
        assert [one.epoch for one in mine] == sorted(one.epoch for one in mine)


def test_own_class_images_are_of_one_class(several: Several, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    draw_photo(own / "dog.png", 3)
    with pytest.raises(ConfigError, match="'a photo of a dog' and 'a photo of a cat'; use an empty folder"):
        prepare(several(prepare__class_dir=str(own)))
    shutil.rmtree(own)


def test_each_subject_s_own_class_is_what_the_base_predicts_for(several: Several) -> None:
    cfg = several(loss__prior="prediction")
    folder = prepare(cfg)
    manifest = Manifest.read(at(folder))
    assert set(manifest.roles) == {"instance"}, "class images were made"
    stream = LatentStream(at(folder), manifest, RankSlice(4, 4), {"instance": 1.0, "class": 1.0}, seed=3,
                          weights=subjects.weights(cfg), class_prompts=manifest.class_prompts())  # fmt: skip
    rows = [manifest.prompts.texts[prompt] for prompt in next(stream).prompts]
    stream.close()
    assert Counter(rows[4:]) == {"a photo of a dog": 2, "a photo of a cat": 2}
