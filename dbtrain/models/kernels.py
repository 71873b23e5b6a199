"""Kernels of a training step: attention kernels by GPU generation, and compilation."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dbtrain.models.blocks import blocks
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

# Attention kernels in order of preference. The first that supports a layer's shapes is used. A fixed table
# rather than autotuning, so that every start of a run uses the same kernels.
ATTENTION = {
    "cudnn": ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    "flash": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    "efficient": ("EFFICIENT_ATTENTION", "MATH"),
    "math": ("MATH",),
}
CUDNN_FROM = (9, 0)  # compute capability: cuDNN beats flash attention on Hopper and later GPUs only


def attention(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """In the block, attention prefers the kernels `name`; "auto" chooses by device."""
    chosen = preferred(name, device)
    if chosen is None:
        return nullcontext()
    return sdpa_kernel([getattr(SDPBackend, kernel) for kernel in ATTENTION[chosen]], set_priority=True)


def preferred(name: str, device: torch.device) -> str | None:
    """The key of ATTENTION for `name` on a device. None leaves the choice to torch."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return None
    return "cudnn" if torch.cuda.get_device_capability(device) >= CUDNN_FROM else "flash"


def compile_module(
    module: nn.Module,
    how: bool | str,
    backend: str | Callable[..., Any] = "inductor",
    activation_memory: float | None = None,
    dynamic: bool | None = None,
) -> None:
    """Compile a denoiser in place, as a whole (`how` is True) or block by block ("regional").

    Call this before DDP wraps the module. Names in the state dict stay the same. Compiled code is cached in
    the user's cache folder for later runs and the other ranks of the node. `activation_memory` is the share
    of activations to keep; the partitioner chooses which to recompute. `dynamic`: False compiles every shape
    by itself; None makes the code for a second one general.
    Raises ConfigError for "regional" if the module has no blocks.
    """
    compiled = blocks(module) if how == "regional" else [module]
    if not compiled:
        raise ConfigError(
            f"train.compile is 'regional', but {type(module).__name__} has no blocks to compile; use true"
        )
    from torch._dynamo import config as dynamo  # these imports take a second that eager runs save
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    if cache_dir() == default_cache_dir():  # set by torch when it is imported, in the temporary folder
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(files.cache() / "inductor")
    functorch.activation_memory_budget = activation_memory or 1.0  # read when the first step compiles
    dynamo.optimize_ddp = False  # or it would split the graph at DDP's first bucket
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)  # each shape of a block is compiled
    # With layout optimization torch 2.13 mixes memory formats in convolution_backward on CPUs, and layers
    # below an upsampler silently get no gradient. On GPUs its heuristics do not apply to UNets anyway.
    inductor.layout_optimization = False
    for one in compiled:
        one.compile(backend=backend, dynamic=dynamic)
