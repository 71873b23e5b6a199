"""Real parts for the tests: pictures, configs, shards and processes; the base is that of `tests/bases.py`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from dbtrain.config import Config
from dbtrain.data.storage import Storage
from tests import bases

pytest_plugins = ["tests.cluster.machines"]

ROOT = Path(__file__).parents[1]
REAL_PHOTOS = ROOT.parent / "shared" / "photos"  # real subjects, where a checkout has them beside it

torch.set_num_threads(1)
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def draw_photo(path: Path, number: int, size: tuple[int, int] = (96, 80)) -> Path:
    """A picture that differs from the others in every part: colours, shape, place."""
    picture = Image.new("RGB", size, (40 * number % 256, 90, 200 - 30 * number % 200))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((10 + 5 * number, 12, 50 + 5 * number, 60), fill=(250, 30 * number % 256, 60))
    pen.line((0, 7 * number, *size), fill="white", width=3)
    picture.save(path)
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos: real ones where there are any, else drawn ones."""
    if (REAL_PHOTOS / "dog6").is_dir():
        return REAL_PHOTOS / "dog6"
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        draw_photo(folder / f"{number:02d}.jpg", number)
    return folder


@pytest.fixture(scope="session")
def class_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests share their generated class images."""
    return tmp_path_factory.mktemp("class")


def config_in(folder: Path, photos: Path, class_dir: Path, **changes: Any) -> Config:
    """A small valid config, written to `folder/c.yaml`; keyword `section__key` changes one value."""
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
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


@pytest.fixture
def make(tmp_path: Path, photos: Path, class_dir: Path) -> Make:
    """`config_in` this test's own folder."""
    return partial(config_in, tmp_path, photos, class_dir)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, photos: Path, class_dir: Path) -> Path:
    """Shards of the small config, made once; a test that changes shards copies them."""
    from dbtrain.prepare.prepare import prepare

    return prepare(config_in(tmp_path_factory.mktemp("prepared"), photos, class_dir))


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


class Started:
    """A verb that is running, with all its processes."""

    def __init__(self, *args: object, ranks: int = 1, **env: str) -> None:
        self.tag = f"TEST_RUN={uuid.uuid4()}"
        name, value = self.tag.split("=")
        self.process = subprocess.Popen(
            command(*args, ranks=ranks), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **env, name: value}, start_new_session=True,
        )  # fmt: skip

    def pids(self, rank: int | None = None) -> list[int]:
        """The processes of all ranks, or of one of them, the agent's not."""
        wanted = {self.tag, f"RANK={rank}"} if rank is not None else {self.tag}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                names = set((folder / "environ").read_text().split("\0"))
                if wanted <= names and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(folder.name))
        return found

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to the started process, or to one rank."""
        for pid in [self.process.pid] if rank is None else self.pids(rank):
            os.kill(pid, number)

    def kill(self) -> None:
        """End every process of it, at once."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait_for(self, there: Callable[[], Any], seconds: float = 120) -> None:
        """Wait until something is there; fails if the verb ends before."""
        until = time.monotonic() + seconds
        while not there():
            assert self.process.poll() is None, f"it ended before: {self.end()}"
            assert time.monotonic() < until, "it did not come"
            time.sleep(0.01)

    def end(self, seconds: float = 120) -> tuple[int, str]:
        """Exit code and output, once it has ended."""
        try:
            output, _ = self.process.communicate(timeout=seconds)
        finally:
            self.kill()
        print(output)
        return self.process.returncode, output


def dbtrain(*args: object, ranks: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
    """A verb run to its end; its output is shown when a test fails."""
    done = subprocess.run(
        command(*args, ranks=ranks), capture_output=True, text=True, timeout=300, env={**os.environ, **env}
    )
    print(done.stdout, done.stderr, sep="\n")
    return done


def train(cfg: Config, until: int | None = None) -> Path:
    """What `dbtrain train` does: the loop, then the export."""
    from dbtrain.export import export
    from dbtrain.train import loop

    folder = loop.train(cfg, until)
    export.finish(cfg)
    return folder
