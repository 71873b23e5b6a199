"""A base's denoiser for generating images: stored as in training, and swapped as far as there is no room.

What it takes is counted on tensors without data, as for a training step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dbtrain.config import Train
from dbtrain.data.sizes import Size
from dbtrain.models import block_swap
from dbtrain.models.base import Base
from dbtrain.models.blocks import blocks
from dbtrain.models.memory_counter import MemoryCounter, like_cuda, materialized, needed, tensors
from dbtrain.runtime import console
from dbtrain.runtime.memory import GIB

PLENTY = 4  # times the weights: enough memory without asking
EASE = 2  # times the weights: memory in which the whole base fits with ease


@dataclass(frozen=True)
class Work:
    """What a denoiser generates at once, and what is on the device meanwhile."""

    rows: int  # images, or twice as many with guidance
    size: Size
    tokens: int  # of the longest prompt
    beside: Collection[str] = ()  # other components; a VAE among them decodes one image at a time

    @classmethod
    def of(
        cls, encoded: Sequence[Mapping[str, Tensor]], images: int, guidance: float, size: Size,
        beside: Collection[str] = (),
    ) -> Work:  # fmt: skip
        """Generating `images` at once of prompts that `sampler.encode` encoded."""
        tokens = max((row["prompt_embeds"].shape[1] for row in encoded), default=0)
        return cls(images * (2 if guidance > 1 else 1), size, tokens, beside)


@dataclass(frozen=True)
class Needs:
    """Bytes on the device at the peak of generating."""

    resident: int  # weights
    temporary: int  # of a call of the denoiser or the VAE
    blocks: tuple[int, ...]  # the frozen weights of each block

    def swapped(self, count: int) -> int:
        """With `count` blocks swapped, and an estimate of what a GPU needs besides tensors."""
        return needed(self.resident + self.temporary - block_swap.saved_bytes(self.blocks, count))

    def blocks_to_swap(self, has: float) -> int:
        """How many blocks have to be swapped to fit into `has` bytes; all if that is not enough."""
        return block_swap.count_that_saves(self.blocks, tensors(self.swapped(0) - has))


def needs(base: Base, linears: str, dtype: torch.dtype, work: Work) -> Needs:
    """What generating takes on a GPU, with `train.base_linears` of `linears`. Reads configs alone."""
    family, shape = base.family, base.family.space(base, work.size).shape
    denoiser = base.denoiser(linears, dtype)
    others = {name: base.skeleton(name, dtype) for name in work.beside}
    wanted = {
        name: [size or work.tokens for size in every] for name, every in family.conditions(base).items()
    }
    rows = family.row({"original_size": work.size, "crop": (0, 0)}, work.size)
    wanted |= {name: list(value.shape) for name, value in rows.items()}
    wanted.pop("lengths", None)  # all prompts count as long as the longest
    with torch.no_grad(), FakeTensorMode(), like_cuda(), MemoryCounter(512) as counter:
        for module in (denoiser, *others.values()):
            materialized(module)
        resident = counter.live
        condition = {name: torch.empty(work.rows, *each, dtype=dtype) for name, each in wanted.items()}
        noise = torch.empty(work.rows, *shape, dtype=dtype)
        family.denoise(denoiser, noise, torch.empty(work.rows), condition)
        if family.vae in others:
            family.decode(others[family.vae], noise[:1])
    return Needs(resident, counter.peak - resident, tuple(map(block_swap.frozen_bytes, blocks(denoiser))))


def apart(base: Base, module: nn.Module, dtype: torch.dtype, device: torch.device) -> list[str]:
    """The text encoders to have on the device only to encode, as not everything fits with ease.

    `module` is what `load` returned.
    """
    frozen = [name for name in base.family.text_encoders if name not in base.family.adaptable_text]
    has = free(device)
    if not frozen or has == inf:
        return []
    others = [base.skeleton(name, dtype) for name in base.family.models[1:]]
    weights = sum(weight.nbytes for one in (module, *others) for weight in one.parameters())
    return frozen if weights * EASE > has else []


def about(linears: str) -> dict[str, str]:
    """What images depend on besides the base if they are generated with `train.base_linears` of `linears`."""
    return {} if linears == "full" else {"base_linears": linears}


def load(base: Base, linears: str, dtype: torch.dtype) -> nn.Module:
    """The denoiser on the CPU, its linear layers stored as `train.base_linears` says."""
    name = base.family.denoiser
    console.say(f"loading {name} of {base.name}")
    module = base.denoiser(linears, dtype)
    base.fill(name, module, dtype)
    return module


def swap(base: Base, module: nn.Module, train: Train, device: torch.device, work: Work) -> int:
    """Swap blocks of what `load` returned, before it is moved to the device. Returns how many.

    They are as many as there is no room for, and at least `train.swap_blocks`; they change no result.
    """
    least = 0 if train.swap_blocks == "auto" else train.swap_blocks
    count = max(least, _missing(base, module, train.base_linears, free(device), work))
    moved = block_swap.swap(module, count, device)
    if count:
        console.say(f"swapping {count} blocks, whose weights take {moved / GIB:.2f} GiB of host memory")
    return count


def _missing(base: Base, module: nn.Module, linears: str, has: float, work: Work) -> int:
    """How many blocks have to be swapped to generate in `has` bytes."""
    weights = list(module.parameters())
    if sum(weight.nbytes for weight in weights) * PLENTY <= has or base.family.enlarges > 1:
        return 0  # upscalers are small, and see more than prompts
    dtype = next(weight.dtype for weight in weights if weight.is_floating_point())
    return needs(base, linears, dtype, work).blocks_to_swap(has)


def free(device: torch.device) -> float:
    """Bytes that are free on a GPU; infinite for a CPU, which is not asked."""
    if device.type != "cuda":
        return inf
    torch.cuda.empty_cache()  # what earlier work left counts as taken
    return torch.cuda.mem_get_info(device)[0]
