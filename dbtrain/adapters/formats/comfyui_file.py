"""ComfyUI's format for transformers: the module names of the model's original code, without alphas.

Diffusers' loaders read it too. What the original code has as one layer is joined. Some models' files have
Diffusers' names, which ComfyUI knows for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dbtrain.adapters.formats import fused
from dbtrain.adapters.formats.common import Content, States, alpha_key, by_module, strength
from dbtrain.adapters.formats.kohya_file import CONFIGS, FILE
from dbtrain.adapters.formats.names import original_names
from dbtrain.adapters.state import MAGNITUDE, AdapterState
from dbtrain.models.families.family import Family
from dbtrain.runtime import files

__all__ = ["FILE", "refuses", "write"]

PREFIX = "diffusion_model"
# The tensor that a layer's scale is multiplied into: the first of these that it has.
SCALED = ("lora_B.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")


def refuses(family: Family, states: States) -> str | None:
    """What of an adapter cannot be joined to the layers of the original code."""
    for state in states.values():
        layers = by_module(state)
        joined = [found for found in _places(family, layers).values() if len(found) > 1]
        if joined and state.config["peft_type"] == "LOKR":
            return f"a lokr adapter of {joined[0][0]}, which the original code joins with other layers"
    return None


def write(path: Path, content: Content) -> None:
    assert content.names, "the layers that have no adapter take part in a joined one"
    family = content.family
    state = content.states[family.denoiser]
    layers = {module: _layer(state, module, layer) for module, layer in by_module(state).items()}
    sizes = content.names(family.denoiser)
    tensors: dict[str, Tensor] = {}
    places = _places(family, sizes)
    places |= {module: [module] for module in layers.keys() - {m for every in places.values() for m in every}}
    for place, modules in places.items():
        if found := [layers.get(module, {}) for module in modules if any(m in layers for m in modules)]:
            layer = found[0]
            if len(found) > 1:
                layer = fused.join(found, [sizes[module] for module in modules])
            tensors |= {f"{PREFIX}.{place}.{part}": tensor for part, tensor in layer.items()}
    header = {**content.about, CONFIGS: json.dumps({family.denoiser: _unscaled(state.config)})}
    data = safetensors.torch.save(dict(sorted(tensors.items())), header)
    files.write_atomically(path, files.sorted_header(data))


def _places(family: Family, modules: Iterable[str]) -> dict[str, list[str]]:
    """Name in the file -> the modules that are one there."""
    return {} if family.keeps_names else original_names(family, modules)


def _layer(state: AdapterState, module: str, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors with its scale multiplied in."""
    found = {name: tensor for name, tensor in layer.items() if name != MAGNITUDE}
    if MAGNITUDE in layer:
        found["dora_scale"] = layer[MAGNITUDE].reshape(-1, 1)
    name = next(name for name in SCALED if name in found)
    return found | {name: (found[name] * strength(state.config, module)[1]).contiguous()}


def _unscaled(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's config for an adapter whose scale is 1."""
    ranks = config.get("rank_pattern") or {}
    return {**config, alpha_key(config): config["r"], "alpha_pattern": ranks, "use_rslora": False}
