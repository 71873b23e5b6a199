"""Gradient checkpointing: which activations are recomputed in the backward pass instead of kept."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from dbtrain.models.block_swap import Swapped
from dbtrain.models.blocks import blocks
from dbtrain.runtime.errors import ConfigError


def modes(denoiser: nn.Module) -> tuple[str, ...]:
    """The values of train.gradient_checkpointing that differ for this denoiser, from fast to small."""
    mixed = any(isinstance(part, Transformer2DModel) for part in denoiser.modules())
    return ("none", "transformer", "blocks") if mixed else ("none", "blocks")


def checkpoint_activations(denoiser: Any, text_encoders: list[Any], mode: str) -> None:
    """Enable gradient checkpointing in the trained components. `mode` is train.gradient_checkpointing.

    `transformer` recomputes the denoiser's transformer blocks: it saves most of the memory that `blocks`
    saves, at half the cost. `blocks` adds the ResNet blocks, as Diffusers does. Both recompute every layer
    of the text encoders. Raises ConfigError for `transformer` and a denoiser without transformer blocks.
    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
    """
    if mode == "none":
        return
    denoiser.enable_gradient_checkpointing(_recomputed)
    if mode == "transformer":
        flagged = [module for module in denoiser.modules() if hasattr(module, "gradient_checkpointing")]
        if flagged == [denoiser] and blocks(denoiser):
            return  # a transformer, which has no other blocks
        if not any(isinstance(module, Transformer2DModel) for module in flagged):
            raise ConfigError(
                f"train.gradient_checkpointing is 'transformer', but the {type(denoiser).__name__} of this "
                "base has no transformer blocks; use blocks"
            )
        for module in flagged:
            module.gradient_checkpointing = isinstance(module, Transformer2DModel)
    for encoder in text_encoders:  # reentrant checkpoints lose the gradient if no input requires one
        encoder.gradient_checkpointing_enable({"use_reentrant": False})


def _recomputed(block: nn.Module, *args: Any) -> Any:
    """The output of a block, whose activations are recomputed; swapped blocks see to that themselves."""
    if isinstance(block, Swapped):
        return block(*args)
    return checkpoint(block.__call__, *args, use_reentrant=False)
