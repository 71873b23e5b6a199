"""Adapters by kind: attaching one to a component, taking its weights out, putting them back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dbtrain import rng
from dbtrain.config import Adapter
from dbtrain.errors import ConfigError

NAME = "default"  # PEFT's name of the one adapter that is trained


def _lora(cfg: Adapter, targets: Sequence[str]) -> PeftConfig:
    """Hu et al. 2021, "LoRA", arXiv:2106.09685; Diffusers' start: A normal with std 1/rank, B zero."""
    return LoraConfig(
        r=cfg.rank,
        lora_alpha=_whole(cfg.alpha or cfg.rank),
        lora_dropout=cfg.dropout,
        target_modules=list(targets),
        init_lora_weights="gaussian",
    )


KINDS: dict[str, Callable[[Adapter, Sequence[str]], PeftConfig]] = {"lora": _lora}


@dataclass(frozen=True)
class AdapterState:
    """An adapter's weights, fp32 on the CPU, and its PEFT config as JSON-able values."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def attach(module: nn.Module, cfg: Adapter, targets: Sequence[str], seed: int) -> None:
    """Put a new adapter on `module`, its weights fp32 and a function of `seed` alone.

    Raises ConfigError if a target names no module.
    """
    wanted = targets if cfg.targets == "auto" else cfg.targets
    names = [name for name, _ in module.named_modules()]
    idle = [want for want in wanted if not any(f".{name}".endswith(f".{want}") for name in names)]
    if idle or not wanted:
        raise ConfigError(
            f"adapter.targets: no module of {type(module).__name__} is called "
            f"{', '.join(map(repr, idle)) or 'nothing (the list is empty)'}; "
            f"use 'auto' or names such as {', '.join(map(repr, targets))}"
        )
    try:
        inject_adapter_in_model(KINDS[cfg.kind](cfg, wanted), module, adapter_name=NAME)
    except ValueError as error:  # a target of a type that PEFT cannot adapt
        raise ConfigError(f"adapter.targets is {list(wanted)}: {error}") from error
    # Start in fp32, whatever the base is in: the same start in every precision.
    for parameter in trainable(module).values():
        parameter.data = parameter.data.float()
    with rng.seeded(seed, "adapter"):
        for layer in module.modules():
            if isinstance(layer, LoraLayer):
                layer.reset_lora_parameters(NAME, "gaussian")


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def collect(module: nn.Module) -> AdapterState:
    """The adapter of a component, as copies that later steps do not change.

    `save_embedding_layers=False`: PEFT's default may ask the Hub for the base's config.
    """
    found = get_peft_model_state_dict(module, adapter_name=NAME, save_embedding_layers=False)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in sorted(found.items())
    }
    assert not any("_orig_mod." in name or "module." in name for name in tensors)
    peft_config: Any = module.peft_config
    config = peft_config[NAME].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    return AdapterState(tensors, json.loads(json.dumps(config, default=list)))


def restore(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put weights that `collect` took back into the same adapter. Raises ConfigError if they differ."""
    mine = {
        name.replace(f".{NAME}.", ".").removesuffix(f".{NAME}"): parameter
        for name, parameter in trainable(module).items()
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in mine.items()}
    odd = set(mine.keys() ^ tensors.keys())
    odd |= {name for name in mine.keys() & tensors.keys() if tensors[name].shape != shapes[name]}
    if odd:
        raise ConfigError(f"the checkpoint's adapter has other layers, e.g. {sorted(odd)[0]}")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])


def _whole(value: float) -> Any:
    """8.0 as 8: alpha is an integer in most readers' eyes."""
    return int(value) if value == int(value) else value
