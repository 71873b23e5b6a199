"""The training objective: noise schedule, prediction target and loss weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.runtime.errors import ConfigError, reason

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class DDPM(nn.Module):
    """Noise schedule and target of Ho et al. 2020, arXiv:2006.11239, in fp32 in every precision.

    Diffusers casts alpha_bar to the latents' dtype before taking square roots, which in bf16 leaves the
    first timesteps without any noise.
    """

    alphas_cumprod: Tensor  # (T,)

    def __init__(self, alphas_cumprod: Tensor, prediction: str, min_snr_gamma: float | None) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ConfigError(
                f"the base's scheduler predicts '{prediction}'; dbtrain trains {', '.join(PREDICTIONS)}"
            )
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)
        self.prediction = prediction
        self.min_snr_gamma = min_snr_gamma

    @classmethod
    def of(cls, scheduler_config: Mapping[str, Any], min_snr_gamma: float | None) -> DDPM:
        """The objective with which a base was trained, from its scheduler's config."""
        from diffusers import DDPMScheduler

        try:
            scheduler = DDPMScheduler.from_config(dict(scheduler_config))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ConfigError(f"cannot read the base's scheduler_config.json: {reason(error)}") from error
        if len(scheduler.alphas_cumprod) == 0:
            raise ConfigError("the base's scheduler_config.json has no timesteps")
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type, min_snr_gamma)

    def timesteps(self, u: Tensor) -> Tensor:
        """Timesteps, (rows,) int64 in [0, T), from `u` uniform in [0, 1), (rows,)."""
        return (u * len(self.alphas_cumprod)).long().clamp(max=len(self.alphas_cumprod) - 1)

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
