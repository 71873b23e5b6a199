"""Fleets: whole ones, as a user starts them, on one rank or two, killed, with bad subjects and late ones."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from dbtrain.config import Config
from dbtrain.evaluate import evaluate
from dbtrain.fleet import fleet as every
from dbtrain.fleet.work import Request
from dbtrain.models import sampler
from dbtrain.runtime import lock
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.fleet_status import Status
from dbtrain.runtime.run_folder import SCORES, RunFolder, step_of
from dbtrain.sample.sample import Kept
from tests import bases, eyes
from tests.conftest import LONG, Make, Started, dbtrain, draw_photo, train
from tests.export import test_hub
from tests.runs import EXPORT, relative, tree
from tests.session import once

KILLS = int(os.environ.get("DBTRAIN_KILLS", "6")) // 6  # moments, for one rank and for two


class Fleet:
    """A folder with a config, photos of subjects, and what fleets make of them."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config = folder, config

    def add(self, *numbers: int) -> None:
        """Put the photos of these subjects into the folder of subjects."""
        for number in numbers:
            there = self.folder / "subjects" / f"s{number}"
            part = self.folder / "part"
            part.mkdir(parents=True)
            for photo in range(2):
                draw_photo(part / f"{photo}.png", 3 * number + photo)
            there.parent.mkdir(exist_ok=True)
            part.rename(there)

    def line(self, name: str, *more: object) -> list[object]:
        """The arguments of a fleet in a folder of its own."""
        home = self.folder / name
        return ["fleet", self.config, self.folder / "subjects", f"run_dir={home}", "--slots", 2, *more]

    def results(self, name: str, numbers: Sequence[int], step: int = 4) -> dict[str, bytes]:
        """What became of subjects: exports, checkpoints, metrics, shards."""
        found = {}
        for number in numbers:
            run = RunFolder(self.folder / name / f"s{number}")
            for part in (run.export, run.checkpoint(step), run.path / "shards"):
                found |= {
                    f"{number} {path}": data.replace(bytes(self.folder), b"")
                    for path, data in tree(part).items()
                    if path != "README.md"
                }
            found[f"{number} metrics"] = run.table("metrics").read_bytes()
        return found


def undisturbed(fleet: Fleet) -> Fleet:
    """One whose subjects 1 to 5 nothing happened to, in "whole"."""

    def fill(folder: Path) -> None:
        whole = Fleet(folder, fleet.config)
        whole.add(1, 2, 3, 4, 5)
        assert dbtrain(*whole.line("whole")).returncode == 0

    return Fleet(once("fleet-undisturbed", fill), fleet.config)


def scored() -> list[str]:
    """Settings of small random models that score a few images."""
    values = {"dino": eyes.dino(), "clip": eyes.clip(), "prompts": '["a {} on the beach"]', "images": 2,
              "class_images": 2}  # fmt: skip
    return [f"evaluation.{name}={value}" for name, value in values.items()]


@pytest.fixture
def fleet(make: Make, tmp_path: Path) -> Fleet:
    make(
        model__path=str(bases.sd(size="slim")), prepare__class_images=2, train__steps=4,
        train__global_batch=1, train__checkpoint_every=1, train__log_every=1, train__keep=9,
        prepare__instance_prompt="a photo of {}",
    )  # fmt: skip
    values = yaml.safe_load((tmp_path / "c.yaml").read_text())
    del values["data"], values["prepare"]["photos"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    return Fleet(tmp_path, tmp_path / "c.yaml")


@pytest.mark.slow
def test_a_subject_is_a_run_like_any_other(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the run alone is, whoever trains with it; reports and other verbs know it."""
    fleet.add(1, 2, 3)
    done = dbtrain(*fleet.line("a"))
    assert done.returncode == 0 and "3 subjects: 3 done" in done.stderr
    status = Status.read(fleet.folder / "a")
    assert status.slots == 2
    assert [(one.name, one.state, one.step) for one in status.subjects] == [
        (f"s{number}", "done", 4) for number in (1, 2, 3)
    ]
    # Alone, with the config that it wrote.
    run = fleet.folder / "a" / "s2"
    alone = fleet.folder / "alone"
    train(Config.load(run / "config.yaml", [f"run_dir={alone}"]))
    assert relative(run, alone) < 1e-5
    assert relative(run, fleet.folder / "a" / "s3") > 1e-4, "the bound tells subjects apart"
    # With others, in another order.
    shutil.rmtree(fleet.folder / "subjects" / "s1")
    fleet.add(0, 7)
    assert dbtrain(*fleet.line("b")).returncode == 0
    assert fleet.results("a", (2, 3)) == fleet.results("b", (2, 3))
    # Once more, with a repository: those that are done are pushed as well, once, and do not change.
    before = tree(fleet.folder / "a" / "s3")
    with test_hub.serving() as hub:
        monkeypatch.setenv("HF_TOKEN", test_hub.TOKEN)
        for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        settings = [f"run_dir={fleet.folder / 'a'}", "hub.repo=me/pets"]
        for _ in range(2):
            every.fleet(Request(fleet.config, fleet.folder / "subjects", settings, 2))
            assert [path for path, _ in hub.asked].count("/api/repos/create") == 4
    after = tree(fleet.folder / "a" / "s3")
    assert after.pop("PUSHED").startswith(b"repo me/pets-s3\n") and after == before
    # Longer.
    assert dbtrain(*fleet.line("a", "train.steps=5")).returncode == 0
    assert RunFolder(run).checkpoint(5).is_dir()


@pytest.mark.slow
def test_all_are_scored_on_a_base_that_is_loaded_once(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the scores of each by itself; one that cannot be scored stops no other."""
    fleet.add(1, 2, 3)
    settings = scored()
    assert dbtrain(*fleet.line("a", *settings)).returncode == 0
    runs = [RunFolder(fleet.folder / "a" / f"s{number}") for number in (1, 2, 3)]
    loads: list[object] = []
    build, draw = sampler.build, evaluate.draw
    monkeypatch.setattr(sampler, "build", lambda *args: loads.append(args) or build(*args))

    def failing(cfg: Config, kept: Kept) -> list[object]:
        found = draw(cfg, kept)
        if cfg.run_dir == str(runs[1].path):
            raise ConfigError("it cannot be looked at")
        return found

    monkeypatch.setattr(evaluate, "draw", failing)
    subjects = fleet.folder / "subjects"
    request = Request(fleet.config, subjects, [f"run_dir={fleet.folder / 'a'}", *settings], 2, evaluate=True)
    with pytest.raises(ConfigError) as caught:
        every.fleet(request)
    assert caught.value.problems[1:] == ("s2: it cannot be looked at",)
    assert len(loads) == 1 and not (runs[1].scores / SCORES).exists()
    together = (runs[2].scores / SCORES).read_bytes()
    shutil.rmtree(runs[2].scores)
    assert dbtrain("evaluate", runs[2].config).returncode == 0
    assert (runs[2].scores / SCORES).read_bytes() == together != (runs[0].scores / SCORES).read_bytes()
    # Scores of other images are none of these.
    assert dbtrain(*fleet.line("a", *settings, "evaluation.seed=5", "--evaluate")).returncode == 0
    assert (runs[2].scores / SCORES).read_bytes() != together


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment(fleet: Fleet, ranks: int) -> None:
    """Then again until it is done, on another number of ranks: as if undisturbed."""
    numbers = (1, 2, 3, 4, 5)
    fleet.add(*numbers)
    whole = undisturbed(fleet)
    wanted = whole.results("whole", numbers)
    moments = random.Random(f"fleet {ranks}")

    def progress() -> int:
        return sum(len(files) for _, _, files in os.walk(fleet.folder / "killed"))

    for _ in range(KILLS):
        shutil.rmtree(fleet.folder / "killed", ignore_errors=True)
        moment = moments.randrange(sum(len(files) for _, _, files in os.walk(whole.folder / "whole")))
        running = Started(*fleet.line("killed"), ranks=ranks)
        while progress() < moment and running.poll() is None:
            time.sleep(0.01)
        running.kill()
        assert dbtrain(*fleet.line("killed"), ranks=3 - ranks).returncode == 0
        assert fleet.results("killed", numbers) == wanted


@pytest.mark.slow
def test_a_stop_is_orderly_and_costs_nothing(fleet: Fleet) -> None:
    fleet.add(1, 2, 3)
    assert dbtrain(*fleet.line("whole", "train.steps=60")).returncode == 0
    running = Started(*fleet.line("stopped", "train.steps=60"))
    run = RunFolder(fleet.folder / "stopped" / "s1")
    running.wait_for(lambda: run.checkpoints())
    running.signal(signal.SIGTERM)
    code, said = running.end()
    assert code == 75 and "2 runs saved" in said
    assert (fleet.folder / "stopped" / "PREEMPTED").exists()
    assert dbtrain(*fleet.line("stopped", "train.steps=60")).returncode == 0
    assert fleet.results("whole", (1, 2, 3), 60) == fleet.results("stopped", (1, 2, 3), 60)


@pytest.mark.slow
def test_a_rank_without_work_waits_for_the_others(fleet: Fleet) -> None:
    """Then it is stopped with them, although the signal is not its own, and scores its share."""
    fleet.add(1, 2, 3)
    entries = [{"photos": f"subjects/s{number}", "steps": steps} for number, steps in ((1, 1), (2, 60_000))]
    (fleet.folder / "list.yaml").write_text(yaml.safe_dump(entries))
    line = fleet.line("a", "train.checkpoint_every=20")
    line[2] = fleet.folder / "list.yaml"
    running = Started(*line, ranks=2)
    one, two = (RunFolder(fleet.folder / "a" / name) for name in ("s1", "s2"))
    running.wait_for(lambda: one.done.exists() and two.checkpoints())
    # Signal the rank that trains: mostly the second, but an early one takes both, and a late one the rest.
    told: set[int] = set()
    until = time.monotonic() + LONG
    while running.poll() is None and time.monotonic() < until:
        for rank, pid in enumerate(running.processes.pids):
            if rank not in told and f"(process {pid} on " in lock.owner_of(two.path):
                told.add(rank)
                running.signal(signal.SIGTERM, rank=rank)
        time.sleep(0.01)
    code, said = running.end()
    assert code == 75 and "1 runs saved" in said and "not done" not in said
    # To its end, with one more, and scores.
    entries[1]["steps"] = max(map(step_of, two.checkpoints())) + 1
    entries.append({"photos": "subjects/s3", "steps": 2})
    (fleet.folder / "list.yaml").write_text(yaml.safe_dump(entries))
    assert dbtrain(*line, *scored(), "--evaluate", ranks=2).returncode == 0
    for name in ("s1", "s2", "s3"):
        assert (RunFolder(fleet.folder / "a" / name).scores / SCORES).is_file()
    assert dbtrain(*line, "--evaluate", "--watch").returncode == 2


@pytest.mark.slow
def test_bad_subjects_are_named_and_stop_no_other(fleet: Fleet) -> None:
    numbers = (1, 2, 3)
    fleet.add(*numbers)
    good = undisturbed(fleet).results("whole", numbers)
    # A photo that is none, a rate that explodes, a setting that all share.
    fleet.add(4, 5)
    (fleet.folder / "subjects" / "s4" / "0.png").write_bytes(b"no picture")
    (fleet.folder / "mixed").mkdir()
    (fleet.folder / "mixed" / "s7").touch()  # where its run folder would be
    entries = [{"photos": f"subjects/s{number}"} for number in (*numbers, 4, 5, 5, 5)]
    entries[4] |= {"lr": 1e30}
    entries[5] |= {"name": "s6", "train.micro_batch": 7}
    entries[6] |= {"name": "s7"}
    (fleet.folder / "list.yaml").write_text(yaml.safe_dump(entries))
    line = fleet.line("mixed")
    line[2] = fleet.folder / "list.yaml"
    done = dbtrain(*line)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    problems = {one.name: one.problem or "" for one in Status.read(fleet.folder / "mixed").subjects}
    assert "0.png" in problems["s4"] and "NaN or infinite" in problems["s5"]
    assert "train.micro_batch" in problems["s6"]
    assert "4 of 7 subjects are not done" in done.stderr and "s5: the loss" in done.stderr
    assert good == fleet.results("mixed", numbers)
    # Mended, it is trained.
    draw_photo(fleet.folder / "subjects" / "s4" / "0.png", 12)
    (fleet.folder / "list.yaml").write_text(yaml.safe_dump(entries[:4]))
    assert dbtrain(*line).returncode == 0
    assert (fleet.folder / "mixed" / "s4" / EXPORT).is_file()
    assert good == fleet.results("mixed", numbers)


@pytest.mark.slow
@pytest.mark.parametrize("listed", [False, True], ids=["folder", "row before its photos"])
def test_photos_dropped_in_while_it_runs_become_a_subject(fleet: Fleet, listed: bool) -> None:
    line = fleet.line("watched", "--watch")
    (fleet.folder / "subjects").mkdir()
    if listed:
        fleet.add(1, 2, 3)
        line[2] = rows = fleet.folder / "list.yaml"
        rows.write_text(yaml.safe_dump([{"photos": f"subjects/s{number}"} for number in (1, 9, 2, 3)]))
    running = Started(*line)
    home = fleet.folder / "watched"
    if not listed:
        running.wait_for(lambda: "can be trained yet; waiting for one" in running.output())
        fleet.add(1, 2, 3)
    running.wait_for(lambda: (home / "s1").exists())
    fleet.add(9)
    running.wait_for(lambda: (home / "s9" / "DONE").exists())
    running.signal(signal.SIGTERM)
    assert running.end()[0] == 75
    assert undisturbed(fleet).results("whole", (1, 2, 3)) == fleet.results("watched", (1, 2, 3))
    assert {one.name for one in Status.read(home).subjects} == {"s1", "s2", "s3", "s9"}


def test_a_fleet_that_waits_for_its_first_subject_can_be_stopped(fleet: Fleet) -> None:
    """By a signal to one rank. What is wrong with a subject is said, and no second time."""
    (fleet.folder / "subjects" / "s1").mkdir(parents=True)
    line = fleet.line("waiting", "--watch")
    line[2] = rows = fleet.folder / "list.yaml"
    rows.write_text(yaml.safe_dump([{"photos": "subjects/s1"}]))
    running = Started(*line, ranks=2)
    running.wait_for(lambda: "waiting for one" in running.output())
    time.sleep(2.5)
    running.signal(signal.SIGTERM, rank=1)
    code, said = running.end()
    assert code == 75 and said.count("there are no photos in") == said.count("waiting for one") == 1


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("adapter.kind=loha", "adapter.kind is 'loha', which slots cannot train"),
        ("hub.repo=me/pets", "but there is no Hub token"),
    ],
)
def test_what_a_fleet_cannot_do_is_refused_before_anything_is_made(
    fleet: Fleet, setting: str, told: str
) -> None:
    fleet.add(1)
    done = dbtrain(*fleet.line("a", setting), HF_TOKEN="")
    assert done.returncode == 2 and told in done.stderr
    assert not (fleet.folder / "a").exists()
