"""`dbtrain init`: the config of every base loads, describes the photos, and overwrites nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dbtrain.config import Config
from dbtrain.config.template import filled
from dbtrain.prepare import init as verb
from dbtrain.runtime.errors import ConfigError
from tests.conftest import ROOT, Done, command, draw_photo, finished


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with five photos, two of them small."""
    monkeypatch.chdir(tmp_path)
    Path("photos/dog").mkdir(parents=True)
    for number in range(5):
        draw_photo(Path(f"photos/dog/{number}.jpg"), number, (1300, 1100) if number < 3 else (96, 48))
    return tmp_path


def dbtrain(*args: object, **env: str) -> Done:
    """A verb run in the test's folder, to its end."""
    return finished(command(*args), Path.cwd(), **env)


def written(base: str, *, name: str = "rex", photos: str = "photos/dog", word: str | None = None) -> Config:
    list(verb.init(name, Path(photos), base, word))
    return Config.load(f"configs/{name}.yaml")


def refused(
    told: str, name: str = "rex", photos: str = "photos/dog", base: str = "tiny", word: str | None = None
) -> None:
    """Check that nothing is written, and that the one line holds `told`."""
    there = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    done = dbtrain("init", name, photos, "--base", base, *(["--word", word] if word is not None else []))
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == there


@pytest.mark.parametrize("base", verb.examples())
def test_a_config_is_its_bases_example_about_these_photos(base: str) -> None:
    example = Config.load(verb.examples()[base])
    cfg = written(base, word="coffee mug")
    assert cfg.prepare and example.prepare
    assert cfg.run_dir == "runs/rex"
    assert cfg.data.shards == "shards/rex"
    assert cfg.prepare.photos == "photos/dog"
    assert cfg.prepare.instance_prompt == "a photo of sks coffee mug"
    assert cfg.prepare.class_prompt == (example.prepare.class_prompt and "a photo of a coffee mug")
    assert all("coffee mug" in prompt for prompt in (*cfg.validation.prompts, *cfg.sample.prompts))
    assert "dog" not in Path("configs/rex.yaml").read_text().replace("photos/dog", "")
    # Nothing else differs.
    assert (cfg.model, cfg.adapter, cfg.loss, cfg.optim) == (
        example.model, example.adapter, example.loss, example.optim,
    )  # fmt: skip
    assert cfg.train == example.train
    assert cfg.prepare.resolution == example.prepare.resolution
    assert len(cfg.validation.prompts) == len(example.validation.prompts)


def test_every_example_is_the_config_of_a_base() -> None:
    for example in verb.examples().values():
        assert Config.load(example).model.path
    assert {"sd15", "sdxl", "flux2-klein", "tiny"} <= verb.examples().keys()


def test_small_photos_are_counted_and_named() -> None:
    said = list(verb.init("rex", Path("photos/dog"), "sd15"))
    assert said[0] == "5 photos in photos/dog, short side 48 to 1100 px"
    assert said[1] == "2 photos smaller than 512 px, to be enlarged: 3.jpg, 4.jpg"
    text = Path("configs/rex.yaml").read_text()
    assert f"# {said[0]}\n# {said[1]}\n" in text


def test_the_name_of_a_photo_adds_no_setting() -> None:
    """It stands in a comment of the config."""
    Path("photos/dog/3.jpg").rename("photos/dog/3\nhub: {repo: them}\n.jpg")
    assert written("sd15").hub.repo is None
    assert r"3\x0ahub: {repo: them}\x0a.jpg" in Path("configs/rex.yaml").read_text()


def test_a_photo_on_its_side_counts_by_its_short_side_and_other_files_do_not_count() -> None:
    Path("photos/dog/notes.txt").write_text("not a photo")
    Path("photos/dog/.hidden.jpg").write_text("not a photo")
    Path("photos/dog/more.jpg").mkdir()
    assert [min(size) for size in verb.sizes_of(Path("photos/dog")).values()] == [1100] * 3 + [48] * 2


@pytest.mark.parametrize(
    ("photos", "steps"), [(1, 200), (2, 200), (3, 500), (5, 500), (7, 700), (10, 1000), (80, 1000)]
)
def test_steps_grow_with_the_photos(photos: int, steps: int) -> None:
    assert verb.steps_for(photos, 500) == steps


@pytest.mark.parametrize(
    ("word", "phrase"), [("dog", "a dog"), ("owl", "an owl"), ("dog house", "a dog house")]
)
def test_the_word_gets_its_article(word: str, phrase: str) -> None:
    cfg = written("sd15", word=word)
    assert cfg.validation.prompts == (f"a photo of sks {word}", f"a photo of {phrase}")


def test_the_word_is_the_folders_name_if_none_is_given() -> None:
    cfg = written("tiny", photos="photos/dog/")
    assert cfg.prepare and cfg.prepare.instance_prompt == "a photo of sks dog"


@pytest.mark.parametrize("name", ["1e4", "null", "a: b", "a, b] #", 'a "b"', "it's", "photos é"])
def test_a_folder_of_any_name_is_read_back(name: str) -> None:
    Path("photos/dog").rename(name)
    cfg = written("tiny", photos=name, word="dog")
    assert cfg.prepare and cfg.prepare.photos == name


def test_the_rest_of_a_template_is_kept() -> None:
    text = "# head\na: {b: 1, c: [x, y]} # tail\nd:\n  e: f # g\n"
    new = filled(text, {"d.e": "h", "a.c": ["long, long", "z"], "a.b": 22})
    assert new == '# head\na: {b: 22, c: ["long, long", z]} # tail\nd:\n  e: h # g\n'


def test_the_doctor_passes_what_init_wrote(folder: Path) -> None:
    done = dbtrain("init", "rex", "photos/dog", "--base", "tiny")
    assert done.returncode == 0
    assert "  dbtrain doctor configs/rex.yaml\n" in done.stdout
    assert dbtrain("doctor", "configs/rex.yaml", XDG_CACHE_HOME=str(folder / "cache")).returncode == 0


def test_the_launch_scripts_are_copied_once() -> None:
    Path("launch").mkdir()
    Path("launch/slurm.sh").write_text("# the user's own\n")
    written("tiny")
    copies = {path.name for path in Path("launch").iterdir()}
    assert copies >= {"slurm.sh", "torchrun.sh", "torchrun_nodes.sh", "train.sbatch", "array.sbatch"}
    assert not copies & {"venv.sh", "test.sh", "quickstart.sh", "Dockerfile"}
    assert Path("launch/slurm.sh").read_text() == "# the user's own\n"
    for copy in Path("launch").glob("*.sbatch"):
        assert copy.read_bytes() == (ROOT / "launch" / copy.name).read_bytes()
    assert not any("copied" in line for line in verb.init("other", Path("photos/dog"), "tiny"))


def test_a_name_with_slashes_is_refused() -> None:
    refused("NAME is 'a/b'", name="a/b")
    refused("NAME is '../b'", name="../b")


def test_an_existing_config_is_not_overwritten() -> None:
    Path("configs").mkdir()
    Path("configs/rex.yaml").write_text("mine")
    refused("configs/rex.yaml already exists; choose another NAME, or delete the file")


def test_a_missing_or_empty_folder_is_refused() -> None:
    refused("PHOTOS is 'photos/cat', which is not a directory", photos="photos/cat")
    Path("photos/cat").mkdir()
    Path("photos/cat/notes.txt").write_text("not a photo")
    refused("PHOTOS: there are no photos in 'photos/cat'; add some", photos="photos/cat")


def test_all_broken_photos_are_named() -> None:
    for name in ("a", "b"):
        Path(f"photos/dog/{name}.jpg").write_text("not a picture")
    with pytest.raises(ConfigError) as raised:
        list(verb.init("rex", Path("photos/dog"), "tiny"))
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        "cannot read photo photos/dog/a.jpg", "cannot read photo photos/dog/b.jpg",
    ]  # fmt: skip
    assert not Path("configs").exists()


def test_an_unknown_base_and_an_odd_word_are_refused() -> None:
    refused(f"--base is 'sd16'; choose from {', '.join(verb.examples())}", base="sd16")
    refused("--word is 'a: {b'", word="a: {b")
    refused("--word is ''", word="")
    Path("photos/dog").rename("photos/2024")
    refused("the folder is called '2024'", photos="photos/2024")


def test_init_imports_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['dbtrain', 'init', 'rex', 'photos/dog', '--base', 'sdxl']\n"
        "import dbtrain.__main__ as m\n"
        "try: m.entry()\n"
        "finally: print({'torch', 'numpy', 'pydantic'} & sys.modules.keys())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "{'pydantic'}", done.stderr


def test_photos_keep_their_shapes_if_squares_would_cut_them(tmp_path: Path) -> None:
    for name, size in {"square": (300, 290), "wide": (480, 270)}.items():
        (tmp_path / name).mkdir()
        draw_photo(tmp_path / name / "0.png", 0, size)
        list(verb.init(name, tmp_path / name, "sdxl", "dog"))
        text = (Path("configs") / f"{name}.yaml").read_text()
        cfg = Config.load(Path("configs") / f"{name}.yaml")
        assert cfg.prepare and cfg.prepare.buckets is (name == "wide")
        assert text.count("  buckets: true # 1 photo cut by squares\n") == (name == "wide")
