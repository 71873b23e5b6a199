"""What a run leaves of itself: metrics.jsonl, speed.jsonl, log.txt, TensorBoard, W&B."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbtrain.config import Config
from dbtrain.runtime import console, dist, files
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.run_folder import TABLES, RunFolder
from dbtrain.train import trackers

TENTHS = 10  # parts of the range of timesteps whose losses are told apart


class Outcome(NamedTuple):
    """What a step gave, on the device."""

    losses: Tensor  # (2,) this rank's shares of the mean instance and class loss: they sum to the means
    grad_norm: Tensor  # () of the gradient before clipping, over all ranks
    bad: Tensor  # (2,) fp64, this rank's first instance and class position of no finite loss; or inf
    spread: Tensor  # (2, 2, TENTHS) this rank's instance and class rows by timestep: count, sum of losses
    seen: int  # sum of the numbers of this rank's rows
    lr: float = 0.0
    wait_s: float = 0.0  # that this rank waited for data


class Metrics:
    """Losses and meters of one run. They stay on the device, and are read at log steps only.

    metrics.jsonl gets a line a step with what is the same in every run of a config, so that two runs
    can be compared line by line; speed.jsonl gets what is not.
    """

    def __init__(
        self, run: RunFolder, cfg: Config, start: int, roles: Sequence[str], source: Callable[[str, int], str]
    ) -> None:
        self.train, self.faults, self.roles, self.source = cfg.train, cfg.faults, roles, source
        self.prior_weight = cfg.loss.prior_weight if "class" in roles else 0.0
        self.step_samples = cfg.train.global_batch * len(roles)
        self.pending: list[tuple[Tensor, int, float]] = []  # (losses and norm (3,), rows seen, lr) a step
        self.first_bad = torch.full((3,), math.inf, dtype=torch.float64, device=dist.device())
        self.skipped = torch.zeros((), dtype=torch.int64, device=dist.device())
        self.spread = torch.zeros(2, 2, TENTHS, device=dist.device())
        self.done, self.wait_s = start, 0.0
        self.since = time.perf_counter()
        self.bar = console.bar(cfg.train.steps, "train", "step", initial=start)
        self.metrics, self.speed, self.validation, self.timesteps = map(run.table, TABLES)
        self.trackers: list[trackers.Tracker] = []
        if dist.is_main():
            for path in (self.metrics, self.speed, self.timesteps):
                _forget_after(path, start)
            self.file = console.ToFile(run.log)
            console.logger.addHandler(self.file)
            self.trackers = trackers.of(run, cfg, start)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: object) -> None:
        if isinstance(problem, (ConfigError, Preempted)):
            self._note(f"stopped: {problem}")
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
        if dist.is_main():
            console.logger.removeHandler(self.file)

    def step(self, done: int, outcome: Outcome, skipped: Tensor) -> None:
        """Count step number `done` of this rank; `skipped` steps were left out so far, ()."""
        norm = outcome.grad_norm
        if self.train.precision == "fp16":  # an infinite gradient is the scaler's business: no step
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
        self.pending.append((torch.cat([outcome.losses, norm[None]]), outcome.seen, outcome.lr))
        bad_norm = torch.where(norm.isfinite(), math.inf, float(done)).double()
        self.first_bad = torch.minimum(self.first_bad, torch.cat([outcome.bad, bad_norm[None]]))
        self.spread += outcome.spread
        self.skipped = skipped
        self.done = done
        self.wait_s += outcome.wait_s
        self.bar.update()
        if done % self.train.log_every == 0 or done == self.train.steps:
            self.report()

    def report(self) -> None:
        """Write down the steps since the last report, and show their means.

        Raises ConfigError on every rank if a loss was NaN or infinite, or too many steps were left out.
        """
        if self.pending:
            self._report()
        self._check_finite()

    def _check_finite(self) -> None:
        if self.faults.nonfinite == "skip":
            if (count := self.skipped.item()) > self.faults.skips:
                raise ConfigError(
                    f"{count} steps by step {self.done} were left out, as their loss or gradient was NaN or "
                    f"infinite: more than faults.skips ({self.faults.skips}); lower optim.lr",
                    shared=True,
                )
            return
        *positions, step = dist.min_over_ranks(self.first_bad).tolist()
        batch = self.train.global_batch
        step = min([step, *(at // batch + 1 for at in positions if math.isfinite(at))])
        if math.isfinite(step):
            named = "".join(
                f", {role} position {int(at)} ({self.source(role, int(at))})"
                for role, at in zip(self.roles, positions, strict=False)
                if at < step * batch  # what comes later is an effect of it
            )
            raise ConfigError(
                f"the loss or gradient was NaN or infinite at step {int(step)}{named}; the last "
                "good checkpoint is kept; lower optim.lr, or use train.precision: bf16 or fp32, or "
                "faults.nonfinite: skip",
                shared=True,
            )

    def _report(self) -> None:
        found, seen, rates = zip(*self.pending, strict=True)
        table = torch.stack(found)  # (steps, 3)
        sums = dist.sum_over_ranks(torch.cat([table[:, :2].flatten(), self.spread.flatten()]))
        table[:, :2] = sums[: 2 * len(table)].view(-1, 2)
        spread = sums[2 * len(table) :].view_as(self.spread).tolist()
        rows = dist.sum_over_ranks(torch.tensor(seen)).tolist()
        seconds, steps = time.perf_counter() - self.since, len(seen)
        lines = []
        for number, (values, row, lr) in enumerate(zip(table.tolist(), rows, rates, strict=True)):
            instance, prior, norm = values
            lines.append({
                "step": self.done - steps + 1 + number, "loss": instance + self.prior_weight * prior,
                "loss_instance": instance, **({"loss_prior": prior} if self.prior_weight else {}),
                "grad_norm": norm, "lr": lr, "rows": f"{row:012x}",
            })  # fmt: skip
        speed = {
            "samples_per_s": steps * self.step_samples / seconds, "step_ms": 1000 * seconds / steps,
            "wait_share": self.wait_s / seconds, "peak_gib": _peak_gib(),
        }  # fmt: skip
        counted = [line for line in lines if math.isfinite(line["loss"])] or lines
        means = [key for key in lines[0] if key not in ("step", "rows")]
        mean = {key: sum(line[key] for line in counted) / len(counted) for key in means}
        if dist.is_main():
            files.append(self.metrics, "".join(json.dumps(_finite(line)) + "\n" for line in lines))
            files.append(self.speed, json.dumps({"step": self.done, **speed}) + "\n")
            files.append(self.timesteps, json.dumps({"step": self.done, **_by_role(spread)}) + "\n")
            for tracker in self.trackers:
                tracker.write(self.done, mean | speed)
        parts = f"instance {mean['loss_instance']:.4f}"
        parts += f", prior {mean['loss_prior']:.4f}" if self.prior_weight else ""
        left_out = f"  {int(self.skipped)} left out" if self.faults.nonfinite == "skip" else ""
        console.say(
            f"step {self.done}/{self.train.steps}  loss {mean['loss']:.4f} ({parts})  "
            f"grad {mean['grad_norm']:.3g}  lr {rates[-1]:.3g}  {speed['samples_per_s']:.3g} samples/s  "
            f"{speed['step_ms']:.0f} ms  wait {speed['wait_share']:.1%}  {speed['peak_gib']:.2f} GiB"
            f"{left_out}"
        )
        self.pending, self.wait_s = [], 0.0
        self.spread.zero_()
        self.since = time.perf_counter()

    def validated(self, step: int, found: dict[str, Any], sheet: Path | None) -> None:
        """Write down what was measured of the run at `step`, and show it; `sheet`: pictures of it."""
        values = {key: value for key, value in found.items() if isinstance(value, float)}
        if values:
            words = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in values.items())
            console.say(f"step {step}/{self.train.steps}  {words}")
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
    def untimed(self) -> Iterator[None]:
        """Keep the block out of the throughput; not what the GPU has still to do of the steps before it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        before = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - before

    def _note(self, text: str) -> None:
        """Put a line into log.txt only: the terminal is told by the door."""
        if dist.is_main():
            self.file.handle(logging.makeLogRecord({"msg": text}))


def _by_role(spread: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Rows and sums of losses in each tenth of the timesteps, of the roles that have rows."""
    return {
        role: {"rows": [int(count) for count in counts], "loss": _finite(losses)}
        for role, (counts, losses) in zip(("instance", "prior"), spread, strict=True)
        if any(counts)
    }  # fmt: skip


def _finite(value: Any) -> Any:
    """A line with null for NaN and infinities, which JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _forget_after(path: Path, start: int) -> None:
    """Drop lines of steps that a resumed run takes again, and any that a crash spoilt."""

    def stays(line: str) -> bool:
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= start
        except (ValueError, LookupError, TypeError):
            return False

    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        files.write_atomically(path, "".join(filter(stays, text.splitlines(keepends=True))))


def _peak_gib() -> float:
    """Most memory this process held: on its GPU, or resident where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
