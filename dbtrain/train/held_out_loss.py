"""The loss on held-out photos and class images, at fixed timesteps and with fixed noise.

Random timesteps and noise make the training loss noisy. Here they are fixed, so the curve is smooth: if it
rises while the training loss still falls, the model is overfitting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dbtrain.config import Config
from dbtrain.data import shards
from dbtrain.data.batch import Batch
from dbtrain.data.shards import HELD_OUT, Manifest
from dbtrain.data.storage import Storage
from dbtrain.models.families.family import Family
from dbtrain.models.precision import PRECISIONS
from dbtrain.runtime import dist, rng
from dbtrain.train import parallel
from dbtrain.train.dreambooth import DreamBooth

METRICS = {"instance": "held_out_instance", "class": "held_out_prior"}


@dataclass(frozen=True)
class HeldOut:
    """A held-out row at one of the timesteps."""

    role: str  # "instance" or "class"
    number: int  # index of the timestep
    u: float  # the timestep, as a fraction of the range
    row: shards.Row
    extra: Mapping[str, Tensor]


def rows(
    manifest: Manifest, storage: Storage, family: Family, role: str, timesteps: int
) -> Iterator[HeldOut]:
    """Yield every held-out row of a role at the centers of `timesteps` equal parts of the range, by size."""
    for shard in sorted(manifest.roles[HELD_OUT[role]], key=manifest.size):
        for row in shards.read(storage, shard, manifest, family.stored):
            row = row.with_mask() if manifest.has_masks else row
            extra = family.row(row.meta, manifest.size(shard))
            for number in range(timesteps):
                yield HeldOut(role, number, (number + 0.5) / timesteps, row, extra)


def measure(model: DreamBooth, held_out: Sequence[HeldOut], cfg: Config) -> dict[str, Any]:
    """Mean loss of each role, overall and at each timestep.

    The work is split over ranks into batches that do not depend on their number.
    """
    size = 2 * cfg.train.micro_batch  # a training step holds as many rows, and their gradients
    batches = [
        alike[i : i + size]
        for _, group in groupby(held_out, key=shape_of)
        for alike in [list(group)]
        for i in range(0, len(alike), size)
    ]
    mine: dict[int, list[float]] = {}
    background = cfg.loss.mask.background
    for number, keep in parallel.rounds(len(batches), parallel.is_sharded(model)):
        with PRECISIONS[cfg.train.precision].forward(dist.device()):
            found = model(batch_of(batches[number], background).to(dist.device())).tolist()
        if keep:
            mine[number] = found
    gathered = {int(number): each for part in dist.gather_json(mine) for number, each in part.items()}
    losses = [loss for number in range(len(batches)) for loss in gathered[number]]
    means, by_timestep = {}, {}
    for role, metric in METRICS.items():
        pairs = [(one.number, loss) for one, loss in zip(held_out, losses, strict=True) if one.role == role]
        if pairs:
            means[metric] = fmean(loss for _, loss in pairs)
            by_timestep["prior" if role == "class" else role] = [
                fmean(loss for number, loss in pairs if number == wanted)
                for wanted in sorted({number for number, _ in pairs})
            ]
    fractions = sorted({one.u for one in held_out})
    timesteps = model.objective.timesteps(torch.tensor(fractions, device=dist.device())).tolist()
    return {**means, "timesteps": timesteps, "by_timestep": by_timestep}


def shape_of(one: HeldOut) -> tuple[int, ...]:
    """The shape of a row's latents, (C, H, W)."""
    return tuple(next(t for name, t in one.row.tensors.items() if name != shards.MASK).shape)


def batch_of(rows: Sequence[HeldOut], background: float = 1.0) -> Batch:
    """Return the rows as a training batch, with noise that depends only on the image and the timestep."""
    noises = []
    for one in rows:
        noise = rng.sample_noise(0, f"held out {one.row.meta['key']}", one.number, shape_of(one), 0.0)
        u = torch.tensor(one.u)
        noises.append(noise._replace(u=u, level=u))
    return Batch.collate(
        [one.row for one in rows], noises, [one.extra for one in rows],
        background=[background if one.role == "instance" else 1.0 for one in rows],
    )  # fmt: skip
