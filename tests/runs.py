"""What a run leaves in its folders, to compare two of them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

EXPORT = Path("export") / "pytorch_lora_weights.safetensors"


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The distance of two adapters, relative to the length of the second.

    All tensors count at once: where gradients are nearly zero, AdamW turns their rounding into whole steps.
    """
    assert ours.keys() == theirs.keys()
    square = sum((ours[name] - theirs[name]).square().sum().item() for name in ours)
    return (square / sum(tensor.square().sum().item() for tensor in theirs.values())) ** 0.5


def relative(one: Path, other: Path) -> float:
    """The distance of the adapters that two runs exported."""
    return distance(load_file(one / EXPORT), load_file(other / EXPORT))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
