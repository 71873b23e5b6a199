"""One optimizer step on this rank's micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dbtrain.config import Config
from dbtrain.data.batch import Batch
from dbtrain.data.dataloader import LatentStream
from dbtrain.models.precision import PRECISIONS
from dbtrain.runtime import dist, rng
from dbtrain.train import optim, parallel
from dbtrain.train.checkpoint import Progress
from dbtrain.train.metrics import TENTHS, Outcome

Compute = Callable[[nn.Module, Progress, Sequence[Batch], Config], Outcome]


def train_step(
    ddp: nn.Module,
    progress: Progress,
    stream: LatentStream,
    step: int,
    cfg: Config,
    compute: Compute | None = None,
) -> Outcome:
    """Run optimizer step `step`, counted from 0, on the stream's next micro-batches."""
    lr = begin(progress, step, cfg)
    before = time.perf_counter()
    batches = [next(stream) for _ in range(stream.batches)]
    wait_s = time.perf_counter() - before
    outcome = (compute or compute_step)(ddp, progress, batches, cfg)
    return outcome._replace(lr=lr, wait_s=wait_s)


def begin(progress: Progress, step: int, cfg: Config) -> float:
    """Prepare optimizer step `step`, counted from 0; return its learning rate."""
    lr = optim.lr_at(step, cfg.optim, cfg.train.steps)
    optim.set_lr(progress.optimizer, lr)
    if progress.ema:
        progress.ema.at(step)
    return lr


def compute_step(ddp: nn.Module, progress: Progress, batches: Sequence[Batch], cfg: Config) -> Outcome:
    """The part of a step that runs on the device. It never reads a tensor back to the host."""
    tally = Tally.zero(batches[0].weight.device)
    progress.optimizer.zero_grad(set_to_none=not cfg.train.cuda_graph)

    # Forward and backward passes of each micro-batch accumulate gradients.
    with parallel.unwrapped(ddp).working_copies.in_place():
        for number, batch in enumerate(batches):
            if cfg.adapter.drops:
                step = batch.first // cfg.train.global_batch
                alone = ("class",) if batch.first_role else ()
                rng.seed_dropout(cfg.seed, "dropout", step, batch.first, *alone)
            with parallel.accumulating(ddp, last=number == len(batches) - 1):
                with PRECISIONS[cfg.train.precision].forward(batch.weight.device):
                    per_image = ddp(batch)  # (rows,): instance rows, then class rows
                # The weights define a sum over the rows of all ranks, but DDP averages over ranks.
                loss = (batch.weight * per_image).sum() * dist.world()
                progress.scaler.scale(loss).backward()
            tally.add(per_image, batch.u, batch.position, cfg, batch.first_role)

    grad_norm = update(progress, cfg)
    return tally.outcome(progress, grad_norm, batches)


@dataclass
class Tally:
    """The statistics of a step for the log. They stay on the device."""

    losses: Tensor  # (2,) by role
    spread: Tensor  # (2, 2, TENTHS) by role and timestep
    bad: Tensor  # (2,) fp64, first bad position by role
    tenths: Tensor  # (TENTHS,)

    @classmethod
    def zero(cls, device: torch.device) -> Tally:
        """See `Outcome`, whose fields these are, for their shapes."""
        return cls(
            losses=torch.zeros(2, device=device),
            spread=torch.zeros(2, 2, TENTHS, device=device),
            bad=torch.full((2,), torch.inf, dtype=torch.float64, device=device),
            tenths=torch.arange(TENTHS, device=device),
        )

    def add(self, per_image: Tensor, u: Tensor, position: Tensor, cfg: Config, first_role: int = 0) -> None:
        """Add a micro-batch: its losses, timesteps and positions, (rows,) each."""
        by_role = per_image.detach().view(-1, cfg.train.micro_batch)  # (roles, micro_batch)
        roles = slice(first_role, first_role + len(by_role))
        self.losses[roles] += by_role.sum(1) / cfg.train.global_batch
        in_bin = (u * TENTHS).long().view_as(by_role)[..., None] == self.tenths
        self.spread[roles, 0] += in_bin.sum(1)
        self.spread[roles, 1] += torch.where(in_bin, by_role[..., None], 0).sum(1)
        first = torch.where(by_role.isfinite(), torch.inf, position.view_as(by_role)).amin(1)
        self.bad[roles] = torch.minimum(self.bad[roles], first)

    def outcome(self, progress: Progress, grad_norm: Tensor, batches: Sequence[Batch]) -> Outcome:
        seen, found = sum(batch.seen for batch in batches), optim.found_rate(progress.optimizer)
        return Outcome(self.losses, grad_norm, self.bad, self.spread, seen, found=found)


def update(progress: Progress, cfg: Config) -> Tensor:
    """Clip the gradients, and step unless something is NaN or infinite. Returns their norm, ().

    The norm of a gradient that is infinite because of the loss scale counts as 0: the scale then falls.
    """
    optimizer, scaler = progress.optimizer, progress.scaler
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(optim.leaves(optimizer), cfg.optim.clip)
    if cfg.faults.nonfinite == "skip" and not scaler.is_enabled():
        skip = ~grad_norm.isfinite()
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # GradScaler's protocol
    scaler.step(optimizer)
    if scaler.is_enabled():
        # At a scale of 1, the gradient itself is infinite; a scale of 0 would make finite ones NaN.
        one = torch.ones_like(grad_norm)
        grad_norm = torch.where(scaler.scale(one) > 1, grad_norm.nan_to_num(0.0, 0.0, 0.0), grad_norm)
        scaler.update()
        scaler.update(scaler.scale(one).clamp(min=1))
    if progress.ema:
        progress.ema.update()
    return grad_norm
