"""ComfyUI's format for transformers, without alphas. Diffusers' loaders read it too.

Diffusers' loaders read it too. What the original code has as one layer is joined. Some models' files have
Diffusers' names, which ComfyUI knows for them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dbtrain.adapters.formats import fused
from dbtrain.adapters.formats.common import CONFIGS, Content, States, alpha_key, by_module, strength
from dbtrain.adapters.formats.header import network, serialized
from dbtrain.adapters.formats.names import nested, original_names
from dbtrain.adapters.state import MAGNITUDE, AdapterState
from dbtrain.models.families.family import Family
from dbtrain.runtime import files

# The tensor that a layer's scale is multiplied into: the first of these that it has.
SCALED = ("lora_B.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")


def components(family: Family) -> tuple[str, ...]:
    """What a file can hold: the denoiser; beside Diffusers' names, text encoders too."""
    if family.comfyui_prefix == family.denoiser:
        return family.adaptable
    return (family.denoiser,) if family.original or family.keeps_names else ()


def refuses(family: Family, states: States) -> str | None:
    """What of an adapter cannot be joined to the layers of the original code."""
    parts = Counter(re.sub(r"\\\d", r"\\d+", name) for _, name in family.original)
    for state in states.values():
        for place, found in _places(family, by_module(state)).items():
            count = sum(number for name, number in parts.items() if re.fullmatch(name, place))
            if count > 1 and state.config["peft_type"] == "LOKR":
                return f"a lokr adapter of {found[0]}, which the original code joins with other layers"
            if len(found) < count and state.config.get("use_dora"):
                return f"a DoRA adapter of {found[0]} without the layers that the original code joins with it"
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
            tensors |= {f"{family.comfyui_prefix}.{place}.{part}": tensor for part, tensor in layer.items()}
    for encoder in content.states.keys() - {family.denoiser}:
        text = content.states[encoder]
        tensors |= {
            f"{encoder}.{nested(module)}.{part}": tensor
            for module, layer in by_module(text).items()
            for part, tensor in _layer(text, module, layer).items()
        }
    configs = {component: _unscaled(one.config) for component, one in sorted(content.states.items())}
    header = {**network(configs[family.denoiser]), **content.about, CONFIGS: json.dumps(configs)}
    files.write_atomically(path, serialized(tensors, header))


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
