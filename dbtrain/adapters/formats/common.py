"""Functions that the formats share: names, ranks and scales."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dbtrain.adapters.state import AdapterState
from dbtrain.runtime.errors import ConfigError

States = Mapping[str, AdapterState]  # by component
Modules = Mapping[str, Sequence[str]]  # by component: the names of the base's modules
MAGNITUDE = "lora_magnitude_vector"  # DoRA's, (out,)


def nested(name: str) -> str:
    """A module's name in files: CLIP layers are below `text_model.`."""
    return f"text_model.{name}" if name.startswith("encoder.layers.") else name


def native(name: str, names: Sequence[str]) -> str:
    """A module's name in the installed transformers: newer versions have no `text_model.`."""
    flat = any(other.startswith("encoder.layers.") for other in names)
    return name.removeprefix("text_model.") if flat else name


def by_module(state: AdapterState) -> dict[str, dict[str, Tensor]]:
    """Module -> name of the tensor within it -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.tensors.items():
        if match := re.fullmatch(r"(.*)\.((?:lora|hada|lokr)_.*)", key):
            found.setdefault(match[1], {})[match[2]] = tensor
    return found


def alpha_in(config: Mapping[str, Any]) -> float:
    return config["lora_alpha"] if config["peft_type"] == "LORA" else config["alpha"]


def scale_of(config: Mapping[str, Any]) -> float:
    """The factor of the update: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    rank = config["r"]
    return alpha_in(config) / (rank**0.5 if config.get("use_rslora") else rank)


def one_rank(tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> int:
    """The rank of all layers. Raises ConfigError if they differ, or if there are none."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(parts)}
    if len(ranks) != 1:
        raise ConfigError(f"its layers have {'different' if ranks else 'no'} ranks {sorted(ranks) or ''}")
    return ranks.pop()


def lora_config(tensors: Mapping[str, Tensor], alpha: float | None = None) -> dict[str, Any]:
    """PEFT's config of a LoRA, inferred from its tensors."""
    rank = one_rank(tensors, ("lora_A.weight",))
    layers = {name.rpartition(".lora_A.")[0] for name in tensors if ".lora_A." in name}
    strength = float(rank if alpha is None else alpha)
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": int(strength) if strength.is_integer() else strength,
        "target_modules": sorted(layers), "use_dora": any(MAGNITUDE in name for name in tensors),
        "use_rslora": False, "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
