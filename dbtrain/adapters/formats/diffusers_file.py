"""Diffusers' format: a file for a pipeline's `load_lora_weights`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers.loaders
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import Tensor

from dbtrain.adapters.formats.common import Modules, States, lora_config, native, nested
from dbtrain.adapters.state import AdapterState
from dbtrain.models.families.family import Family
from dbtrain.runtime import files

FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights(folder)` looks for
METADATA = "lora_adapter_metadata"  # Diffusers' key in the file's header


def write(folder: Path, family: Family, states: States) -> None:
    """Write Diffusers' file with Diffusers' own mixin, which saves importing the pipeline.

    The metadata contains alpha, which loaders would otherwise take to be the rank.
    """
    layers: dict[str, Any] = {}
    for component, state in states.items():
        layers[f"{component}_lora_layers"] = diffusers_keys(state.tensors)
        layers[f"{component}_lora_adapter_metadata"] = state.config
    part = folder.with_name(f".{folder.name}.tmp")
    try:
        getattr(diffusers.loaders, family.lora_mixin).save_lora_weights(part, weight_name=FILE, **layers)
        files.write_atomically(folder / FILE, files.sorted_header((part / FILE).read_bytes()))
    finally:
        shutil.rmtree(part, ignore_errors=True)


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


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], modules: Modules) -> States:
    """The adapters in Diffusers' file by component, under PEFT's names."""
    states = {}
    for component, names in modules.items():
        mine = {
            name.removeprefix(f"{component}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{component}.")
        }
        if not mine:
            continue
        if component.startswith("text_encoder"):
            mine = convert_state_dict_to_peft(mine) if any("linear_layer" in name for name in mine) else mine
            mine = {native(name, names): tensor for name, tensor in mine.items()}
        else:
            mine = convert_unet_state_dict_to_peft(mine) if any(".lora." in name for name in mine) else mine
        config = {key.removeprefix(f"{component}."): value for key, value in metadata.items()
                  if key.startswith(f"{component}.")}  # fmt: skip
        states[component] = AdapterState(mine, lora_config(mine) | config)
    return states
