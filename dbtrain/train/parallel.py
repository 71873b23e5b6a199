"""The module that trains, wrapped so that its gradients are averaged over ranks."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dbtrain.runtime import dist


def wrap(module: nn.Module) -> nn.Module:
    """The module under DDP; itself in a world of one.

    `init_sync` is off: the adapter starts from the seed and the base from files, both the same on every
    rank, and a broadcast of gigabytes of frozen weights would only cost time.
    """
    if dist.world() == 1:
        return module
    with warnings.catch_warnings():  # torch 2.13 has a new name for broadcast_buffers, 2.10 has not
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module,
            process_group=dist.group(),
            init_sync=False,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=1 << 20,  # one bucket: an adapter is small, and each all-reduce has its latency
        )


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Context of one micro-batch: gradients are exchanged in the last one of a step only."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
