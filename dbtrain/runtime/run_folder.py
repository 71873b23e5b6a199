"""A run folder: every name in it, written down once.

runs/dog/
├── config.yaml          the resolved config
├── log.txt  tb/         what the terminal showed; TensorBoard
├── *.jsonl              a line per step: metrics, speed, timesteps, validation
├── checkpoints/         step-000500/: adapter, optimizer.safetensors, state.json
├── validation/          step-000500/: images and sheet.png
├── export/              the adapter's files, README.md, samples.png
├── samples/             step-000500/ or sample-<key>/: images and sheet.png
├── scores/              scores.json, sheet.png, checkpoints.json
├── report.html
└── DONE, PREEMPTED      what batch scripts look for
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.hashing import sha256_of

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"  # in a checkpoint
SHEET = "sheet.png"  # in a folder of images
SCORES = "scores.json"  # in a folder of scores
SAMPLES = "samples.png"  # the contact sheet in an export
TABLES = ("metrics", "speed", "validation", "timesteps")  # the *.jsonl of a run


@dataclass(frozen=True)
class RunFolder:
    """The paths in one run folder. Raises ConfigError if `~` in it cannot be resolved."""

    path: Path

    def __init__(self, run_dir: str | Path) -> None:
        object.__setattr__(self, "path", files.expand(run_dir))

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def scores(self) -> Path:
        return self.path / "scores"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def validation(self) -> Path:
        return self.path / "validation"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def done(self) -> Path:
        """Exists once the run is trained and exported."""
        return self.path / "DONE"

    @property
    def preempted(self) -> Path:
        """Exists while the run waits for the same command to be run again."""
        return self.path / "PREEMPTED"

    def table(self, name: str) -> Path:
        """The *.jsonl called `name`, one of TABLES."""
        return self.path / f"{name}.jsonl"

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / _step_name(step)

    def validation_sheet(self, step: int) -> Path:
        return self.validation / _step_name(step) / SHEET

    def samples_of(self, step: int) -> Path:
        return self.samples / _step_name(step)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return steps_in(self.path / "checkpoints")

    def validations(self) -> list[Path]:
        """Folders of validation images, oldest first."""
        return steps_in(self.validation)

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict per logged step, in order: step, loss, loss_instance, loss_prior, grad_norm, lr.

        A line that a crash cut off is left out.
        """
        return read_lines(self.table("metrics"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a *.jsonl that are whole, in order; [] if there is no such file."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            found.append(values)
    return found


def steps_in(folder: Path) -> list[Path]:
    """The folders called `step-<number>`, by their number."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))
    return sorted(filter(Path.is_dir, named), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a folder that `steps_in` finds."""
    return int(path.name.removeprefix("step-"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises ConfigError if one of its files is missing or altered."""
    try:
        state = json.loads((checkpoint / STATE).read_bytes())
        odd = [name for name, sha in state["files"].items() if sha256_of(checkpoint / name) != sha]
        if state["step"] != step_of(checkpoint) or not isinstance(state["identity"], dict):
            odd.append(STATE)
    except (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError) as error:
        raise ConfigError(f"checkpoint {checkpoint} is damaged: {reason(error)}") from error
    if odd:
        raise ConfigError(f"checkpoint {checkpoint} is damaged: {', '.join(odd)} differs from its sha256")
    return state


def _step_name(step: int) -> str:
    return f"step-{step:06d}"
