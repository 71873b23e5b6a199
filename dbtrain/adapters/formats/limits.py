"""Limits on adapters, which may be anybody's: PEFT allocates, searches and imports what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dbtrain.adapters.formats.common import by_module, check_patterns, rank_in
from dbtrain.adapters.state import AdapterState
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

MOST_RANK = 10_240  # the widest layer of SDXL; a LoKr of a higher rank is not decomposed
FACTORS = {"LORA": "lora_A.weight", "LOHA": "hada_w1_b"}  # kind -> its tensor of (rank, ...)
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal")  # others change the base's weights
# Settings of PEFT that copy or replace modules of the base, import other packages, or need the training data.
UNREAD = (
    "layer_replication", "modules_to_save", "target_parameters", "trainable_token_indices", "megatron_config",
    "loftq_config", "eva_config", "corda_config", "arrow_config", "lora_ga_config", "use_qalora",
)  # fmt: skip


def check_file(path: Path) -> None:
    """Raise ConfigError unless `path` is a regular file that fits into memory."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing, or is not a regular file")
    if (size := path.stat().st_size) > files.FILE_BYTES:
        raise ConfigError(f"{path} has {files.size_text(size)}; use one of at most 4 GB")


def bounded(state: AdapterState) -> AdapterState:
    """The adapter, on the layers that it has tensors for if its settings name them by a pattern.

    Raises ConfigError for settings that would change more than its layers, or take much memory or time, and
    for weights that are not finite.
    """
    config = state.config
    if found := [name for name in UNREAD if config.get(name)]:
        raise ConfigError(
            f"its setting {found[0]} is not supported; merge it into a base, or use another one"
        )
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise ConfigError(
            f"its weights are for a base changed by init_lora_weights = {str(start)[:40]}; convert it with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    check_patterns(config)
    factor = FACTORS.get(str(config.get("peft_type")))
    ranks = [tensor.shape[0] for name, tensor in state.tensors.items() if factor and name.endswith(factor)]
    most = min(MOST_RANK, max(ranks)) if ranks else MOST_RANK
    for rank in {rank_in(config, module) for module in by_module(state)}:
        if isinstance(rank, int) and rank > (most if factor else 2**31):
            raise ConfigError(f"its rank is {_short(rank)}, but its tensors have at most {most}")
    for alpha in _alphas(config):
        if isinstance(alpha, (int, float)) and not (math.isfinite(alpha) and abs(alpha) < 1e9):
            raise ConfigError(f"its alpha is {_short(alpha)}; use one with a finite, smaller alpha")
    for name, tensor in state.tensors.items():
        if not (values := tensor.float()).isfinite().all():
            raise ConfigError(f"its tensor {name} has {'NaN' if values.isnan().any() else 'infinite values'}")
    if isinstance(config.get("target_modules"), str):
        return replace(state, config=dict(config) | {"target_modules": sorted(by_module(state))})
    return state


def _alphas(config: Mapping[str, Any]) -> list[Any]:
    return [config.get("alpha"), config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]


def _short(value: float) -> str:
    text = str(value)
    return text if len(text) < 20 else f"a number of {len(text)} digits"
