"""Which kernels compute a step: attention's by the GPU's generation, and compiled ones."""

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

# Attention kernels by preference: the first that can do a layer's shapes does them. A table and no
# measurement, so that every start of a run computes alike.
ATTENTION = {
    "cudnn": ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    "flash": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    "efficient": ("EFFICIENT_ATTENTION", "MATH"),
    "math": ("MATH",),
}
CUDNN_FROM = (9, 0)  # compute capability: cuDNN's kernels beat flash attention from Hopper on, not before


def attention(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """In the block, attention prefers the kernels `name`; "auto": what suits the device."""
    chosen = preferred(name, device)
    if chosen is None:
        return nullcontext()
    return sdpa_kernel([getattr(SDPBackend, kernel) for kernel in ATTENTION[chosen]], set_priority=True)


def preferred(name: str, device: torch.device) -> str | None:
    """The row of ATTENTION that `name` stands for on a device; None: torch's own choice."""
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
) -> None:
    """Compile a denoiser in place, whole (True) or its blocks one by one ("regional").

    Before DDP wraps it; state-dict keys keep their names. What is compiled is kept in the user's
    cache folder, for later runs and for this node's other ranks. `activation_memory` is the share of the
    activations to keep; the partitioner of forward and backward pass chooses which to compute again.
    Raises ConfigError if it has no blocks.
    """
    compiled = blocks(module) if how == "regional" else [module]
    if not compiled:
        raise ConfigError(
            f"train.compile is 'regional', but {type(module).__name__} has no blocks to compile; use true"
        )
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(files.cache() / "inductor"))
    from torch._dynamo import config as dynamo  # a second of imports that eager runs do not need
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    functorch.activation_memory_budget = activation_memory or 1.0  # read when the first step compiles
    dynamo.optimize_ddp = False  # one graph: it would split at DDP's first bucket
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)  # a block is compiled for each of its shapes
    # With it, torch 2.13 on CPUs mixes memory formats in convolution_backward: layers below an
    # upsampler silently get no gradient. On GPUs its heuristics leave UNets alone anyway.
    inductor.layout_optimization = False
    for one in compiled:
        one.compile(backend=backend)
