"""kohya's format, with LyCORIS's names for LoHa and LoKr, for A1111, ComfyUI and Forge."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dbtrain.adapters.formats.common import (
    MAGNITUDE,
    Modules,
    States,
    alpha_in,
    by_module,
    lora_config,
    nested,
    one_rank,
    scale_of,
)
from dbtrain.adapters.state import AdapterState
from dbtrain.models.families.family import Family
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

FILE = "kohya.safetensors"
CONFIGS = "dbtrain"  # key in the header: PEFT's config of each component
WHOLE = {"lokr_w1", "lokr_w2"}  # a LoKr layer without decomposed factors

# PEFT's names of a layer's tensors -> kohya's. LyCORIS and PEFT have the same names.
PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def write(folder: Path, family: Family, states: States) -> None:
    tensors: dict[str, Tensor] = {}
    first = next(iter(states.values())).config
    for component, state in states.items():
        for module, layer in by_module(state).items():
            name = f"{family.kohya[component]}_{nested(module).replace('.', '_')}"
            tensors |= {
                f"{name}.{part}": tensor for part, tensor in _kohya_layer(layer, state.config).items()
            }
    header = {
        "ss_network_module": "networks.lora" if first["peft_type"] == "LORA" else "lycoris.kohya",
        "ss_network_dim": str(first["r"]), "ss_network_alpha": str(alpha_in(first)),
        CONFIGS: json.dumps({component: state.config for component, state in states.items()}),
    }  # fmt: skip
    data = safetensors.torch.save(dict(sorted(tensors.items())), header)
    files.write_atomically(folder / FILE, files.sorted_header(data))


def _kohya_layer(layer: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A layer's tensors under kohya's names, with the alpha that gives the right scale.

    Readers ignore the scale of a LoKr layer without decomposed factors, as LyCORIS does, so it is
    multiplied into one of them.
    """
    rank, scale = config["r"], scale_of(config)
    found = {PARTS.get(name, name): tensor for name, tensor in layer.items() if name != MAGNITUDE}
    if MAGNITUDE in layer:
        up = layer["lora_B.weight"]
        found["dora_scale"] = layer[MAGNITUDE].reshape(-1, *[1] * (up.dim() - 1))
    if found.keys() >= WHOLE:
        found["lokr_w1"], scale = found["lokr_w1"] * scale, 1.0
    return found | {"alpha": torch.tensor(float(scale * rank))}


def read(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], family: Family, modules: Modules
) -> States:
    """The adapters in kohya's file by component, under PEFT's names."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.partition(".")
        layers.setdefault(layer, {})[part] = tensor
    configs = files.json_object(header.get(CONFIGS, "{}"), "its header's settings")
    states = {}
    for component, prefix in family.kohya.items():
        known = {f"{prefix}_{nested(name).replace('.', '_')}": name for name in modules[component]}
        mine = {known[name]: layers.pop(name) for name in list(layers) if name in known}
        if mine:
            states[component] = _from_kohya(mine, configs.get(component))
    if layers:
        raise ConfigError(f"the base has no module for its layer {min(layers)}")
    return states


def _from_kohya(layers: Mapping[str, Mapping[str, Tensor]], config: dict[str, Any] | None) -> AdapterState:
    back = {kohya: peft for peft, kohya in PARTS.items()}
    tensors: dict[str, Tensor] = {}
    alphas = {
        layer["alpha"].item() for layer in layers.values() if "alpha" in layer and not layer.keys() >= WHOLE
    }
    for module, layer in layers.items():
        for part, tensor in layer.items():
            if part == "dora_scale":
                conv = layer["lora_down.weight"].dim() > 2
                tensors[f"{module}.{MAGNITUDE}"] = tensor.reshape((1, -1, 1, 1) if conv else -1)
            elif part != "alpha":
                tensors[f"{module}.{back.get(part, part)}"] = tensor
    if config is None:
        if len(alphas) > 1:
            raise ConfigError(f"its layers have different alphas ({', '.join(map(str, sorted(alphas)))})")
        config = _inferred(tensors, alphas.pop() if alphas else None)
    for module, layer in layers.items():
        if layer.keys() >= WHOLE:
            tensors[f"{module}.lokr_w1"] = layer["lokr_w1"] / scale_of(config)
    return AdapterState(tensors, config)


def _inferred(tensors: Mapping[str, Tensor], alpha: float | None) -> dict[str, Any]:
    """PEFT's config of another trainer's file, inferred from its tensors."""
    kinds = {re.sub(r".*\.(lora|hada|lokr)_.*", r"\1", name) for name in tensors}
    if len(kinds) != 1 or not kinds <= {"lora", "hada", "lokr"}:
        raise ConfigError(f"its layers must be of one kind, but are {', '.join(sorted(kinds)) or 'of none'}")
    kind = kinds.pop()
    if kind == "lora":
        return lora_config(tensors, alpha)
    parts = ("hada_w1_b",) if kind == "hada" else ("lokr_w2_b", "lokr_w1_b")
    if any(name.endswith(parts) for name in tensors):
        rank = one_rank(tensors, parts)
    else:  # no factor is decomposed, as in PEFT with any rank this large
        rank = max(max(tensor.shape[:2]) for tensor in tensors.values())
    return {
        "peft_type": {"hada": "LOHA", "lokr": "LOKR"}[kind], "r": rank, "alpha": alpha or rank,
        "target_modules": sorted({re.split(r"\.(?:hada|lokr)_", name)[0] for name in tensors}),
        "use_effective_conv2d": any(name.endswith(("hada_t1", "lokr_t2")) for name in tensors),
        **({"decompose_both": any(name.endswith("lokr_w1_b") for name in tensors)} if kind == "lokr" else {}),
    }  # fmt: skip
