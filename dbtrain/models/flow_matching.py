"""Flow matching: a denoiser that predicts the velocity from image to noise, at continuous noise levels.

Lipman et al. 2022, "Flow Matching for Generative Modeling", arXiv:2210.02747; Esser et al. 2024, "Scaling
Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv:2403.03206 (Stable Diffusion 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dbtrain.config.training import Loss, Timesteps
from dbtrain.models.objectives import USUAL, between, check_scheduler, levels, span
from dbtrain.runtime.errors import ConfigError

# Settings of the scheduler that mean another process, and the values that do not.
OTHER_PROCESSES: dict[str, tuple[Any, ...]] = {
    "invert_sigmas": (None, False), "time_shift_type": (None, "exponential"),
    "stochastic_sampling": (None, False),
}  # fmt: skip
# (setting, default of the scheduler) of the line mu = a n + b by which the shift grows with n tokens.
LINE = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))


class FlowMatching(nn.Module):
    """x_t = (1 - t) x0 + t noise, with the target noise - x0. `t` is the noise level sigma in (0, 1), fp32.

    Diffusers' scripts compute sigma in the latents' dtype: in bf16 a third of its values are left. They look
    it up in the scheduler's own table, which is shifted for some models and not for others.
    """

    SCHEDULERS: ClassVar[tuple[str, ...]] = ("FlowMatchEulerDiscreteScheduler",)
    SAMPLER: ClassVar[str | None] = None
    span: Tensor | None

    def __init__(
        self, shift: float = 1.0, settings: Timesteps = USUAL.timesteps, weighting: str = "none"
    ) -> None:
        super().__init__()
        self.shift, self.settings, self.weighting = shift, settings, weighting
        self.register_buffer("span", span(settings, self._level), persistent=False)

    @staticmethod
    def check(scheduler_config: Mapping[str, Any]) -> None:
        check_scheduler(scheduler_config, FlowMatching.SCHEDULERS, OTHER_PROCESSES)
        shift = scheduler_config.get("shift", 1.0)
        numbers = [shift, *(scheduler_config.get(name) or default for name, default in LINE)]
        if not all(type(value) in (int, float) and 0 < value < 1e6 for value in numbers):
            raise ConfigError(
                f"the base's scheduler_config.json has shift = {shift!r} and {numbers[1:]} for "
                f"{', '.join(name for name, _ in LINE)}; use positive numbers"
            )

    @classmethod
    def of(cls, scheduler_config: Mapping[str, Any], loss: Loss = USUAL, tokens: int = 0) -> FlowMatching:
        cls.check(scheduler_config)
        for name, off in (("min_snr_gamma", None), ("noise_offset", 0.0)):
            if getattr(loss, name) != off:
                raise ConfigError(
                    f"loss.{name} is {getattr(loss, name)}, which has no meaning for flow-matching models "
                    "such as this base; remove it, and see loss.timesteps and loss.weighting"
                )
        shift = loss.timesteps.shift
        if shift is None:
            shift = own_shift(scheduler_config, tokens)
        return cls(shift, loss.timesteps, loss.weighting)

    def timesteps(self, u: Tensor) -> Tensor:
        """Noise levels, (rows,) fp32 in (0, 1), from `u` uniform in [0, 1), (rows,)."""
        return self._level(between(self.span, u)).float()

    def _level(self, u: Tensor) -> Tensor:
        sigma = levels(u, self.settings, "logit_normal")
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, shaped like x0."""
        sigma = t[:, None, None, None]
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity, shaped like x0."""
        return noise - x0

    def clean(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The x0 that a velocity at x_t leads to, shaped like x_t."""
        return x_t - t[:, None, None, None] * prediction

    def signal(self, t: Tensor) -> Tensor:
        """The share of the image in x_t beside that of the noise, (rows,)."""
        return 1 - t

    def weight(self, t: Tensor) -> Tensor:
        """Loss weight of each image, (rows,): 1, or one of the weightings of the SD 3 paper."""
        if self.weighting == "sigma_sqrt":
            return t**-2.0
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
        return torch.ones_like(t)


def own_shift(scheduler_config: Mapping[str, Any], tokens: int) -> float:
    """The factor by which a base shifts noise levels for images of `tokens` tokens.

    Larger images need more noise for the same loss of information. SD 3's shift is constant; FLUX's is
    exp(mu) with mu on a line over the number of tokens.
    """
    if not scheduler_config.get("use_dynamic_shifting"):
        return float(scheduler_config.get("shift") or 1.0)
    few, many, low, high = (scheduler_config.get(name) or default for name, default in LINE)
    return math.exp(low + (high - low) * (tokens - few) / (many - few))
