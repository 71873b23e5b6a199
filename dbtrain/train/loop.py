"""The training loop. Its result does not depend on the number of ranks or on interruptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dbtrain.config import Config
from dbtrain.runtime import console, dist, lock
from dbtrain.runtime.errors import Preempted
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import RunFolder, step_of
from dbtrain.train.inputs import Inputs
from dbtrain.train.setup import setup
from dbtrain.train.step import train_step


def train(cfg: Config, until: int | None = None, on_step: Callable[[int], None] | None = None) -> Path:
    """Train an adapter for at most `cfg.train.steps` optimizer steps; return the run folder.

    Resumes from the newest checkpoint; does nothing if the run is complete. `until` is a step to stop at,
    as if preempted; a run that is there already stops at once. `on_step(step)` is called on every rank
    after each step.

    Raises ConfigError for anything a user can fix. Raises Preempted, after saving a checkpoint, if it stops
    early. Both are raised on every rank at the same step.
    """
    dist.init()
    dist.assert_same(content_key(cfg.model_dump(mode="json")), "the config")
    run = RunFolder(cfg.run_dir)
    with lock.held(run.path, "run_dir"):
        inputs = Inputs.find(cfg)
        if end := inputs.trained_to(cfg):
            console.say(f"{cfg.run_dir} is already trained to step {end}: nothing to do")
            return run.path
        if until is not None:
            saved_to = dist.from_main(max(map(step_of, run.checkpoints()), default=0))
            if saved_to >= until:
                raise Preempted(f"as requested: --until is {until}, and the run is at step {saved_to}")

        job = setup(cfg, inputs)  # model, optimizer, data, metrics, validation
        with job.open(until) as (ddp, stop):
            for step in job.steps():
                done = step + 1
                # One optimizer step on this rank's micro-batches.
                dist.at(done)
                outcome = train_step(ddp, job.progress, job.stream, step, cfg, job.compute)
                job.metrics.step(done, outcome, job.progress.skipped)
                if on_step:
                    on_step(done)
                # Save on schedule, at the end, and before stopping.
                stopping = stop.reason(done)
                if saved := bool(stopping) or job.is_save_step(done):
                    job.save(done)
                if stopping and done < cfg.train.steps:
                    raise Preempted(f"{stopping} at step {done} (checkpoint saved)")
                # Validate with the same prompts, seeds and noise every time.
                job.validate(done, saved)
    return run.path
