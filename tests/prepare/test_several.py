"""prepare for several configs in one pass: the shards of each alone, each part of the base loaded once."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from dbtrain.config import Config
from dbtrain.models.pretrained import Pretrained
from dbtrain.prepare.prepare import prepare, prepare_all
from dbtrain.runtime.errors import ConfigError
from tests.conftest import Make, draw_photo, finished

SUBJECTS = (("sks", "dog"), ("sks", "dog"), ("xyz", "cat"))
PARTS = ("text_encoder", "unet", "vae")


@pytest.fixture
def several(make: Make, tmp_path: Path) -> list[Config]:
    """Two dogs with the same words and a cat, each with two photos and the same class images."""
    found = []
    for number, (token, kind) in enumerate(SUBJECTS):
        photos = tmp_path / f"photos-{number}"
        photos.mkdir()
        for k in range(2):
            draw_photo(photos / f"{k}.png", 3 * number + k)
        found.append(make(
            prepare__photos=str(photos), prepare__instance_prompt=f"a photo of {token} {kind}",
            prepare__class_prompt=f"a photo of a {kind}", prepare__class_images=3,
            prepare__class_dir=str(tmp_path / "class"), prepare__flip=number == 1, train__steps=4 + number,
            data__shards=str(tmp_path / f"shards-{number}"), run_dir=str(tmp_path / f"run-{number}"),
        ))  # fmt: skip
    return found


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each part of the base is loaded."""
    counts: Counter[str] = Counter()
    for name in ("load", "skeleton"):
        original = getattr(Pretrained, name)

        def counting(self, part, *args, original=original, name=name):  # type: ignore[no-untyped-def]
            counts[part] += name == "load" or part == "unet"
            return original(self, part, *args)

        monkeypatch.setattr(Pretrained, name, counting)
    return counts


def content(cfg: Config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(cfg.data.shards).iterdir()}


def alone(cfg: Config, folder: Path) -> dict[str, bytes]:
    """The shards that `prepare` makes for a config alone, with class images of its own."""
    one = cfg.override(f"data.shards={folder}", f"prepare.class_dir={folder}-class")
    prepare(one)
    made = content(one)
    manifest = made["manifest.json"].decode().replace(f"{folder}-class", str(cfg.prepare.class_dir))
    return made | {"manifest.json": manifest.encode()}


def test_shards_are_those_of_each_alone_and_parts_are_loaded_once(
    several: list[Config], tmp_path: Path, loaded: Counter[str]
) -> None:
    assert prepare_all(several) == [None] * 3
    assert {part: count for part, count in loaded.items() if part in PARTS} == {
        "unet": 1, "vae": 1, "text_encoder": 2,  # for the class prompts, and for the tables
    }  # fmt: skip
    for number, cfg in enumerate(several):
        assert content(cfg) == alone(cfg, tmp_path / f"alone-{number}")
    loaded.clear()
    before = [content(cfg) for cfg in several]
    assert prepare_all(several) == [None] * 3 and not loaded
    assert [content(cfg) for cfg in several] == before


def test_what_goes_wrong_with_one_stops_no_other(
    several: list[Config], tmp_path: Path, loaded: Counter[str]
) -> None:
    first, second, third = several
    (tmp_path / "photos-0" / "1.png").write_bytes((tmp_path / "photos-0" / "1.png").read_bytes()[:-60])
    lost = third.override(f"prepare.photos={tmp_path / 'nowhere'}", f"data.shards={tmp_path / 'lost'}")
    none = third.override("prepare=null", f"data.shards={tmp_path / 'none'}")
    (tmp_path / "file").touch()
    file = third.override(f"data.shards={tmp_path / 'file'}")
    problems = prepare_all([first, second, lost, none, third, file])
    assert [bool(problem) for problem in problems] == [True, False, True, True, False, True]
    assert "photos-0/1.png" in problems[0] and "nowhere' is not a directory" in problems[2]
    assert "no prepare section" in problems[3] and "file' is not a directory" in problems[5]
    assert not (tmp_path / "shards-0" / "manifest.json").exists()
    assert content(second) == alone(second, tmp_path / "alone")
    with pytest.raises(ConfigError) as caught:
        prepare(first)
    assert "\n".join(caught.value.problems) == problems[0]
    draw_photo(tmp_path / "photos-0" / "1.png", 1)
    loaded.clear()
    assert prepare_all([first, second]) == [None, None]
    assert content(first) == alone(first, tmp_path / "mended")


def test_class_images_that_subjects_share_are_encoded_once(several: list[Config], encoded: list[str]) -> None:
    pictures = [cfg.override("prepare.class_pictures=true") for cfg in several]
    assert prepare_all(pictures) == [None] * 3
    assert Counter(encoded)["00001.png"] == 2, "a class that two subjects share, and another"


CODE = """
import json, sys
from pathlib import Path
from dbtrain.config import Config
from dbtrain.prepare.prepare import prepare_all
from dbtrain.runtime import dist
problems = prepare_all([Config.load(path) for path in sys.argv[2:]])
Path(f"{sys.argv[1]}-{dist.rank()}").write_text(json.dumps(problems))
dist.finish(0)
"""


def test_ranks_share_the_work_and_agree_on_problems(several: list[Config], tmp_path: Path) -> None:
    photo = tmp_path / "photos-1" / "1.png"
    photo.write_bytes(photo.read_bytes()[:-60])
    (tmp_path / "script.py").write_text(CODE)
    paths = [tmp_path / f"{number}.yaml" for number in range(3)]
    for path, cfg in zip(paths, several, strict=True):
        path.write_text(cfg.dump())
    done = finished([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        *map(str, (tmp_path / "script.py", tmp_path / "told", *paths)),
    ])  # fmt: skip
    assert done.returncode == 0
    one, two = (json.loads((tmp_path / f"told-{rank}").read_text()) for rank in range(2))
    assert one == two and [bool(problem) for problem in one] == [False, True, False]
    for number in (0, 2):
        assert content(several[number]) == alone(several[number], tmp_path / f"alone-{number}")


def test_own_images_of_a_class_serve_no_other(several: list[Config], tmp_path: Path) -> None:
    """Those that nobody can tell apart are refused for all classes but the first."""
    (tmp_path / "class").mkdir(exist_ok=True)
    draw_photo(tmp_path / "class" / "mine.png", 7)
    *dogs, cat = prepare_all(several)
    assert dogs == [None, None]
    assert cat and "whose images would be of 'a photo of a dog' and 'a photo of a cat'" in cat
