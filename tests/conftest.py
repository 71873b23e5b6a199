"""Real parts for the tests: pictures, configs, shards and processes; the base is that of `tests/bases.py`."""
# ruff: noqa: E402

from __future__ import annotations

from tests import session

session.begin()  # before anything is imported that reads the environment

import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from dbtrain.config import Config
from dbtrain.data.storage import Storage
from dbtrain.runtime import console
from dbtrain.runtime.imports import importing
from tests import bases
from tests.forkserver import Forked, can_fork
from tests.session import once

pytest_plugins = ["tests.cluster.machines", "tests.hostile"]

ROOT = Path(__file__).parents[1]
REAL_PHOTOS = ROOT.parent / "shared" / "photos"  # real subjects, where a checkout has them beside it

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Garbage collections leave out all that tests import, and are rare: they took a twelfth of the time."""
    with importing(at_start=True):
        collected = yield
    gc.set_threshold(20_000, 10, 10)
    return collected


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests first, so that workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    if getattr(config.option, "loadgroup", False):  # in a worker; pytest 9.2 renamed what xdist 3.8 sets
        assert all("@" in item.nodeid for item in grouped), "pytest-xdist does not keep groups together"


def slow(*values: Any) -> Any:
    """A row of a table that `launch/test.sh --quick` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def thinned(rows: Iterable[Any], step: int) -> list[Any]:
    """A table, whose rows are tuples or one value, of which `launch/test.sh --quick` takes one in `step`."""
    every = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [slow(*row) if number % step else pytest.param(*row) for number, row in enumerate(every)]


def draw_photo(path: Path, number: int, size: tuple[int, int] = (96, 80)) -> Path:
    """A picture that differs from the others in every part: colours, shape, place."""
    picture = Image.new("RGB", size, (40 * number % 256, 90, 200 - 30 * number % 200))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((10 + 5 * number, 12, 50 + 5 * number, 60), fill=(250, 30 * number % 256, 60))
    pen.line((0, 7 * number, *size), fill="white", width=3)
    picture.save(path)
    return path


def draw_photos(folder: Path) -> None:
    for number in range(5):
        draw_photo(folder / f"{number:02d}.jpg", number)


@pytest.fixture(scope="session")
def photos() -> Path:
    """Five photos: real ones where there are any, else drawn ones."""
    real = REAL_PHOTOS / "dog6"
    return real if real.is_dir() else once("photos", draw_photos)


@pytest.fixture(scope="session")
def class_dir() -> Path:
    """Where all tests share their generated class images."""
    return once("class", lambda folder: None)


def config_in(folder: Path, photos: Path, class_dir: Path, **changes: Any) -> Config:
    """A small valid config, written to `folder/c.yaml`; keyword `section__key` changes one value."""
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "subject": {"token": "sks", "class_word": "dog"},
        "model": {"path": str(bases.sd())},
        "prepare": {
            "photos": str(photos), "instance_prompt": "a photo of sks dog",
            "class_prompt": "a photo of a dog", "class_images": 8, "class_dir": str(class_dir),
            "resolution": 64, "sampling": {"steps": 2, "precision": "fp32"},
        },
        "data": {"shards": str(folder / "shards")},
        "adapter": {"rank": 4, "alpha": 8},
        "optim": {"lr": 1e-3},
        "train": {"steps": 4, "global_batch": 4, "precision": "fp32", "checkpoint_every": 2},
        "sample": {"images": 2, "steps": 2, "precision": "fp32"},
    }  # fmt: skip
    for name, value in changes.items():
        *sections, key = name.split("__")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(values))
    return Config.load(path)


Make = Callable[..., Config]
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def make(tmp_path: Path, photos: Path, class_dir: Path) -> Make:
    """`config_in` this test's own folder."""
    return partial(config_in, tmp_path, photos, class_dir)


@pytest.fixture(scope="session")
def prepared(photos: Path, class_dir: Path) -> Path:
    """Shards of the small config, made once; a test that changes shards copies them."""
    from dbtrain.prepare.prepare import prepare

    return once("prepared", lambda folder: prepare(config_in(folder, photos, class_dir))) / "shards"


def at(folder: Path) -> Storage:
    """A folder of shards, as the package reads it."""
    return Storage(str(folder))


def command(*args: object, ranks: int = 1) -> list[str]:
    """The command line of a verb, in one process or under torchrun."""
    launcher = [sys.executable, "-m", "dbtrain"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    f"--nproc-per-node={ranks}", "-m", "dbtrain"]  # fmt: skip
    return [*launcher, *map(str, args)]


class Cold:
    """The processes of a command line, started as a user starts them; has the methods of `Forked`."""

    def __init__(
        self, command: list[str], env: dict[str, str], stdout: IO[Any], stderr: IO[Any], cwd: Path = ROOT
    ) -> None:
        self.tag = f"TEST_RUN={uuid.uuid4()}"  # by which its processes are found
        name, value = self.tag.split("=")
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env={**env, name: value},
            cwd=cwd, start_new_session=True,
        )  # fmt: skip

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def poll(self) -> int | None:
        return self.process.poll()

    def _pids(self, *wanted: str) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                names = (folder / "environ").read_text().split("\0")
                if {self.tag, *wanted} <= set(names) and " Z " not in (folder / "stat").read_text():
                    found.append(int(folder.name))
        return found

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to the started process, or to one rank."""
        for pid in [self.process.pid] if rank is None else self._pids(f"RANK={rank}"):
            os.kill(pid, number)

    def kill(self) -> None:
        """End every process at once."""
        while pids := self._pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()


LONG = 900.0  # seconds after which nothing more is expected of a process, however busy the machine is


def launch(
    command: list[str], stdout: IO[Any], stderr: IO[Any], cwd: Path = ROOT, cold: bool = False, **env: str
) -> Cold | Forked:
    """Start what this command line starts: as a fork, or as a user does where the environment needs it."""
    full = {**os.environ, **env}
    kind = Forked if can_fork(full) and not cold else Cold
    return kind(command, full, stdout, stderr, cwd)


class Started:
    """A verb that is running, with all its processes."""

    running: list[Started] = []  # noqa: RUF012

    def __init__(self, *args: object, ranks: int = 1, cold: bool = False, **env: str) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        self.processes = launch(command(*args, ranks=ranks), self.said, self.said, cold=cold, **env)
        self.signal, self.kill, self.poll = self.processes.signal, self.processes.kill, self.processes.poll
        Started.running.append(self)

    def wait_for(self, there: Callable[[], Any], seconds: float = LONG) -> None:
        """Wait until something is there; fails if the verb ends before."""
        until = time.monotonic() + seconds
        while not there():
            assert self.poll() is None, f"it ended before: {self.end()}"
            assert time.monotonic() < until, "it did not come"
            time.sleep(0.01)

    def end(self, seconds: float = LONG) -> tuple[int, str]:
        """Exit code and output, once it has ended."""
        try:
            code = self.processes.wait(seconds)
        finally:
            self.kill()
        print(said := self.output())
        return code, said

    def cpu_seconds(self) -> float:
        """What the first of its processes has computed so far. Raises FileNotFoundError once it has ended."""
        assert isinstance(self.processes, Forked)
        stat = Path(f"/proc/{self.processes.pids[0]}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def output(self) -> str:
        """What it has said so far."""
        fd = self.said.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode()


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    """Whatever a test started ends with it, and so does what a verb in its process shows of messages."""
    logger = console.logger
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers[:]
    yield
    while Started.running:
        Started.running.pop().kill()
    logger.setLevel(level)
    logger.propagate, logger.handlers[:] = propagate, handlers


def finished(command: list[str], cwd: Path = ROOT, cold: bool = False, **env: str) -> Done:
    """What a command line did, by its end; its output is shown when a test fails."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        processes = launch(command, stdout, stderr, cwd, cold, **env)
        try:
            code = processes.wait(LONG)
        finally:
            processes.kill()
        stdout.seek(0), stderr.seek(0)
        done = Done(command, code, stdout.read(), stderr.read())
    print(done.stdout, done.stderr, sep="\n")
    return done


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes that the code under test starts with `subprocess.run` are forks too."""
    real = subprocess.run

    def run(line: list[str], **options: Any) -> Any:
        if line[0] != sys.executable:
            return real(line, **options)
        return finished(line, Path(options.get("cwd") or "").absolute(), **options.get("env") or {})

    monkeypatch.setattr(subprocess, "run", run)


def dbtrain(*args: object, ranks: int = 1, cold: bool = False, **env: str) -> Done:
    """A verb run to its end."""
    return finished(command(*args, ranks=ranks), cold=cold, **env)


def train(cfg: Config, until: int | None = None) -> Path:
    """What `dbtrain train` does: the loop, then the export."""
    from dbtrain.export import export
    from dbtrain.train import loop

    folder = loop.train(cfg, until)
    export.finish(cfg)
    return folder
