"""What a run says: text and a progress bar on rank 0, metrics.jsonl, TensorBoard, W&B."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dbtrain import dist, files
from dbtrain.config import Config
from dbtrain.errors import ConfigError
from dbtrain.keys import content_key

for _library in ("TRANSFORMERS", "DIFFUSERS"):  # which remark on what they miss when imported
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")

_logger = logging.getLogger("dbtrain")
say = _logger.info


class _ToFile(logging.Handler):
    """Lines of log.txt. What goes wrong is raised, not printed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        files.append(self.path, self.format(record) + "\n")


class _BelowBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start() -> None:
    """Show `say` lines on rank 0's terminal. Once a process."""
    if _logger.handlers:
        return
    _logger.addHandler(_BelowBar() if dist.is_main() else logging.NullHandler())
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


class _Lines:
    """A file for bars where no terminal redraws them: a line each time, instead of returns."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(total: int, what: str, unit: str, initial: int = 0, share: bool = False) -> tqdm:
    """A progress bar on rank 0; in a batch log, a line every half minute.

    `share` says that `total` is this rank's part of work that is split over ranks.
    """
    if share and dist.world() > 1:
        what = f"{what} (rank 0 of {dist.world()})"
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit=unit, initial=initial, dynamic_ncols=terminal,
        file=sys.stderr if terminal else _Lines(), mininterval=0.1 if terminal else 30.0,
        disable=not dist.is_main(),
    )  # fmt: skip


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
        say("no TensorBoard log: pip install 'dbtrain[tensorboard]' for one")
    if cfg.train.wandb:
        trackers.append(_WandB(folder, cfg.train.wandb, cfg.model_dump(mode="json")))
    return trackers


class RunLog:
    """Losses and meters of one run. Sums stay on the device; they are read at log steps only."""

    def __init__(self, folder: Path, cfg: Config, start: int, class_rows: bool) -> None:
        self.train = cfg.train
        self.prior_weight = cfg.loss.prior_weight if class_rows else 0.0
        self.step_samples = cfg.train.global_batch * (2 if class_rows else 1)
        self.sums = torch.zeros(3, device=dist.device())  # instance loss, prior loss, gradient norm
        self.first_bad = torch.full((1,), math.inf, device=dist.device())
        self.steps, self.wait_s = 0, 0.0
        self.since = time.perf_counter()
        self.bar = bar(cfg.train.steps, "train", "step", initial=start)
        self.metrics = folder / "metrics.jsonl"
        self.trackers: list[Tracker] = []
        if dist.is_main():
            self._forget_after(start)
            self.file = _ToFile(folder / "log.txt")
            _logger.addHandler(self.file)
            self.trackers = _trackers(folder, cfg, start)

    def step(self, done: int, losses: Tensor, grad_norm: Tensor, lr: float, wait_s: float) -> None:
        """Count one step: this rank's (instance, prior) loss shares, (2,), and the norm, ()."""
        if self.train.precision == "fp16":  # an infinite gradient is the scaler's business: no step
            grad_norm = grad_norm.nan_to_num(0.0, 0.0, 0.0)
        values = torch.cat([losses, grad_norm[None]])
        self.sums += values
        bad = torch.where(values.isfinite().all(), math.inf, float(done))
        self.first_bad = torch.minimum(self.first_bad, bad)
        self.steps += 1
        self.wait_s += wait_s
        self.bar.update()
        if done % self.train.log_every == 0 or done == self.train.steps:
            self._report(done, lr)

    def check_finite(self) -> None:
        """Raise ConfigError on every rank if any loss so far was NaN or infinite."""
        bad = dist.min_over_ranks(self.first_bad).item()
        if math.isfinite(bad):
            raise ConfigError(
                f"the loss or gradient was NaN or infinite at step {int(bad)}; the last good "
                "checkpoint is kept; lower optim.lr, or use train.precision: bf16 or fp32",
                shared=True,
            )

    def _report(self, done: int, lr: float) -> None:
        instance, prior = (dist.sum_over_ranks(self.sums[:2]) / self.steps).tolist()
        self.check_finite()
        seconds = time.perf_counter() - self.since
        metrics = {
            "loss": instance + self.prior_weight * prior,
            "loss_instance": instance,
            **({"loss_prior": prior} if self.prior_weight else {}),
            "grad_norm": self.sums[2].item() / self.steps,
            "lr": lr,
            "samples_per_s": self.steps * self.step_samples / seconds,
            "step_ms": 1000 * seconds / self.steps,
            "wait_share": self.wait_s / seconds,
            "peak_gib": _peak_gib(),
        }
        if dist.is_main():
            files.append(self.metrics, json.dumps({"step": done, **metrics}) + "\n")
            for tracker in self.trackers:
                tracker.write(done, metrics)
        parts = f"instance {instance:.4f}" + (f", prior {prior:.4f}" if self.prior_weight else "")
        say(
            f"step {done}/{self.train.steps}  loss {metrics['loss']:.4f} ({parts})  "
            f"grad {metrics['grad_norm']:.3g}  lr {lr:.3g}  {metrics['samples_per_s']:.3g} samples/s  "
            f"{metrics['step_ms']:.0f} ms  wait {metrics['wait_share']:.1%}  {metrics['peak_gib']:.2f} GiB"
        )
        self.sums.zero_()
        self.steps, self.wait_s = 0, 0.0
        self.since = time.perf_counter()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Keep the block out of the throughput."""
        before = time.perf_counter()
        yield
        self.since += time.perf_counter() - before

    def note(self, text: str) -> None:
        """Put a line into log.txt only: the terminal is told by the door."""
        if dist.is_main():
            self.file.handle(logging.makeLogRecord({"msg": text}))

    def close(self) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
        if dist.is_main():
            _logger.removeHandler(self.file)

    def _forget_after(self, start: int) -> None:
        """Drop lines of steps that a resumed run takes again, and any that a crash spoilt."""

        def stays(line: str) -> bool:
            try:
                return line.endswith("\n") and json.loads(line)["step"] <= start
            except (ValueError, LookupError, TypeError):
                return False

        if self.metrics.exists():
            text = self.metrics.read_text(encoding="utf-8", errors="replace")
            files.write_atomically(self.metrics, "".join(filter(stays, text.splitlines(keepends=True))))


def _peak_gib() -> float:
    """Most memory this process held: on its GPU, or resident where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
