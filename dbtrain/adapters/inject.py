"""Adapters by kind: attaching them to components, collecting and restoring their weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dbtrain.adapters import targets, tokens
from dbtrain.adapters.state import MAGNITUDE, AdapterState, patterns, plain
from dbtrain.config.adapter import AdapterSettings, alpha_of
from dbtrain.models.block_swap import stored
from dbtrain.runtime import rng
from dbtrain.runtime.errors import ConfigError, reason

NAME = "default"  # PEFT's name of the trained adapter
warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several adapters are meant


@dataclass(frozen=True)
class Kind:
    """An adapter kind: its PEFT config and the initialization of its layers."""

    config: Any  # PEFT's config class
    options: Callable[[AdapterSettings], dict[str, Any]]
    start: Callable[[Any, AdapterSettings], None]
    """(layer, settings): initialize with torch's global generator, so that the update is zero."""
    layer: type


def _start_lora(layer: Any, cfg: AdapterSettings) -> None:
    """`gaussian` is Diffusers' initialization: normal with std 1/rank for A, zero for B."""
    if cfg.init == "orthogonal":  # PEFT's own makes new parameters, in the base's precision
        a, b = (factor[NAME].weight.data for factor in (layer.lora_A, layer.lora_B))
        q = torch.linalg.qr(torch.randn(len(a), len(a))).Q
        a.copy_((torch.randn(a.shape[1], len(a) // 2) @ q[0::2]).T / 10)
        b.copy_(torch.randn(len(a) // 2, len(b)).T @ q[1::2] / 10)
    else:
        layer.reset_lora_parameters(NAME, True if cfg.init == "kaiming" else cfg.init)


def _start_loha(layer: Any, cfg: AdapterSettings) -> None:
    """LyCORIS's initialization. PEFT's makes one factor so small that hundreds of steps are lost."""
    for name, std in (("w1_a", 0.1), ("w1_b", 1.0), ("w2_a", 0.0), ("w2_b", 1.0), ("t1", 0.1), ("t2", 0.1)):
        weights = getattr(layer, f"hada_{name}")
        if NAME in weights:
            nn.init.normal_(weights[NAME], std=std)


def _start_lokr(layer: Any, cfg: AdapterSettings) -> None:
    """LyCORIS's initialization. PEFT's sets the left factor to zero, through which all gradients pass."""
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
    module: nn.Module,
    cfg: AdapterSettings,
    part: str,
    seed: int,
    without: Sequence[str] = (),
    presets: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Add a new adapter to `module`, with fp32 weights on the CPU that depend on `seed` alone.

    `part`: "denoiser" or "text_encoder". Modules in `without` and their submodules get no adapter.
    `presets`: the family's own.
    Raises ConfigError if a target, or a pattern of `ranks`, matches no module.
    """
    kind = KINDS[cfg.kind]
    modules = targets.Modules.of(module, without)
    chosen = targets.select(modules, cfg.targets, part, presets)
    silence_dropout(module)
    ranks = targets.ranks(modules, chosen, cfg, part)
    config = kind.config(
        r=cfg.rank, target_modules=chosen, rank_pattern=patterns(ranks, cfg.rank),
        alpha_pattern=patterns(ranks if cfg.alpha is None else {}, cfg.rank), **kind.options(cfg),
    )  # fmt: skip
    try:
        inject_adapter_in_model(config, module, adapter_name=NAME)
    except (ValueError, TypeError) as error:  # a target of a type that PEFT cannot adapt
        why = f"targets is {cfg.targets!r}: {reason(error)}"
        if cfg.init == "orthogonal":
            why = "init is 'orthogonal', which needs linear layers and an even rank; use gaussian"
        raise ConfigError(f"{targets.SECTIONS[part]}.{why}") from error
    for name in without:  # whose biases no gradient reaches
        module.get_submodule(name).requires_grad_(False)
    # Initialize in fp32 on the CPU, whatever the base's dtype and device, so that all start from the same
    # weights. The device has a generator of its own.
    for parameter in trainable(module).values():
        parameter.data = parameter.data.to("meta" if parameter.is_meta else "cpu", torch.float32)
    start(module, cfg, seed)
    _train_mode(module, cfg)


def start(module: nn.Module, cfg: AdapterSettings, seed: int) -> None:
    """Give the adapter on `module` the weights from which training starts."""
    kind = KINDS[cfg.kind]
    with rng.seeded(seed, "adapter"):
        for layer in module.modules():
            if isinstance(layer, kind.layer):
                kind.start(layer, cfg)


def silence_dropout(module: nn.Module) -> None:
    """Disable the dropout of the frozen base (T5 has some): its masks would depend on more than the step."""
    layer: Any
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif isinstance(vars(layer).get("dropout"), float):  # the layer's attribute, not its config's
            layer.dropout = 0.0


def _train_mode(module: nn.Module, cfg: AdapterSettings) -> None:
    """Switch to train mode, except LoHa and LoKr layers without dropout.

    In train mode PEFT's layers compare a random number with their dropout, which breaks compiled graphs.
    """
    module.train()
    if not (cfg.rank_dropout or cfg.module_dropout):
        for layer in module.modules():
            if isinstance(layer, (LoHaLayer, LoKrLayer)):
                layer.eval()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, without the embeddings of a learned word."""
    named = module.named_parameters()
    return {name: p for name, p in named if p.requires_grad and not name.endswith(tokens.DIRECTION)}


def name_in_files(parameter: str, adapter: str = NAME) -> str | None:
    """The name of an adapter's parameter in files; None if it does not belong to `adapter`.

    PEFT drops the adapter's name, and from DoRA's magnitude `.weight` too.
    """
    found = re.fullmatch(rf"(.*\.(?:lora|hada|lokr)_\w+)\.{re.escape(adapter)}(\.\w+)?", parameter)
    if not found:
        return None
    return found[1] if found[1].endswith(MAGNITUDE) else found[1] + (found[2] or "")


def collect(module: nn.Module) -> AdapterState:
    """A copy of a component's adapter."""
    mine = {name_in_files(name) or name for name in trainable(module)}
    # PEFT's default for save_embedding_layers may ask the Hub for the base's config.
    found = get_peft_model_state_dict(module, adapter_name=NAME, save_embedding_layers=False)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in sorted(found.items())
        if name in mine
    }
    assert not any("_orig_mod." in name or "module." in name for name in tensors)
    return AdapterState(tensors, config_of(module))


def config_of(module: Any) -> dict[str, Any]:
    """The PEFT config of a component's adapter, as JSON-serializable values."""
    return plain(module.peft_config[NAME].to_dict())


# The settings that the shapes and the strength of an adapter depend on. A file's other settings are for
# training, or load and change what a stranger's file should not.
SHAPING = (
    "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "use_effective_conv2d", "decompose_both", "decompose_factor",
)  # fmt: skip


def put_on(module: nn.Module, state: AdapterState, name: str) -> dict[str, nn.Parameter]:
    """Add an adapter to `module` as `name`; return its parameters, yet to be filled, by their name in files.

    Raises what PEFT raises if it does not fit.
    """
    kind = KINDS[state.config["peft_type"].lower()]
    known = {field.name for field in fields(kind.config)} & set(SHAPING)
    options = {key: value for key, value in state.config.items() if key in known}
    wanted = sorted({re.split(r"\.(?:lora|hada|lokr)_", key)[0] for key in state.tensors
                      if not key.endswith(".bias") or ".lora_" in key})  # fmt: skip
    ends = tuple(f".{target}" for target in wanted)
    others = any(other.endswith(ends) and other not in wanted for other, _ in module.named_modules())
    options["target_modules"] = "|".join(map(re.escape, wanted)) if others else wanted
    options["init_lora_weights" if kind.config is LoraConfig else "init_weights"] = False
    for layer in module.modules():  # PEFT's LoRA reads this from the layer that it wraps
        if isinstance(layer, (LoHaLayer, LoKrLayer)) and isinstance(layer.get_base_layer(), nn.Conv2d):
            layer.groups = layer.get_base_layer().groups
    inject_adapter_in_model(kind.config(**options), module, adapter_name=name)
    return parameters(module, name)


def add(module: nn.Module, state: AdapterState, name: str) -> None:
    """Add an adapter to `module` as `name`, with its weights, for inference in the module's precision.

    Raises what PEFT raises if it does not fit.
    """
    like = next(module.parameters())
    fill(parameters := put_on(module, state, name), state)
    for value in parameters.values():
        value.data = value.data.to(like.device, like.dtype)  # not frozen, so that it is not swapped


def parameters(module: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their name in files."""
    return {
        unwrapped(name): parameter
        for label, parameter in module.named_parameters()
        if (name := name_in_files(label, adapter))
    }


def fill(parameters: Mapping[str, nn.Parameter], state: AdapterState) -> None:
    """Copy an adapter's weights, except biases of the base, into its parameters."""
    with torch.no_grad():
        for label, parameter in parameters.items():
            parameter.copy_(state.tensors[label])


def bias_changes(module: nn.Module, state: AdapterState) -> dict[nn.Parameter, Tensor]:
    """What an adapter adds to the base's biases."""
    biases = {
        unwrapped(f"{name}.{label}"): p
        for name, layer in module.named_modules()
        for label, p in stored(layer).items()
        if label.endswith("bias") and isinstance(p, nn.Parameter)
    }
    named = {unwrapped(label): tensor for label, tensor in state.tensors.items()}
    return {bias: named[label].to(bias) - bias.detach() for label, bias in biases.items() if label in named}


def unwrapped(label: str) -> str:
    """A parameter's name without PEFT's wrappers around its module."""
    return re.sub(r"(\.base_layer)+\.", ".", label)


def check_fit(module: nn.Module, state: AdapterState) -> None:
    """Raise ConfigError unless the tensors are those, and of the shapes, that PEFT puts on `module`.

    `module` is on the meta device, and is of no use afterwards.
    """
    biases = {name: p.shape for name, p in module.named_parameters() if name.endswith(".bias")}
    try:
        with torch.device("meta"):
            wanted = {name: parameter.shape for name, parameter in put_on(module, state, NAME).items()}
    except Exception as error:  # PEFT raises many kinds for what it cannot hold
        raise ConfigError(f"it does not fit the base: {reason(error)}") from error
    for name, tensor in state.tensors.items():
        there = wanted.pop(name, None) or biases.get(unwrapped(name))
        if there != tensor.shape:
            has = tuple(there) if there else "nothing of that name"
            raise ConfigError(
                f"it does not fit the base: {name} is {tuple(tensor.shape)}, the base has {has}"
            )
    if wanted:
        raise ConfigError(f"it is incomplete: {min(wanted)} is missing")


def restore(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load weights from `collect` into the adapter. Raises ConfigError if its layers differ."""
    mine = {name_in_files(name) or name: parameter for name, parameter in trainable(module).items()}
    shapes = {name: parameter.shape for name, parameter in mine.items()}
    if different := shapes.items() ^ {name: tensor.shape for name, tensor in tensors.items()}.items():
        raise ConfigError(f"the checkpoint's adapter has different layers, e.g. {min(different)[0]}")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])
