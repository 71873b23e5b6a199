"""Diffusers' format: a file for a pipeline's `load_lora_weights`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers.loaders
from diffusers.utils import convert_state_dict_to_diffusers

from dbtrain.adapters.formats.common import CONFIGS, Content
from dbtrain.adapters.formats.names import nested
from dbtrain.adapters.state import MAGNITUDE
from dbtrain.runtime import files

FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights(folder)` looks for
METADATA = "lora_adapter_metadata"  # Diffusers' key in the file's header


def write(path: Path, content: Content) -> None:
    """Write Diffusers' file with Diffusers' own mixin, which saves importing the pipeline.

    The metadata contains alpha, which loaders would otherwise take to be the rank.
    """
    layers: dict[str, Any] = {}
    for component, state in content.states.items():
        tensors = state.tensors
        if component in content.family.text_encoders:  # Transformers drops a magnitude without `.weight`
            tensors = {f"{k}.weight" if k.endswith(MAGNITUDE) else k: t for k, t in tensors.items()}
        named = tensors if component == "transformer" else diffusers_keys(tensors)
        layers[f"{component}_lora_layers"] = named
        layers[f"{component}_lora_adapter_metadata"] = state.config
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        mixin = getattr(diffusers.loaders, content.family.lora_mixin)
        mixin.save_lora_weights(part.parent, weight_name=part.name, **layers)
        data = part.read_bytes()
    finally:
        part.unlink(missing_ok=True)
    files.write_atomically(path, files.sorted_header(data, {CONFIGS: "{}"}))


def diffusers_keys(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A component's adapter under the names that Diffusers' loaders read.

    Diffusers' converter renames only attention layers, and its UNet loader infers the naming of all layers
    from the first key, so half of a mixed file would silently not load. An adapter with other layers
    therefore keeps PEFT's names, which loaders also read.

    CLIP layers are below `text_model.`, as in older files and in every loader, although transformers 5.6
    removed that level from CLIPTextModel (huggingface/diffusers#13984).
    """
    peft_keys = {nested(name): tensor for name, tensor in sorted(tensors.items())}
    converted = convert_state_dict_to_diffusers(peft_keys)
    plain = all(".lora_A." not in name and ".lora_B." not in name for name in converted)
    return converted if plain else peft_keys
