"""The page about a fleet of 64 subjects, as a real browser shows it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dbtrain.config import Config
from dbtrain.data.pictures import save_png
from dbtrain.report import fleet, report
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.fleet_status import NAME, Status, Subject
from tests.conftest import config_in
from tests.report.conftest import HOSTILE, SCORES, Page
from tests.report.test_report import luminance

pytestmark = [pytest.mark.xdist_group("report"), pytest.mark.slow]

COUNT, STEPS = 64, 400
HOUR = 3600.0


def subject(number: int) -> Subject:
    """24 are done, 8 train, 2 failed, of which one has no run folder, and the others wait."""
    name, started = f"subject-{COUNT - number:02d}", HOUR * (number // 8)
    if number < 24:
        return Subject(name, name, STEPS, "done", STEPS, None, started, started + HOUR)
    if number < 32:
        return Subject(name, name, STEPS, "training", 120 + number, None, started)
    if number < 34:
        problem = (HOSTILE, f"prepare.photos: 'photos/{name}' is not a directory")[number % 2]
        return Subject(name, name, STEPS, "failed", (50, 0)[number % 2], problem, started, started + 60)
    return Subject(name, name, STEPS)


def fill(folder: Path, one: Subject, cfg: Config, number: int, pictures: list[Path]) -> None:
    """What a subject that has trained leaves in its run folder."""
    folder.mkdir()
    values = {"run_dir": str(folder), "subject": cfg.subject.model_copy(update={"name": one.name})}
    (folder / "config.yaml").write_text(cfg.model_copy(update=values).dump())
    draw = np.random.default_rng(number)
    losses = (0.3 / (1 + np.arange(one.step) / 60) + draw.uniform(0, 0.1, (2, one.step))).T.tolist()
    rows = ({"step": k + 1, "loss": a + b, "loss_instance": a, "loss_prior": b, "grad_norm": a, "lr": 1e-4}
            for k, (a, b) in enumerate(losses))  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for prompt in range(3):
        place = folder / "validation" / f"step-{one.step:06d}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[prompt], place / f"{prompt:02d}-seed0.png")
    if one.state == "done":
        (folder / "DONE").touch()
        (folder / "scores").mkdir()
        scores = {**SCORES, "likeness": 0.2 + 0.03 * number}
        (folder / "scores" / "scores.json").write_text(json.dumps(scores))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, photos: Path, class_dir: Path) -> Path:
    """A fleet's folder."""
    work = tmp_path_factory.mktemp("fleet")
    pictures, generator = [], np.random.default_rng(0)
    for number in range(3):  # as detailed as a photo
        noise = Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8))
        note = json.dumps({"prompt": f"prompt {number}", "seed": 0})
        save_png(path := work / f"{number}.png", noise.filter(ImageFilter.GaussianBlur(2)), note)
        pictures.append(path)
    cfg = config_in(work, photos, class_dir)
    home = work / "sixty-four"
    home.mkdir()
    subjects = tuple(map(subject, range(COUNT)))
    Status(8, subjects).write(home)
    for number, one in enumerate(subjects):
        if one.step:
            fill(home / one.run, one, cfg, number, pictures)
    return home


@pytest.fixture(scope="module")
def page_file(home: Path) -> Path:
    return report.report([home])


def names(page: Page) -> list[str]:
    """The subjects in the table that are not hidden, from top to bottom."""
    found: list[str] = page(
        "[...document.querySelectorAll('.index tbody tr:not([hidden])')].map(row => row.dataset.name)"
    )
    return found


def test_it_opens_without_an_error_and_is_light(browser: Page, page_file: Path, home: Path) -> None:
    page = browser.open(page_file)
    assert page_file == home / "report.html" and page("document.title").startswith("sixty-four")
    assert [address for address in page.requests() if not address.startswith("data:")] == [page_file.as_uri()]
    assert page("window.ran === undefined")
    assert page.driver.get_log("browser") == []
    assert page_file.stat().st_size < 5e6
    assert page(
        "[...document.querySelectorAll('main img')].every(image => image.naturalWidth > 0 && image.alt)"
    )


def test_totals_count_the_states_and_tell_the_rate(browser: Page, page_file: Path) -> None:
    page = browser.open(page_file)
    tiles = dict(zip(page.texts("#result dt"), page.texts("#result .value"), strict=True))
    assert tiles["done"] == "24 of 64" and tiles["failed"] == "2 of 64" and tiles["waiting"] == "30 of 64"
    assert tiles["done an hour"] == "8"
    assert page.texts("#result dd .what")[-1] == "mean of 24"


def test_each_subject_has_a_row_with_what_its_folder_holds(
    browser: Page, page_file: Path, home: Path
) -> None:
    page = browser.open(page_file)
    assert names(page) == [subject(number).name for number in range(COUNT)]
    row = ".index tbody tr:nth-child(25) "  # trains
    assert page.texts(row + ".progress") == ["training 144 of 400"]
    assert page.find(row + ".bar > span").get_attribute("style") == "width: 36%;"
    assert len(page.texts(row + ".spark path")) == 2 and page.texts(row + ".none").count("not scored") == 3
    assert page(f"document.querySelectorAll('{row} img').length") == 3 + 2, "images and photos"
    assert page.find(row + "a").get_attribute("href") == f"{(home / 'subject-40').as_uri()}/"
    problems = page.texts(".index .problem")
    assert problems == [HOSTILE, "prepare.photos: 'photos/subject-31' is not a directory"]
    assert page.texts(".index tbody tr:nth-child(34) a") == [], "it has no run folder"


def test_rows_are_filtered_by_state_and_name(browser: Page, page_file: Path) -> None:
    page = browser.open(page_file)
    for state in ("done", "training", "waiting"):
        page.click(f"[name=state][value={state}]")
    assert names(page) == ["subject-32", "subject-31"] and page.texts("#filter output") == ["2 shown"]
    page.click("[name=state][value=done]")
    page.find("[type=search]").send_keys("T-6")
    assert names(page) == ["subject-64", "subject-63", "subject-62", "subject-61", "subject-60"]
    page.find("[type=search]").send_keys("\n")
    assert page("location.search") == "", "the form is not sent"
    assert page.driver.get_log("browser") == []


def test_rows_are_sorted_by_name_state_and_score(browser: Page, page_file: Path) -> None:
    page = browser.open(page_file)
    heads = page.texts(".index thead th")
    assert heads[:2] == ["subject", "state"] and heads[-2:] == ["Instance loss", "Class loss"]
    page.click(".index [data-sort]", 0)
    assert names(page) == sorted(names(page))
    page.click(".index [data-sort]", 1)
    order = page("[...document.querySelectorAll('.index tbody tr')].map(row => row.dataset.state)")
    assert list(Counter(order)) == ["failed", "training", "waiting", "done"]
    page.click(".index [data-sort]", heads.index("Looks like the subject"))
    assert names(page)[0] == "subject-41", "the highest score first"


def test_the_curves_of_all_are_drawn_when_they_are_unfolded(browser: Page, page_file: Path) -> None:
    page = browser.open(page_file)
    page.click("#curves summary")
    page.wait(lambda: bool(page.texts(".chart h4")), 60)  # the browser tells the page later
    titles = page.texts(".chart h4")
    assert titles == ["Training loss, instance images", "Training loss, class images"]
    assert len(page.texts(".chart:first-of-type .legend button")) == 33
    assert page.driver.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_any_screen_and_has_contrast(browser: Page, page_file: Path, width: int, theme: str) -> None:
    page = browser.open(page_file, width, theme)
    assert page("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    paper = luminance(page, "section", "backgroundColor")
    assert (paper < 0.1) == (theme == "dark")
    for selector in ("dt", ".state[data-state=failed]", ".state[data-state=training]", ".index a", "output"):
        ink = luminance(page, selector, "color")
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector


def test_an_own_report_is_linked_and_a_damaged_folder_named(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    one, other = (home / name for name in ("subject-64", "subject-63"))
    for folder in (one, other):
        shutil.copytree(folder, copy / folder.name)
    (copy / "subject-64" / "report.html").touch()
    (copy / "subject-63" / "config.yaml").write_text("run_dir: [")
    Status(1, (subject(0), subject(1))).write(copy)
    text = report.report([copy], tmp_path / "copy" / "page.html").read_text()
    assert 'href="./subject-64/report.html"' in text and "subject-63/config.yaml" in text
    (copy / NAME).write_text("{}")
    with pytest.raises(ConfigError, match=r"fleet\.json is damaged"):
        report.report([copy])
    with pytest.raises(ConfigError, match="is a fleet, which has a page of its own"):
        report.report([copy, one])


def test_a_fleet_that_has_not_begun_has_a_page(tmp_path: Path, browser: Page) -> None:
    Status(8, (Subject("dog", "dog", 400),)).write(tmp_path)
    page = browser.open(report.report([tmp_path]))
    assert page.driver.get_log("browser") == []
    assert page.texts(".index tbody .state") == ["waiting"]
    assert "No step has been logged yet" in page.texts("#curves")[0]


def test_a_small_curve_has_gaps_and_stays_in_its_box() -> None:
    assert fleet.path([1.0, 0.0, None, 0.5]) == "M0.0 0.0L32.0 24.0M96.0 12.0"
    assert fleet.path([2.0]) == "M0.0 24.0"
