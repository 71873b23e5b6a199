"""All file names in a run folder, in one place.

runs/dog/
├── config.yaml          the resolved config
├── log.txt  tb/         console output; TensorBoard
├── *.jsonl              one line per logged step: metrics, speed, timesteps, validation
├── checkpoints/         step-000500/: adapter, optimizer.safetensors, state.json
├── validation/          step-000500/: images and sheet.png
├── best.json            train.stop: best: its step, and why
├── export/              the adapter's files (see `name_of`), README.md, samples.png
├── samples/             step-000500/ or sample-<key>/: images and sheet.png
├── scores/              scores.json, sheet.png, checkpoints.json
├── report.html
└── DONE, FAILED, PREEMPTED  markers for batch scripts
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.hashing import sha256_of

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"  # in a checkpoint
EMA = "ema"  # in a checkpoint: the moving average of the adapter, in folders of the same form
SHEET = "sheet.png"  # in a folder of images
CONFUSION = "confusion.json"  # which of several subjects the images of each are like
SCORES = "scores.json"  # in a folder of scores
SAMPLES = "samples.png"  # the contact sheet in an export
PREVIEW = "{name}.preview.png"  # beside an adapter's file in an export: what A1111 and managers show for it
WEIGHTS = ("pytorch_lora_weights", "adapter_model", "kohya")  # adapter files that are called alike everywhere
LONGEST = 200  # bytes of a name; file systems allow 255
TABLES = ("metrics", "speed", "validation", "timesteps")  # *.jsonl files of a run


class RunFolder:
    """The paths in one run folder. Raises ConfigError if `~` in it cannot be resolved."""

    def __init__(self, run_dir: str | Path) -> None:
        self.path = files.expand(run_dir)
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.txt"
        self.tensorboard = self.path / "tb"
        self.export = self.path / "export"
        self.scores = self.path / "scores"
        self.samples = self.path / "samples"
        self.validation = self.path / "validation"
        self.report = self.path / "report.html"
        self.best = self.path / "best.json"  # exists in a run that looks for its best step
        self.done = self.path / "DONE"  # exists once the run is trained and exported
        self.failed = self.path / "FAILED"  # in a fleet: exists, and says why, once the run cannot go on
        self.pushed = self.path / "PUSHED"  # in a fleet: what was pushed to the Hub, and where to
        self.preempted = self.path / "PREEMPTED"  # exists while the same command has to be run again

    def table(self, name: str) -> Path:
        """The path of a *.jsonl file. `name` is one of TABLES."""
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

    @property
    def swept(self) -> tuple[Path, ...]:
        """The subfolders in which files are deleted."""
        return self.path / "checkpoints", self.export, self.samples, self.scores, self.validation

    def validations(self) -> list[Path]:
        """Folders of validation images, oldest first."""
        return steps_in(self.validation)

    def read_best(self) -> dict[str, Any] | None:
        """The best step so far, why, and whether that ended the run; None for one that does not look for it.

        Raises ConfigError if the file is damaged.
        """
        if not self.best.is_file():
            return None
        found = files.read_json(self.best)
        if not (isinstance(found.get("step"), int) and found.keys() >= {"why", "stopped"}):
            raise ConfigError(f"{self.best} is damaged; run dbtrain train again, which repairs it")
        return found

    def exported(self, steps: int) -> int:
        """The step that a finished run of `steps` steps exports: `steps`, unless it looks for its best."""
        best = self.read_best()
        return best["step"] if best else steps

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict per logged step, in order: step, loss, loss_instance, loss_prior, grad_norm, lr.

        Skips a line that a crash truncated.
        """
        return read_lines(self.table("metrics"))


def name_of(adapter: str | Path) -> str:
    """What an adapter is called: the name of its run folder or file, safe as a file name.

    Letters and digits of any script stay, and `_`, `.` and `-`; all else becomes `_`. `export`, and files
    that are called alike in every export, have the name of the folder that they are in.
    """
    path = Path(os.path.abspath(files.expand(adapter)))
    if path.suffix == ".safetensors":
        path = path.parent if path.stem in WEIGHTS else path.with_suffix("")
    path = path.parent if path.name == "export" else path
    safe = re.sub(r"[^\w.-]+", "_", path.name).lstrip(".")
    cut = safe.encode()[:LONGEST].decode(errors="ignore")
    return "adapter" if cut.lower() in ("", WEIGHTS[0]) else cut


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a *.jsonl file, in order; [] if the file does not exist."""
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
    """The subfolders called `step-<number>`, sorted by number."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))
    return sorted(filter(Path.is_dir, named), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a folder `step-<number>`."""
    return int(path.name.removeprefix("step-"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises ConfigError if one of its files is missing or altered."""
    try:
        state = json.loads((checkpoint / STATE).read_bytes())
        damaged = [name for name, sha in state["files"].items() if sha256_of(checkpoint / name) != sha]
        if state["step"] != step_of(checkpoint) or not isinstance(state["identity"], dict):
            damaged.append(STATE)
    except (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError) as error:
        raise ConfigError(f"checkpoint {checkpoint} is damaged: {reason(error)}") from error
    if damaged:
        names = ", ".join(damaged)
        raise ConfigError(f"checkpoint {checkpoint} is damaged: {names} does not match its sha256")
    return state


def adapter_in(checkpoint: Path, ema: bool) -> Path:
    """The folder of a checkpoint's adapter, or of its moving average. Raises ConfigError without one."""
    if not ema:
        return checkpoint
    if not (checkpoint / EMA).is_dir():
        raise ConfigError(
            f"export.ema is true, but checkpoint {checkpoint} has no moving average, as train.ema was null; "
            "set export.ema=false"
        )
    return checkpoint / EMA


def _step_name(step: int) -> str:
    return f"step-{step:06d}"
