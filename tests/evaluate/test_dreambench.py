"""The DreamBooth dataset: its text file, what it makes of a config, and the table of all subjects."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dbtrain.config import Config, subject_words
from dbtrain.evaluate import dreambench
from dbtrain.evaluate import prompts as subject
from dbtrain.evaluate.dreambench import Dataset
from dbtrain.runtime.errors import ConfigError
from tests.conftest import ROOT, Done, finished

OBJECTS = ["in a barn", "made of glass", "beside a lighthouse"]
LIVE = ["wearing boots", "asleep"]


def line(words: str) -> str:
    return f"'a {{0}} {{1}} {words}'.format(unique_token, class_token)"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder like the dataset's, with other subjects and prompts."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    lists = [",\n".join(map(line, words)) for words in (OBJECTS, LIVE)]
    (folder / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\nlamp,lamp\ncat9,cat\nowl_plushie,stuffed animal\ndog,dog\n\n"
        f"Prompts\n\nObject Prompts\n\nprompt_list = [\n{lists[0]}\n]\n\n"
        f"Live Subject Prompts\n\nprompt_list = [\n{lists[1]}\n]\n"
    )
    return folder


def command(*arguments: object, cwd: Path) -> Done:
    line = [sys.executable, "-m", "dbtrain.evaluate.dreambench", *map(str, arguments)]
    return finished(line, cwd=cwd)


def test_the_text_file_is_read(dataset: Path) -> None:
    found = Dataset.read(dataset)
    assert found.subjects == (
        ("lamp", "lamp"),
        ("cat9", "cat"),
        ("owl_plushie", "stuffed animal"),
        ("dog", "dog"),
    )
    assert found.objects == tuple(f"a {{}} {words}" for words in OBJECTS)
    assert found.live == tuple(f"a {{}} {words}" for words in LIVE)


def test_settings_make_a_config_of_each_subject(dataset: Path, tmp_path: Path) -> None:
    base = ROOT / "configs" / "sd15.yaml"
    for number, name, kind, prompts in (
        (1, "lamp", "lamp", OBJECTS), (2, "cat9", "cat", LIVE), (3, "owl_plushie", "stuffed animal", OBJECTS),
        (4, "dog", "dog", LIVE),
    ):  # fmt: skip
        done = command("settings", dataset, number, cwd=tmp_path)
        cfg = Config.load(base, done.stdout.splitlines())
        assert cfg.run_dir == f"runs/dreambench/{name}" and cfg.prepare
        assert cfg.prepare.photos == str(dataset / name)
        about = subject_words.of(cfg.prepare, cfg.subject)
        assert (about.token, about.kind, about.class_prompt) == ("sks", kind, f"a {kind}")
        drawn = subject.prompts(about, cfg.evaluation)
        assert drawn == [(f"a sks {kind} {words}", f"a {kind} {words}") for words in prompts]
        assert cfg.evaluation.images == 4


def scores(runs: Path, name: str, dino: float, **changes: object) -> None:
    folder = runs / name / "scores"
    folder.mkdir(parents=True)
    values = {
        "dino": dino, "clip_i": 0.8, "clip_t": 0.3, "dino_real": 0.7, "clip_i_real": 0.9, "images": 4,
        "dino_model": "d", "dino_preprocessing": "p", "clip_model": "c", "clip_preprocessing": "q", **changes,
    }  # fmt: skip
    (folder / "scores.json").write_text(json.dumps(values))


def test_the_table_is_the_mean_of_what_is_done_beside_the_paper_s(dataset: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "dreambench"
    scores(runs, "lamp", 0.5)
    scores(runs, "dog", 0.7)
    some = command("table", dataset, cwd=tmp_path)
    assert some.returncode == 0 and some.stdout.startswith("2 of 4 subjects\n")
    rows = [text.split() for text in some.stdout.splitlines()]
    assert ["DINO", "0.600", "0.668"] in rows and ["CLIP-T", "0.300", "0.305"] in rows
    assert ["DINO,", "real", "images", "0.700", "0.774"] in rows
    assert command("table", dataset, "--when-all", cwd=tmp_path).stdout == ""
    scores(runs, "cat9", 0.6)
    scores(runs, "owl_plushie", 0.6)
    assert command("table", dataset, "--when-all", cwd=tmp_path).stdout.startswith("4 of 4 subjects\n")


def test_scores_that_cannot_be_averaged_are_refused(dataset: Path, tmp_path: Path) -> None:
    scores(tmp_path, "lamp", 0.5)
    scores(tmp_path, "dog", 0.7, clip_model="another")
    done = command("table", dataset, tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: subjects were scored with different clip_model: another, c"
    path = tmp_path / "dog" / "scores" / "scores.json"
    path.write_text('{"likeness": 0.5}')
    with pytest.raises(ConfigError, match="another judge wrote it"):
        Dataset.read(dataset).scores(tmp_path)


def test_what_is_no_dataset_is_refused(dataset: Path, tmp_path: Path) -> None:
    assert "there is no subject 5" in command("settings", dataset, 5, cwd=tmp_path).stderr
    for text in ("", "Object Prompts\nLive Subject Prompts\n", "Classes\n\na,b\n"):
        (dataset / dreambench.TEXTS).write_text(text)
        done = command("table", dataset, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "google/dreambooth" in command("table", tmp_path / "none", cwd=tmp_path).stderr
