"""What a run leaves in its folders, to compare two of them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

EXPORT = Path("export") / "pytorch_lora_weights.safetensors"


def relative(one: Path, other: Path) -> float:
    a, b = load_file(one / EXPORT), load_file(other / EXPORT)
    return max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
