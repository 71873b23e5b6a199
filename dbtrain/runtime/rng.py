"""Randomness as a function of (seed, position) and nothing else: not the rank, clock or call order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbtrain.runtime.hashing import digest


def seed_of(*key: str | int) -> int:
    """A 63-bit seed that depends on `key` alone."""
    return int.from_bytes(digest(*key)[:8], "big") >> 1


def generator(*key: str | int) -> torch.Generator:
    """A CPU generator seeded by `key`: the same numbers on every machine and device."""
    return torch.Generator().manual_seed(seed_of(*key))


class RowNoise(NamedTuple):
    """All that is random about one training row."""

    u: Tensor  # () uniform in [0, 1), becomes the timestep
    noise: Tensor  # shaped like the latent
    posterior: Tensor  # shaped like the latent: latent = mean + std * posterior
    level: Tensor  # () uniform in [0, 1), for an upscaler: how rough the image is that it is given


def sample_noise(
    seed: int, role: str, position: int, shape: tuple[int, ...], noise_offset: float
) -> RowNoise:
    """The draws of the row at `position`, for a latent of `shape` (C, H, W).

    `noise_offset` adds a normal number for each channel to the noise, scaled by it.
    Guttenberg 2023, "Diffusion with Offset Noise", crosslabs.org.
    """
    source = generator(seed, role, position)
    # Said aloud, as libraries change the default dtype of all threads while they load a model.
    how: dict[str, Any] = {"generator": source, "dtype": torch.float32}
    u = torch.rand((), **how)
    noise = torch.randn(shape, **how)
    posterior = torch.randn(shape, **how)
    if noise_offset:  # drawn last: turning it on leaves the other draws as they were
        noise = noise + noise_offset * torch.randn((shape[0], 1, 1), **how)
    level = torch.rand((), **how)
    return RowNoise(u, noise, posterior, level)


@contextmanager
def seeded(*key: str | int) -> Iterator[None]:
    """Seed torch's global CPU generator by `key` for the block, and put it back after it."""
    with torch.random.fork_rng(devices=[]):  # forking GPUs' would open a context on each of them
        torch.default_generator.manual_seed(seed_of(*key))
        yield


def seed_dropout(*key: str | int) -> None:
    """Seed torch's global generators, which dropout draws from, by `key`."""
    torch.manual_seed(seed_of(*key))
