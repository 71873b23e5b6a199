"""The meaning of `train.precision`: the dtypes of the base and of its computations.

Adapters, their gradients and moments are fp32 in every precision. Steps compute with copies of them in
the base's precision, which one kernel makes once per step. Autocast would instead launch two small kernels
for each of their hundreds of weights in every forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """The dtypes of a step."""

    dtype: torch.dtype  # of the frozen base and of the adapters' computations
    autocast: bool = False  # torch.amp.autocast chooses what computes in fp32
    scaled: bool = False  # loss scaling, so that small gradients do not underflow

    def forward(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return torch.amp.autocast(device.type, self.dtype) if self.autocast else nullcontext()


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "bf16": Precision(torch.bfloat16, autocast=True),
    "fp16": Precision(torch.float16, autocast=True, scaled=True),
    "pure-bf16": Precision(torch.bfloat16),
}


class WorkingCopies:
    """Copies of fp32 parameters in another precision, which replace them during a step."""

    def __init__(self, module: nn.Module, parameters: Collection[str], dtype: torch.dtype) -> None:
        """`parameters`: names of parameters of `module`.

        Layers with DoRA get no copies, because DoRA subtracts 1 from a ratio of nearly equal norms.
        """
        self.dtype = dtype
        self.places: list[tuple[nn.Module, str]] = []
        dora = {name.split(".lora_")[0] for name in parameters if "lora_magnitude_vector" in name}
        for name in parameters:
            if dtype != torch.float32 and name.split(".lora_")[0] not in dora:
                owner, _, last = name.rpartition(".")
                self.places.append((module.get_submodule(owner), last))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, forward and backward passes (and recomputed activations) use the copies.

        Gradients accumulate in the fp32 originals.
        """
        if not self.places:
            yield
            return
        originals = [owner._parameters[name] for owner, name in self.places]
        self._put(_Cast.apply(self.dtype, *originals))
        try:
            yield
        finally:
            self._put(originals)

    def _put(self, values: Any) -> None:
        for (owner, name), value in zip(self.places, values, strict=True):
            owner._parameters[name] = value  # as torch.func.functional_call does


class _Cast(torch.autograd.Function):
    """Cast all tensors to another dtype, and their gradients back, in about one kernel each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return _cast(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_cast(grads, ctx.dtype))


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    space = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)
    parts = space.split([tensor.numel() for tensor in tensors])
    casts = tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))
    torch._foreach_copy_(casts, tensors)
    return casts
