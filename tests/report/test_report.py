"""The page about a run, as a real browser shows it; and what is said of runs that are not whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from dbtrain.data import photos as images
from dbtrain.data import shards
from dbtrain.data.sizes import Size
from dbtrain.prepare.prepare import prepare
from dbtrain.report import crops, curves, figures, report, run, thumbs
from dbtrain.runtime import lock
from dbtrain.runtime.errors import ConfigError
from dbtrain.tiny import world
from dbtrain.tiny.paint import render
from tests import bases
from tests.conftest import ROOT, Make, at, dbtrain
from tests.report.conftest import HOSTILE, VALIDATIONS, Page

pytestmark = pytest.mark.xdist_group("report")  # they share what takes long to make


def test_the_page_opens_without_an_error_and_asks_for_nothing_but_itself(browser: Page, one: Path) -> None:
    page = browser.open(one)
    assert one.name == "report.html" and page("document.title").startswith("a photo of sks dog")
    assert [address for address in page.requests() if not address.startswith("data:")] == [one.as_uri()]
    assert page.driver.get_log("browser") == []
    assert one.stat().st_size < 3e6


def test_every_picture_is_shown_and_has_words(browser: Page, one: Path, photos: Path) -> None:
    page = browser.open(one)
    shown = page("[...document.images].filter(i => i.closest('main')).map(i => [i.naturalWidth, i.alt])")
    assert all(width > 0 and alt for width, alt in shown)
    assert page("document.querySelectorAll('.timeline img').length") == 2 * 2 * len(VALIDATIONS)
    count = len(images.find(str(photos), "photos"))
    assert page("document.querySelectorAll('#data img').length") == count + count + 8  # and class images
    assert page("document.querySelectorAll('.photos img').length") == min(4, count)
    assert any("as trained" in alt for _, alt in shown)
    assert page.texts(".timeline thead th")[:3] == ["before", "step 2", "step 4"]


def test_curves_are_drawn_and_tell_their_values(browser: Page, one: Path) -> None:
    page = browser.open(one)
    titles = page.texts(".chart h4")
    for title in (
        "Training loss, instance images", "Training loss, class images", "Held-out loss, instance images",
        "Training loss by timestep, instance images", "Held-out loss over timesteps, class images",
        "Learning rate", "Gradient norm, before clipping", "Samples per second, all ranks",
        "Time of a step, ms", "Share of the time waiting for data", "Peak memory of rank 0, GiB",
    ):  # fmt: skip
        assert title in titles
    inked = page(
        "[...document.querySelectorAll('.uplot canvas')].map(c => new Uint32Array(c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data.buffer).some(pixel => pixel))"
    )
    assert len(inked) == len(titles) and all(inked)
    last = json.loads((one.parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert page.texts(".chart .at")[0] == "step 4"
    page.driver.execute_script(
        "const t = document.getElementById('tools'); t.elements.smoothing.value = 0;"
        "t.dispatchEvent(new Event('input'))"
    )
    assert float(page.texts(".chart .live")[0]) == pytest.approx(last["loss_instance"], rel=1e-3)
    page.click("[name=log]")
    assert page.driver.get_log("browser") == []


def test_the_keyboard_walks_along_a_curve_and_hides_lines(browser: Page, one: Path) -> None:
    page = browser.open(one)
    plot = page.find(".plot")
    page.driver.execute_script("arguments[0].focus()", plot)
    plot.send_keys("\ue012\ue012")  # left twice
    assert page.texts(".chart .at")[0] == "step 3"
    key = page.find(".legend button")
    page.driver.execute_script("arguments[0].focus()", key)
    key.send_keys(" ")
    assert key.get_attribute("aria-pressed") == "false"
    assert "from " in plot.get_attribute("aria-label"), "the curve in words"


@pytest.mark.slow
def test_dragging_zooms_every_chart_to_the_same_steps(browser: Page, both: Path) -> None:
    from selenium.webdriver import ActionChains

    page = browser.open(both)
    over = page.find(".u-over")
    width = over.size["width"]
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", over)
    drag = ActionChains(page.driver).move_to_element_with_offset(over, -width // 4, 0).click_and_hold()
    drag.move_by_offset(width // 2, 0).release().perform()
    assert page.texts(".chart .at")[:2] == ["step 3", "step 3"], "where the drag ended, in all charts"
    for leftmost, where in (("step 2", "zoomed in"), ("step 1", "all of it")):
        for number in (0, 1):
            page.find(".plot", number).send_keys("\ue012" * 9)
            assert page.texts(".chart .at")[number] == leftmost, where
        page.click("[name=reset]")


def test_a_picture_is_enlarged_and_the_arrows_go_through_the_steps(browser: Page, one: Path) -> None:
    page = browser.open(one)
    shot = page.find(".timeline .shot")
    page.driver.execute_script("arguments[0].focus()", shot)
    shot.send_keys("\n")
    assert page("document.getElementById('viewer').open")
    assert "step 0" in page.texts("#caption")[0]
    page.driver.switch_to.active_element.send_keys("\ue014")  # right
    assert "step 2" in page.texts("#caption")[0]
    file = page.find("#viewer a").get_attribute("href")
    assert file == (one.parent / "validation" / "step-000002" / "00-seed0.png").as_uri()
    page.driver.switch_to.active_element.send_keys("\ue00c")  # escape
    assert not page("document.getElementById('viewer').open")


@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_a_phone_and_a_desk(browser: Page, one: Path, both: Path, width: int) -> None:
    for path in (one, both):
        page = browser.open(path, width)
        assert page("innerWidth") == width
        assert page("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        cut = page(
            "[...document.querySelectorAll('main *')].filter(node => !node.closest('.scroll, pre, details')"
            "&& node.getBoundingClientRect().right > innerWidth).map(node => node.outerHTML.slice(0, 80))"
        )
        assert not cut, "nothing hangs out at the side, but what can be scrolled"


def luminance(page: Page, selector: str, what: str) -> float:
    """WCAG's relative luminance of a colour on the page."""
    text = page(f"getComputedStyle(document.querySelector('{selector}')).{what}")
    channels = [int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_theme_is_the_reader_s_and_text_has_contrast(browser: Page, one: Path, theme: str) -> None:
    page = browser.open(one, theme=theme)
    paper = luminance(page, "section", "backgroundColor")
    assert (paper < 0.1) == (theme == "dark")
    for selector in (
        "section",
        "dt",
        "section .note",
        ".files a",
        ".legend button",
        ".state",
        ".level[data-level=good]",
        ".level[data-level=fair]",
        ".cure",
        ".rating + .bar + .what",
    ):
        ink = luminance(page, selector, "color")
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector


def test_prompts_are_text_whatever_they_say(browser: Page, both: Path) -> None:
    page = browser.open(both)
    page("new Promise(done => setTimeout(done, 200))")
    assert page("window.ran === undefined")
    assert any(HOSTILE in text for text in page.texts("h1, h3"))
    assert page.driver.get_log("browser") == []


def test_two_runs_stand_side_by_side(browser: Page, both: Path, runs: list[Path]) -> None:
    page = browser.open(both)
    assert page.texts(".index tbody th a") == ["run-plain", "run-other"]
    legend = page.texts(".chart:nth-of-type(1) .legend button")
    assert [text.split("run-")[1][:5] for text in legend[:2]] == ["plain", "other"]
    strokes = [page.find(".legend .stroke", k).value_of_css_property("border-top-color") for k in (0, 1)]
    assert strokes[0] != strokes[1]
    differing = page.texts("#differences thead th")
    assert {"optim.lr", "prepare.instance_prompt", "prepare.flip", "data.shards"} == set(differing)
    rows = [f"seed {seed}run-{name}" for seed in (0, 1) for name in ("plain", "other")]
    assert page.texts(".timeline tbody th") == rows * 2
    assert page.texts("#summary tbody th") == ["run-plain", "run-other"]
    assert len(page.texts("#data .note")) >= 2, "each has data of its own"
    assert page.texts(".suggested th") == ["4", "4"]
    assert not page.texts(".files a"), "the page lies outside both folders: paths, no links"


def test_every_link_leads_to_a_file(browser: Page, one: Path) -> None:
    page = browser.open(one)
    found = page("[...document.querySelectorAll('.files a')].map(a => a.href)")
    assert one.parent.joinpath("export/pytorch_lora_weights.safetensors").as_uri() in found
    for address in found:
        assert Path(address.removeprefix("file://")).exists()


def test_a_folder_with_nothing_but_a_config_gives_a_page(make: Make, tmp_path: Path, browser: Page) -> None:
    cfg = make(prepare__photos=str(tmp_path / "gone"), data__shards=str(tmp_path / "lost"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    page = browser.open(report.report([folder]))
    assert page.driver.get_log("browser") == []
    assert page.texts(".state") == ["not trained yet"]
    assert page.texts(".command") == [f"dbtrain run {cfg.run_dir}/config.yaml"]
    text = page.texts("main")[0]
    assert f"prepare.photos: '{tmp_path / 'gone'}' is not a directory" in text
    assert "has no manifest.json; rerun: dbtrain prepare" in text
    assert "metrics.jsonl is missing or empty" in text and "No step has been logged yet" in text


@pytest.mark.slow
def test_the_report_imports_neither_peft_nor_the_compiler() -> None:
    code = "import sys, dbtrain.report.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"peft", "diffusers", "torch._dynamo", "torch._inductor"} & set(done.stdout.split())


def test_a_base_that_is_not_here_is_said_and_not_downloaded(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    download = DiffusionPipeline.download

    def spied(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return download(*args, **options)

    monkeypatch.setattr(DiffusionPipeline, "download", spied)
    folder = tmp_path / "copied"
    shutil.copytree(runs[0], folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(bases.sd()), "somebody/some-model"))
    part = crops.data_sheets([run.read(folder, "copied")], 4)[0].parts[1]
    assert "'somebody/some-model', which is not on this machine" in part.problem
    assert part.total and not part.pictures
    assert not asked


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run folder: it has no config\.yaml"):
        report.report([tmp_path])


@pytest.mark.slow
def test_the_command_writes_where_it_is_told(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    done = dbtrain("report", *runs, "--out", out, "--crops", 0)
    assert done.returncode == 0 and done.stdout == f"report: {out}\n"
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert "0 of" in out.read_text(), "no crop was decoded, and the page says how many there are"


def test_damaged_parts_are_named_and_the_rest_is_shown(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": null, "loss_instance": null}\n[1]\n{"step": 6, "lo')
    (folder / "scores" / "scores.json").write_text("{")
    picture = folder / "validation" / "step-000004" / "00-seed0.png"
    picture.write_bytes(picture.read_bytes()[:60])
    text = report.report([folder], most_crops=0).read_text()
    assert "metrics.jsonl has 2 damaged lines, left out here" in text
    assert "scores.json cannot be read" in text
    assert "00-seed0.png cannot be read" in text
    assert "NaN or infinite losses" in text and "first at step 5" in text


def test_the_state_is_told_by_what_the_folder_holds(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)

    def state() -> str:
        return run.read(folder, "run").state

    assert state() == "done, step 4 of 4"
    (folder / "DONE").unlink()
    (folder / "PREEMPTED").write_text("SIGTERM at step 4 (checkpoint saved)\n")
    assert state() == "preempted at step 4 of 4: SIGTERM at step 4 (checkpoint saved)"
    (folder / "PREEMPTED").unlink()
    (folder / lock.NAME).write_text("{}")
    assert state() == "running, at step 4 of 4"
    os.utime(folder / lock.NAME, (0, 0))
    assert state() == "not finished, at step 4 of 4"


def test_figures_say_where_the_held_out_loss_was_lowest(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    losses = [0.4, 0.2, 0.3]
    lines = [json.dumps({"step": 10 * k, "held_out_instance": loss}) for k, loss in enumerate(losses)]
    (folder / "validation.jsonl").write_text("\n".join(lines))
    found = {figure.label: figure for figure in figures.of_run(run.read(folder, "run"))}
    figure = found["Held-out loss, instance"]
    assert (figure.value, figure.note) == ("0.4 → 0.3", "−25%, lowest at step 10, 0.2; it has risen since")
    assert found["Suggested checkpoint"].value == "step 4"
    likeness, place = found["Likeness"], found["Place"]
    assert (likeness.value, likeness.note) == ("0.75", "likeness of the adapter's images of the subject")
    assert (place.value, place.note) == ("1", ""), "a score without a label, as older versions wrote them"
    assert "Held-out loss, class" not in found


def test_long_runs_are_averaged_to_few_points_and_keep_their_mean() -> None:
    xs = list(range(1, 100_001))
    ys: curves.Values = [float(x % 7) for x in xs]
    few_xs, few_ys = curves.thinned(xs, ys, curves.POINTS)
    assert len(few_xs) <= curves.POINTS and few_xs[-1] == xs[-1]
    assert curves.mean(few_ys) == pytest.approx(curves.mean(ys), rel=1e-3)
    assert curves.thinned([1, 2], [None, 2.0], curves.POINTS) == ([1, 2], [None, 2.0])


def test_losses_by_timestep_are_means_over_rows(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    rows = [{"step": s, "instance": {"rows": [s] + [0] * 9, "loss": [6.0] + [0.0] * 9}} for s in (1, 3)]
    (folder / "timesteps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,) = [g for g in curves.groups([run.read(folder, "run")]) if g.title == "Loss by timestep"]
    first, second, *_ = group.charts[0].series
    assert (first.xs, first.ys) == ([1, 3], [6.0, 2.0])
    assert second.xs == [], "no row of that tenth was seen"


def test_many_validations_are_thinned_out_evenly() -> None:
    steps = list(range(0, 10_000, 100))
    shown = thumbs.spread(steps, thumbs.MOST_STEPS)
    assert len(shown) == thumbs.MOST_STEPS and shown[0] == 0 and shown[-1] == 9900
    assert shown == sorted(set(shown))


def test_the_more_pictures_the_smaller() -> None:
    assert thumbs.side(1) == thumbs.side(24) == 384
    assert thumbs.side(96) == 192
    assert thumbs.side(10_000) == 96


def test_crops_are_shown_as_training_sees_them(make: Make, tmp_path: Path) -> None:
    """Through the embedded base's VAE, which was trained: mirrored crops look like mirrored photos."""
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "a.png"
    render(world.subject_scene("mug", 0)).save(photo)
    cfg = make(model__path="tiny", prepare__photos=str(tmp_path / "photos"), prepare__class_prompt=None,
               prepare__flip=True)  # fmt: skip
    prepare(cfg)
    manifest = shards.Manifest.read(at(tmp_path / "shards"))
    decode = crops._decoder(cfg.model)
    seen = 0
    for row in shards.read(at(tmp_path / "shards"), manifest.roles["instance"][0]):
        crop = images.Crop(*row.meta["crop"], row.meta["flip"])
        given = images.pixels(images.load(photo), crop, Size.square(64))
        shown = torch.from_numpy(np.array(decode(row))).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.corrcoef(torch.stack([given.flatten(), shown.flatten()]))[0, 1] > 0.95
        seen += 1
    assert seen == 2


def test_a_crop_says_how_many_prompts_it_has(make: Make, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number, text in enumerate(("sks mug, red\nsks mug, big\nsks mug, red\nmug", "sks mug")):
        render(world.subject_scene("mug", number)).save(photo := tmp_path / "photos" / f"{number}.png")
        photo.with_suffix(".txt").write_text(text)
    cfg = make(model__path="tiny", prepare__photos=str(tmp_path / "photos"), prepare__class_prompt=None,
               prepare__captions="lines")  # fmt: skip
    prepare(cfg)
    part = crops._stored(cfg, 2, 64)[0]
    assert [picture.captions[-1] for picture in part.pictures] == ["“sks mug, red” (+2 more)", "“sks mug”"]


def test_models_of_pixels_show_the_very_pixels(make: Make) -> None:
    cfg = make(model__path=str(bases.if_1()), prepare__resolution=16)
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    shown = crops._decoder(cfg.model)(shards.Row({"pixels": pixels}, {}))
    assert np.array_equal(np.array(shown), pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/shards", "https://…@host/shards"),
        ("s3://bucket/dog?X-Amz-Signature=abc&b=c, and more", "s3://bucket/dog?… and more"),
        ("photos/dog", "photos/dog"),
        ("a mug @ home?", "a mug @ home?"),
    ],
)
def test_what_opens_doors_is_not_shown(text: str, shown: str) -> None:
    assert report.without_secrets(text) == shown
