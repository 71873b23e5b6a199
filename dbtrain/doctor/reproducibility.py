"""Whether a config gives the same run uninterrupted, interrupted, and on two processes on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dbtrain.config import Config
from dbtrain.doctor.dry_run import run_command
from dbtrain.runtime import console, exit_codes
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder, step_of

STEPS = 6
# Largest difference of two adapters that rounding explains, relative to how much training changed them.
ROUNDING = {"fp32": 1e-3, "bf16": 0.1, "pure-bf16": 0.1, "fp16": 0.05}


@dataclass(frozen=True)
class Way:
    """One way to take the same steps."""

    name: str
    parts: tuple[tuple[int, int], ...]  # (processes, step to stop at)
    same: bool  # bit for bit the same as the straight run, if kernels are deterministic


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
    rows: bool  # whether every step had the same images
    loss: float  # largest relative difference of a step's loss
    adapter: (
        float  # norm of the adapters' difference, relative to the norm of the adapter's change in training
    )
    limit: float  # on `adapter`

    @property
    def fine(self) -> bool:
        return self.rows and self.adapter <= self.limit

    def __str__(self) -> str:
        verdict = "bit for bit" if not self.adapter else "rounding" if self.fine else "NOT THE SAME RUN"
        rows = "same" if self.rows else "other"
        return f"{self.way.name:20} {rows:>6} {self.loss:12.1e} {self.adapter:12.1e}  {verdict}"


HEAD = f"{'way':20} {'rows':>6} {'loss':>12} {'adapter':>12}"


def table(cfg: Config) -> Iterator[str]:
    """Lines on how far each way is from the straight run. Raises ConfigError if one is not the same."""
    yield HEAD
    different = []
    for gap in exact(cfg):
        yield str(gap)
        if not gap.fine:
            different.append(gap.way.name)
    if different:
        raise ConfigError(f"these differ from the straight run: {', '.join(different)}")


def exact(cfg: Config) -> Iterator[Gap]:
    """Train a few steps in several ways, in new processes, and yield each way's gap to the straight run.

    Reads the config's shards, and writes only to a temporary folder. Raises ConfigError if a run fails.
    """
    ways = [way for way in WAYS if all(_possible(cfg, ranks) for ranks, _ in way.parts)]
    skipped = [way.name for way in WAYS if way not in ways]
    if skipped:
        console.say(f"skipped: {', '.join(skipped)} (train.global_batch is not divisible, or too few GPUs)")
    with tempfile.TemporaryDirectory(prefix="dbtrain-exact-") as scratch:
        straight = None
        for way in ways:
            run = _run(cfg, way, Path(scratch) / way.name.replace(" ", "-"))
            straight = straight or run
            yield _gap(cfg, way, straight, run)


def _possible(cfg: Config, ranks: int) -> bool:
    """Whether so many processes can share the batch and this machine's GPUs."""
    gpus = torch.cuda.device_count()
    return not cfg.train.global_batch % (ranks * cfg.train.micro_batch) and not 0 < gpus < ranks


@dataclass(frozen=True)
class _Run:
    start: dict[str, Tensor]  # the adapter after the first step
    end: dict[str, Tensor]  # the adapter after the last step
    lines: list[dict[str, float]]  # metrics.jsonl


def _run(cfg: Config, way: Way, folder: Path) -> _Run:
    """Train `way` in a new folder. Raises ConfigError if a process fails."""
    settings = cfg.model_copy(update={
        "run_dir": str(folder / "run"),
        "train": cfg.train.model_copy(
            update={"steps": STEPS, "stop": "steps", "checkpoint_every": 1, "keep": STEPS + 1}
        ),
        "optim": cfg.optim.model_copy(update={"warmup_steps": min(cfg.optim.warmup_steps, STEPS)}),
        "hub": type(cfg.hub)(), "validation": cfg.validation.model_copy(update={"prompts": ()}),
    })  # fmt: skip
    folder.mkdir()
    (folder / "config.yaml").write_text(settings.dump())
    for ranks, until in way.parts:
        done = run_command(["train", str(folder / "config.yaml"), "--until", str(until)], ranks)
        if done.returncode not in (0, exit_codes.PREEMPTED):
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            raise ConfigError(f"{way.name}: {' '.join(done.args)} ended with {done.returncode}", *errors[:3])
    run = RunFolder(folder / "run")
    saved = {step_of(path): path for path in run.checkpoints()}
    return _Run(_adapter(saved[1]), _adapter(saved[STEPS]), run.read_metrics())


def _adapter(path: Path) -> dict[str, Tensor]:
    """All adapter tensors of a checkpoint, by component and name."""
    files = sorted(path.glob("*/adapter_model.safetensors"))
    return {f"{file.parent.name}.{name}": t for file in files for name, t in load_file(file).items()}


def _gap(cfg: Config, way: Way, straight: _Run, other: _Run) -> Gap:
    change = torch.stack([(straight.end[n] - straight.start[n]).norm() for n in straight.end]).norm()
    difference = torch.stack([(straight.end[n] - other.end[n]).norm() for n in straight.end]).norm()
    pairs = list(zip(straight.lines, other.lines, strict=True))
    return Gap(
        way,
        rows=all(one["rows"] == two["rows"] for one, two in pairs),
        loss=max(abs(one["loss"] - two["loss"]) / abs(one["loss"]) for one, two in pairs),
        adapter=(difference / change).item(),
        limit=ROUNDING[cfg.train.precision],
    )
