"""Which validations are due, and what of them a run folder has."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from dbtrain.config import Config
from dbtrain.data.pictures import note_in
from dbtrain.data.shards import HELD_OUT, Manifest
from dbtrain.evaluate.scoring import Scoring
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import SHEET, RunFolder, read_lines, step_of
from dbtrain.train.metrics import keep_lines


def is_due(cfg: Config, manifest: Manifest, step: int) -> bool:
    """Whether to validate after `step` steps; this includes step 0 and the last step."""
    wanted = bool(cfg.validation.prompts or held_out_roles(manifest))
    return wanted and (step % cfg.validation.every == 0 or step == cfg.train.steps)


def missing(
    cfg: Config, manifest: Manifest, fingerprint: Mapping[str, Any], scoring: Scoring | None, step: int
) -> set[str]:
    """Which of "images" and "losses" (with scores) are due after `step` steps and not in the run folder."""
    if not is_due(cfg, manifest, step):
        return set()
    run, wanted = RunFolder(cfg.run_dir), set()
    if cfg.validation.prompts and note_in(run.validation_sheet(step)) != images_key(cfg, fingerprint):
        wanted.add("images")
    measured = [(line.get("step"), line.get("key")) for line in read_lines(run.table("validation"))]
    wants_line = bool(scoring or held_out_roles(manifest))
    if wants_line and (step, losses_key(cfg, fingerprint, scoring)) not in measured:
        wanted.add("losses")
    return wanted


def forget_after(cfg: Config, fingerprint: Mapping[str, Any], scoring: Scoring | None, step: int) -> None:
    """Delete the results of steps after `step`, which are repeated, and losses with other settings."""
    run, key = RunFolder(cfg.run_dir), losses_key(cfg, fingerprint, scoring)
    for path in run.validations():
        outdated = step == 0 and note_in(path / SHEET) != images_key(cfg, fingerprint)
        if step_of(path) > step or outdated:
            shutil.rmtree(path)
    keep_lines(run.table("validation"), lambda line: line["step"] <= step and line.get("key") == key)


def held_out_roles(manifest: Manifest) -> list[str]:
    return [role for role, held_out in HELD_OUT.items() if held_out in manifest.roles]


def images_key(cfg: Config, fingerprint: Mapping[str, Any]) -> str:
    """A hash of everything that a step's images depend on, except the step."""
    settings = cfg.sample.model_dump(mode="json", exclude={"prompts", "images", "batch", "precision"})
    about = [fingerprint, cfg.validation.prompts, cfg.validation.images, settings]
    return content_key([*about, *_averaged(cfg)])


def losses_key(cfg: Config, fingerprint: Mapping[str, Any], scoring: Scoring | None) -> str:
    """A hash of everything that a step's held-out losses and scores depend on, except the step."""
    scores = [scoring.key, images_key(cfg, fingerprint)] if scoring and scoring.prompts else []
    return content_key([fingerprint, cfg.validation.timesteps, *scores, *_averaged(cfg)])[:12]


def _averaged(cfg: Config) -> list[str]:
    return ["average"] if cfg.export.ema else []
