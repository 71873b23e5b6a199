"""What a denoiser is trained to predict: the parts that all objectives share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dbtrain.config.training import Loss, Timesteps
from dbtrain.runtime.errors import ConfigError

UNFITTING = (
    "made for another training objective (EDM, flow matching, distillation) than this kind of model is "
    "trained with here; use another base"
)

USUAL = Loss()  # the default settings


class Objective(Protocol):
    """What a family's denoiser is trained to predict. `t` is whatever its `timesteps` returns, (rows,)."""

    SCHEDULERS: ClassVar[tuple[str, ...]]  # the schedulers of bases that were trained so
    SAMPLER: ClassVar[str | None]  # what images are generated with; None: the base's own scheduler

    @staticmethod
    def check(scheduler_config: Mapping[str, Any]) -> None:
        """Raise ConfigError unless this is the objective that a scheduler's config describes."""

    @classmethod
    def of(cls, scheduler_config: Mapping[str, Any], loss: Loss, tokens: int) -> Objective:
        """The objective with which a base was trained, for images of `tokens` tokens.

        Raises ConfigError if it was another one, or if settings do not fit it.
        """

    def timesteps(self, u: Tensor) -> Tensor:
        """The noise levels, (rows,), for `u` uniform in [0, 1), (rows,); they rise with `u`."""

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, shaped like x0."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The denoiser's target, shaped like x0."""

    def clean(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The x0 that the denoiser's prediction for x_t amounts to, shaped like x_t."""

    def signal(self, t: Tensor) -> Tensor:
        """The share of the image in x_t beside that of the noise, (rows,) fp32: 1 without noise."""

    def weight(self, t: Tensor) -> Tensor:
        """Loss weight of each image, (rows,) fp32."""


def check_scheduler(
    config: Mapping[str, Any], kinds: Sequence[str], harmless: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise ConfigError unless a scheduler is of one of the classes `kinds`, without another process.

    `harmless`: settings that could mean another process, and their values that do not. A config without a
    class is of the first.
    """
    kind = config.get("_class_name", kinds[0])
    wrong = [name for name, fine in harmless.items() if config.get(name) not in fine]
    if kind not in kinds or wrong:
        named = f"{kind} with {wrong[0]} = {config[wrong[0]]}" if wrong else kind
        raise ConfigError(f"the base's scheduler is {named}, {UNFITTING}")


def losses(
    error: Tensor, signal: Tensor, huber: float | None = None, weights: Tensor | None = None
) -> Tensor:
    """The loss of each image, (rows,), from its error, (rows, C, H, W).

    That is the squared error, or the pseudo-Huber loss of each element: like the square up to a threshold,
    which falls from 1 to `huber` as the share `signal` of the image does, (rows,), and linear beyond. The
    threshold is that of kohya's `--loss_type huber --huber_schedule snr`.
    Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled
    Pseudo-Huber Loss", arXiv:2403.16728.

    `weights`: of each place, (rows, 1, H, W); the loss is then a weighted mean.
    """
    square = error.square()
    if huber is not None:
        c = (huber + (1 - huber) * signal.square())[:, None, None, None]
        square = 2 * c * square / ((square + c.square()).sqrt() + c)  # 2 c (sqrt(e^2 + c^2) - c)
    if weights is None:
        return square.flatten(1).mean(1)
    weighted = weights * square.mean(1, keepdim=True)  # (rows, 1, H, W)
    return weighted.flatten(1).sum(1) / weights.flatten(1).sum(1).clamp_min(1e-6)


def span(settings: Timesteps, level: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The `u` between which noise levels are from `low` to `high`, (2,) fp64; None: any.

    `level` gives the noise level of each u, (rows,), and rises. So a row needs a single uniform number,
    whatever the distribution.
    """
    wanted = torch.tensor([settings.low, settings.high], dtype=torch.float64)
    if (settings.low, settings.high) == (0, 1):
        return None
    below, above = torch.zeros_like(wanted), torch.ones_like(wanted)
    for _ in range(60):  # halvings: more than fp64 has bits
        middle = (below + above) / 2
        less = level(middle) < wanted
        below, above = torch.where(less, middle, below), torch.where(less, above, middle)
    return above * (wanted > 0)  # the level of u = 0 may be above 0


def between(ends: Tensor | None, u: Tensor) -> Tensor:
    """`u`, (rows,), uniform in [0, 1), moved to `span`."""
    if ends is None:
        return u
    low, high = ends.unbind()
    return low + (high - low) * u.double()


def levels(u: Tensor, settings: Timesteps, usual: str) -> Tensor:
    """Noise levels in (0, 1), (rows,) fp64: the quantiles `u`, (rows,), of a distribution.

    Each needs a single uniform number, so that a row's draws stay those of its position. `usual` is the
    distribution that `auto` stands for.
    Esser et al. 2024, "Scaling Rectified Flow Transformers", arXiv:2403.03206, section 3.1.
    """
    tiny = 1e-7
    u = u.double().clamp(tiny, 1 - tiny)
    kind = usual if settings.distribution == "auto" else settings.distribution
    if kind == "logit_normal":
        normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
        return torch.sigmoid(settings.mean + settings.std * normal)
    if kind == "mode":
        bend = torch.cos(math.pi / 2 * (1 - u)).square() - u
        return (u - settings.mode_scale * bend).clamp(tiny, 1 - tiny)
    return u
