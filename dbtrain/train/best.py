"""`train.stop: best`: which step is the best so far, and whether it is time to stop.

Both follow from validation.jsonl, which a resumed run has up to its step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from math import inf
from typing import Any

from dbtrain.config import Config
from dbtrain.evaluate.choice import Rows
from dbtrain.evaluate.scoring import Scoring
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder, read_lines, step_of
from dbtrain.train import due


def decide(cfg: Config, fingerprint: Mapping[str, Any], scoring: Scoring | None, step: int) -> bool:
    """Write best.json, and return whether to stop: nothing is better since `train.patience` validations.

    What was found after `step` does not count. Without `scoring`, or a step to choose, there is no best, and
    no file.
    """
    run = RunFolder(cfg.run_dir)
    rows = _rows(cfg, fingerprint, scoring, step)
    scored = _choosable(cfg, scoring, rows)
    if not scoring or not scored:
        run.best.unlink(missing_ok=True)
        return False
    best, why = scoring.rule.choose(scored)
    stop = scoring.rule.stale(scored, scoring.rule.value(rows[0])) >= cfg.train.patience
    if stop:
        why += f"; stopped at step {scored[-1]['step']}"
    found = {"step": best["step"], "why": why, "stopped": stop}
    files.write_atomically(run.best, json.dumps(found) + "\n")
    return stop


def contenders(cfg: Config, fingerprint: Mapping[str, Any], scoring: Scoring | None) -> set[int]:
    """The steps whose checkpoints have to be kept, because one of them can still turn out the best."""
    scored = _choosable(cfg, scoring, _rows(cfg, fingerprint, scoring))
    return scoring.rule.contenders(scored) if scoring and scored else set()


def _choosable(cfg: Config, scoring: Scoring | None, rows: Rows) -> Rows:
    """The rows after step 0, without those that could be the best but have no checkpoint.

    A run that began with `train.stop: steps` did not save all of them, or deleted some. What was chosen stays
    so, also if its checkpoint has been deleted since.
    """
    run = RunFolder(cfg.run_dir)
    kept = set(map(step_of, run.checkpoints()))
    with suppress(ConfigError):  # damaged: it is written again
        kept |= {best["step"] for best in [run.read_best()] if best}
    rows = [row for row in rows if row["step"] > 0]
    while scoring and rows and (gone := scoring.rule.contenders(rows) - kept):
        rows = [row for row in rows if row["step"] not in gone]
    return rows


def _rows(cfg: Config, fingerprint: Mapping[str, Any], scoring: Scoring | None, until: float = inf) -> Rows:
    """The validations up to a step that were scored in this way, in order."""
    if not scoring:
        return []
    key = due.losses_key(cfg, fingerprint, scoring)
    names = [name for name in (scoring.rule.subject, scoring.rule.prompt) if name]
    lines = read_lines(RunFolder(cfg.run_dir).table("validation"))
    found = {
        line["step"]: line
        for line in lines
        if line.get("key") == key and line["step"] <= until
        and all(isinstance(line.get(name), float) for name in names)
    }  # fmt: skip
    return [found[step] for step in sorted(found)]
