"""The blocks of a model, for compiling and sharding it block by block."""

from __future__ import annotations

from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The innermost modules whose classes the model lists as its blocks, in the model's order; may be empty.

    Diffusers lists the transformer blocks of most newer models in `_repeated_blocks` only, and those of
    older transformers in `_no_split_modules` only. For a UNet `_no_split_modules` also names the ResNet
    blocks, and the up blocks, which contain both.
    """
    lists = (getattr(model, name, None) or () for name in ("_repeated_blocks", "_no_split_modules"))
    classes = {name for names in lists for name in names}
    listed = [  # FSDP makes a subclass of each class
        module for module in model.modules() if classes & {kind.__name__ for kind in type(module).__mro__}
    ]
    return [module for module in listed if not any(inner in listed for inner in list(module.modules())[1:])]
