"""The safetensors files of a component, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


class WeightFiles:
    """The tensors of several files by name, as one mapping. Reading one reads no other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    @cached_property
    def places(self) -> dict[str, Path]:
        """The file of each tensor."""
        found: dict[str, Path] = {}
        for path in self.paths:
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.places[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor as it is stored, or some rows of it. Raises KeyError if no file has it."""
        with safe_open(self.places[name], "pt") as file:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
