"""kohya's format, with LyCORIS's names for LoHa and LoKr, for A1111, ComfyUI and Forge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dbtrain.adapters.formats.common import CONFIGS, Content, by_module, strength
from dbtrain.adapters.formats.header import network, serialized
from dbtrain.adapters.formats.names import kohya_names
from dbtrain.adapters.formats.reading import WHOLE, rank_of
from dbtrain.adapters.formats.word_file import bundled
from dbtrain.adapters.state import MAGNITUDE
from dbtrain.runtime import files

FILE = "{name}.safetensors"  # programs list files of many adapters in one folder

# PEFT's names of a layer's tensors -> kohya's. LyCORIS and PEFT have the same names.
PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def write(path: Path, content: Content) -> None:
    tensors: dict[str, Tensor] = {}
    first = next(iter(content.states.values())).config
    for component, state in content.states.items():
        layers = by_module(state)
        named = kohya_names(content.family, component, layers, content.names)
        for module, layer in layers.items():
            rank, scale = strength(state.config, module)
            found = _kohya_layer(layer, rank, scale)
            tensors |= {f"{named[module]}.{part}": tensor for part, tensor in found.items()}
    configs = {component: state.config for component, state in content.states.items()}
    header = {**network(first), **content.about, CONFIGS: json.dumps(configs)}
    tensors |= bundled(content.family, content.words)
    files.write_atomically(path, serialized(tensors, header))


def _kohya_layer(layer: Mapping[str, Tensor], rank: int, scale: float) -> dict[str, Tensor]:
    """A layer's tensors under kohya's names, with the alpha that gives the right scale.

    The CP decomposition of LoKr is multiplied out: ComfyUI and Forge do not read it. Readers ignore the
    scale of a LoKr layer without decomposed factors, as LyCORIS does, so it is multiplied into one of them.
    """
    found = {PARTS.get(name, name): tensor for name, tensor in layer.items() if name != MAGNITUDE}
    if MAGNITUDE in layer:
        up = layer["lora_B.weight"]
        found["dora_scale"] = layer[MAGNITUDE].reshape(-1, *[1] * (up.dim() - 1))
    if "lokr_t2" in layer:
        t2, a, b = (found.pop(f"lokr_{name}") for name in ("t2", "w2_a", "w2_b"))
        found["lokr_w2"] = torch.einsum("ijkl, ip, jr -> prkl", t2, a, b).contiguous()
    if found.keys() >= WHOLE:
        found["lokr_w1"], scale = found["lokr_w1"] * scale, 1.0
    return found | {"alpha": torch.tensor(float(scale * (rank_of(found) or rank)))}
