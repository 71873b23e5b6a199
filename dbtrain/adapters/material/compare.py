"""How two adapters differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbtrain.adapters.material.adapter_file import AdapterFile, Place
from dbtrain.adapters.material.merge import aligned


@dataclass(frozen=True)
class Difference:
    """How two adapters differ in a part. Norms of all changes in it."""

    layers: int
    one: float
    other: float
    apart: float
    dot: float

    @property
    def relative(self) -> float:
        """The distance, relative to the norm of the first."""
        if not self.one:
            return math.inf if self.other else 0.0
        return self.apart / self.one

    @property
    def cosine(self) -> float:
        return self.dot / (self.one * self.other) if self.one and self.other else math.nan


Alone = Mapping[str, Sequence[Place]]  # "first" and "second" -> the layers that only this one has


def difference(one: AdapterFile, other: AdapterFile) -> tuple[dict[str, Difference], Alone]:
    """How two adapters differ in each part, and the layers that only one of them has."""
    found: dict[str, list[tuple[float, ...]]] = {}  # by part, of each layer: squared norms, dot product
    alone: dict[str, list[Place]] = {"first": [], "second": []}
    for place, rules in aligned([one, other]).items():
        deltas = {number: rule() for number, rule in rules.items()}
        squares = [deltas[number].norm ** 2 if number in deltas else 0.0 for number in (0, 1)]
        apart, dot = sum(squares), 0.0
        if len(deltas) == 2:
            apart, dot = (deltas[0] - deltas[1]).norm ** 2, deltas[0].dot(deltas[1])
        else:
            alone["first" if 0 in deltas else "second"].append(place)
        found.setdefault(place[0], []).append((*squares, apart, dot))
    return {part: _together(rows) for part, rows in found.items()}, alone


def _together(rows: Sequence[tuple[float, ...]]) -> Difference:
    one, other, apart, dot = map(math.fsum, zip(*rows, strict=True))
    return Difference(len(rows), math.sqrt(one), math.sqrt(other), math.sqrt(apart), dot)


def table(parts: Mapping[str, Difference], alone: Alone) -> Iterator[str]:
    """A difference in lines for people."""
    for name, part in parts.items():
        yield (
            f"{name}: {part.layers} layers, relative distance {part.relative:.3g}, cosine {part.cosine:.6f}, "
            f"norms {part.one:.4g} and {part.other:.4g}"
        )
    for which, places in alone.items():
        if places:
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            yield f"only in the {which}: {'.'.join(places[0])}{more}"


def as_json(parts: Mapping[str, Difference], alone: Alone) -> dict[str, Any]:
    """A difference as values for JSON; null for a number that there is not."""
    return {
        "parts": {
            name: {
                "layers": part.layers, "norms": [part.one, part.other], "distance": part.apart,
                "relative": part.relative if math.isfinite(part.relative) else None,
                "cosine": part.cosine if math.isfinite(part.cosine) else None,
            }
            for name, part in parts.items()
        },
        "alone": {which: [".".join(place) for place in places] for which, places in alone.items()},
    }  # fmt: skip
