"""The safetensors files of a component, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

PICKLES = ("*.bin", "*.ckpt", "*.pt")


def variant_of(path: Path) -> str | None:
    """The variant in the name of a safetensors file, e.g. fp16 of `model.fp16-00001-of-00002.safetensors`."""
    return path.name.removesuffix(".safetensors").partition(".")[2].partition("-")[0] or None


def lack(folder: Path, variant: str | None, anew: str) -> tuple[str, str]:
    """What a folder has in place of weights of a variant, and what to do: `anew`, if it has none at all."""
    if other := sorted(folder.glob("*.safetensors")):
        return (
            f"{folder} has no weights of variant {variant or 'null'}, only {other[0].name}",
            f"set model.variant: {variant_of(other[0]) or 'null'}",
        )
    if pickles := [path.name for kind in PICKLES for path in folder.glob(kind)]:
        return (
            f"{folder} has its weights only as a pickle ({pickles[0]}), which can run code when loaded",
            "get its .safetensors files, or, if you trust it, convert it with Diffusers' "
            "save_pretrained(safe_serialization=True)",
        )
    return f"{folder} has no weights (*.safetensors)", anew


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
