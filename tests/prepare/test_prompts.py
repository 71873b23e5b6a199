"""Several prompts of a photo: how they are made, stored, and drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import Config, Prepare
from dbtrain.config.inputs import Caption
from dbtrain.config.subjects import Subject
from dbtrain.data import prompt_table
from dbtrain.data.dataloader import LatentStream
from dbtrain.data.order import RankSlice
from dbtrain.data.shards import Manifest
from dbtrain.prepare import encode
from dbtrain.prepare import prepare as verb
from dbtrain.prepare.prepare import prepare
from dbtrain.prepare.prompts import of_photo
from dbtrain.runtime.errors import ConfigError
from dbtrain.train.inputs import Inputs
from tests.conftest import Make, at, draw_photo, train

WORDS = Subject(token="sks", class_word="dog")
TAGS = [f"tag {letter}" for letter in "abcdefgh"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    (tmp_path / "captioned").mkdir()
    return draw_photo(tmp_path / "captioned" / "0.png", 0)


def made(photo: Path, text: str, captions: Any = True, seed: int = 1, **how: Any) -> list[str]:
    photo.with_suffix(".txt").write_text(text)
    cfg = Prepare(photos="x", instance_prompt="x", captions=captions, caption=Caption(**how) if how else None)
    return of_photo(photo, cfg, WORDS, seed)


def test_captions_are_prompts_as_they_are_unless_something_is_to_change(photo: Path) -> None:
    assert made(photo, "one\ntwo, {three|four}") == ["one two, {three|four}"]
    assert made(photo, "one\n\ntwo\none", "lines") == ["one", "two"]
    assert made(photo, "red, big", prefix="a photo of {},") == ["a photo of sks dog, red, big"]
    assert made(photo, "red", prefix="{token}", suffix=", on a {class} bed") == ["sks red, on a dog bed"]


def test_a_json_file_may_have_several_captions(photo: Path) -> None:
    def read(value: Any, captions: Any = "lines") -> list[str]:
        photo.with_suffix(".json").write_text(json.dumps(value))
        return of_photo(photo, Prepare(photos="x", instance_prompt="x", captions=captions), WORDS, 1)

    assert read(["one", "two"]) == ["one", "two"]
    assert read({"captions": ["one"]}, True) == ["one"]
    with pytest.raises(ConfigError, match=r"has 2 captions; set prepare\.captions to lines"):
        read(["one", "two"], True)
    with pytest.raises(ConfigError, match="is no list of texts"):
        read({"text": "one"})


def test_tags_are_put_in_other_orders_but_for_the_first_ones(photo: Path) -> None:
    prompts = made(photo, ", ".join(TAGS), shuffle=True, keep_tags=2, variants=60)
    assert len(prompts) == 60 and all(prompt.startswith("tag a, tag b, ") for prompt in prompts)
    for place in range(2, 8):
        seen = Counter(prompt.split(", ")[place] for prompt in prompts)
        assert set(seen.values()) == {10}, "each tag as often in each place"
    assert prompts == made(photo, ", ".join(TAGS), shuffle=True, keep_tags=2, variants=60)
    assert prompts != made(photo, ", ".join(TAGS), shuffle=True, keep_tags=2, variants=60, seed=2)


def test_the_share_of_tags_that_was_asked_for_is_left_out(photo: Path) -> None:
    prompts = made(photo, ", ".join(TAGS), tag_dropout=0.25, keep_tags=1, variants=100)
    counts = Counter(tag for prompt in prompts for tag in prompt.split(", "))
    assert counts.pop("tag a") == 100
    assert set(counts.values()) == {75}
    whole = [prompt for prompt in prompts if len(prompt.split(", ")) == 8]
    assert 0.3 * 0.75**7 < len(whole) / 100 < 3 * 0.75**7, "tags are left out by themselves"


def test_one_of_several_words_is_chosen(photo: Path) -> None:
    prompts = made(photo, "a {big|small} dog on a {red {bed|sofa}|lawn}", variants=40)
    assert set(prompts) == {f"a {size} dog on a {place}" for size in ("big", "small")
                            for place in ("red bed", "red sofa", "lawn")}  # fmt: skip
    assert Counter(prompt.split()[1] for prompt in prompts) == {"big": 20, "small": 20}


@pytest.fixture
def captioned(make: Make, photo: Path) -> Config:
    """Two photos with two captions of four tags each."""
    for number in range(2):
        draw_photo(photo.parent / f"{number}.png", number)
        lines = [", ".join(f"{kind} {number} {k}" for k in range(4)) for kind in ("x", "y")]
        (photo.parent / f"{number}.txt").write_text("\n".join(lines))
    return make(
        prepare__photos=str(photo.parent), prepare__captions="lines", data__prompt_dropout=0.2,
        prepare__caption={"shuffle": True, "keep_tags": 1, "prefix": "a sks dog,", "variants": 12},
    )  # fmt: skip


@pytest.mark.slow
def test_training_draws_prompts_by_position(captioned: Config) -> None:
    """10,000 positions: each caption and each place of a tag as often as asked for, whatever the ranks."""
    folder = prepare(captioned)
    manifest = Manifest.read(at(folder))
    texts = manifest.prompts.texts
    counts, drawn = Counter[str](), {}
    for world in (1, 2, 4):
        streams = [
            LatentStream(at(folder), manifest, RankSlice(4, 4 // world, rank, world), {"instance": 1.0},
                         seed=9, prompt_dropout=0.2) for rank in range(world)
        ]  # fmt: skip
        steps = 2500 if world == 1 else 100
        drawn[world] = [k for _ in range(steps) for stream in streams for k in next(stream).prompts]
        for stream in streams:
            stream.close()
    assert drawn[2] == drawn[4] == drawn[1][:400]
    for prompt in drawn[1]:
        counts[texts[prompt]] += 1
    total = sum(counts.values())
    assert total == 10_000
    assert abs(counts.pop("") / total - 0.2) < 0.02
    tags = [text.removeprefix("a sks dog, ").split(", ") for text in counts.elements()]
    assert all(every[0].endswith(" 0") for every in tags), "the first tag stays"
    kinds = Counter(every[0] for every in tags)
    assert len(kinds) == 4 and max(kinds.values()) / min(kinds.values()) < 1.1
    for place in (1, 2, 3):
        seen = Counter(every[place][-1] for every in tags)
        assert all(abs(count / len(tags) - 1 / 3) < 0.03 for count in seen.values()), place


def test_each_text_is_encoded_once_and_no_image_again(
    captioned: Config, encoded: list[str], monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    rows: list[int] = []
    original = encode.prompt_tables

    def counting(base: Any, every: Any, gib: Any) -> Any:
        rows.extend(len(next(iter(ids.values()))) for ids in every)
        return original(base, every, gib)

    monkeypatch.setattr(verb.encode, "prompt_tables", counting)
    folder = prepare(captioned)
    manifest = Manifest.read(at(folder))
    texts = manifest.prompts.texts
    assert rows == [len(texts)] and len(set(texts)) == len(texts)
    table = prompt_table.read(at(folder), manifest.prompts)
    assert all(len(tensor) == len(texts) for tensor in table.values())
    train(captioned)
    encoded.clear()
    path = Path(str(captioned.prepare and captioned.prepare.photos)) / "0.txt"
    path.write_text(path.read_text().replace("x 0 1", "z"))
    with pytest.raises(ConfigError, match=r"the caption of 0\.png was edited"):
        Inputs.find(captioned)
    prepare(captioned)
    assert encoded == []


def test_settings_that_do_not_go_together(make: Make) -> None:
    with pytest.raises(ConfigError, match="captions is false; set captions to true, lines or auto"):
        make(prepare__caption={"shuffle": True})
