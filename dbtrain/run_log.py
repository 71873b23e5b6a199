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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dbtrain import dist, files, log
from dbtrain.config import Config
from dbtrain.errors import ConfigError, Preempted
from dbtrain.keys import content_key


class Outcome(NamedTuple):
    """What a step gave, on the device."""

    losses: Tensor  # (2,) this rank's shares of the mean instance and class loss: they sum to the means
    grad_norm: Tensor  # () of the gradient before clipping, over all ranks
    bad: Tensor  # (2,) fp64, this rank's first instance and class position of no finite loss; or inf
    seen: int  # sum of the numbers of this rank's rows


class Tracker(Protocol):
    """Where metrics go, besides metrics.jsonl."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with files.naming(folder):
            self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with files.naming(self.folder):
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        with files.naming(self.folder):
            self.writer.close()


class _WandB:
    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("train.wandb needs W&B: pip install 'dbtrain[wandb]'") from error
        self.run = wandb.init(
            project=project, name=folder.name, id=content_key(str(folder.resolve()))[:16], resume="allow",
            dir=str(folder), config=config,
        )  # fmt: skip

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


def _trackers(folder: Path, cfg: Config, start: int) -> list[Tracker]:
    trackers: list[Tracker] = []
    try:
        trackers.append(_TensorBoard(folder / "tb", start))
    except ImportError:
        log.say("no TensorBoard log: pip install 'dbtrain[tensorboard]' for one")
    if cfg.train.wandb:
        trackers.append(_WandB(folder, cfg.train.wandb, cfg.model_dump(mode="json")))
    return trackers


class RunLog:
    """Losses and meters of one run. They stay on the device, and are read at log steps only.

    metrics.jsonl gets a line a step with what is the same in every run of a config, so that two runs
    can be compared line by line; speed.jsonl gets what is not.
    """

    def __init__(
        self, folder: Path, cfg: Config, start: int, roles: Sequence[str], source: Callable[[str, int], str]
    ) -> None:
        self.train, self.faults, self.roles, self.source = cfg.train, cfg.faults, roles, source
        self.prior_weight = cfg.loss.prior_weight if "class" in roles else 0.0
        self.step_samples = cfg.train.global_batch * len(roles)
        self.pending: list[tuple[Tensor, int, float]] = []  # (losses and norm (3,), rows seen, lr) a step
        self.first_bad = torch.full((3,), math.inf, dtype=torch.float64, device=dist.device())
        self.skipped = torch.zeros((), dtype=torch.int64, device=dist.device())
        self.done, self.wait_s = start, 0.0
        self.since = time.perf_counter()
        self.bar = log.bar(cfg.train.steps, "train", "step", initial=start)
        self.metrics, self.speed = folder / "metrics.jsonl", folder / "speed.jsonl"
        self.trackers: list[Tracker] = []
        if dist.is_main():
            for path in (self.metrics, self.speed):
                _forget_after(path, start)
            self.file = log.ToFile(folder / "log.txt")
            log.logger.addHandler(self.file)
            self.trackers = _trackers(folder, cfg, start)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: object) -> None:
        if isinstance(problem, (ConfigError, Preempted)):
            self._note(f"stopped: {problem}")
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
        if dist.is_main():
            log.logger.removeHandler(self.file)

    def step(self, done: int, outcome: Outcome, skipped: Tensor, lr: float, wait_s: float) -> None:
        """Count step number `done` of this rank; `skipped` steps were left out so far, ()."""
        norm = outcome.grad_norm
        if self.train.precision == "fp16":  # an infinite gradient is the scaler's business: no step
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
        self.pending.append((torch.cat([outcome.losses, norm[None]]), outcome.seen, lr))
        bad_norm = torch.where(norm.isfinite(), math.inf, float(done)).double()
        self.first_bad = torch.minimum(self.first_bad, torch.cat([outcome.bad, bad_norm[None]]))
        self.skipped = skipped
        self.done = done
        self.wait_s += wait_s
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
        table[:, :2] = dist.sum_over_ranks(table[:, :2].contiguous())
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
            for tracker in self.trackers:
                tracker.write(self.done, mean | speed)
        parts = f"instance {mean['loss_instance']:.4f}"
        parts += f", prior {mean['loss_prior']:.4f}" if self.prior_weight else ""
        left_out = f"  {int(self.skipped)} left out" if self.faults.nonfinite == "skip" else ""
        log.say(
            f"step {self.done}/{self.train.steps}  loss {mean['loss']:.4f} ({parts})  "
            f"grad {mean['grad_norm']:.3g}  lr {rates[-1]:.3g}  {speed['samples_per_s']:.3g} samples/s  "
            f"{speed['step_ms']:.0f} ms  wait {speed['wait_share']:.1%}  {speed['peak_gib']:.2f} GiB"
            f"{left_out}"
        )
        self.pending, self.wait_s = [], 0.0
        self.since = time.perf_counter()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Keep the block out of the throughput."""
        before = time.perf_counter()
        yield
        self.since += time.perf_counter() - before

    def _note(self, text: str) -> None:
        """Put a line into log.txt only: the terminal is told by the door."""
        if dist.is_main():
            self.file.handle(logging.makeLogRecord({"msg": text}))


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """The line with null for NaN and infinities, which JSON has not."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


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
