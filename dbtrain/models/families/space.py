"""The space that a denoiser works in: a VAE's latents, scaled, or pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError


@dataclass(frozen=True)
class LatentSpace:
    """The denoiser's space. x0 = (stored latent - shift) * scale."""

    shape: tuple[int, ...]  # (C, H, W)
    scale: tuple[float, ...] = (1.0,)  # one, or one per channel
    shift: tuple[float, ...] = (0.0,)

    def unscaled(self, x0: Tensor) -> Tensor:
        """The VAE's latent for x0, (..., C, H, W) both."""
        scale, shift = self._values(x0)
        return x0 / scale + shift

    def scaled(self, latent: Tensor) -> Tensor:
        """x0 for the VAE's latent, (..., C, H, W) both."""
        scale, shift = self._values(latent)
        return (latent - shift) * scale

    def _values(self, like: Tensor) -> list[Tensor]:
        return [
            torch.tensor(values, device=like.device)[:, None, None] for values in (self.scale, self.shift)
        ]


def latent_shape(base: Pretrained, side: int, patch: int = 1) -> tuple[int, int, int]:
    """(C, h, w) of the VAE's latents for square images of `side` px.

    Raises ConfigError if the VAE, with `patch` latents to a token in each direction, cannot divide the side.
    """
    shrinks = 2 ** (len(base.setting("vae", "block_out_channels", list)) - 1)
    cells = latent_side(base, side, shrinks, patch)
    return base.setting("vae", "latent_channels", int), cells, cells


def latent_side(base: Pretrained, side: int, shrinks: int, patch: int) -> int:
    """The side of the VAE's latents, `shrinks` px to a latent, for `side` px. Raises as `latent_shape`."""
    cell = shrinks * patch
    if side % cell:
        near = max(1, round(side / cell)) * cell
        raise ConfigError(
            f"prepare.resolution is {side}, which the VAE of {base.name} cannot divide; use a multiple of "
            f"{cell}, e.g. {near}"
        )
    return side // shrinks


def vae_space(base: Pretrained, side: int, patch: int = 1) -> LatentSpace:
    """The latent space of a base's VAE for square images of `side` px, which `patch` latents must divide."""
    shape = latent_shape(base, side, patch)
    config, scale = base.config("vae"), base.setting("vae", "scaling_factor", (int, float))
    if not math.isfinite(scale) or scale <= 0:
        raise ConfigError(
            f"base model {base.name}: scaling_factor of its vae is {scale}; use a positive number"
        )
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = config["latents_mean"], config["latents_std"]
        return LatentSpace(shape, tuple(scale / value for value in std), tuple(map(float, mean)))
    return LatentSpace(shape, (float(scale),), (float(config.get("shift_factor") or 0),))


def pixel_space(base: Pretrained, side: int) -> LatentSpace:
    """The space of square RGB images of `side` px, in [-1, 1]."""
    return LatentSpace((3, side, side))
