"""What the page says first: the verdict, how to use the files, and the table of many runs."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image, ImageFilter

from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config
from dbtrain.data.pictures import save_png
from dbtrain.report import palette, report, thumbs, usage, verdict
from dbtrain.report.run import read
from tests.report.conftest import SCORES, Page

pytestmark = pytest.mark.xdist_group("report")

MANY = 16
STEPS = range(0, 500, 100)  # of the many runs' validations
UNSCORED = 3  # of the many runs


def fill(folder: Path, original: Path, number: int, pictures: list[Path], lines: str) -> None:
    """A run like the original, with other settings and scores, large pictures and a long log of losses."""
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("validation", "checkpoints", "tb"))
    cfg = yaml.safe_load((original / "config.yaml").read_text())
    cfg["run_dir"], cfg["seed"], cfg["optim"]["lr"] = str(folder), number, 1e-4 * (1 + number % 4)
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    (folder / "metrics.jsonl").write_text(lines)
    for step, (prompt, seed) in itertools.product(STEPS, itertools.product(range(2), range(2))):
        place = folder / "validation" / f"step-{step:06d}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[2 * prompt + seed], place / f"{prompt:02d}-seed{seed}.png")
    scores = {**SCORES, "likeness": 0.2 + 0.04 * number}
    (folder / "scores" / "scores.json").write_text(json.dumps(scores))
    if number == UNSCORED:
        shutil.rmtree(folder / "scores")


@pytest.fixture(scope="module")
def many(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about sixteen runs, in the folder of the first."""
    home = tmp_path_factory.mktemp("many")
    pictures, generator = [], np.random.default_rng(0)
    for number in range(4):  # as detailed as a photo
        noise = Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8))
        note = json.dumps({"prompt": f"prompt {number // 2}", "seed": number % 2})
        save_png(path := home / f"{number}.png", noise.filter(ImageFilter.GaussianBlur(2)), note)
        pictures.append(path)
    losses = generator.uniform(0.01, 0.2, (1000, 4)).tolist()
    keys = ("loss_instance", "loss_prior", "grad_norm", "lr")
    rows = ({"step": k + 1, **dict(zip(keys, row, strict=True))} for k, row in enumerate(losses))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    folders = [home / f"run-{number:02d}" for number in range(MANY)]
    for number, folder in enumerate(folders):
        fill(folder, runs[0], number, pictures, lines)
    return report.report(folders)


# The page of one run.


def test_the_verdict_and_pictures_come_first_and_curves_below(browser: Page, one: Path) -> None:
    page = browser.open(one)
    order = [".sentence", "#use", "#images", "#summary", "#curves", "#scores", "#data", "#config", "#files"]
    tops = [page(f"document.querySelector('{selector}').getBoundingClientRect().top") for selector in order]
    assert tops == sorted(tops)
    assert page("document.querySelector('.made img').getBoundingClientRect().bottom") < 900, "in the window"
    assert page.texts(".sentence") == [
        "It has learned the subject, follows prompts and has begun to change the class."
    ]
    assert page.texts(".rating strong") == ["75%", "100%", "75%"]
    assert page.texts(".rating .level") == ["good", "good", "fair"], "not by colour alone"
    assert page.texts(".words code") == ["sks dog", "a photo of sks dog in the snow", "a photo of a dog"]
    assert page.texts(".programs tbody th") == ["Diffusers", "ComfyUI", "A1111, Forge"]
    counts = page("['.made', '.photos'].map(s => document.querySelectorAll(`${s} img`).length)")
    assert counts == [2, 4]


def test_on_paper_there_are_no_tools(browser: Page, one: Path) -> None:
    page = browser.open(one)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = page("['nav', '#tools', '.sentence'].map(s => document.querySelector(s).checkVisibility())")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == [False, False, True]


# The page of many runs.


@pytest.mark.slow
def test_sixteen_runs_are_a_small_page(browser: Page, many: Path) -> None:
    page = browser.open(many)
    assert many.stat().st_size < 3e6
    assert page("document.documentElement.scrollHeight") <= 6000
    assert page("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert page.texts(".index tbody th a") == [f"run-{number:02d}" for number in range(MANY)]
    prompts = [f"“prompt {prompt}”, seed {seed}" for prompt in (0, 1) for seed in (0, 1)]
    assert page.texts("#images summary h3") == prompts
    assert page("[...document.images].filter(i => i.closest('main')).every(i => i.alt && i.src)")
    assert page.driver.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_colour_stands_for_two_runs(browser: Page, many: Path, theme: str) -> None:
    page = browser.open(many, theme=theme)
    swatches = page(
        "[...document.querySelectorAll('.index .swatch')].map(s => getComputedStyle(s).backgroundColor)"
    )
    strokes = page(
        "[...document.querySelectorAll('.chart .legend .stroke')].slice(0, 16)"
        ".map(s => getComputedStyle(s).borderTopColor)"
    )
    assert len(set(swatches)) == MANY
    assert strokes == swatches, "the same in table and curves"


@pytest.mark.slow
def test_a_heading_sorts_the_runs(browser: Page, many: Path) -> None:
    page = browser.open(many)
    names = [f"run-{number:02d}" for number in range(MANY) if number != UNSCORED]
    for order in ("descending", "ascending"):
        page.click(".index thead button", 1)
        assert page("document.querySelector('[aria-sort]').textContent") == "Looks like the subject"
        assert page("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == order
        shown = page.texts(".index tbody th a")
        assert shown[-1] == f"run-{UNSCORED:02d}", "without a score: last"
        assert shown[:-1] == sorted(names, reverse=order == "descending")


def test_a_run_s_name_leads_to_all_about_it(browser: Page, many: Path) -> None:
    page = browser.open(many)
    assert not page("document.getElementById('run-5').open")
    page.click(".index tbody th a", 5)
    assert page("location.hash") == "#run-5"
    page("new Promise(done => setTimeout(done, 50))")
    assert page("document.getElementById('run-5').open")
    assert page.texts("#run-5 .chart h4"), "curves are drawn when they are unfolded"
    assert page("document.querySelector('#run-5 canvas').width") > 200


def test_links_reach_the_files_of_runs_beside_the_page(browser: Page, many: Path) -> None:
    page = browser.open(many)
    links = set(page("[...document.querySelectorAll('.files a, .programs a')].map(a => a.href)"))
    links |= set(
        page("[...document.querySelectorAll('.shot')].map(s => new URL(s.dataset.href, location).href)")
    )
    found = [Path(unquote(link.removeprefix("file://"))) for link in links]
    assert all(path.exists() for path in found)
    assert {path.relative_to(many.parents[1]).parts[0] for path in found} >= {"run-00", "run-15"}


def test_a_prompt_of_one_run_is_not_split_by_seed(runs: list[Path]) -> None:
    alone = thumbs.timelines([read(runs[0], "run")], by_seed=True)
    assert [(line.seed, len(line.rows)) for line in alone] == [(None, 2), (None, 2)]


# Colours.


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(colour: str) -> np.ndarray:
    """Ottosson's OKLab, in which equal distances look equal; 0.02 can just be seen."""
    lms = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                    [0.0883024619, 0.2817188376, 0.6299787005]]) @ linear(colour)  # fmt: skip
    return np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                     [0.0259040371, 0.7827717662, -0.8086757660]]) @ np.cbrt(lms)  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 8, 13, 16, 24])
@pytest.mark.parametrize(("theme", "paper"), [("light", "#ffffff"), ("dark", "#1d2026")])
def test_colours_differ_and_can_be_read_on_paper(count: int, theme: str, paper: str) -> None:
    found = palette.colours(count, theme)
    assert len(found) == count
    for one, other in itertools.combinations(found, 2):
        assert np.linalg.norm(oklab(one) - oklab(other)) > 0.05
    for colour in found:
        low, high = sorted(float(linear(one) @ [0.2126, 0.7152, 0.0722]) for one in (colour, paper))
        assert (high + 0.05) / (low + 0.05) >= 3, "WCAG's contrast of graphics"


# The verdict.

TINY = {"likeness": 0.5, "likeness_base": 0.1, "likeness_real": 0.9, "place": 0.5, "drift": 0.4}
DINO = {"dino": 0.6, "dino_base": 0.4, "dino_real": 0.8, "clip_t": 0.27, "clip_t_base": 0.3,
        "preservation": 0.45, "preservation_base": 0.4}  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (TINY, [(0.5, "fair"), (0.5, "poor"), (0.6, "poor")]),
        ({**TINY, "likeness": 0.95, "place": 1.0, "drift": 0.0}, [(1, "good"), (1, "good"), (1, "good")]),
        ({"class_distance": 4.0, "class_distance_base": 3.0}, [(0.75, "good")]),
        ({"class_distance": 2.9, "class_distance_base": 3.0}, [(1, "good")]),
        (
            {**TINY, "class_distance": 5.0, "class_distance_base": 3.0},
            [(0.5, "fair"), (0.5, "poor"), (0.6, "poor"), (0.6, "fair")],
        ),
        (DINO, [(0.5, "fair"), (0.5, "poor"), (0.875, "fair")]),
        ({**DINO, "clip_t": 0.32, "preservation": 0.3}, [(0.5, "fair"), (1, "good"), (1, "good")]),
        ({name: value for name, value in DINO.items() if name != "dino_real"}, [(0.5, "poor")]),
        ({"place": 1.0}, [(1, "good")]),
        ({"diversity": 0.4}, []),
    ],
)
def test_scores_become_shares(scores: dict[str, float], expected: list[tuple[float, str]]) -> None:
    found = verdict.ratings(scores)
    assert [rating.level for rating in found] == [level for _, level in expected]
    assert [rating.share for rating in found] == pytest.approx([share for share, _ in expected])


@pytest.mark.parametrize(
    ("removed", "verb"), [((), ""), (("scores/scores.json",), "evaluate"), (("DONE",), "run")]
)
def test_the_command_that_is_due(
    runs: list[Path], tmp_path: Path, removed: tuple[str, ...], verb: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    for name in removed:
        (folder / name).unlink()
    said = verdict.verdict(read(folder, "run"))
    assert said.command == (f"dbtrain {verb} {runs[0]}/config.yaml" if verb else "")
    assert bool(said.cures) == (not removed)


@pytest.mark.parametrize(
    ("run_dir", "path"),
    [
        ("$SCRATCH/my dog", "'/large/my dog/config.yaml'"),
        ("~/dog", "/home/me/dog/config.yaml"),
        ("runs/dog", "runs/dog/config.yaml"),
    ],
)
def test_commands_name_folders_as_a_shell_finds_them(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: str, path: str
) -> None:
    monkeypatch.setenv("SCRATCH", "/large")
    monkeypatch.setenv("HOME", "/home/me")
    run = made(tmp_path / "run", runs, (usage.DIFFUSERS,), run_dir=run_dir)
    (run.folder / "DONE").unlink()
    assert verdict.verdict(run).command == f"dbtrain run {path}"
    assert all(f" {path} " in command for command in usage.commands(run).values())


def test_a_better_checkpoint_is_pointed_out(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    rows = [{"step": 2, "suggested": True, "exported": False}, {"step": 4, "exported": True}]
    (folder / "scores" / "checkpoints.json").write_text(json.dumps(rows))
    assert verdict.verdict(read(folder, "run")).cures[-1] == (
        f"The checkpoint of step 2 scored best: dbtrain export {runs[0]}/config.yaml --step 2"
    )


# How to use it.


def made(folder: Path, runs: list[Path], files: tuple[str, ...], **changes: str) -> usage.Run:
    """A run that exported these files; `changes` are config overrides, with __ for a dot."""
    shutil.copytree(runs[0], folder)
    cfg = Config.load(folder / "config.yaml", [f"run_dir={folder}"])
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    (folder / "config.yaml").write_text(cfg.override(*overrides).dump())
    shutil.rmtree(folder / "export")
    for name in files:
        path = folder / "export" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(runs[0] / "export" / usage.DIFFUSERS, path)
    return read(folder, folder.name)


KOHYA, PEFT = formats.FORMATS["kohya"].file.format(name="my dog"), "unet/adapter_config.json"
TRANSFORMER, DIFF = "transformer/adapter_config.json", "my dog-diff.safetensors"
EACH = ["ComfyUI", "A1111, Forge"]


@pytest.mark.parametrize(
    ("exported", "model", "programs", "missing"),
    [
        ((usage.DIFFUSERS,), "", ["Diffusers", *EACH], "diffusers,kohya"),
        ((usage.DIFFUSERS, KOHYA), "", ["Diffusers", *EACH], ""),
        ((PEFT, "my dog.safetensors"), "", ["Diffusers with PEFT", *EACH], ""),
        ((PEFT,), "", ["Diffusers with PEFT", *EACH], "peft,kohya"),
        ((PEFT, DIFF), "", ["Diffusers with PEFT", *EACH], "peft,diff,kohya"),
        ((TRANSFORMER,), "", ["Diffusers with PEFT", "ComfyUI"], "peft,comfyui"),
        ((TRANSFORMER, KOHYA), "", ["Diffusers with PEFT", "ComfyUI"], ""),
        ((usage.DIFFUSERS,), "tiny", ["Diffusers"], ""),
        ((), "", [], ""),
    ],
)
def test_each_program_is_told_its_file(
    runs: list[Path], tmp_path: Path, exported: tuple[str, ...], model: str, programs: list[str], missing: str
) -> None:
    run = made(tmp_path / "my dog", runs, exported, **({"model__path": model} if model else {}))
    found = usage.programs(run)
    assert [program.name for program in found] == programs
    assert all((program.source is None) == (bool(missing) and program.name in EACH) for program in found)
    assert formats.FORMATS["diffusers"].file == usage.DIFFUSERS
    commands = usage.commands(run)
    assert [what for what in commands if "export" in commands[what]] == (
        [f"A file for {' and '.join(name for name in programs if name in EACH)}"] if missing else []
    )
    for command in commands.values():  # each can be pasted into a shell
        name, verb, config, *rest = shlex.split(command)
        assert (name, verb in ("export", "sample"), config) == ("dbtrain", True, f"{run.folder}/config.yaml")
        if verb == "export":
            assert list(Config.load(run.names.config, rest).export.formats) == missing.split(",")


def test_a_learned_word_is_not_forgotten(runs: list[Path], tmp_path: Path) -> None:
    run = made(tmp_path / "word", runs, (usage.DIFFUSERS, KOHYA, "embeddings/sks.safetensors"))
    notes = {program.name: program.note for program in usage.programs(run)}
    assert notes["Diffusers"] == usage.LEARNED
    assert "embeddings/sks.safetensors" in notes["ComfyUI"] and "write embedding:sks" in notes["ComfyUI"]
    assert not notes["A1111, Forge"], "kohya's file has it"


def test_dora_in_kohya_s_file_is_warned_of(runs: list[Path], tmp_path: Path) -> None:
    notes = {
        program.name: program.note
        for program in usage.programs(made(tmp_path / "dora", runs, (KOHYA,), adapter__dora="true"))
    }
    assert notes == {"ComfyUI": usage.DORA, "A1111, Forge": usage.DORA}
    both = usage.programs(made(tmp_path / "both", runs, (KOHYA, DIFF), adapter__dora="true"))
    assert {(str(program.source)[-15:], program.note) for program in both} == {
        ("dog-diff.safetensors"[-15:], "")
    }


def test_the_code_for_diffusers_loads_the_adapter(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[DiffusionPipeline] = []

    def generated(pipe: DiffusionPipeline, prompt: str) -> object:
        loaded.append(pipe)
        assert prompt == "a photo of sks dog in the snow"
        return type("Output", (), {"images": [type("Saved", (), {"save": lambda self, name: None})()]})()

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", generated)
    (program, *_) = usage.programs(read(runs[0], "run"))
    exec(program.code, {})
    assert loaded[0].get_active_adapters()
    assert any("lora_B" in name and torch.any(weight) for name, weight in loaded[0].unet.named_parameters())


def test_prompts_without_a_known_word_are_shown_whole(runs: list[Path], tmp_path: Path) -> None:
    run = made(tmp_path / "run", runs, (), subject__token="null", prepare__class_prompt="null")
    said = usage.words(run.cfg)
    assert said and (said.token, said.trigger) == ("", "a photo of sks dog")
