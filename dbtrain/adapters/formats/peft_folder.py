"""PEFT's format: a folder per component, for `PeftModel.from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from dbtrain.adapters.formats import limits
from dbtrain.adapters.formats.common import CONFIGS, Content
from dbtrain.adapters.state import AdapterState
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def contents(state: AdapterState) -> dict[str, bytes | str]:
    """The contents of a PEFT folder by file name."""
    named = {PREFIX + name: tensor for name, tensor in state.tensors.items()}
    return {
        WEIGHTS: files.sorted_header(safetensors.torch.save(named, {"format": "pt"}), {CONFIGS: "{}"}),
        CONFIG: json.dumps(state.config, indent=1) + "\n",
    }


def write(folder: Path, content: Content) -> None:
    for component, state in content.states.items():
        for name, data in contents(state).items():
            files.write_atomically(folder / component / name, data)


def read(folder: Path) -> AdapterState:
    """The adapter in a PEFT folder. Raises ConfigError if it is not one."""
    try:
        config = files.read_json(folder / CONFIG)
        limits.check_file(folder / WEIGHTS)
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        config["peft_type"], config["target_modules"]
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is not a PEFT adapter: {reason(error)}") from error
    return AdapterState({name.removeprefix(PREFIX): t for name, t in tensors.items()}, config)
