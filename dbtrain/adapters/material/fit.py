"""Limits of the rank of adapters, and how well what they leave fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dbtrain.adapters.material.adapter_file import Place
from dbtrain.adapters.material.delta import Delta

EXACT = 1e-12  # relative errors below this are fp64's


@dataclass(frozen=True)
class Fit:
    """How well a layer of an adapter fits the change that it stands for."""

    rank: int
    norm: float  # of the change
    error: float  # norm of what is left out

    @property
    def relative(self) -> float:
        return self.error / self.norm if self.norm else 0.0


Fits = dict[Place, Fit]


@dataclass(frozen=True)
class Limit:
    """The rank of a layer: at most a number, a share of the squared norm to keep, or else all that it has."""

    rank: int | None = None
    energy: float | None = None

    def of(self, delta: Delta) -> int:
        if self.energy is not None:
            return min(delta.rank_for(self.energy), self.rank or delta.rank)
        return min(self.rank or delta.rank, delta.rank)

    def fit(self, delta: Delta) -> tuple[Delta, Fit]:
        """A change within this limit, and how well it fits."""
        rank = self.of(delta)
        if rank == delta.rank and self.energy is None:
            return delta, Fit(rank, delta.norm, 0.0)
        return delta.resized(rank), Fit(rank, delta.norm, delta.error(rank))


def table(fits: Fits, most: int = 5) -> Iterator[str]:
    """Lines about fits: all of them together, and those that fit worst."""
    ranks = [fit.rank for fit in fits.values()]
    norm, error = (math.hypot(*(getattr(fit, name) for fit in fits.values())) for name in ("norm", "error"))
    span = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    share = error / norm if norm else 0.0
    yield f"{len(fits)} layers of rank {span}, relative error {share:.3g}"
    worst = sorted(fits.items(), key=lambda item: -item[1].relative)[:most]
    for (component, module), fit in worst:
        if fit.relative > EXACT:
            yield f"  {fit.relative:.3g}  rank {fit.rank}  {component}.{module}"


def as_json(fits: Fits) -> list[dict[str, object]]:
    """Fits as values for JSON, a layer each."""
    return [
        {"component": component, "layer": module, "rank": fit.rank, "norm": fit.norm, "error": fit.relative}
        for (component, module), fit in fits.items()
    ]
