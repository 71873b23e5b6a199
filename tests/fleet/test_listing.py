"""The list of a fleet's subjects: its forms, what an entry may set, and whose problem a mistake is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dbtrain.fleet import listing
from dbtrain.fleet.listing import Entry
from dbtrain.runtime.errors import ConfigError
from tests.conftest import draw_photo

CONFIG = """\
run_dir: runs/fleet
subject: {token: sks, class_word: dog}
model: {path: tiny}
prepare: {instance_prompt: "a photo of {}", class_prompt: "a photo of a {class}", resolution: 64}
adapter: {rank: 4}
sample: {prompts: ["a {} in the snow"]}
"""
Read = Callable[..., list[Entry]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write a config and a list beside three folders of photos, and read them."""
    for number, name in enumerate(("cat9", "backpack_dog", "mug")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        draw_photo(folder / "0.png", number)

    def reading(
        name: str, text: str = "", overrides: Sequence[str] = (), config: str = CONFIG
    ) -> list[Entry]:
        (tmp_path / "c.yaml").write_text(config)
        path = tmp_path / "photos" / name
        if text:
            path.write_text(text)
        return listing.read(tmp_path / "c.yaml", path, overrides)

    return reading


def good(entries: list[Entry]) -> dict[str, object]:
    """The configs of the entries, none of which has a problem."""
    assert [entry.problem for entry in entries if entry.problem] == []
    return {entry.name: entry.cfg for entry in entries}


LISTS = {
    "list.yaml": "- {name: tom, photos: cat9, class: cat, lr: 2e-3}\n"
    "- {photos: mug, token: 007, train.steps: 9}\n",
    "names.yaml": "tom: {photos: cat9, class_word: cat, optim: {lr: 0.002}}\n"
    "mug: {photos: mug, token: 007, steps: 9}\n",
    "list.csv": "name, photos,class,lr,token,steps\ntom,cat9,cat,2e-3,,\n,mug,,,007,9\n",
    "spreadsheet.csv": " \nname,photos,class,lr,token,steps,,\n,,,,,,,\ntom,cat9,cat,2e-3, ,,,,,\n"
    " , \n,mug,,,007,9,,\n,,,,,,,\n",
    "told.csv": "sep=;\r\nname;photos;class;lr;token;steps\r\ntom;cat9;cat;2e-3\r\n;mug;;;007;9\r\n",
    "excel.csv": "name;photos;class_word;optim.lr;token;steps\r\ntom;cat9;cat;2e-3;;\r\n\r\n;mug;;;007;9\r\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_every_form_of_a_list_says_the_same(read: Read, tmp_path: Path, name: str) -> None:
    found = good(read(name, LISTS[name], ["train.steps=50"]))
    assert list(found) == ["tom", "mug"]
    tom, mug = found.values()
    assert (tom.run_dir, tom.data.shards) == ("runs/fleet/tom", "runs/fleet/tom/shards")
    assert (tom.subject.name, tom.prepare.photos) == ("tom", str(tmp_path / "photos" / "cat9"))
    assert (tom.optim.lr, tom.train.steps, tom.adapter.rank) == (2e-3, 50, 4)
    assert (mug.optim.lr, mug.train.steps, mug.subject.token) == (1e-4, 9, "007")
    assert (
        tom.prepare.instance_prompt == "a photo of sks cat" and tom.prepare.class_prompt == "a photo of a cat"
    )
    assert mug.sample.prompts == ("a 007 dog in the snow",)


def test_a_folder_of_photo_folders_is_a_list(read: Read, tmp_path: Path) -> None:
    (tmp_path / "photos" / "empty").mkdir()
    (tmp_path / "photos" / ".hidden").mkdir()
    output = tmp_path / "photos" / "fleet"
    output.mkdir()
    draw_photo(output / "sheet.png", 1)
    found = good(read(".", overrides=[f"run_dir={output}"]))
    assert list(found) == ["backpack_dog", "cat9", "mug"]
    assert {one.prepare.instance_prompt for one in found.values()} == {"a photo of sks dog"}


def test_the_dataset_tells_its_classes(read: Read) -> None:
    prompts = "Prompts\n\nObject Prompts\n'a {0} {1}'.format(unique_token, class_token),\n"
    text = f"subject_name,class\nbackpack_dog,backpack\ncat9,cat\nlost,dog\n{prompts}"
    text += "Live Subject Prompts\n'a {0} {1}'.format(unique_token, class_token),\n"
    first, second, lost = read("prompts_and_classes.txt", text)
    assert [one.cfg.subject.class_word for one in (first, second) if one.cfg] == ["backpack", "cat"]
    assert lost.name == "lost" and lost.problem and "lost' is not a directory" in lost.problem
    words = {name: cfg.subject.class_word for name, cfg in good(read(".")).items()}
    assert words == {"backpack_dog": "backpack", "cat9": "cat", "mug": "dog"}


def test_a_subject_starts_from_an_adapter_beside_the_list(read: Read, tmp_path: Path) -> None:
    entries = read("list.yaml", "- {photos: mug, start: mug.safetensors}\n- {photos: cat9}\n")
    mug, cat = good(entries).values()
    assert mug.adapter.start == str(tmp_path / "photos" / "mug.safetensors") and cat.adapter.start is None


def test_each_subject_may_make_its_prompts_otherwise(read: Read) -> None:
    config = CONFIG.replace("resolution", "captions: true, caption: {prefix: 'a photo of {},'}, resolution")
    text = (
        "- {photos: mug, prepare: {captions: lines, caption: {shuffle: true, variants: 4}}}\n"
        "- {photos: cat9, prepare.captions: false, prepare.caption: null}\n- {photos: backpack_dog}\n"
    )
    mug, cat, dog = (one.prepare for one in good(read("list.yaml", text, config=config)).values())
    assert (mug.captions, mug.caption.prefix, mug.caption.variants) == ("lines", "a photo of {},", 4)
    assert (cat.captions, cat.caption) == (False, None)
    assert dog.captions is True and not dog.caption.shuffle


def test_repeats_of_a_subject_are_not_those_of_the_config(read: Read) -> None:
    config = CONFIG.replace("resolution", 'repeats: {"*.png": 2}, resolution')
    text = "- {photos: mug, prepare.repeats: {close: 3}}\n- {photos: cat9}\n"
    mug, cat = (one.prepare for one in good(read("list.yaml", text, config=config)).values())
    assert (mug.repeats, cat.repeats) == ({"close": 3}, {"*.png": 2})


PROBLEMS = [
    ("{photos: cat9, learning_rate: 1}", "cat9", "unknown key 'learning_rate'; did you mean 'optim.lr'?"),
    ("{photos: cat9, clas: cat}", "cat9", "unknown key 'clas'; did you mean 'class'?"),
    ("{photos: cat9, train.precision: fp32}", "cat9", "train.precision is 'fp32', but all subjects"),
    ("{photos: cat9, prepare: {resolution: 32}}", "cat9", "prepare.resolution is '32', but all subjects"),
    ("{photos: cat9, prepare.captioner: me/blip}", "cat9", "prepare.captioner is 'me/blip', but all"),
    ("{photos: cat9, prepare.caption.shuffle: true}", "cat9", "but captions is false; set captions to true"),
    ("{photos: cat9, steps: many}", "cat9", "train.steps is 'many'"),
    ("{photos: cat9, steps: 5, train.steps: 6}", "cat9", "train.steps is given twice"),
    ("{photos: nowhere}", "nowhere", "nowhere' is not a directory"),
    ("{name: tom}", "tom", "'prepare.photos' is missing"),
    ("{photos: cat9, name: a/b}", "entry 2", "name is 'a/b', but it names a folder"),
    (f"{{photos: cat9, name: {90 * '猫'}}}", "entry 2", "of 270 bytes; use at most 200"),
    ("{photos: mug}", "entry 2", "the name 'mug' is that of an entry before it"),
    ("just words", "entry 2", "it is 'just words', not settings"),
    ("{photos: cat9, class_prompt: null}", "cat9", "class images either all or none"),
    ("{photos: cat9, adapter.text_encoder.rank: 2}", "cat9", "text encoders either all or none"),
    ("{photos: cat9, lr: 1, optim.warmup_steps: 900}", "cat9", "optim.warmup_steps is 900, but"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "name", "told"), PROBLEMS)
def test_a_mistake_is_the_problem_of_its_entry(read: Read, entry: str, name: str, told: str) -> None:
    first, second, third = read("list.yaml", f"- {{photos: mug}}\n- {entry}\n- {{name: last, photos: mug}}\n")
    assert first.cfg and third.cfg and second.cfg is None
    assert second.name == name
    assert second.problem and told in second.problem
    assert first.problem is None and third.problem is None


def test_a_word_that_no_prompt_has_is_a_problem(read: Read) -> None:
    fixed = CONFIG.replace("a photo of {}", "a photo of sks dog").replace("a photo of a {class}", "a dog")
    same, other = read("list.yaml", "- {photos: mug}\n- {photos: cat9, class: cat}\n", config=fixed)
    assert same.cfg and other.problem and "subject.class_word is 'cat', but" in other.problem
    good(read("list.yaml", "- {photos: cat9, class: cat, prompt: 'my cat', class_prompt: null}\n",
              config=fixed.replace('class_prompt: "a dog", ', "")))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("nowhere.yaml", "", "cannot read list"),
        ("list.yaml", "- {", "is not a valid list"),
        ("list.yaml", "words", "has neither"),
        ("list.csv", 'a,b\n"x', "is not a valid CSV file"),
        ("list.csv", "lr,lr\n1,1\n", "more than one column 'lr'"),
        ("mug", "", "has photos itself"),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error(read: Read, name: str, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read(name, text)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("optim: {lrr: 1}", "did you mean 'optim.lr'"),
        ("subjects: [{token: a, class_word: b, photos: c}]", "remove them"),
    ],
)
def test_a_problem_of_the_config_is_told_once(read: Read, change: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        read(".", config=CONFIG + change)
    assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError, match="'run_dir' is missing"):
        read(".", config=CONFIG.replace("run_dir: runs/fleet", ""))


def test_each_subject_has_a_repository_of_its_own(read: Read, tmp_path: Path) -> None:
    unnamed = CONFIG.replace("run_dir: runs/fleet", "")
    found = good(read(".", overrides=["hub.repo=me/pets", "subject.name=pets"], config=unnamed))
    assert found["mug"].hub.repo == "me/pets-mug" and found["mug"].run_dir == "runs/pets/mug"
    assert listing.shared(tmp_path / "c.yaml", ["run_dir=elsewhere"]).run_dir == "elsewhere"


def test_photos_that_are_still_copied_are_not_listed_yet(read: Read, tmp_path: Path) -> None:
    read(".")
    paths = tmp_path / "c.yaml", tmp_path / "photos"
    assert listing.read(*paths, settled_s=3600) == []
    while len(listing.read(*paths, settled_s=0.05)) < 3:
        pass  # they settle
    draw_photo(tmp_path / "photos" / "new.png", 1)  # beside the folders: no subject
    assert len(listing.read(*paths)) == 3
