"""The blocks that a model is made of: its units of compilation, and of whatever else goes block by block."""

from __future__ import annotations

from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The innermost modules of the kinds that the model's class names as its blocks, in the model's order.

    Diffusers lists the transformer blocks in `_repeated_blocks`, the only list of most newer models.
    `_no_split_modules` has a UNet's ResNet blocks too, but also its up blocks, which hold both; and it
    is the only list of older transformers. Empty if the class names none, or has none of those it names.
    """
    lists = (getattr(model, name, None) or () for name in ("_repeated_blocks", "_no_split_modules"))
    names = {name for kinds in lists for name in kinds}
    named = [module for module in model.modules() if type(module).__name__ in names]
    return [module for module in named if not any(inner in named for inner in list(module.modules())[1:])]
