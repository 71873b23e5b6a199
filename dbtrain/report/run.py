"""Read a run folder, complete or not. Nothing in it is changed."""

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
from dbtrain.runtime.run_folder import SCORES, STATE, RunFolder, step_of
from dbtrain.train import segments

METRICS, SPEED, VALIDATION, TIMESTEPS = "metrics", "speed", "validation", "timesteps"
TABLES = {  # *.jsonl of a run folder, and what the page lacks without it
    METRICS: "no losses, gradient norms and learning rates",
    SPEED: "no speed and memory",
    VALIDATION: "no held-out losses (settings prepare.held_out and validation.every)",
    TIMESTEPS: "no training loss by timestep",
}
Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run folder. `tables`: the lines of each *.jsonl in order of steps; empty without the file."""

    folder: Path
    label: str
    cfg: Config
    tables: dict[str, list[Line]]
    scores: dict[str, float]
    score_labels: dict[str, str]  # by score; empty for files of older versions
    checkpoint_scores: list[Line]
    best: Line  # of a run that looks for its best step: step, why, stopped; else empty
    log: list[str]
    lacks: list[str]  # what is missing or damaged, in sentences

    @property
    def names(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def subject(self) -> str:
        """What the run trains, in the config's words."""
        prompts = [one.prepare.instance_prompt for one in self.cfg.each_subject() if one.prepare]
        return " and ".join(prompts) or self.folder.name

    @property
    def step(self) -> int:
        """The last step that was logged or saved."""
        saved = [step_of(path) for path in self.names.checkpoints()]
        return max([0, *(line["step"] for line in self.tables[METRICS]), *saved])

    def told(self, key: str, default: Any) -> str:
        """A setting that may change when a run is resumed, with its steps, from the newest checkpoint."""
        paths = self.names.checkpoints()
        state = _json(paths[-1] / STATE, dict, []) if paths else {}
        return segments.told(state.get("segments", ()), key, default)

    @property
    def state(self) -> str:
        """Whether the run is done, preempted or running, and at which step."""
        where = f"step {self.step} of {self.cfg.train.steps}"
        if self.names.done.is_file():
            exported = f"; exported step {self.best['step']}, {self.best.get('why')}" if self.best else ""
            return f"done, {where}{exported}"
        if self.names.preempted.is_file():
            why = _text(self.names.preempted).strip()
            return f"preempted at {where}" + (f": {why}" if why else "")
        if is_fresh(self.folder / lock.NAME):
            return f"running, at {where}"
        return f"not finished, at {where}" if self.step else "not trained yet"

    @property
    def times(self) -> str:
        """The times of the first and the last line of its log."""
        stamps = [line[:19] for line in self.log if line[:4].isdigit() and line[4:5] == "-"]
        return f"from {stamps[0]} to {stamps[-1]}" if stamps else "times unknown: no log.txt"

    @property
    def score_names(self) -> list[str]:
        """The scores that any of the checkpoints has."""
        names = dict.fromkeys(name for row in self.checkpoint_scores for name in row)
        return [name for name in names if name not in ("step", "suggested")]

    def values(self, table: str, key: str) -> tuple[list[int], list[float | None]]:
        """(steps, values) of one column; None where a value is not finite."""
        lines = [line for line in self.tables[table] if key in line]
        return [line["step"] for line in lines], [number(line[key]) for line in lines]


def read_all(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, with distinct labels. Raises ConfigError if one is not a run folder."""
    paths = list(dict.fromkeys(files.expand(folder).resolve() for folder in folders))
    return [read(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def read(folder: Path, label: str) -> Run:
    """The run in a folder; `lacks` names missing parts. Raises ConfigError if it is not a run folder."""
    names = RunFolder(folder)
    if not names.config.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml; use the config's run_dir")
    lacks: list[str] = []
    growing = is_fresh(folder / lock.NAME)
    tables = {name: _lines(names.table(name), lacks, growing) for name in TABLES}
    lacks += [f"{name}.jsonl is missing or empty: {TABLES[name]}" for name in TABLES if not tables[name]]
    scores = _json(names.scores / SCORES, dict, lacks)
    labels = scores.get("labels")
    rows = _json(names.scores / "checkpoints.json", list, lacks)
    best = _json(names.best, dict, lacks)
    return Run(
        folder, label, Config.load(names.config), tables,
        {str(name): value for name, given in scores.items() if (value := number(given)) is not None},
        {name: str(text) for name, text in labels.items()} if isinstance(labels, dict) else {},
        sorted((row for row in rows if _has_step(row)), key=lambda row: row["step"]),
        best if _has_step(best) else {},
        _text(names.log).splitlines(), lacks,
    )  # fmt: skip


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _lines(path: Path, lacks: list[str], growing: bool) -> list[Line]:
    """The lines of a *.jsonl in order of steps, the last of each step; `lacks` counts damaged ones.

    `growing`: a last line without an end is being written.
    """
    good: dict[int, Line] = {}
    damaged = 0
    content = _text(path)
    if growing:
        content = content[: content.rfind("\n") + 1]
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if _has_step(line):
            good[line["step"]] = line
        else:
            damaged += 1
    if damaged:
        lacks.append(
            f"{path.name} has {damaged} damaged {'line' if damaged == 1 else 'lines'}, left out here"
        )
    return [good[step] for step in sorted(good)]


def _has_step(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("step"), int)


def _json(path: Path, kind: type, lacks: list[str]) -> Any:
    """The content of a JSON file, of type `kind`; an empty one if the file is missing or damaged."""
    if not path.is_file():
        return kind()
    try:
        found = json.loads(_text(path))
        if not isinstance(found, kind):
            raise ValueError(f"it is not a {kind.__name__}")
    except ValueError as error:
        lacks.append(f"{path.name} cannot be read: {reason(error)}")
        return kind()
    return found


def _text(path: Path) -> str:
    """A file's text; empty without the file."""
    with files.naming(path):
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def is_fresh(path: Path) -> bool:
    """Whether the holder of a lock has refreshed it recently."""
    return path.is_file() and time.time() - path.stat().st_mtime < lock.DEAD_S


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest suffixes of these paths that are all different."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(paths):
            return labels
    raise AssertionError("paths are all different")
