"""Class images as the sampler's latents, in files: one image each, never decoded."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason

SUFFIX = ".safetensors"
NAME = "x0"  # of the only tensor in a file


def save(path: Path, x0: Tensor) -> None:
    """Write a whole file or none. `x0`: (C, h, w), scaled as the denoiser has it, in any precision.

    Raises ConfigError if it is not finite.
    """
    if not x0.isfinite().all():
        raise ConfigError(
            f"class image {path.name} came out NaN or infinite; use prepare.sampling.precision: fp32"
        )
    files.write_atomically(path, safetensors.torch.save({NAME: x0.cpu().contiguous()}))


def load(path: Path, shape: tuple[int, ...]) -> Tensor:
    """What `save` wrote, `shape` (C, h, w) fp32. Raises ConfigError that names a file that is not it."""
    try:
        x0 = safetensors.torch.load(path.read_bytes())[NAME].float()
        if tuple(x0.shape) != shape or not x0.isfinite().all():
            raise ValueError(f"it holds no finite latent of shape {shape}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(
            f"cannot read class image {path}: {reason(error)}; remove it, and prepare draws it anew"
        ) from error
    return x0
