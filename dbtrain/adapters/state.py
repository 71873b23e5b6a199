"""An adapter's weights and settings, apart from any model."""

from __future__ import annotations

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
