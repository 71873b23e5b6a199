"""How long a job takes, from speeds that were measured with the same settings on the same kind of device.

Every run, and `doctor --dry-run`, keeps what it measures in the user's cache, by settings and device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dbtrain.config import Config
from dbtrain.data import photos
from dbtrain.data.pictures import note_in
from dbtrain.data.shards import Manifest
from dbtrain.data.storage import Storage
from dbtrain.models.base import Base
from dbtrain.models.pretrained import Pretrained
from dbtrain.prepare import class_images, images, own_images, plan, subjects
from dbtrain.runtime import console, dist, files, pace
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import SHEET, RunFolder, step_of

ENOUGH = 20  # units after which a measurement is as good as a longer one
MARGIN = 1.25  # of a SLURM time limit, for busy disks and slower nodes
SPARE_S = 300.0  # of a SLURM time limit, for the start of the job
QUARTER_S = 900  # SLURM time limits are rounded up to this
CPU = "a CPU,"  # begins the name of a device that is not a GPU
IMAGES = ("validation image", "sample")  # kinds of work with the same sampler
JOB = ("prepare", "train", "sample")  # the verbs of `run`
# The settings of a section that speeds depend on, or do not.
PREPARE = {"resolution", "vae_precision", "class_pictures"}
SAMPLING = {"guidance", "precision", "batch"}
NOT_TRAIN = {"steps", "stop", "patience", "checkpoint_every", "keep", "log_every", "wandb"}


@dataclass(frozen=True)
class Todo:
    """What a job has still to do, over all ranks."""

    class_images: int = 0
    encode: int = 0
    steps: int = 0
    validations: int = 0
    checkpoints: int = 0
    samples: int = 0

    @classmethod
    def of(cls, cfg: Config, verbs: Sequence[str] = JOB) -> Todo:
        """What is left of these verbs. Raises ConfigError for what they would refuse; uses no network."""
        run, train = RunFolder(cfg.run_dir), cfg.train
        start = max(map(step_of, run.checkpoints()), default=0)
        wanted, crops = _to_prepare(cfg) if "prepare" in verbs and cfg.prepare else (0, 0)
        best = run.read_best() if train.stop == "best" else None
        trains = "train" in verbs and start < train.steps and not (best and best["stopped"])
        validates = trains and bool(cfg.validation.prompts or _held_out(cfg))
        samples = "sample" in verbs and not note_in(run.samples_of(run.exported(train.steps)) / SHEET)
        return cls(
            class_images=wanted,
            encode=crops,
            steps=train.steps - start if trains else 0,
            # There is a validation before the first step too.
            validations=pace.times(cfg.validation.every, start or -1, train.steps) if validates else 0,
            checkpoints=pace.times(train.checkpoint_every, start, train.steps) if trains else 0,
            # Without and with the adapter.
            samples=2 * len(cfg.sample.prompts) * cfg.sample.images if samples else 0,
        )


def _to_prepare(cfg: Config) -> tuple[int, int]:
    """How many class images to generate, and crops to encode."""
    assert cfg.prepare
    here = Pretrained.here(cfg.model)
    base = Base.of(here, cfg.model) if here else None
    storage = Storage(cfg.data.shards, retries=0)
    with contextlib.suppress(ConfigError):  # there are no shards, or they are made again
        if base and storage.folder:
            manifest = Manifest.read(storage)
            plan.check(cfg, base, manifest)
            return 0, 0
    own, wanted = 0, 0
    parts = subjects.parts(cfg)
    every = [photos.of_subject(part.prepare) for part in parts["instance"]]
    for part in parts["class"]:
        mine = len(own_images.find_own(part.prepare))
        missing = part.prepare.class_images - mine
        if base:
            shares = images.of_classes(base, cfg, every)
            missing -= class_images.there(base, part.prepare, cfg.train.base_linears, shares)
        own, wanted = own + mine, wanted + missing
    count = sum(map(len, every))
    crops = count * cfg.prepare.variants * (1 + cfg.prepare.flip)
    return wanted, crops + own + (wanted if cfg.prepare.class_pictures else 0)


def _held_out(cfg: Config) -> int:
    """Held-out images, as far as the config says."""
    if cfg.prepare is None:
        return 0
    parts = subjects.parts(cfg)
    return len(parts["instance"]) * cfg.prepare.held_out + len(parts["class"]) * cfg.prepare.class_held_out


@dataclass(frozen=True)
class Speed:
    """Measured speeds: per kind of work seconds per unit, seconds of warming up, and units measured."""

    device: str
    ranks: int
    rates: dict[str, tuple[float, float, float]]

    @property
    def gpu(self) -> bool:
        return not self.device.startswith(CPU)

    @property
    def is_here(self) -> bool:
        return self.device == device()

    def parts(self, cfg: Config, todo: Todo) -> dict[str, float]:
        """Seconds of each part of a job; NaN for parts whose speed is unknown."""
        sampling = cfg.prepare.sampling.steps if cfg.prepare else 0
        # If images of one kind were not measured, those of the other are as good.
        images = len(cfg.validation.prompts) * cfg.validation.images
        validation, samples = (
            _known(self._images(kind, count, cfg.sample.steps) for kind in kinds)
            for count, kinds in ((todo.validations * images, IMAGES), (todo.samples, IMAGES[::-1]))
        )
        # The loss of a held-out image takes less than a training step takes for one.
        passes = todo.validations * _held_out(cfg) * cfg.validation.timesteps
        held_out = passes / cfg.train.global_batch * self.rates.get("step", (math.nan,))[0] if passes else 0.0
        busy = {"prepare": todo.class_images + todo.encode, "train": todo.steps, "sample": todo.samples}
        return {
            "class images": self._images("class image", todo.class_images, sampling),
            "shards": self._seconds("encode", self._share(todo.encode)),
            "training": self._seconds("step", todo.steps) + self._seconds("checkpoint", todo.checkpoints),
            "validation": validation + held_out,
            "samples": samples,
            "loading": sum(self._seconds(f"loading for {verb}", 1) for verb, count in busy.items() if count),
        }

    def _seconds(self, kind: str, units: float, unknown: float = math.nan) -> float:
        """Time of `units` of a kind of work that one rank does."""
        each, warm_up, _ = self.rates.get(kind, (unknown, 0.0, 0.0))
        return each * units + warm_up if units else 0.0

    def _share(self, units: int) -> int:
        return -(-units // self.ranks)

    def _images(self, kind: str, count: int, steps: int) -> float:
        mine = self._share(count)
        denoising, rest = self._seconds(f"{kind} step", mine * steps), self._seconds(kind, mine)
        return denoising + rest + self._seconds(f"{kind} decode", mine, unknown=0.0)

    def told(self, cfg: Config, todo: Todo) -> str:
        """A phrase for the time of a job and its parts; "" if nothing of it was measured."""
        parts = self.parts(cfg, todo)
        shown = {name: seconds for name, seconds in parts.items() if not seconds < 0.5}
        unknown = [name for name, seconds in shown.items() if math.isnan(seconds)]
        if len(unknown) == len(shown):
            return ""
        each = ", ".join(
            f"{name} {'unknown' if name in unknown else pace.human(seconds, 0)}"
            for name, seconds in shown.items()
        )
        where = f"{self.device}, {self.ranks} process" + "es" * (self.ranks > 1)
        about = "at least" if unknown else "about"
        return f"{about} {pace.human(self.total(cfg, todo), 0)}: {each}; measured on {where}"

    def total(self, cfg: Config, todo: Todo) -> float:
        """Seconds of the parts that are known."""
        return sum(seconds for seconds in self.parts(cfg, todo).values() if not math.isnan(seconds))


def _known(values: Iterable[float]) -> float:
    """The first that is not NaN, or else NaN."""
    return next((value for value in values if not math.isnan(value)), math.nan)


def slurm_time(seconds: float, stop_before_s: float) -> str:
    """A time limit with a margin, as `sbatch --time` takes it: HH:MM:SS or D-HH:MM:SS."""
    needed = MARGIN * seconds + stop_before_s + SPARE_S
    quarters = math.ceil(needed / QUARTER_S)
    days, quarters = divmod(quarters, 96)
    text = f"{quarters // 4:02d}:{quarters % 4 * 15:02d}:00"
    return f"{days}-{text}" if days else text


def announce(cfg: Config, *verbs: str) -> None:
    """Say on rank 0 how long these verbs take, if their speed was measured on this kind of device."""
    dist.init()
    with dist.agreed():
        here = [speed for speed in speeds(cfg, dist.world()) if speed.is_here] if dist.is_main() else []
        with contextlib.suppress(ConfigError):  # the verb says it, or first unpacks the photos to count
            if here and (text := here[0].told(cfg, Todo.of(cfg, verbs))):
                console.say(text)


def remember(cfg: Config, verb: str) -> None:
    """Keep what this process has measured during `verb`, for later estimates."""
    global _accounted_s
    spent = sum(seconds for phase, seconds in console.spent_s.items() if phase not in console.INNER)
    loading = time.monotonic() - console.started - spent - _accounted_s
    _accounted_s += loading
    rates = {
        kind: (rate.each, rate.warm_up, rate.count)
        for kind, rate in pace.measured.items()
        if rate.units or kind != "step"
    }  # the first step of a process also compiles
    pace.measured.clear()
    folder = _folder(cfg)
    if not dist.is_main() or not rates or not folder:
        return
    rates[f"loading for {verb}"] = (loading, 0.0, 1.0)
    path = folder / f"{content_key([device(), dist.world()])[:16]}.json"
    known = _read(path)
    for kind, rate in (known.rates if known else {}).items():
        if kind not in rates or min(rate[2], ENOUGH) > min(rates[kind][2], ENOUGH):
            rates[kind] = rate
    entry = {"device": device(), "ranks": dist.world(), "rates": rates}
    with contextlib.suppress(OSError):  # the cache is not writable: there is no estimate next time
        files.write_atomically(path, json.dumps(entry, indent=1) + "\n")


_accounted_s = 0.0  # time of loading that earlier verbs of this process have remembered


def speeds(cfg: Config, ranks: int) -> list[Speed]:
    """What was measured with the settings of `cfg` on `ranks` ranks; on this device first."""
    folder = _folder(cfg)
    paths = sorted(folder.glob("*.json")) if folder else []
    found = [speed for path in paths if (speed := _read(path)) and speed.ranks == ranks]
    return sorted(found, key=lambda speed: not speed.is_here)


def _read(path: Path) -> Speed | None:
    """A record, or None if it is missing or damaged."""
    try:
        entry = json.loads(path.read_text())
        rates = {str(kind): (float(a), float(b), float(c)) for kind, (a, b, c) in entry["rates"].items()}
        return Speed(str(entry["device"]), int(entry["ranks"]), rates)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _folder(cfg: Config) -> Path | None:
    """Where records for the settings of `cfg` are; None for a user without a home folder."""
    prepare = cfg.prepare
    settings = [
        torch.__version__, cfg.model.model_dump(mode="json"),
        cfg.adapter.model_dump(mode="json", exclude={"start"}),
        cfg.train.model_dump(mode="json", exclude=NOT_TRAIN), bool(cfg.loss.prior_weight),
        *([cfg.loss.prior] if cfg.loss.prior != "images" else []),
        cfg.sample.model_dump(mode="json", include=SAMPLING),
        prepare and prepare.model_dump(mode="json", include=PREPARE),
        prepare and prepare.sampling.model_dump(mode="json", include=SAMPLING),
        bool(prepare and prepare.class_prompt),
    ]  # fmt: skip
    try:
        return files.cache() / "pace" / content_key(settings)[:32]
    except RuntimeError:
        return None


def device() -> str:
    """The name of the device that this rank computes on."""
    where = dist.device()
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{CPU} {line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{CPU} {os.cpu_count()} cores"
