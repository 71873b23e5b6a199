"""A micro-batch in memory: the rows that one forward pass takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dbtrain.data import shards
from dbtrain.runtime import rng


@dataclass(frozen=True)
class Batch:
    """One micro-batch: instance rows first, then as many class rows (none without prior preservation)."""

    stored: dict[str, Tensor]  # what the family's `encode_images` gave, (rows, C, H, W) each
    posterior: Tensor  # (rows, C, H, W) normals for the VAE's posterior
    noise: Tensor  # (rows, C, H, W)
    u: Tensor  # (rows,) uniform in [0, 1), becomes the timestep
    prompt: Tensor  # (rows,) int64, row of the prompt table
    weight: Tensor  # (rows,) share of the row in the step's loss
    level: Tensor  # (rows,) uniform in [0, 1), for upscalers
    position: Tensor  # (rows,) fp64
    extra: dict[str, Tensor]  # what the rows' descriptions add to the condition, (rows, ...) each
    first: int  # position of the first instance row
    seen: int  # sum of numbers made of each row's role, position and content: to compare runs by

    @classmethod
    def collate(
        cls,
        rows: Sequence[shards.Row],
        draws: Sequence[rng.RowNoise],
        extras: Sequence[Mapping[str, Tensor]],
        *,
        stored: Mapping[str, Tensor] | None = None,
        weights: Sequence[float] | None = None,
        positions: Sequence[int] | None = None,
        seen: int = 0,
    ) -> Batch:
        """The batch of these rows and of what was drawn for each, on the CPU.

        `extras`: what each row adds to the condition. `stored` takes the place of the rows' own tensors.
        Without `weights` and `positions`, rows weigh nothing and are at position 0.
        """
        zeros = [0] * len(rows)
        return cls(
            stored=_stacked([row.tensors for row in rows]) if stored is None else dict(stored),
            posterior=torch.stack([draw.posterior for draw in draws]),
            noise=torch.stack([draw.noise for draw in draws]),
            u=torch.stack([draw.u for draw in draws]),
            prompt=torch.tensor([row.meta["prompt"] for row in rows]),
            weight=torch.tensor(weights or zeros, dtype=torch.float32),
            level=torch.stack([draw.level for draw in draws]),
            position=torch.tensor(positions or zeros, dtype=torch.float64),
            extra=_stacked(extras),
            first=(positions or zeros)[0],
            seen=seen,
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        return self._each(lambda tensor: tensor.pin_memory())

    def take(self, other: Batch) -> None:
        """Copy another batch's tensors into this one's."""
        for field in fields(self):
            mine, given = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, dict):
                for name, tensor in mine.items():
                    tensor.copy_(given[name])
            elif isinstance(mine, Tensor):
                mine.copy_(given)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: change(tensor) for name, tensor in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return Batch(**{field.name: changed(getattr(self, field.name)) for field in fields(self)})


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same names, stacked: (rows, ...) each."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
