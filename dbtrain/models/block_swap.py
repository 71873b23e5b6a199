"""Block swap: blocks whose frozen weights stay in host memory and pass through two buffers on the device.

While one block computes, the next one's weights are copied into the other buffer. Nothing is copied back.
Adapters, and all else that is trained, stay on the device. A swapped block recomputes its activations in the
backward pass: autograd would otherwise keep its weights as views of a buffer that has other weights by then.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbtrain.models.blocks import blocks
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.memory import GIB, trim

BUFFERS = 2
ALIGNED = 512  # bytes, like CUDA's allocator, so that kernels are chosen as for weights of their own
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device
IN_HOST_MEMORY = "in_host_memory"  # attribute of a layer in a swapped block
Slot = tuple[dict[str, Any], str]
"""A layer's parameters or buffers by name, and the name of one."""


def frozen_bytes(block: nn.Module) -> int:
    """Bytes of a block's frozen parameters and buffers, each rounded up as a device's allocator does."""
    return sum(_rounded(tensor) for _, _, tensor in _frozen(block))


def saved_bytes(sizes: Sequence[int], count: int) -> int:
    """Device memory that swapping `count` blocks saves, bytes; negative for one block.

    `sizes`: `frozen_bytes` of every block of the denoiser, in order.
    """
    chosen = spread(sizes, count)
    return sum(chosen) - BUFFERS * max(chosen, default=0)


def count_that_saves(sizes: Sequence[int], missing: float) -> int:
    """The fewest blocks whose swapping saves `missing` bytes of device memory; 0 if none are missing.

    `sizes`: `frozen_bytes` of every block. If even swapping all of them does not save enough, that is all.
    """
    if missing <= 0:
        return 0
    enough = (count for count in range(len(sizes) + 1) if saved_bytes(sizes, count) >= missing)
    return next(enough, len(sizes))


def swap(denoiser: nn.Module, count: int, device: torch.device) -> int:
    """Move the frozen weights of `count` blocks, evenly spread, to host memory; two buffers go to `device`.

    Returns the bytes of host memory that they take. Call it when adapters are attached, and before the
    denoiser is moved to `device`.
    Raises ConfigError if there are not as many blocks, or if the host's memory cannot be page-locked.
    """
    found = blocks(denoiser)
    if count > len(found):
        raise ConfigError(
            f"train.swap_blocks is {count}, but the {type(denoiser).__name__} of this base has {len(found)} "
            f"blocks; use {len(found) if len(found) > BUFFERS else 0}"
        )
    if not count:
        return 0
    ring = Ring(spread(found, count), device)
    for block in ring.frozen:
        kind: Any = type(block)
        block.ring = ring  # type: ignore[assignment]
        block.__class__ = _swapped(kind)
    return sum(len(frozen.memory) for frozen in ring.frozen.values())


def stored(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's own parameters where they are kept, which is in host memory if its block is swapped.

    They may be changed in place: nothing is copied from them meanwhile, and the next call copies them anew.
    """
    own: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
    in_host_memory = vars(layer).get(IN_HOST_MEMORY, {})
    for name in own.keys() & in_host_memory.keys():
        torch.get_device_module(own[name].device).synchronize()
        own[name] = in_host_memory[name]
    return own


class Swapped:
    """Added to the class of a swapped block. It is outside of what `compile` compiles, and of hooks."""

    ring: Ring

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(self._call, *args, use_reentrant=False, **kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self.ring.turn_to(self)  # type: ignore[arg-type]
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


@cache
def _swapped(kind: Any) -> Any:
    """One class for all swapped blocks of a kind, so that they share their compiled code."""
    return type(kind.__name__, (Swapped, kind), {"__module__": kind.__module__})


@dataclass(frozen=True)
class _Frozen:
    """The frozen tensors of a block."""

    memory: Tensor  # (bytes,) uint8, on the host
    slots: Sequence[Slot]  # where the block's layers have them
    views: Sequence[Sequence[Tensor]]  # by buffer


class Ring:
    """Two buffers on the device, of the largest block's size: for the block at work, and for the next.

    The autograd engine runs the nodes of a graph in reverse order of their creation. So when a block is
    called or recomputed, all work of the previous one, its backward pass too, has been queued, and its
    buffer can be refilled once that has run. Which block comes next is a guess from the order of their first
    calls. A wrong guess costs time only.
    """

    def __init__(self, swapped: Sequence[nn.Module], device: torch.device) -> None:
        """Takes the frozen tensors of these blocks."""
        sizes = [frozen_bytes(block) for block in swapped]
        # Never freed while the ring is in use, so the allocator needs no `record_stream`.
        self.buffers = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
        self.device = device
        self.runtime: Any = torch.get_device_module(device)  # on a CPU its streams and events do nothing
        self.stream = self.runtime.Stream(device)
        self.ready: list[Any] = [None] * BUFFERS  # events: the buffer is filled
        self.holds: list[tuple[nn.Module, int] | None] = [None] * BUFFERS  # block, version of its memory
        self.current = 0  # buffer of the block at work
        self.order: list[nn.Module] = []  # blocks by their first call
        self.last: nn.Module | None = None
        self.step = 1  # through the order: 1 in a forward pass, -1 in a backward pass

        memory = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        parts = memory.split(sizes)
        self.frozen: dict[nn.Module, _Frozen] = {}
        for block, part in zip(swapped, parts, strict=True):
            self.frozen[block] = self._take(block, part)
            trim()  # or the host would hold all weights twice
        if device.type == "cuda":
            _page_lock(memory, self)

    def turn_to(self, block: nn.Module) -> None:
        """Put the block's weights in place for the work that is queued next, and prefetch another's."""
        number = self._holding(block)
        if number is None:
            number = self._fill(1 - self.current, block)
        self.runtime.current_stream(self.device).wait_event(self.ready[number])
        _show(self.frozen[block], number)
        self.current = number
        following = self._following(block)
        if following is not None and self._holding(following) is None:
            self._fill(1 - number, following)

    def _holding(self, block: nn.Module) -> int | None:
        """The number of the buffer that has the weights of `block` as they are now."""
        wanted = (block, self.frozen[block].memory._version)
        return self.holds.index(wanted) if wanted in self.holds else None

    def _fill(self, number: int, block: nn.Module) -> int:
        """Copy a block's weights to a buffer once the work that was queued so far has run."""
        memory = self.frozen[block].memory
        self.stream.wait_event(self.runtime.current_stream(self.device).record_event())
        with self.runtime.stream(self.stream):
            self.buffers[number][: len(memory)].copy_(memory, non_blocking=True)
            self.ready[number] = self.stream.record_event()
        self.holds[number] = (block, memory._version)
        return number

    def _following(self, block: nn.Module) -> nn.Module | None:
        """The block that is likely to be called after this one, if that is known.

        A training step turns round at both ends, where the ring holds the next two blocks already. Without
        gradients another forward pass follows.
        """
        if block not in self.order:
            self.order.append(block)
        position, last = self.order.index(block), self.last
        if not torch.is_grad_enabled():
            self.step = 1
        elif last is block:
            self.step = -self.step
        elif last is not None:
            self.step = 1 if position > self.order.index(last) else -1
        self.last = block
        wanted = position + self.step
        if wanted == len(self.frozen) and not torch.is_grad_enabled():
            wanted = 0
        return self.order[wanted] if 0 <= wanted < len(self.order) else None

    def _take(self, block: nn.Module, memory: Tensor) -> _Frozen:
        """Move a block's frozen tensors to `memory`, and put views of a buffer in their place."""
        layers, slots, tensors = zip(*_frozen(block), strict=True)
        copies = _views(memory, tensors)
        with torch.no_grad():
            for layer, (_, name), tensor, copy in zip(layers, slots, tensors, copies, strict=True):
                copy.copy_(tensor)
                vars(layer).setdefault(IN_HOST_MEMORY, {})[name] = copy
        frozen = _Frozen(memory, slots, [_views(buffer, tensors) for buffer in self.buffers])
        _show(frozen, 0)
        return frozen


def spread(every: Sequence[Any], count: int) -> list[Any]:
    """`count` of them, as evenly as possible: copies then have the time of the blocks between them too."""
    return [every[number * len(every) // count] for number in range(count)]


def _show(frozen: _Frozen, number: int) -> None:
    """Make a block's layers read that buffer."""
    for (registry, name), view in zip(frozen.slots, frozen.views[number], strict=True):
        registry[name] = view


def _frozen(block: nn.Module) -> Iterator[tuple[nn.Module, Slot, Tensor]]:
    """(layer, slot, tensor) of each parameter and buffer that is not trained."""
    for layer in block.modules():
        for registry in (layer._parameters, layer._buffers):
            for name, tensor in registry.items():
                if tensor is not None and not tensor.requires_grad:
                    yield layer, (registry, name), tensor


def _rounded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNED) * ALIGNED


def _views(memory: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Parts of `memory`, (bytes,) uint8, in the form of each tensor. They share its version counter."""
    views, start = [], 0
    for tensor in tensors:
        strides = torch.empty_like(tensor, device="meta").stride()  # channels last stays so
        part = memory[start : start + tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, strides)
        views.append(nn.Parameter(part, False) if isinstance(tensor, nn.Parameter) else part)
        start += _rounded(tensor)
    return views


def _page_lock(memory: Tensor, ring: Ring) -> None:
    """Page-lock memory while `ring` lives, so that copies from it run beside the kernels.

    Not by torch's `pin_memory`, which rounds up to a power of two.
    """
    cudart, start = torch.cuda.cudart(), memory.data_ptr()
    try:
        torch.cuda.check_error(cudart.cudaHostRegister(start, memory.nbytes, PORTABLE))
    except RuntimeError as error:
        raise ConfigError(
            f"train.swap_blocks: {memory.nbytes / GIB:.1f} GiB of host memory cannot be page-locked: {error}"
            "; swap fewer blocks"
        ) from error
    weakref.finalize(ring, _unlock, start).atexit = False  # the end of the process unlocks it too


def _unlock(start: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(start)
