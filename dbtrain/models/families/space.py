"""The space that a denoiser works in: a VAE's latents, scaled, or pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.data.sizes import Size
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


def shrinking(base: Pretrained) -> int:
    """How many px of each side are one of the VAE's latents."""
    return 2 ** (len(base.setting("vae", "block_out_channels", list)) - 1)


def latent_shape(base: Pretrained, size: Size, patch: int = 1) -> tuple[int, int, int]:
    """(C, h, w) of the VAE's latents for images of `size`.

    Raises ConfigError if the VAE, with `patch` latents to a token in each direction, cannot divide it.
    """
    return base.setting("vae", "latent_channels", int), *latent_sides(base, size, shrinking(base), patch)


def latent_sides(base: Pretrained, size: Size, shrinks: int, patch: int) -> tuple[int, int]:
    """(h, w) of the VAE's latents, `shrinks` px to a latent. Raises as `latent_shape`."""
    cell = shrinks * patch
    if size.height % cell or size.width % cell:
        near = Size(*(max(1, round(side / cell)) * cell for side in size))
        raise ConfigError(
            f"{named(size)}, which the VAE of {base.name} cannot divide; use a multiple of {cell}, "
            f"e.g. {near.width if size.is_square else near}"
        )
    return size.height // shrinks, size.width // shrinks


def named(size: Size) -> str:
    """The beginning of a message about the setting of a size."""
    return f"prepare.resolution is {size.width}" if size.is_square else f"prepare.buckets has {size}"


def vae_space(base: Pretrained, size: Size, patch: int = 1) -> LatentSpace:
    """The latent space of a base's VAE for images of `size`, which `patch` latents must divide."""
    shape = latent_shape(base, size, patch)
    config, scale = base.config("vae"), base.setting("vae", "scaling_factor", (int, float))
    if not math.isfinite(scale) or scale <= 0:
        raise ConfigError(
            f"base model {base.name}: scaling_factor of its vae is {scale}; use a positive number"
        )
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = config["latents_mean"], config["latents_std"]
        return LatentSpace(shape, tuple(scale / value for value in std), tuple(map(float, mean)))
    return LatentSpace(shape, (float(scale),), (float(config.get("shift_factor") or 0),))


def pixel_space(base: Pretrained, size: Size) -> LatentSpace:
    """The space of RGB images of `size`, in [-1, 1]."""
    return LatentSpace((3, *size))


def unet_grids(base: Pretrained) -> tuple[int, ...]:
    """Px that divide the sides of images well: each level of the UNet halves them, then only the VAE does.

    An odd number of cells on a level is resized on the way up.
    """
    cell = shrinking(base) if base.index.get("vae") else 1
    levels = len(base.setting("unet", "block_out_channels", list))
    return tuple(cell * 2**level for level in reversed(range(levels)))


def patch_grids(base: Pretrained, patch: int, shrinks: Callable[[Pretrained], int] = shrinking) -> tuple[int]:
    """Px that divide the sides of images for a transformer: those of `patch` latents."""
    return (patch * shrinks(base),)
