"""The served page: a real server, asked by a real browser and by strangers, while a real run goes on."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dbtrain.report.live import Server
from dbtrain.runtime import lock
from dbtrain.runtime.fleet_status import Status, Subject
from tests.conftest import LONG, Make, Started, dbtrain
from tests.report.conftest import Page
from tests.runs import tree

pytestmark = [pytest.mark.xdist_group("report"), pytest.mark.slow]

BEHIND_S = 5.0


@contextmanager
def serving(*folders: Path) -> Iterator[Server]:
    with Server(folders, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, path: str, method: str = "GET", host: str = "") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=LONG)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    response = connection.getresponse()
    response.content = response.read().decode()  # type: ignore[attr-defined]
    return response


def text(server: Server) -> str:
    response = ask(server, server.path)
    assert response.status == 200
    return response.content  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def running(runs: list[Path], tmp_path: Path) -> Path:
    """A copy of a run, as it is while it goes on."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    (run / "DONE").unlink()
    (run / lock.NAME).touch()
    return run


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": 0.5, "loss_instance": 0.5, "grad_norm": 1.0, "lr": 1e-4}) + "\n"


def test_only_this_machine_is_served_and_only_who_knows_the_address(running: Path) -> None:
    with serving(running) as server:
        port, good = server.server_port, server.path
        assert server.server_address[0] == "127.0.0.1" and server.url == f"http://127.0.0.1:{port}{good}"
        response = ask(server, good)
        assert response.status == 200 and "step 4 of 4" in text(server)
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert response.headers["Cache-Control"] == "no-store"
        assert not [name for name in response.headers if name.startswith("Access-Control")]
        # An SSH tunnel may have another port here, but never another name: that would be DNS rebinding.
        for host, code in (("localhost:9", 200), ("127.0.0.1", 200), ("evil.example", 403), ("", 200),
                           (f"127.0.0.1.evil.example:{port}", 403), ("[::1", 403), ("0", 403)):  # fmt: skip
            assert ask(server, good, host=host).status == code, host
        wrong = good[:-2] + ("A" if good[-2] != "A" else "B") + "/"
        for path in ("/", "/report.html", "/config.yaml", wrong, good[:-1], good + "config.yaml", good + "?a",
                     good + "../config.yaml", good + "%2e%2e/config.yaml", "//", good + "export/", "*",
                     f"{good}..{running}/config.yaml", str(running / "config.yaml")):  # fmt: skip
            answer = ask(server, path)
            assert (answer.status, answer.content) == (404, "not found\n"), path  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(running: Path, method: str) -> None:
    before = tree(running)
    with serving(running) as server:
        assert ask(server, server.path, method).status == 405
        assert ask(server, "/", method).status == 405
    assert tree(running) == before


def test_each_server_has_an_address_of_its_own(tmp_path: Path) -> None:
    with serving(tmp_path) as one, serving(tmp_path) as other:
        assert one.path != other.path and len(one.path) > 40
        assert ask(other, one.path).status == 404


def test_the_version_changes_with_the_files_and_only_then(running: Path) -> None:
    with serving(running) as server:

        def version() -> str | None:
            return ask(server, server.path, "HEAD").headers["ETag"]

        first = version()
        os.utime(running / lock.NAME)
        (running / "report.html").write_text("another page")
        assert version() == first == ask(server, server.path).headers["ETag"]
        for path in ("log.txt", "metrics.jsonl", "validation/step-000006/00-seed0.png", "scores/scores.json"):
            (running / path).parent.mkdir(exist_ok=True)
            with (running / path).open("a") as file:
                file.write(" ")
            assert version() != first, path
            first = version()


def test_a_line_that_is_half_written_is_no_damage_until_the_run_has_ended(running: Path) -> None:
    with serving(running) as server, (running / "metrics.jsonl").open("a") as file:
        file.write(line(5)[:40]), file.flush()
        assert "damaged" not in text(server) and "at step 4 of 4" in text(server)
        file.write(line(5)[40:]), file.flush()
        assert "at step 5 of 4" in text(server)
        file.write(line(6)[:40]), file.flush()
        (running / lock.NAME).unlink()
        assert "metrics.jsonl has 1 damaged line, left out here" in text(server)


def test_a_run_that_is_not_there_yet_is_waited_for(browser: Page, runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "later"
    with serving(run) as server:
        page = browser.visit(server.url)
        assert page.texts("h1") == ["Waiting"] and str(run) in page.texts("main")[0]
        shutil.copytree(runs[0], run)
        page.wait(lambda: page.texts("#result h2") == ["Result"], BEHIND_S)


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_text('{"slots": 1, "subjects": [{}]}')
    with serving(tmp_path) as server:
        assert "fleet.json is damaged" in text(server)


def test_a_new_step_is_shown_within_seconds_where_the_reader_is(browser: Page, running: Path) -> None:
    with serving(running) as server:
        page = browser.visit(server.url)
        fold = "document.querySelector('#config details, #files details, details')"
        page.driver.execute_script(f"{fold}.open = true; scrollTo({{top: 900, behavior: 'instant'}})")
        before = page("scrollY")
        assert before > 500 and page.texts("#live") == ["live"]
        with (running / "metrics.jsonl").open("a") as file:
            file.write(line(7))
        page.wait(lambda: "at step 7 of 4" in page.texts("header")[0], BEHIND_S)
        page.wait(lambda: page("scrollY") == before, BEHIND_S)
        assert page(f"{fold}.open")
        # A reader who looks at an image keeps it.
        page.click(".shot")
        with (running / "metrics.jsonl").open("a") as file:
            file.write(line(8))
        time.sleep(2.5)
        assert page("document.getElementById('viewer').open") and "step 7" in page.texts("header")[0]
        page.click("#viewer [data-close]")
        page.wait(lambda: "at step 8 of 4" in page.texts("header")[0], BEHIND_S)
        assert {address.partition("?")[0] for address in page.requests() if "data:" not in address} == {
            server.url
        }
        assert page("window.ran === undefined") and page.driver.get_log("browser") == []
    page.wait(lambda: "has ended" in page.texts("#live")[0], BEHIND_S)


def test_a_fleet_is_served_too(browser: Page, runs: list[Path], tmp_path: Path) -> None:
    fleet = Status(2, (Subject("dog", "dog", 4, "training", 2), Subject("cat", "cat", 4)))
    fleet.write(tmp_path)
    shutil.copytree(runs[0], tmp_path / "dog")
    with serving(tmp_path) as server:
        page = browser.visit(server.url)
        assert "2 of 4" in page.texts("tr[data-name=dog] .progress")[0]
        page.click("th [data-sort]")
        assert page("document.querySelector('.index tbody tr').dataset.name") == "cat"
        fleet.changed("dog", step=3).write(tmp_path)
        page.wait(lambda: "3 of 4" in page.texts("tr[data-name=dog] .progress")[0], BEHIND_S)
        assert page("document.querySelector('.index tbody tr').dataset.name") == "cat", "still sorted"


def test_a_run_is_the_same_whether_it_is_watched_or_not(
    browser: Page, make: Make, tmp_path: Path, prepared: Path
) -> None:
    """From before its start to its end, by the command line, which Ctrl-C ends."""
    os.symlink(prepared, tmp_path / "shards")
    make(train__steps=30, train__log_every=1, train__checkpoint_every=10, validation__every=10)
    line = ["train", tmp_path / "c.yaml"]
    assert dbtrain(*line, f"run_dir={tmp_path / 'alone'}").returncode == 0
    run = tmp_path / "run"
    server = Started("report", run, "--serve", "--port", 0)
    address = re.compile(r"^report: (http://127\.0\.0\.1:\d+/\S+/)$", re.MULTILINE)
    server.wait_for(lambda: address.search(server.output()))
    found = address.search(server.output())
    assert found
    page = browser.visit(found[1])
    assert page.texts("h1") == ["Waiting"]
    training = Started(*line)
    page.wait(lambda: "at step" in page.texts("header")[0], LONG)
    assert training.end()[0] == 0
    page.wait(lambda: "done, step 30 of 30" in page.texts("header")[0], LONG)
    for name in ("metrics.jsonl", "export/pytorch_lora_weights.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    kept = [{name for name in tree(one) if not name.startswith("tb/")} for one in (run, tmp_path / "alone")]
    assert kept[0] == kept[1], "nothing was added"
    server.signal(signal.SIGINT)
    code, said = server.end()
    assert code == 0 and "Traceback" not in said


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        done = dbtrain("report", tmp_path, "--serve", "--port", server.server_port)
    assert done.returncode == 2 and "choose another with --port" in done.stderr
