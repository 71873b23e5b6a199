"""Functions that the formats share: layers, ranks and scales."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from dbtrain.adapters.state import AdapterState
from dbtrain.adapters.tokens import Words
from dbtrain.models.families.family import Family
from dbtrain.runtime.errors import ConfigError

States = Mapping[str, AdapterState]  # by component
Names = Callable[[str], Mapping[str, int]]  # component -> all its modules, and how many outputs each has
CONFIGS = "dbtrain"  # key in every file's header: PEFT's config of each component, unless it is elsewhere
MOST_PATTERNS = 1000  # more than any base has layers


@dataclass(frozen=True)
class Content:
    """What to write, and what some formats need of the base for it."""

    family: Family
    states: States
    names: Names | None = None  # kohya's file for SDXL and ComfyUI's file need them
    about: Mapping[str, str] = field(default_factory=dict)  # entries of a kohya file's header
    load: Callable[[str], nn.Module] | None = None  # component -> a copy of it with its weights, fp32
    words: Words = ()  # kohya's file holds them too


def by_module(state: AdapterState) -> dict[str, dict[str, Tensor]]:
    """Module -> name of the tensor within it -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.tensors.items():
        if match := re.fullmatch(r"(.*)\.((?:lora|hada|lokr)_.*)", key):
            found.setdefault(match[1], {})[match[2]] = tensor
    return found


def alpha_key(config: Mapping[str, Any]) -> str:
    """The name of alpha in a PEFT config."""
    return "lora_alpha" if config["peft_type"] == "LORA" else "alpha"


def alpha_in(config: Mapping[str, Any]) -> float:
    return config[alpha_key(config)]


def check_patterns(config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the patterns of a stranger's config are names, which take no time to match."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise ConfigError(f"its {key} is not a table")
        if len(patterns) > MOST_PATTERNS:
            raise ConfigError(f"its {key} has {len(patterns)} entries; at most {MOST_PATTERNS} are read")
        for pattern in patterns:
            if not re.fullmatch(r"[\w.^$|\\-]+", pattern):
                raise ConfigError(f"its {key} has the regular expression '{pattern}'; only names are read")


def rank_in(config: Mapping[str, Any], module: str) -> int:
    """The rank of a module's update. A config's `rank_pattern` names the modules that differ."""
    patterns = config.get("rank_pattern") or {}
    return patterns.get(get_pattern_key(list(patterns), module), config["r"])


def strength(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """The rank of a module's update, and its factor: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    A config's `alpha_pattern` names the modules whose alpha differs.
    """
    rank, patterns = rank_in(config, module), config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), alpha_in(config))
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)
