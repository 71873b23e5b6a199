"""What the formats share: states, names, strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dbtrain.adapters.state import AdapterState
from dbtrain.runtime.errors import ConfigError

States = Mapping[str, AdapterState]  # by component
Modules = Mapping[str, Sequence[str]]  # by component: names of the base's modules
MAGNITUDE = "lora_magnitude_vector"  # DoRA's, (out,)


def nested(name: str) -> str:
    """A CLIP layer's name below `text_model.`, where files have it; other names as they are."""
    return f"text_model.{name}" if name.startswith("encoder.layers.") else name


def native(name: str, names: Sequence[str]) -> str:
    """A name below `text_model.` as the installed transformers has it."""
    flat = any(other.startswith("encoder.layers.") for other in names)
    return name.removeprefix("text_model.") if flat else name


def by_module(state: AdapterState) -> dict[str, dict[str, Tensor]]:
    """module -> tensor's own name -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.tensors.items():
        for mark in (".lora_", ".hada_", ".lokr_"):
            module, found_mark, part = key.rpartition(mark)
            if found_mark:
                found.setdefault(module, {})[mark[1:] + part] = tensor
                break
    return found


def alpha_in(config: Mapping[str, Any]) -> float:
    return config["lora_alpha"] if config["peft_type"] == "LORA" else config["alpha"]


def scale_of(config: Mapping[str, Any]) -> float:
    """By what the update is multiplied."""
    rank = config["r"]
    return alpha_in(config) / (rank**0.5 if config.get("use_rslora") else rank)


def one_rank(tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> int:
    """The one rank of all layers. Raises ConfigError if they differ, or if it cannot be told."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(parts)}
    if len(ranks) != 1:
        raise ConfigError(f"its layers have {'different' if ranks else 'no'} ranks {sorted(ranks) or ''}")
    return ranks.pop()


def lora_config(tensors: Mapping[str, Tensor], alpha: float | None = None) -> dict[str, Any]:
    """PEFT's settings of a LoRA that came without them."""
    rank = one_rank(tensors, ("lora_A.weight",))
    layers = {name.rpartition(".lora_A.")[0] for name in tensors if ".lora_A." in name}
    strength = float(rank if alpha is None else alpha)
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": int(strength) if strength.is_integer() else strength,
        "target_modules": sorted(layers), "use_dora": any(MAGNITUDE in name for name in tensors),
        "use_rslora": False, "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
