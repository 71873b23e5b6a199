"""Average gradients over ranks with DDP; shard frozen weights over ranks with FSDP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dbtrain.models import block_swap
from dbtrain.models.blocks import blocks
from dbtrain.runtime import dist, preemption


def mesh(how: str, timeout_s: float) -> DeviceMesh | None:
    """The ranks that hold the denoiser together; None if each holds it whole. Call this on every rank.

    `how` is train.shard. A mesh over nodes is not needed: nothing that is sharded has a gradient.
    """
    group = dist.sharing(how, timeout_s)
    return DeviceMesh.from_group(group, dist.device().type) if group else None


def shard(denoiser: nn.Module, ranks: DeviceMesh | None, kept: int = 0) -> None:
    """Shard the matrices of a `skeleton` by rows, block by block; its weights are on the device, not filled.

    Each sharded block is gathered for its forward pass, and again for its backward pass. `kept` blocks stay
    whole, evenly spread, and so does what is in no block: it is needed all the time. Vectors stay whole too:
    they are small, and biases may be trained. What is attached later, such as adapters, is not sharded.
    """
    if ranks is None:
        return
    # Blocks that return views, as FLUX's do, are safe: nothing changes their outputs in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    every = blocks(denoiser)
    sharded = block_swap.spread(every, len(every) - kept)
    matrices = {parameter for block in sharded for parameter in block.parameters() if parameter.dim() > 1}
    whole = set(denoiser.parameters()) - matrices
    for module in (*sharded, denoiser) if sharded else ():
        fully_shard(module, mesh=ranks, ignored_params=whole)
    _leave_autograd_alone(denoiser)
    device = dist.device()
    denoiser._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)


def _leave_autograd_alone(denoiser: nn.Module) -> None:
    """Keep FSDP's nodes out of the graph: they would change the order in which gradients are summed.

    FSDP adds them to notice that a block's backward pass has ended, unless gradients are disabled. Here it
    has ended when the backward pass reaches another sharded block: autograd runs what was recorded last
    first, so that all of the block's kernels are queued by then. Hooks of autograd run on the stream of the
    forward pass, from which FSDP allocates what it frees here, so later kernels cannot write to it too early.
    `reached` runs before FSDP's hook of the same output, which gathers: no more than two blocks are there.

    The last block of a backward pass is freed by FSDP at its end. It stays in `gathered`, where freeing it
    again does nothing. Nothing is left of a pass without gradients, which FSDP frees block by block. After an
    exception in a pass, which ends the run, the state of FSDP is undefined too.
    """
    enabled: list[bool] = []  # before the hooks of the modules that are being called
    gathered: list[FSDPModule] = []  # the block whose backward pass was reached last

    def before(*_: Any) -> None:
        enabled.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def after(*_: Any) -> None:
        torch.set_grad_enabled(enabled.pop())

    def watch(block: Any, _: Any, outputs: Any) -> None:
        def reached(_: Tensor) -> None:
            if gathered and gathered[0] is not block:
                gathered.pop().reshard()
            block.unshard()  # FSDP gathers it for the first of several backward passes alone
            gathered[:] = [block]

        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        graded = [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]
        for output in graded:
            output.register_hook(reached)
        block.set_unshard_in_backward(bool(graded))  # else it has no backward pass to be gathered for

    for module in denoiser.modules():
        if isinstance(module, FSDPModule):
            module.register_forward_pre_hook(before, prepend=True)
            module.register_forward_pre_hook(after)
            if module is not denoiser:
                module.register_forward_hook(watch, prepend=True)


def local(tensor: Tensor) -> tuple[Tensor, slice | None]:
    """This rank's part of a tensor, and which rows it has; all of it and None if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor, None
    held, ranks = tensor.to_local(), tensor.device_mesh
    first = min(ranks.get_local_rank() * -(-len(tensor) // ranks.size()), len(tensor))
    return held, slice(first, first + len(held))


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


def holders(module: nn.Module) -> int:
    """How many ranks hold the module together, before it is used."""
    return max(p.device_mesh.size() if isinstance(p, DTensor) else 1 for p in module.parameters())


def reshard(module: nn.Module) -> None:
    """Free what is gathered, so that changes of the shards are seen."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def largest(number: int, group: ProcessGroup) -> int:
    """The largest of the numbers of a group's ranks, on each of them."""
    found = torch.tensor(number)
    all_reduce(found, ReduceOp.MAX, group=group)
    return int(found)


def rounds(count: int, together: bool) -> Iterator[tuple[int, bool]]:
    """Yield (number, whether to keep its result) for this rank's share of `count` pieces of work.

    Ranks agree before each round on whether to stop. `together`: the work contains collectives, so that a
    rank without a piece of its own repeats one. Raises Preempted on all ranks.
    """
    for first in range(0, count, dist.world()):
        with dist.agreed():
            preemption.check()
        if (number := first + dist.rank()) < count:
            yield number, True
        elif together:
            yield count - 1, False


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


def unwrapped(module: Any) -> Any:
    """The module that `wrap` was given."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """The context of a micro-batch: gradients are synchronized in the last one of a step only."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
