"""Random numbers as a function of (seed, position) alone, not of the rank, clock or call order."""

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
    """A CPU generator seeded by `key`: the same numbers on every machine."""
    return torch.Generator().manual_seed(seed_of(*key))


class RowNoise(NamedTuple):
    """All random numbers of one training row."""

    u: Tensor  # () uniform in [0, 1), becomes the timestep
    noise: Tensor  # shaped like the latent
    posterior: Tensor  # shaped like the latent: latent = mean + std * posterior
    level: Tensor  # () uniform in [0, 1), for an upscaler: becomes the noise level of its input image


def sample_noise(
    seed: int, role: str, position: int, shape: tuple[int, ...], noise_offset: float
) -> RowNoise:
    """The random numbers of the row at `position`, for a latent of `shape` (C, H, W).

    `noise_offset` scales a normal number per channel that is added to the noise.
    Guttenberg 2023, "Diffusion with Offset Noise", crosslabs.org.
    """
    source = generator(seed, role, position)
    # The dtype is explicit because libraries change the default of all threads while they load a model.
    options: dict[str, Any] = {"generator": source, "dtype": torch.float32}
    u = torch.rand((), **options)
    noise = torch.randn(shape, **options)
    posterior = torch.randn(shape, **options)
    if noise_offset:  # sampled after the others, which therefore do not depend on it
        noise = noise + noise_offset * torch.randn((shape[0], 1, 1), **options)
    level = torch.rand((), **options)
    return RowNoise(u, noise, posterior, level)


@contextmanager
def seeded(*key: str | int) -> Iterator[None]:
    """Seed torch's global CPU generator by `key` for the block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):  # the default would open a context on every GPU
        torch.default_generator.manual_seed(seed_of(*key))
        yield


def seed_dropout(*key: str | int) -> None:
    """Seed torch's global generators, which dropout uses, by `key`."""
    torch.manual_seed(seed_of(*key))
