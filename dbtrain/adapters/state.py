"""An adapter's weights and settings, apart from any model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

MAGNITUDE = "lora_magnitude_vector"  # DoRA's, (out,)


@dataclass(frozen=True)
class AdapterState:
    """An adapter's weights, fp32 on the CPU, and its PEFT config as JSON-serializable values."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def layout(self) -> dict[str, Any]:
        """Kind, strength and shapes. Adapters with the same layout can replace each other."""
        keys = ("peft_type", "r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        strength = {key: self.config.get(key) or None for key in keys}
        return strength | {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT config as JSON-serializable values, its modules in order."""
    found = {**config, "target_modules": sorted(config["target_modules"])}
    return dict(json.loads(json.dumps(found, default=list)))


def patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """PEFT's patterns of the modules that differ; one a value, as it tries each of them on every module.

    A name also means the modules that end with it, unless a `^` says that it is the whole name.
    """
    modules: dict[float, list[str]] = {}
    for module, value in values.items():
        if value != usual:
            longer = any(other.endswith(f".{module}") for other in values)
            modules.setdefault(value, []).append(f"^{module}" if longer else module)
    return {"|".join(sorted(names)): value for value, names in sorted(modules.items())}
