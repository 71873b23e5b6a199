"""`train.stop: best`: which step is the best so far, and whether it is time to stop.

Both follow from validation.jsonl, which a resumed run has up to its step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import inf
from typing import Any

from dbtrain.config import Config
from dbtrain.evaluate.choice import Rows
from dbtrain.evaluate.scoring import Scoring
from dbtrain.runtime import files
from dbtrain.runtime.run_folder import RunFolder, read_lines
from dbtrain.train import due


def decide(cfg: Config, fingerprint: Mapping[str, Any], scoring: Scoring | None, step: int) -> bool:
    """Write best.json, and return whether to stop: nothing is better since `train.patience` validations.

    What was found after `step` does not count. Without `scoring`, or a validation after the first step,
    there is no best, and no file.
    """
    run = RunFolder(cfg.run_dir)
    rows = _rows(cfg, fingerprint, scoring, step)
    scored = [row for row in rows if row["step"] > 0]
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
    scored = [row for row in _rows(cfg, fingerprint, scoring) if row["step"] > 0]
    return scoring.rule.contenders(scored) if scoring and scored else set()


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
