"""Ranks and what they say to each other: the only file that imports torch.distributed.

Every function works without a process group too, as a world of one rank. Control messages are
CPU tensors on gloo, so that they never stall a GPU stream; gradients take the device's backend.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dbtrain.errors import ConfigError, os_problem

TIMEOUT = timedelta(minutes=30)


def init() -> None:
    """Join the process group that torchrun's variables describe. Once; a world of one joins none."""
    if world() == 1 or is_initialized():
        return
    if device().type == "cuda":
        torch.cuda.set_device(device())
    backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
    torch_dist.init_process_group(backend, timeout=TIMEOUT)


def is_initialized() -> bool:
    return torch_dist.is_initialized()


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's device: its GPU if there is one, else the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def finish(code: int) -> None:
    """End this process with `code` if it used a process group; else return.

    gloo's threads outlive destroy_process_group() and abort the interpreter in a third of runs
    (torch 2.13): flush, then leave without the interpreter's shutdown.
    """
    if is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def gather_json(value: Any) -> list[Any]:
    """Every rank's JSON-able value, in rank order, on every rank."""
    if world() == 1:
        return [value]
    message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    torch_dist.all_gather(sizes, torch.tensor([len(message)]))
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(message)] = message
    everyone = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world())]
    torch_dist.all_gather(everyone, padded)
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(everyone, sizes, strict=True)]


def from_main(value: Any) -> Any:
    """Rank 0's JSON-able value, on every rank."""
    return gather_json(value if is_main() else None)[0]


@contextmanager
def agreed() -> Iterator[None]:
    """Run the block on every rank; what a user can fix on one rank is raised on all of them.

    Without this the others would wait in their next collective for a rank that is gone. Every
    rank must enter the block, and the block must hold no collective.
    """
    problems: tuple[str, ...] = ()
    try:
        yield
    except ConfigError as error:
        problems = error.problems
    except OSError as error:
        problems = (os_problem(error),)
    everyone = [line for lines in gather_json(problems) for line in lines]
    if everyone:
        raise ConfigError(*dict.fromkeys(everyone), shared=True)


def assert_same(value: str, what: str) -> None:
    """Raise ConfigError on every rank unless all of them hold the same `value`."""
    values = gather_json(value)
    odd = [str(number) for number, other in enumerate(values) if other != values[0]]
    if odd:
        raise ConfigError(f"{what} differs between rank 0 and rank {', '.join(odd)}", shared=True)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, on its device; the input is left alone."""
    total = values.clone()
    if world() > 1:
        torch_dist.all_reduce(total)
    return total


def min_over_ranks(values: Tensor) -> Tensor:
    """Elementwise minimum of a tensor over all ranks, on its device."""
    least = values.clone()
    if world() > 1:
        torch_dist.all_reduce(least, torch_dist.ReduceOp.MIN)
    return least


def wrap(module: nn.Module) -> nn.Module:
    """The module under DDP, which averages gradients over ranks; itself in a world of one.

    `init_sync` is off: the adapter starts from the seed, the base from files, both the same on
    every rank, and broadcasting gigabytes of frozen weights would only cost time.
    """
    if world() == 1:
        return module
    with warnings.catch_warnings():  # torch 2.13 has a new name for broadcast_buffers, 2.10 has not
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Context of one micro-batch: gradients are exchanged in the last one of a step only."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
