"""An adapter file's layers as PEFT has them: factors that PEFT lacks are multiplied out, settings inferred.

The tensors are the truth: the rank is theirs, and where a file has alphas, so is the scale. The settings in
a file's header count only where they agree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor

from dbtrain.adapters.formats.common import alpha_key, check_patterns, strength
from dbtrain.adapters.formats.names import Layers
from dbtrain.adapters.state import MAGNITUDE, AdapterState, patterns
from dbtrain.runtime.errors import ConfigError

KINDS = {"lora": "LORA", "hada": "LOHA", "lokr": "LOKR"}  # prefix of the tensors -> PEFT's kind
WHOLE = {"lokr_w1", "lokr_w2"}  # a LoKr layer without decomposed factors
# The tensors that say a layer's rank, and the size of the rank within their shape.
RANKS = {"lora_A.weight": 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0}


def state_of(layers: Layers, stored: Mapping[str, Any] | None) -> AdapterState:
    """The adapter of one component; `stored` is the PEFT config in the file's header, if it has one.

    Raises ConfigError for layers that PEFT cannot hold.
    """
    kind = _kind(layers)
    alphas = {module: layer.pop("alpha").item() for module, layer in layers.items() if "alpha" in layer}
    for module, layer in layers.items():
        _fold(module, layer, alphas.get(module))
    config = _inferred(kind, layers, alphas)
    if stored is not None:
        check_patterns(stored)
    trusted = stored is not None and (not alphas or _agree(stored, config, layers))
    if trusted:
        config |= {"rank_pattern": {}, "alpha_pattern": {}} | dict(stored or {})
    if alphas or not trusted:  # then, as in LyCORIS, a LoKr layer of whole factors has no scale
        for module, layer in layers.items():
            if layer.keys() >= WHOLE:
                layer["lokr_w1"] = layer["lokr_w1"] / strength(config, module)[1]
    tensors = {
        f"{module}.{part}": tensor for module, layer in layers.items() for part, tensor in layer.items()
    }
    return AdapterState(tensors, config)


def _kind(layers: Layers) -> str:
    kinds = {part[:4] for layer in layers.values() for part in layer if part[:4] in KINDS}
    if len(kinds) != 1:
        names = ", ".join(sorted(KINDS[kind] for kind in kinds))
        raise ConfigError(f"its layers must be of one kind, but are {names or 'of none'}")
    kind = kinds.pop()
    if kind != "lora" and (dora := [name for name, layer in layers.items() if "dora_scale" in layer]):
        raise ConfigError(f"{dora[0]} has DoRA on a {KINDS[kind]} layer, which PEFT does not have")
    return kind


def _fold(module: str, layer: dict[str, Tensor], alpha: float | None) -> None:
    """Turn a layer's tensors into those that PEFT has, in place."""
    if (mid := layer.pop("lora_mid.weight", None)) is not None:  # LoCon with a CP decomposition
        down = layer["lora_A.weight"].flatten(1)  # (rank, in)
        layer["lora_A.weight"] = torch.einsum("ijkl, jc -> ickl", mid, down)
    if (scale := layer.pop("dora_scale", None)) is not None:
        out = layer["lora_B.weight"].shape[0]
        if scale.shape[0] != out or scale.numel() != out:
            raise ConfigError(
                f"{module} has a dora_scale of the shape {tuple(scale.shape)}, over the layer's input; "
                f"PEFT's DoRA is over its output, ({out}, 1)"
            )
        layer[MAGNITUDE] = scale.flatten()
    if layer.keys() >= {"lokr_w1_a", "lokr_w1_b", "lokr_w2"}:
        rank = layer["lokr_w1_b"].shape[0]
        if 2 * rank < max(layer["lokr_w2"].shape[:2]):  # for PEFT the right factor would not be whole
            left = layer.pop("lokr_w1_a") @ layer.pop("lokr_w1_b")
            layer["lokr_w1"] = left * ((rank if alpha is None else alpha) / rank)
    if MAGNITUDE in layer:
        conv = layer["lora_A.weight"].dim() > 2
        layer[MAGNITUDE] = layer[MAGNITUDE].reshape((1, -1, 1, 1) if conv else (-1,))


def rank_of(layer: Mapping[str, Tensor]) -> int | None:
    """A layer's rank, by its tensors; None for a LoKr layer of whole factors."""
    return next((layer[part].shape[axis] for part, axis in RANKS.items() if part in layer), None)


def _inferred(kind: str, layers: Layers, alphas: Mapping[str, float]) -> dict[str, Any]:
    """The PEFT config that gives each layer its rank and its alpha."""
    ranks: dict[str, int] = {}
    free: dict[str, int] = {}  # layers that are whole from this rank on
    for module, layer in layers.items():
        if (rank := rank_of(layer)) is not None:
            ranks[module] = rank
        elif layer.keys() >= WHOLE:
            free[module] = math.ceil(max(layer["lokr_w2"].shape[:2]) / 2)
        else:
            raise ConfigError(f"its layer {module} has only {', '.join(sorted(layer)) or 'an alpha'}")
    common = _most(ranks.values()) or max(free.values())
    ranks |= {module: max(least, common) for module, least in free.items()}
    alpha = {module: float(alphas.get(module, ranks[module])) for module in layers if module not in free}
    usual = _most(alpha.values()) or float(common)
    config: dict[str, Any] = {
        "peft_type": KINDS[kind], "r": common, "target_modules": sorted(layers),
        "rank_pattern": patterns(ranks, common),
        "alpha_pattern": patterns({module: _whole(value) for module, value in alpha.items()}, usual),
    }  # fmt: skip
    config[alpha_key(config)] = _whole(usual)
    parts = {part for layer in layers.values() for part in layer}
    if kind == "lora":
        return config | {
            "use_dora": MAGNITUDE in parts, "lora_bias": "lora_B.bias" in parts,
            "use_rslora": False, "bias": "none", "lora_dropout": 0.0,
        }  # fmt: skip
    config["use_effective_conv2d"] = bool(parts & {"hada_t1", "lokr_t2"})
    if kind == "lokr":
        config |= {"decompose_both": "lokr_w1_b" in parts, "decompose_factor": _factor(layers)}
    return config


def _factor(layers: Layers) -> int:
    """LoKr's `decompose_factor`: -1 if each left factor is as large as it can be."""
    sizes = set()  # (size of a dimension, its share in the left factor)
    for layer in layers.values():
        shape = {name.removeprefix("lokr_"): tensor.shape for name, tensor in layer.items()}
        left_out, left_in = shape["w1"] if "w1" in shape else (shape["w1_a"][0], shape["w1_b"][1])
        if "w2" in shape or "t2" in shape:
            right_out, right_in = shape["w2"][:2] if "w2" in shape else (shape["w2_a"][1], shape["w2_b"][1])
            sizes |= {(left_out * right_out, left_out), (left_in * right_in, left_in)}
        else:  # the right factor of a convolution's input holds the kernel too
            sizes.add((left_out * shape["w2_a"][0], left_out))
    for factor in (-1, *sorted({left for _, left in sizes}, reverse=True)):
        if all(factorization(size, factor)[0] == left for size, left in sizes):
            return factor
    raise ConfigError("its LoKr layers are split by no one factor")


def _agree(stored: Mapping[str, Any], found: Mapping[str, Any], layers: Layers) -> bool:
    """Whether the settings in a header give the strength that the tensors have."""
    if stored.get("peft_type") != found["peft_type"]:
        return False
    for module, layer in layers.items():
        (rank, scale), (its_rank, its_scale) = strength(stored, module), strength(found, module)
        free = layer.keys() >= WHOLE
        if not free and (rank != its_rank or not math.isclose(scale, its_scale, rel_tol=1e-5)):
            return False
        if free and 2 * rank < max(layer["lokr_w2"].shape[:2]):
            return False
    return True


def _most(values: Any) -> Any:
    """The most frequent value, the largest of several; None if there are none."""
    counted = Counter(values)
    return max(counted, key=lambda value: (counted[value], value), default=None)


def _whole(value: float) -> float:
    """An int where it is whole, as other programs write it."""
    return int(value) if value.is_integer() else value
