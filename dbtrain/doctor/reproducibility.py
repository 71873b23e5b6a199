"""Whether a config gives the same run straight, interrupted, and on two processes: tried on this machine."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dbtrain.config import Config
from dbtrain.runtime import console
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder, step_of

STEPS = 6
# Largest gap between two runs, relative to the size of the adapter's change, that rounding explains.
ROUNDING = {"fp32": 1e-3, "bf16": 0.1, "pure-bf16": 0.1, "fp16": 0.05}


@dataclass(frozen=True)
class Way:
    """One way to take the same steps: number of processes until each stop."""

    name: str
    parts: tuple[tuple[int, int], ...]  # (processes, step to stop at)
    same: bool  # bit for bit, where kernels are deterministic


WAYS = (
    Way("straight", ((1, STEPS),), same=True),
    Way("again", ((1, STEPS),), same=True),
    Way("interrupted", ((1, STEPS // 2), (1, STEPS)), same=True),
    Way("2 processes", ((2, STEPS),), same=False),
    Way("2 processes, then 1", ((2, STEPS // 2), (1, STEPS)), same=False),
)


@dataclass(frozen=True)
class Gap:
    """How far a run is from the straight one."""

    way: Way
    rows: bool  # the same images at every step
    loss: float  # largest relative difference of a step's loss
    adapter: float  # norm of the difference, relative to that of the change that training made
    limit: float

    @property
    def fine(self) -> bool:
        return self.rows and self.adapter <= self.limit

    def __str__(self) -> str:
        verdict = "bit for bit" if not self.adapter else "rounding" if self.fine else "NOT THE SAME RUN"
        rows = "same" if self.rows else "other"
        return f"{self.way.name:20} {rows:>6} {self.loss:12.1e} {self.adapter:12.1e}  {verdict}"


HEAD = f"{'way':20} {'rows':>6} {'loss':>12} {'adapter':>12}"


def exact(cfg: Config) -> Iterator[Gap]:
    """Train a few steps of a config in several ways, in processes of their own, and compare.

    Reads the config's shards, and writes to a temporary folder only. Raises ConfigError if a run fails.
    """
    ways = [way for way in WAYS if all(_possible(cfg, ranks) for ranks, _ in way.parts)]
    skipped = [way.name for way in WAYS if way not in ways]
    if skipped:
        console.say(f"left out: {', '.join(skipped)} (train.global_batch cannot be shared, or too few GPUs)")
    with tempfile.TemporaryDirectory(prefix="dbtrain-exact-") as scratch:
        results = {}
        for way in ways:
            folder = Path(scratch) / way.name.replace(" ", "-")
            results[way.name] = _run(cfg, way, folder)
            yield _gap(cfg, way, results["straight"], results[way.name])


def _possible(cfg: Config, ranks: int) -> bool:
    gpus = torch.cuda.device_count()
    return not cfg.train.global_batch % (ranks * cfg.train.micro_batch) and not 0 < gpus < ranks


@dataclass(frozen=True)
class _Run:
    start: dict[str, Tensor]
    end: dict[str, Tensor]
    lines: list[dict[str, float]]


def _run(cfg: Config, way: Way, folder: Path) -> _Run:
    settings = cfg.model_copy(update={
        "run_dir": str(folder / "run"),
        "train": cfg.train.model_copy(update={"steps": STEPS, "checkpoint_every": 1, "keep": STEPS + 1}),
        "optim": cfg.optim.model_copy(update={"warmup_steps": min(cfg.optim.warmup_steps, STEPS)}),
        "hub": type(cfg.hub)(), "validation": cfg.validation.model_copy(update={"prompts": ()}),
    })  # fmt: skip
    folder.mkdir()
    (folder / "config.yaml").write_text(settings.dump())
    for ranks, until in way.parts:
        launcher = [sys.executable, "-m", "dbtrain"]
        if ranks > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                        f"--nproc-per-node={ranks}", "-m", "dbtrain"]  # fmt: skip
        command = [*launcher, "train", str(folder / "config.yaml"), "--until", str(until)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode not in (0, 75):
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            raise ConfigError(f"{way.name}: {' '.join(command)} ended with {done.returncode}", *errors[:3])
    run = RunFolder(folder / "run")
    saved = {step_of(path): path for path in run.checkpoints()}
    return _Run(_adapter(saved[1]), _adapter(saved[STEPS]), run.read_metrics())


def _adapter(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("*/adapter_model.safetensors"))
    return {f"{file.parent.name}.{name}": t for file in files for name, t in load_file(file).items()}


def _gap(cfg: Config, way: Way, straight: _Run, other: _Run) -> Gap:
    moved = torch.stack([(straight.end[n] - straight.start[n]).norm() for n in straight.end]).norm()
    apart = torch.stack([(straight.end[n] - other.end[n]).norm() for n in straight.end]).norm()
    pairs = list(zip(straight.lines, other.lines, strict=True))
    return Gap(
        way,
        rows=all(one["rows"] == two["rows"] for one, two in pairs),
        loss=max(abs(one["loss"] - two["loss"]) / abs(one["loss"]) for one, two in pairs),
        adapter=(apart / moved).item(),
        limit=ROUNDING[cfg.train.precision],
    )
