"""Runs with all that a folder may hold, and a browser that shows the page about them."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dbtrain.data.pictures import save_png
from dbtrain.prepare.prepare import prepare
from dbtrain.report import report
from dbtrain.sample.sample import sample_run
from tests.conftest import config_in, train

HOSTILE = '<script>window.ran = true</script><img src=x onerror="window.ran = true"> "dog" & \'sks\''
VALIDATIONS = (0, 2, 4)
SCORES = {
    "likeness": 0.75, "place": 1.0, "likeness_base": 0.15, "likeness_real": 0.95, "drift": 0.25,
    "labels": {"likeness": "likeness of the adapter's images of the subject"},
}  # fmt: skip
TIMES = [100, 300, 500, 700]


def plant(folder: Path, prompts: tuple[str, ...]) -> None:
    """What validation and evaluation leave in a run folder."""
    for step in VALIDATIONS:
        place = folder / "validation" / f"step-{step:06d}"
        for number, prompt in enumerate(prompts):
            for seed in (0, 1):
                picture = Image.new("RGB", (64, 64), (60 * step, 80 * seed, 200))
                note = json.dumps({"prompt": prompt, "seed": seed})
                save_png(place / f"{number:02d}-seed{seed}.png", picture, note)
        save_png(place / "sheet.png", Image.new("RGB", (300, 200), "white"))
    lines = [
        {"step": step, "held_out_instance": 0.2 - 0.02 * step, "held_out_prior": 0.1 + 0.01 * step,
         "timesteps": TIMES,
         "by_timestep": {"instance": [0.3, 0.2, 0.1, 0.05], "prior": [0.2, 0.1, 0.1, 0.1]}}
        for step in VALIDATIONS
    ]  # fmt: skip
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tenths = {"rows": [2] * 9 + [0], "loss": [0.5 - 0.05 * k for k in range(9)] + [0.0]}
    rows = [{"step": step, "instance": tenths, "prior": tenths} for step in (2, 4)]
    (folder / "timesteps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores").mkdir()
    (folder / "scores" / "scores.json").write_text(json.dumps(SCORES))
    of_checkpoints = [
        {"step": 2, "likeness": 0.5, "suggested": False}, {"step": 4, "likeness": 0.75, "suggested": True}
    ]  # fmt: skip
    (folder / "scores" / "checkpoints.json").write_text(json.dumps(of_checkpoints))


@pytest.fixture(scope="session")
def runs(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, class_dir: Path, prepared: Path
) -> list[Path]:
    """Two finished runs with all that a folder may hold; the second has a prompt that is an attack."""
    folders = []
    for name, changes in (
        ("plain", {}),
        ("other", {"optim__lr": 5e-4, "prepare__instance_prompt": HOSTILE, "prepare__flip": True}),
    ):
        home = tmp_path_factory.mktemp(name)
        cfg = config_in(home, photos, class_dir, sample__prompts=["a photo of sks dog"],
                        run_dir=str(home / f"run-{name}"), **changes)  # fmt: skip
        if changes:
            prepare(cfg)
        else:
            shutil.copytree(prepared, home / "shards")
        folder = train(cfg)
        sample_run(cfg)
        plant(folder, ("a photo of sks dog", HOSTILE))
        folders.append(folder)
    return folders


class Page:
    """A browser with a page in it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1440, theme: str = "light") -> Page:
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        return self._get(path.as_uri())

    def visit(self, address: str) -> Page:
        """A page that is served."""
        return self._get(address)

    def _get(self, address: str) -> Page:
        self.driver.get("about:blank")  # the page before may still ask its server
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(address)
        return self

    def wait(self, there: Callable[[], bool], seconds: float) -> None:
        """Wait until something is there, also if the page reloads meanwhile."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Exception):
                if there():
                    return
            assert time.monotonic() < until, self.texts("header")
            time.sleep(0.05)

    def __call__(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {script}")

    def texts(self, selector: str) -> list[str]:
        return self(
            f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent.trim())"
        )

    def find(self, selector: str, number: int = 0) -> Any:
        return self.driver.find_elements("css selector", selector)[number]

    def click(self, selector: str, number: int = 0) -> None:
        """Click on the middle of a node, in the middle of the window."""
        node = self.find(selector, number)
        self.driver.execute_script(
            "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", node
        )
        node.click()

    def requests(self) -> list[str]:
        """Every address that the page asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events
                if event["method"] == "Network.requestWillBeSent"]  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Page]:
    """A headless Chromium that cannot reach a network."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield Page(opened)
    finally:
        opened.quit()


@pytest.fixture(scope="session")
def one(runs: list[Path]) -> Path:
    return report.report(runs[:1])


@pytest.fixture(scope="session")
def both(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.report(runs, tmp_path_factory.mktemp("page") / "both.html")
