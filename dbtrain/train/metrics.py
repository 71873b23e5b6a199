"""Record a run: metrics.jsonl, speed.jsonl, timesteps.jsonl, log.txt, TensorBoard, and W&B."""

from __future__ import annotations

import json
import logging
import math
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbtrain.config import Config
from dbtrain.prepare import duration
from dbtrain.runtime import console, dist, files, pace
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.run_folder import TABLES, RunFolder, read_lines
from dbtrain.train import trackers

TENTHS = 10  # bins of the timesteps for timesteps.jsonl


class Outcome(NamedTuple):
    """The result of a step, on the device."""

    losses: Tensor  # (2,) this rank's terms of the mean instance and class loss; their sum is the mean
    grad_norm: Tensor  # () of the gradient over all ranks, before clipping
    bad: Tensor  # (2,) fp64, first instance and class position with a loss that is not finite; else inf
    spread: Tensor  # (2, 2, TENTHS) this rank's (instance, class) x (rows, sum of losses) by timestep
    seen: int  # sum of the ids of this rank's rows
    lr: float = 0.0
    found: Tensor | None = None  # () the learning rate of which `lr` is a factor, if the optimizer finds it
    wait_s: float = 0.0  # time that this rank waited for data


class Metrics:
    """The losses and speed of a run. They stay on the device and are read at log steps only.

    metrics.jsonl has one line per step with reproducible values, so that two runs can be compared line by
    line. speed.jsonl has the values that vary.
    """

    def __init__(
        self, run: RunFolder, cfg: Config, start: int, roles: Sequence[str],
        source: Callable[[str, int], str], among_others: bool = False,
    ) -> None:  # fmt: skip
        """`among_others`: other runs take part in each step, whose time then says nothing about this one."""
        self.cfg, self.among_others = cfg, among_others
        self.train, self.faults, self.roles, self.source = cfg.train, cfg.faults, roles, source
        self.over: set[str] = set()  # interruptions since the last step
        self.breaks = {"validation": cfg.validation.every, "checkpoint": cfg.train.checkpoint_every}
        self.prior_weight = cfg.loss.prior_weight if "class" in roles else 0.0
        self.step_samples = cfg.train.global_batch * len(roles)
        self.pending: list[tuple[Tensor, int, float]] = []  # per step: losses and norm (3,), seen, lr
        self.first_bad = torch.full((3,), math.inf, dtype=torch.float64, device=dist.device())
        self.skipped = torch.zeros((), dtype=torch.int64, device=dist.device())
        self.spread = torch.zeros(2, 2, TENTHS, device=dist.device())
        self.done, self.wait_s = start, 0.0
        pace.forget("step", *self.breaks)  # of another run in this process
        self.since = self.lap = pace.clock()  # of the last report, and of the last step
        self.bar = console.bar(cfg.train.steps, "train", "step", initial=start)
        self.bar.ahead = self.ahead
        self.metrics, self.speed, self.validation, self.timesteps = map(run.table, TABLES)
        self.trackers: list[trackers.Tracker] = []
        if dist.is_main():
            for path in (self.metrics, self.speed, self.timesteps):
                keep_lines(path, lambda line: line["step"] <= start)
            self.file = console.ToFile(run.log)
            console.logger.addHandler(self.file)
            self.trackers = trackers.of(run, cfg, start)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: object) -> None:
        self.bar.close()
        if dist.is_main():
            console.logger.removeHandler(self.file)
        if not self.among_others:
            duration.remember(self.cfg, "train")
        for tracker in self.trackers:
            tracker.close()
        if dist.is_main() and isinstance(problem, (ConfigError, Preempted)):  # the terminal shows it later
            self.file.handle(logging.makeLogRecord({"msg": f"stopped: {problem}"}))

    def step(self, done: int, outcome: Outcome, skipped: Tensor) -> None:
        """Add the outcome of step `done`; `skipped`, (), counts skipped steps: `report` adds to it."""
        norm = outcome.grad_norm
        found = [] if outcome.found is None else [outcome.found.float()[None]]
        self.pending.append((torch.cat([outcome.losses, norm[None], *found]), outcome.seen, outcome.lr))
        bad_norm = torch.where(norm.isfinite(), math.inf, float(done)).double()
        self.first_bad = torch.minimum(self.first_bad, torch.cat([outcome.bad, bad_norm[None]]))
        self.spread += outcome.spread
        self.skipped = skipped
        self.done = done
        self.over.clear()
        self.wait_s += outcome.wait_s
        reports = done % self.train.log_every == 0 or done == self.train.steps
        if reports:
            self.report()  # waits for the device
        self.lap, before = pace.clock(), self.lap
        pace.add("step", self.lap - before)
        self.bar.update()

    def ahead(self) -> tuple[float, float] | None:
        """Seconds per step, without interruptions, and seconds of the interruptions that are still to come.

        None before the second step, as the first one warms up and compiles. An interruption takes as long as
        those so far: 0 if there were none.
        """
        if self.among_others or "step" not in pace.measured or not pace.measured["step"].units:
            return None
        return pace.measured["step"].each, sum(
            pace.times(every, self.done - (kind not in self.over), self.train.steps)
            * (pace.each(kind) or 0.0)
            for kind, every in self.breaks.items()
        )

    def report(self) -> None:
        """Write the steps since the last report, and show their means.

        Raises ConfigError on every rank if a loss was NaN or infinite, or if too many steps were skipped.
        """
        if self.pending:
            self._report()
        self._check_finite()

    def _check_finite(self) -> None:
        # Skipped steps are allowed up to a limit.
        if self.faults.nonfinite == "skip":
            if (count := self.skipped.item()) > self.faults.skips:
                raise ConfigError(
                    f"{count} of the first {self.done} steps were skipped because their loss or gradient was "
                    f"NaN or infinite, more than faults.skips ({self.faults.skips}); lower optim.lr",
                    shared=True,
                )
            return

        # Otherwise name the first step that went wrong, and the images that caused it.
        *positions, step = dist.min_over_ranks(self.first_bad).tolist()
        batch = self.train.global_batch
        step = min([step, *(at // batch + 1 for at in positions if math.isfinite(at))])
        if math.isfinite(step):
            images = "".join(
                f", {role} position {int(at)} ({self.source(role, int(at))})"
                for role, at in zip(self.roles, positions, strict=False)
                if at < step * batch  # later ones are a consequence
            )
            raise ConfigError(
                f"the loss or gradient was NaN or infinite at step {int(step)}{images}; the last "
                "good checkpoint is kept; lower optim.lr, or use train.precision: bf16 or fp32, or "
                "faults.nonfinite: skip",
                shared=True,
            )

    def _report(self) -> None:
        # Sum over ranks with one collective.
        found, seen, rates = zip(*self.pending, strict=True)
        table = torch.stack(found)  # (steps, 3 or 4)
        sums = dist.sum_over_ranks(torch.cat([table[:, :2].flatten(), self.spread.flatten()]))
        table[:, :2] = sums[: 2 * len(table)].view(-1, 2)
        self.skipped += (~table[:, :3].isfinite()).any(1).sum()
        spread = sums[2 * len(table) :].view_as(self.spread).tolist()
        rows = dist.sum_over_ranks(torch.tensor(seen)).tolist()

        # One line per step, the speed, and the means of all steps with a finite loss.
        seconds, steps = pace.clock() - self.since, len(seen)
        lines = []
        for number, (values, row, lr) in enumerate(zip(table.tolist(), rows, rates, strict=True)):
            instance, prior, norm, *found = values
            lines.append({
                "step": self.done - steps + 1 + number, "loss": instance + self.prior_weight * prior,
                "loss_instance": instance, **({"loss_prior": prior} if self.prior_weight else {}),
                "grad_norm": norm, "lr": math.prod([lr, *found]), "rows": f"{row:012x}",
            })  # fmt: skip
        speed = {
            "samples_per_s": steps * self.step_samples / seconds, "step_ms": 1000 * seconds / steps,
            "wait_share": self.wait_s / seconds, "peak_gib": _peak_gib(),
        }  # fmt: skip
        finite = [line for line in lines if math.isfinite(line["loss"])] or lines
        means = [key for key in lines[0] if key not in ("step", "rows")]
        mean = {key: sum(line[key] for line in finite) / len(finite) for key in means}

        # To the files and trackers, and to the terminal.
        if dist.is_main():
            files.append(self.metrics, "".join(json.dumps(_finite(line)) + "\n" for line in lines))
            files.append(self.speed, json.dumps({"step": self.done, **speed}) + "\n")
            files.append(self.timesteps, json.dumps({"step": self.done, **_by_role(spread)}) + "\n")
            for tracker in self.trackers:
                tracker.write(self.done, mean | speed)
        parts = f"instance {mean['loss_instance']:.4f}"
        parts += f", prior {mean['loss_prior']:.4f}" if self.prior_weight else ""
        skipped = f"  {int(self.skipped)} skipped" if self.faults.nonfinite == "skip" else ""
        left = ""
        if ahead := self.ahead():
            left = f"  {pace.left((self.train.steps - self.done) * ahead[0] + ahead[1])}"
        console.say(
            f"step {self.done}/{self.train.steps}  loss {mean['loss']:.4f} ({parts})  "
            f"grad {mean['grad_norm']:.3g}  lr {lines[-1]['lr']:.3g}  "
            f"{speed['samples_per_s']:.3g} samples/s  {speed['step_ms']:.0f} ms  "
            f"wait {speed['wait_share']:.1%}  {speed['peak_gib']:.2f} GiB{skipped}{left}"
        )
        self.pending, self.wait_s = [], 0.0
        self.spread.zero_()
        self.since = pace.clock()

    def validated(self, step: int, found: dict[str, Any], sheet: Path | None) -> None:
        """Record and show the validation results at `step`; `sheet` is the contact sheet, if any."""
        values = {key: value for key, value in found.items() if isinstance(value, float)}
        if values:
            text = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in values.items())
            console.say(f"step {step}/{self.train.steps}  {text}")
        if dist.is_main():
            if found:
                line = _finite({"step": step, **found})
                files.append(self.validation, json.dumps(line, allow_nan=False) + "\n")
            for tracker in self.trackers:
                if values:
                    tracker.write(step, values)
                if sheet:
                    tracker.show(step, "validation", sheet)

    @contextmanager
    def interrupted(self, kind: str) -> Iterator[None]:
        """Exclude the block, a validation or a checkpoint, from the time of the steps.

        Waits until the GPU has finished the steps before it.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        before = pace.clock()
        try:
            yield
            pace.add(kind, pace.clock() - before)
            self.over.add(kind)
        finally:
            seconds = pace.clock() - before
            self.since, self.lap = self.since + seconds, self.lap + seconds


def _by_role(spread: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Rows and sums of losses in each timestep bin, for the roles that have rows."""
    return {
        role: {"rows": [int(count) for count in counts], "loss": _finite(losses)}
        for role, (counts, losses) in zip(("instance", "prior"), spread, strict=True)
        if any(counts)
    }


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a *.jsonl with the lines that `wanted` accepts. Damaged lines are dropped."""
    if path.is_file():
        lines = [line for line in read_lines(path) if isinstance(line.get("step"), int) and wanted(line)]
        files.write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def _peak_gib() -> float:
    """Peak memory of this process: on its GPU, or resident if it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
