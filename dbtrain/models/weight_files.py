"""The safetensors files of a component, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


class WeightFiles:
    """The tensors of several files by name, as one mapping. Reading one reads no other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._files.keys()

    @cached_property
    def _files(self) -> dict[str, Any]:
        """The open file of each tensor."""
        files = [safe_open(path, "pt") for path in self.paths]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor as it is stored, or some rows of it. Raises KeyError if no file has it."""
        file = self._files[name]
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]

    def encoded(self, name: str, storage: str, rows: slice | None = None) -> tuple[Tensor, Tensor] | None:
        """What `quantization.encode` gives for a weight, or some rows of it, if that is how it is stored."""
        return None
