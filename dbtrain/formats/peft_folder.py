"""PEFT's folders, one a component: what `PeftModel.from_pretrained` reads."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from dbtrain import files
from dbtrain.adapters import AdapterState
from dbtrain.errors import ConfigError, reason
from dbtrain.families.base import Family
from dbtrain.formats.common import States

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def contents(state: AdapterState) -> dict[str, bytes | str]:
    """Contents of a PEFT folder, by file name."""
    named = {PREFIX + name: tensor for name, tensor in state.tensors.items()}
    return {
        WEIGHTS: safetensors.torch.save(named, {"format": "pt"}),
        CONFIG: json.dumps(state.config, indent=1) + "\n",
    }


def write(folder: Path, family: Family, states: States) -> None:
    for component, state in states.items():
        for name, content in contents(state).items():
            files.write_atomically(folder / component / name, content)


def read(folder: Path) -> AdapterState:
    """The adapter in a PEFT folder. Raises ConfigError if it is none."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        config["peft_type"], config["target_modules"]
    except (OSError, ValueError, SafetensorError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is no PEFT adapter: {reason(error)}") from error
    return AdapterState({name.removeprefix(PREFIX): t for name, t in tensors.items()}, config)
