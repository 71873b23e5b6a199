"""Adapters by kind: attaching one to a component, taking its weights out, putting them back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dbtrain.adapters import targets
from dbtrain.adapters.state import AdapterState
from dbtrain.config.adapter import Adapter, AdapterSettings, alpha_of
from dbtrain.runtime import rng
from dbtrain.runtime.errors import ConfigError, reason

NAME = "default"  # PEFT's name of the one adapter that is trained


@dataclass(frozen=True)
class Kind:
    """An adapter kind: its PEFT config, and the start of one layer's weights."""

    config: Any  # PEFT's class of settings
    options: Callable[[AdapterSettings], dict[str, Any]]
    start: Callable[[Any, AdapterSettings], None]
    """(layer, settings): weights from torch's global generator, the update itself zero."""
    layer: type


def _start_lora(layer: Any, cfg: AdapterSettings) -> None:
    """Diffusers' start is `gaussian`: the down projection normal with std 1/rank, the up projection zero."""
    if cfg.init == "orthogonal":
        layer.orthogonal_init(NAME)
    else:
        layer.reset_lora_parameters(NAME, True if cfg.init == "kaiming" else cfg.init)


def _start_loha(layer: Any, cfg: AdapterSettings) -> None:
    """LyCORIS's start: PEFT's own makes one factor so small that hundreds of steps are lost."""
    for name, std in (("w1_a", 0.1), ("w1_b", 1.0), ("w2_a", 0.0), ("w2_b", 1.0), ("t1", 0.1), ("t2", 0.1)):
        weights = getattr(layer, f"hada_{name}")
        if NAME in weights:
            nn.init.normal_(weights[NAME], std=std)


def _start_lokr(layer: Any, cfg: AdapterSettings) -> None:
    """LyCORIS's start: PEFT's own zeroes the left factor, through which all gradients go."""
    layer.reset_adapter_parameters_lycoris_way(NAME)


def _lora_options(cfg: AdapterSettings) -> dict[str, Any]:
    return {
        "lora_alpha": alpha_of(cfg), "lora_dropout": cfg.dropout, "use_rslora": cfg.rslora,
        "use_dora": cfg.dora, "bias": cfg.bias,
        "init_lora_weights": True if cfg.init == "kaiming" else cfg.init,
    }  # fmt: skip


def _lycoris_options(cfg: AdapterSettings) -> dict[str, Any]:
    return {
        "alpha": alpha_of(cfg), "rank_dropout": cfg.rank_dropout, "module_dropout": cfg.module_dropout,
        "use_effective_conv2d": cfg.effective_conv2d,
    }  # fmt: skip


def _lokr_options(cfg: AdapterSettings) -> dict[str, Any]:
    decomposition = {"decompose_both": cfg.decompose_both, "decompose_factor": cfg.decompose_factor}
    return _lycoris_options(cfg) | decomposition


# LoRA: Hu et al. 2021, arXiv:2106.09685 (DoRA: arXiv:2402.09353; rsLoRA: arXiv:2312.03732). LoHa:
# Hyeon-Woo et al. 2021, "FedPara", arXiv:2108.06098. LoKr: Edalati et al. 2022, "KronA", arXiv:2212.10650.
KINDS = {
    "lora": Kind(LoraConfig, _lora_options, _start_lora, LoraLayer),
    "loha": Kind(LoHaConfig, _lycoris_options, _start_loha, LoHaLayer),
    "lokr": Kind(LoKrConfig, _lokr_options, _start_lokr, LoKrLayer),
}


def attach(
    module: nn.Module, cfg: AdapterSettings, part: str, seed: int, without: Sequence[str] = ()
) -> None:
    """Put a new adapter on `module`, its weights fp32 and a function of `seed` alone.

    `part` is "denoiser" or "text_encoder": the row of PRESETS. Modules below a name in `without`
    are left alone. Raises ConfigError if a target names no module.
    """
    kind = KINDS[cfg.kind]
    chosen = targets.select(targets.Modules.of(module, without), cfg.targets, part)
    _silence_dropout(module)
    config = kind.config(r=cfg.rank, target_modules=chosen, **kind.options(cfg))
    try:
        inject_adapter_in_model(config, module, adapter_name=NAME)
    except (ValueError, TypeError) as error:  # a target of a type that PEFT cannot adapt
        raise ConfigError(f"{targets.SECTIONS[part]}.targets is {cfg.targets!r}: {reason(error)}") from error
    # Start in fp32, whatever the base is in: the same start in every precision.
    for parameter in trainable(module).values():
        parameter.data = parameter.data.float()
    with rng.seeded(seed, "adapter"):
        for layer in module.modules():
            if isinstance(layer, kind.layer):
                kind.start(layer, cfg)
    _train_mode(module, cfg)


def _silence_dropout(module: nn.Module) -> None:
    """Turn off the base's own dropout (T5 has some): it is frozen, and its masks would be no function
    of the step."""
    layer: Any
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif isinstance(vars(layer).get("dropout"), float):  # its own, not its config's
            layer.dropout = 0.0


def _train_mode(module: nn.Module, cfg: AdapterSettings) -> None:
    """`module.train()`; LoHa and LoKr layers only where they drop something.

    In train mode PEFT's layers ask a random number whether to take part at all: a graph break.
    """
    module.train()
    if not (cfg.rank_dropout or cfg.module_dropout):
        for layer in module.modules():
            if isinstance(layer, (LoHaLayer, LoKrLayer)):
                layer.eval()


def drops(cfg: Adapter) -> bool:
    """Whether any adapter draws random masks."""
    every = (cfg, cfg.text_encoder) if cfg.text_encoder else (cfg,)
    return any(one.dropout or one.rank_dropout or one.module_dropout for one in every)


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
