"""What a run folder tells of its run: read as it is, whole or not, and never changed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.config import Config
from dbtrain.runtime import files, lock
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.run_folder import SCORES, RunFolder, step_of

METRICS, SPEED, VALIDATION, TIMESTEPS = "metrics", "speed", "validation", "timesteps"
TABLES = {  # *.jsonl of a run folder, and what a page lacks without it
    METRICS: "no losses, gradient norms and learning rates",
    SPEED: "no speed and memory",
    VALIDATION: "no held-out losses (settings prepare.held_out and validation.every)",
    TIMESTEPS: "no training loss by timestep",
}
Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run folder. `tables`: lines of each *.jsonl, by step; empty where there is none."""

    folder: Path
    label: str
    cfg: Config
    tables: dict[str, list[Line]]
    scores: dict[str, float]
    score_labels: dict[str, str]  # what a score says; none in files of older versions
    checkpoint_scores: list[Line]
    log: list[str]
    lacks: list[str]  # sentences about what is missing or damaged

    @property
    def names(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def subject(self) -> str:
        """What the run was to learn, in the config's words."""
        return self.cfg.prepare.instance_prompt if self.cfg.prepare else self.folder.name

    @property
    def step(self) -> int:
        """The last step that was logged or saved."""
        saved = [step_of(path) for path in self.names.checkpoints()]
        return max([0, *(line["step"] for line in self.tables[METRICS]), *saved])

    @property
    def state(self) -> str:
        """Where the run stands, in words."""
        where = f"step {self.step} of {self.cfg.train.steps}"
        if self.names.done.is_file():
            return f"done, {where}"
        if self.names.preempted.is_file():
            said = _text(self.names.preempted).strip()
            return f"preempted at {where}" + (f": {said}" if said else "")
        if _is_fresh(self.folder / lock.NAME):
            return f"running, at {where}"
        return f"not finished, at {where}" if self.step else "not trained yet"

    @property
    def times(self) -> str:
        """When it was first and last heard of, by its log."""
        stamps = [line[:19] for line in self.log if line[:4].isdigit() and line[4:5] == "-"]
        return f"from {stamps[0]} to {stamps[-1]}" if stamps else "there is no log.txt that says when"

    @property
    def score_names(self) -> list[str]:
        """The scores that any of its checkpoints has."""
        names = dict.fromkeys(name for row in self.checkpoint_scores for name in row)
        return [name for name in names if name not in ("step", "suggested")]

    def values(self, table: str, key: str) -> tuple[list[int], list[float | None]]:
        """(steps, values) of one column; None where a value was NaN or infinite."""
        lines = [line for line in self.tables[table] if key in line]
        return [line["step"] for line in lines], [number(line[key]) for line in lines]


def read_all(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each under a name of its own. Raises ConfigError if one is no run folder."""
    paths = list(dict.fromkeys(files.expand(folder).resolve() for folder in folders))
    return [read(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def read(folder: Path, label: str) -> Run:
    """The run in a folder. Raises ConfigError if it is none; parts that are missing are named in `lacks`."""
    names = RunFolder(folder)
    if not names.config.is_file():
        raise ConfigError(
            f"{folder} is no run folder: it has no config.yaml; give the folder that run_dir names"
        )
    lacks: list[str] = []
    tables = {name: _lines(names.table(name), lacks) for name in TABLES}
    lacks += [f"{name}.jsonl is missing or empty: {TABLES[name]}" for name in TABLES if not tables[name]]
    found = _json(names.scores / SCORES, dict, lacks)
    labels = found.get("labels")
    rows = _json(names.scores / "checkpoints.json", list, lacks)
    return Run(
        folder, label, Config.load(names.config), tables,
        {str(name): value for name, given in found.items() if (value := number(given)) is not None},
        {name: str(text) for name, text in labels.items()} if isinstance(labels, dict) else {},
        sorted((row for row in rows if _has_step(row)), key=lambda row: row["step"]),
        _text(names.log).splitlines(), lacks,
    )  # fmt: skip


def number(value: Any) -> float | None:
    """A finite number as it is; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _lines(path: Path, lacks: list[str]) -> list[Line]:
    """The lines of a *.jsonl by step, the last of each; those that a crash spoilt are counted in `lacks`."""
    good: dict[int, Line] = {}
    spoilt = 0
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if _has_step(line):
            good[line["step"]] = line
        else:
            spoilt += 1
    if spoilt:
        lacks.append(f"{path.name} has {spoilt} damaged {'line' if spoilt == 1 else 'lines'}, left out here")
    return [good[step] for step in sorted(good)]


def _has_step(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("step"), int)


def _json(path: Path, kind: type, lacks: list[str]) -> Any:
    """The content of a JSON file of this kind; an empty one if it is not there, or damaged."""
    if not path.is_file():
        return kind()
    try:
        found = json.loads(_text(path))
        if not isinstance(found, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    except ValueError as error:
        lacks.append(f"{path.name} cannot be read: {reason(error)}")
        return kind()
    return found


def _text(path: Path) -> str:
    """A file's text; empty if there is none."""
    with files.naming(path):
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _is_fresh(path: Path) -> bool:
    """Whether a lock gave a sign of life lately."""
    return path.is_file() and time.time() - path.stat().st_mtime < lock.DEAD_S


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths that tell them apart."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(paths):
            return labels
    raise AssertionError("paths are all different")
