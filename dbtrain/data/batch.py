"""A micro-batch in memory: the rows of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dbtrain.data import shards
from dbtrain.data.shards import MASK
from dbtrain.runtime import rng


@dataclass(frozen=True)
class Batch:
    """A micro-batch: instance rows, then as many class rows (none without prior preservation).

    All rows have one shape. Class images of other shapes than the photos are batches of their own.
    """

    stored: dict[str, Tensor]  # output of the family's `encode_images`, (rows, C, H, W) each
    posterior: Tensor  # (rows, C, H, W) normal, to sample the VAE's posterior
    noise: Tensor  # (rows, C, H, W)
    u: Tensor  # (rows,) uniform in [0, 1), becomes the timestep
    prompt: Tensor  # (rows,) int64, index into the prompt table
    prompts: tuple[int, ...]  # the same, on the host
    weight: Tensor  # (rows,) weight in the step's loss
    background: Tensor  # (rows,) weight of what is outside a row's mask, relative to the inside
    level: Tensor  # (rows,) uniform in [0, 1), for upscalers
    position: Tensor  # (rows,) fp64
    redrawn: Tensor  # (rows,) bool: whether the row's noisy image is first redrawn by the base
    extra: dict[str, Tensor]  # further conditions, from the rows' descriptions, (rows, ...) each
    first: int  # position of the first instance row
    preserved: int  # how many of the last rows (of each slot) have the base's own prediction as their target
    redraws: bool  # whether any row is redrawn; known on the host
    seen: int  # checksum of the rows' roles, positions and content, to compare runs
    first_role: int = 0  # of the rows: 1 if all are class rows
    slots: int = 1  # parts of equal size, each of which is a micro-batch of its own

    @classmethod
    def collate(
        cls,
        rows: Sequence[shards.Row],
        draws: Sequence[rng.RowNoise],
        extras: Sequence[Mapping[str, Tensor]],
        *,
        stored: Mapping[str, Tensor] | None = None,
        weights: Sequence[float] | None = None,
        background: Sequence[float] | None = None,
        positions: Sequence[int] | None = None,
        prompts: Sequence[int] | None = None,
        preserved: int = 0,
        redraws: bool = False,
        first_role: int = 0,
        seen: int = 0,
    ) -> Batch:
        """The batch of these rows and their random numbers, on the CPU.

        `extras`: further conditions of each row. `stored` and `prompts` replace the rows' own. `weights` and
        `positions` default to 0, `background` to 1. With `redraws`, the preserved rows are redrawn.
        """
        zeros = [0] * len(rows)
        chosen = [row.meta["prompt"] for row in rows] if prompts is None else prompts
        return cls(
            stored=_stacked([row.tensors for row in rows]) if stored is None else dict(stored),
            posterior=torch.stack([draw.posterior for draw in draws]),
            noise=torch.stack([draw.noise for draw in draws]),
            u=torch.stack([draw.u for draw in draws]),
            prompt=torch.tensor(chosen),
            prompts=tuple(chosen),
            weight=torch.tensor(weights or zeros, dtype=torch.float32),
            background=torch.tensor(background or [1.0] * len(rows)),
            level=torch.stack([draw.level for draw in draws]),
            position=torch.tensor(positions or zeros, dtype=torch.float64),
            redrawn=torch.arange(len(rows)) >= len(rows) - preserved * redraws,
            extra=_stacked(extras),
            first=(positions or zeros)[0],
            preserved=preserved,
            redraws=redraws,
            first_role=first_role,
            seen=seen,
        )

    @classmethod
    def joined(cls, parts: Sequence[Batch], prompts: int) -> Batch:
        """The micro-batches of several slots as one; each has a prompt table of `prompts` entries."""
        chosen = tuple(slot * prompts + k for slot, part in enumerate(parts) for k in part.prompts)
        tensors: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if isinstance(values[0], Tensor):
                tensors[field.name] = torch.cat(values)
            elif isinstance(values[0], dict):
                tensors[field.name] = {name: torch.cat([each[name] for each in values]) for name in values[0]}
        tensors["prompt"] = torch.tensor(chosen)
        first = parts[0]
        return cls(
            **tensors, prompts=chosen, first=first.first, preserved=first.preserved,
            redraws=any(part.redraws for part in parts), seen=0, slots=len(parts),
        )  # fmt: skip

    @property
    def places(self) -> Tensor | None:
        """The weight of each place in a row's loss, (rows, 1, H, W); None if no row has a mask."""
        if (mask := self.stored.get(MASK)) is None:
            return None
        inside = mask.float() / 255
        return inside + self.background[:, None, None, None] * (1 - inside)

    def of_preserved(self, values: Tensor) -> Tensor:
        """The preserved rows of each slot, of `values` for all rows."""
        return values.unflatten(0, (self.slots, -1))[:, -self.preserved :].flatten(0, 1)

    def with_preserved(self, values: Tensor, of_preserved: Tensor) -> Tensor:
        """`values` for all rows, with others for the preserved ones."""
        others = values.unflatten(0, (self.slots, -1))[:, : -self.preserved]
        return torch.cat([others, of_preserved.unflatten(0, (self.slots, -1))], 1).flatten(0, 1)

    def blank(self) -> Batch:
        """A batch of this one's shape in which everything is zero."""
        return replace(self._each(torch.zeros_like), prompts=(0,) * len(self.prompts), redraws=False)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`. Does not wait for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        return self._each(lambda tensor: tensor.pin_memory())

    def take(self, other: Batch) -> None:
        """Copy the tensors of another batch into those of this one."""
        for field in fields(self):
            target, source = getattr(self, field.name), getattr(other, field.name)
            if isinstance(target, dict):
                for name, tensor in target.items():
                    tensor.copy_(source[name])
            elif isinstance(target, Tensor):
                target.copy_(source)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: change(tensor) for name, tensor in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return Batch(**{field.name: changed(getattr(self, field.name)) for field in fields(self)})


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The rows' tensors stacked by name, (rows, ...) each."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
