"""Gradient checkpointing: which activations are computed again in the backward pass instead of kept."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from dbtrain.runtime.errors import ConfigError


def checkpoint_activations(denoiser: Any, text_encoders: list[Any], mode: str) -> None:
    """Make the trained components recompute what `mode`, `train.gradient_checkpointing`, names.

    `transformer` keeps the input of each transformer block of the denoiser only: most of what `blocks`
    saves, at half its price. `blocks` adds the ResNets, and is all that Diffusers has. The text encoders
    recompute every layer in both. Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
    arXiv:1604.06174. Raises ConfigError for a denoiser without transformer blocks.
    """
    if mode == "none":
        return
    denoiser.enable_gradient_checkpointing()
    if mode == "transformer":
        flagged = [module for module in denoiser.modules() if hasattr(module, "gradient_checkpointing")]
        if not any(isinstance(module, Transformer2DModel) for module in flagged):
            raise ConfigError(
                "train.gradient_checkpointing is 'transformer', but a "
                f"{_kind(denoiser)} of this base has no transformer blocks; use blocks"
            )
        for module in flagged:
            module.gradient_checkpointing = isinstance(module, Transformer2DModel)
    for encoder in text_encoders:  # reentrant checkpoints of frozen inputs give no gradient
        encoder.gradient_checkpointing_enable({"use_reentrant": False})


def _kind(module: nn.Module) -> str:
    return type(module).__name__
