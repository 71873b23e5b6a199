"""Average gradients over ranks with DDP."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dbtrain.runtime import dist


def wrap(module: nn.Module) -> nn.Module:
    """Wrap the module in DDP; return it as is if there is only one rank.

    `init_sync` is off because all ranks start with the same weights: the adapter depends on the seed, and
    the base is read from files. A broadcast of gigabytes of frozen weights would only cost time.
    """
    if dist.world() == 1:
        return module
    with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, 2.10 does not
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module,
            process_group=dist.group(),
            init_sync=False,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=1 << 20,  # one bucket: an adapter is small, and latency dominates
        )


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """The context of a micro-batch: gradients are synchronized in the last one of a step only."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
