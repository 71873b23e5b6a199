"""The sequence of a run's images: the sizes of its batches, step by step, and the order of the rows of each.

Every batch has a single size. Which one is a function of the step, so ranks agree on it without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dbtrain.data.order import Order, Turns
from dbtrain.data.shards import Manifest, Shard
from dbtrain.data.sizes import Size


def orders(
    manifest: Manifest,
    images: Mapping[str, str],
    weights: Mapping[str, Sequence[float]],
    global_batch: int,
    seed: int,
) -> dict[str, Order | Turns]:
    """The order in which the rows of each role are trained on.

    `images`: the role in the shards whose images the rows of a role are. `weights`: of each subject, or of
    each class, in the order of the config, by role; of a single one if that is missing.
    """
    every = {role: weights.get(role, (1.0,)) for role in images}
    turns = shares(manifest.roles["instance"], manifest, every["instance"])
    return {
        role: _of_sizes(manifest, manifest.roles[stored], turns, every[role], global_batch, seed, role)
        for role, stored in images.items()
    }


def shares(shards: Sequence[Shard], manifest: Manifest, weights: Sequence[float]) -> dict[Size, float]:
    """The share of the steps with each size: how often a photo is seen does not depend on its size."""
    rows = _rows_by_part(shards)
    found: dict[Size, float] = {}
    for shard in shards:
        size, weight = manifest.size(shard), weights[shard.part] if len(weights) > 1 else 1.0
        found[size] = found.get(size, 0.0) + weight * shard.epoch / rows[shard.part]
    return found


def apart(manifest: Manifest, images: Mapping[str, str]) -> bool:
    """Whether class images have other sizes than the photos, and therefore batches of their own."""
    sizes = [{manifest.size(shard) for shard in manifest.roles[stored]} for stored in images.values()]
    return any(one != sizes[0] for one in sizes)


def _of_sizes(
    manifest: Manifest, shards: Sequence[Shard], turns: Mapping[Size, float], weights: Sequence[float],
    global_batch: int, seed: int, role: str,
) -> Order | Turns:  # fmt: skip
    """The order of the shards of a role, in turns of a step with each size."""
    sizes = {manifest.size(shard) for shard in shards}
    rows = _rows_by_part(shards)
    if len(sizes) == 1:
        return _of_parts(shards, rows, weights, global_batch, seed, role)
    parts = [[k for k, shard in enumerate(shards) if manifest.size(shard) == size] for size in turns]
    inner = [
        _of_parts([shards[k] for k in part], rows, weights, global_batch, seed, f"{role} {size}")
        for size, part in zip(turns, parts, strict=True)
    ]
    return Turns(parts, inner, list(turns.values()), global_batch)


def _of_parts(
    shards: Sequence[Shard], rows: Mapping[int, int], weights: Sequence[float], global_batch: int, seed: int,
    role: str,
) -> Order | Turns:  # fmt: skip
    """The order of shards of one size, in turns of a row of each subject, or class, that they have.

    `rows`: of each subject, of all sizes. One with few of this size has few turns.
    """
    if len(weights) == 1:
        return _of_one(shards, global_batch, seed, role)
    here = _rows_by_part(shards)
    numbers = sorted(here)
    parts = [[k for k, shard in enumerate(shards) if shard.part == number] for number in numbers]
    inner = [
        _of_one([shards[k] for k in part], 1, seed, f"{role} {number}")
        for number, part in zip(numbers, parts, strict=True)
    ]
    return Turns(parts, inner, [weights[number] * (here[number] / rows[number]) for number in numbers])


def _rows_by_part(shards: Sequence[Shard]) -> Counter[int]:
    """The rows of an epoch, by the number of their subject, or class."""
    rows: Counter[int] = Counter()
    for shard in shards:
        rows[shard.part] += shard.epoch
    return rows


def _of_one(shards: Sequence[Shard], global_batch: int, seed: int, role: str) -> Order:
    repeats = tuple(shard.repeats for shard in shards)
    rows = tuple(shard.epoch for shard in shards)
    return Order(rows, global_batch, seed, role, repeats if any(repeats) else ())
