"""DDPM: a denoiser that predicts the noise, the image or a mixture of both, at discrete timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dbtrain.config.training import Loss, Timesteps
from dbtrain.models.objectives import USUAL, between, check_scheduler, levels, span
from dbtrain.runtime.errors import ConfigError, reason

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULERS = (  # those that sample with DDPM's noise schedule, and so record it
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")  # Diffusers' schedules
MOST_TIMESTEPS = 100_000
# Settings of these schedulers that mean another training objective, and the values that do not.
OTHER_OBJECTIVES: dict[str, tuple[Any, ...]] = {
    "timestep_type": (None, "discrete"),  # continuous: EDM's
    "use_flow_sigmas": (None, False),
}


class DDPM(nn.Module):
    """Noise schedule and target of Ho et al. 2020, arXiv:2006.11239, in fp32 in every precision.

    Diffusers casts alpha_bar to the latents' dtype before taking square roots, which in bf16 leaves the
    first timesteps without any noise.
    """

    SCHEDULERS: ClassVar[tuple[str, ...]] = SCHEDULERS
    SAMPLER: ClassVar[str | None] = "DPM-Solver++ 2M"  # Lu et al. 2022, arXiv:2211.01095

    alphas_cumprod: Tensor  # (T,)
    span: Tensor | None

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction: str,
        min_snr_gamma: float | None = None,
        settings: Timesteps = USUAL.timesteps,
    ) -> None:
        super().__init__()
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)
        self.prediction = prediction
        self.min_snr_gamma = min_snr_gamma
        self.settings = settings
        self.register_buffer("span", span(settings, self._level), persistent=False)

    @staticmethod
    def check(scheduler_config: Mapping[str, Any]) -> None:
        """Raise ConfigError unless DDPM is the objective that a scheduler's config describes.

        `DDPMScheduler.from_config` would read any scheduler's config, and use its own defaults for what is
        not there: a base made for EDM (Playground 2.5, CosXL) or flow matching would be trained wrong.
        """
        check_scheduler(scheduler_config, SCHEDULERS, OTHER_OBJECTIVES)
        timesteps = scheduler_config.get("num_train_timesteps", 1000)
        prediction = scheduler_config.get("prediction_type", "epsilon")
        betas = scheduler_config.get("beta_schedule", "linear")
        ends = [scheduler_config.get(name, 0.01) for name in ("beta_start", "beta_end")]
        trained = scheduler_config.get("trained_betas")
        if prediction not in PREDICTIONS:
            raise ConfigError(
                f"the base's scheduler predicts '{prediction}'; dbtrain trains {', '.join(PREDICTIONS)}"
            )
        if type(timesteps) is not int or not 0 < timesteps <= MOST_TIMESTEPS:
            raise ConfigError(
                f"the base's scheduler_config.json has {str(timesteps)[:20]} timesteps; use 1 to "
                f"{MOST_TIMESTEPS}"
            )
        if trained is not None:
            fine = isinstance(trained, list) and len(trained) == timesteps and all(map(_is_beta, trained))
        else:
            fine = betas in BETAS and all(map(_is_beta, ends))
        if not fine:
            raise ConfigError(
                f"the base's scheduler_config.json has beta_schedule {betas!r}, beta_start {ends[0]!r} and "
                f"beta_end {ends[1]!r}{', and trained_betas of its own' if trained else ''}; use betas "
                f"between 0 and 1, and one of {', '.join(BETAS)}"
            )

    @classmethod
    def of(cls, scheduler_config: Mapping[str, Any], loss: Loss = USUAL, tokens: int = 0) -> DDPM:
        from diffusers import DDPMScheduler

        cls.check(scheduler_config)
        if loss.timesteps.shift is not None or loss.weighting != "none":
            raise ConfigError(
                "loss.timesteps.shift and loss.weighting are for flow-matching models, which this base is "
                "not; remove them, and see loss.timesteps.distribution and loss.min_snr_gamma"
            )
        times, usual = loss.timesteps, USUAL.timesteps
        if times.distribution == "auto" and (times.mean, times.std) != (usual.mean, usual.std):
            raise ConfigError(
                f"loss.timesteps.mean is {times.mean:g} and loss.timesteps.std is {times.std:g}, but this "
                "base's noise levels are uniform; set loss.timesteps.distribution to logit_normal"
            )
        try:
            scheduler = DDPMScheduler.from_config(dict(scheduler_config))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ConfigError(f"cannot read the base's scheduler_config.json: {reason(error)}") from error
        return cls(
            scheduler.alphas_cumprod, scheduler.config.prediction_type, loss.min_snr_gamma, loss.timesteps
        )

    def timesteps(self, u: Tensor) -> Tensor:
        """Timesteps, (rows,) int64 in [0, T), from `u` uniform in [0, 1), (rows,)."""
        u = self._level(between(self.span, u))
        return (u * len(self.alphas_cumprod)).long().clamp(max=len(self.alphas_cumprod) - 1)

    def _level(self, u: Tensor) -> Tensor:
        if self.settings.distribution in ("auto", "uniform"):
            return u
        return levels(u, self.settings, "uniform")

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, shaped like x0: the forward process at timesteps `t`, (rows,)."""
        signal, sigma = self._signal_sigma(t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The denoiser's target, shaped like x0."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        signal, sigma = self._signal_sigma(t)  # Salimans & Ho 2022, arXiv:2202.00512
        return signal * noise - sigma * x0

    def clean(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The x0 that a prediction at x_t amounts to, shaped like x_t."""
        if self.prediction == "sample":
            return prediction
        signal, sigma = self._signal_sigma(t)
        if self.prediction == "v_prediction":
            return signal * x_t - sigma * prediction
        return (x_t - sigma * prediction) / signal.clamp_min(1e-6)  # a last timestep may have no signal

    def signal(self, t: Tensor) -> Tensor:
        """The share of the image in x_t beside that of the noise, (rows,)."""
        signal, sigma = self._signal_sigma(t)
        return (signal / (signal + sigma)).flatten()

    def weight(self, t: Tensor) -> Tensor:
        """Loss weight of each image, (rows,): 1, or min-SNR-gamma.

        As in the paper, the error of any prediction type is weighted like min(SNR, gamma) times the error
        in x0. Finite at zero terminal SNR.
        Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv:2303.09556.
        """
        if self.min_snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        alpha_bar = self.alphas_cumprod[t]
        snr = alpha_bar / (1 - alpha_bar)
        if self.prediction == "epsilon":
            return (self.min_snr_gamma / snr).clamp(max=1)
        capped = snr.clamp(max=self.min_snr_gamma)
        return capped / (snr + 1) if self.prediction == "v_prediction" else capped

    def _signal_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod[t][:, None, None, None]  # (rows, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1
