"""Frozen linear layers with 8-bit weights: half the memory of a bf16 base, at some exactness and speed.

Diffusers' layerwise casting stores fp8 without scales, which errs more on small weights (11% where their
standard deviation is 0.005, 2.6% here), and autograd keeps its decoded bf16 weights until the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.runtime.errors import ConfigError

# Storage of a weight, and the largest magnitude that it holds. Int8 has even steps of 1/127 of a row's
# largest weight, fp8 (e4m3) steps of 1/16 of each weight: int8 errs a third as much on weights
# that are spread like a normal.
STORAGE = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
WIDTH = 64  # narrower layers hold next to nothing, and stay as they are


class Linear8bit(nn.Linear):
    """A frozen linear layer that keeps its weight in 8 bits, with one fp32 scale for each output channel.

    An `nn.Linear` to all who ask, as PEFT does: `weight`, (out, in), is computed anew whenever it is read.
    The forward and the backward pass each have their own copy for as long as one product takes.
    """

    scale: Tensor  # (out, 1) fp32

    def __init__(self, linear: nn.Linear, storage: str) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which makes a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.storage, largest = STORAGE[storage]
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        coded = weight / scale
        coded = coded.round_() if self.storage == torch.int8 else coded.clamp_(-largest, largest)
        # As bytes: torch takes fp8 for a floating dtype that `module.to(dtype)` is to convert.
        self.codes = nn.Parameter(coded.to(self.storage).view(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as the products use it, in the base's dtype."""
        return decode(self.codes, self.scale, self.storage, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        dtype, kind = self.dtype, input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input = input.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(input, self.codes, self.scale, bias, self.storage, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage={self.storage}"


def decode(codes: Tensor, scale: Tensor, storage: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The weight, (out, in): 8-bit codes, exact in every `dtype`, times `scale`, rounded once."""
    return codes.view(storage).to(dtype).mul_(scale)


class _Product(torch.autograd.Function):
    """input @ weight.T + bias, which keeps the codes for its backward pass, not the weight."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
        storage: torch.dtype, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(codes, scale)
        ctx.storage = storage
        return nn.functional.linear(input, decode(codes, scale, storage, dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (codes, scale) = grads, ctx.saved_tensors
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = grad @ decode(codes, scale, ctx.storage, grad.dtype)
        if ctx.needs_input_grad[3]:  # adapter.bias trains it
            of_bias = grad.flatten(0, -2).sum(0)
        return of_input, None, None, of_bias, None, None


def quantize(module: nn.Module, storage: str) -> None:
    """Replace the wide linear layers of a frozen component, one at a time, so that its memory only falls.

    `storage` is a key of STORAGE. Raises ConfigError if the component has no wide linear layer.
    """
    wide = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and min(child.in_features, child.out_features) >= WIDTH
    ]
    if not wide:
        raise ConfigError(
            f"train.base_linears is '{storage}', but a {type(module).__name__} of this base has no linear "
            f"layer that is {WIDTH} wide; use full"
        )
    while wide:
        parent, name, linear = wide.pop()
        setattr(parent, name, Linear8bit(linear, storage))
