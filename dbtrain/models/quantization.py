"""Frozen linear layers with 8-bit weights: half the memory of bf16, at some cost in accuracy and speed.

Diffusers' layerwise casting stores fp8 without scales, so its error is larger for small weights (11% at a
standard deviation of 0.005, 2.6% here), and autograd keeps its decoded bf16 weights until the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.runtime.errors import ConfigError

# Storage dtype and its largest magnitude. The steps of int8 are 1/127 of a row's largest weight, those of fp8
# (e4m3) 1/16 to 1/8 of each weight. For normally distributed weights int8 has a third of fp8's error.
STORAGE = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
WIDTH = 64  # narrower layers are not worth quantizing


class Linear8bit(nn.Linear):
    """A frozen linear layer with an 8-bit weight and one fp32 scale per output channel.

    A subclass of `nn.Linear`, because PEFT checks for it. Each read of `weight`, (out, in), decodes it. The
    forward and the backward pass decode their own copies and drop them after one matrix product.
    """

    scale: Tensor  # (out, 1) fp32

    def __init__(self, linear: nn.Linear, storage: str) -> None:
        nn.Module.__init__(self)  # skips nn.Linear's, which creates a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.storage, largest = STORAGE[storage]
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        coded = weight / scale
        coded = coded.round_() if self.storage == torch.int8 else coded.clamp_(-largest, largest)
        # Stored as bytes, because `module.to(dtype)` would convert fp8 like any floating dtype.
        self.codes = nn.Parameter(coded.to(self.storage).view(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight in the base's dtype."""
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
    """The weight, (out, in): 8-bit codes, which every `dtype` represents exactly, times `scale`."""
    return codes.view(storage).to(dtype).mul_(scale)


class _Product(torch.autograd.Function):
    """input @ weight.T + bias. Saves the codes for the backward pass, not the weight."""

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
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad @ decode(codes, scale, ctx.storage, grad.dtype)
        if ctx.needs_input_grad[3]:  # adapter.bias trains it
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_input, None, None, grad_bias, None, None


def quantize(module: nn.Module, storage: str) -> None:
    """Replace the wide linear layers of a frozen component, one by one, so that memory never grows.

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
            f"train.base_linears is '{storage}', but the {type(module).__name__} of this base has no linear "
            f"layer of width {WIDTH} or more; use full"
        )
    while wide:
        parent, name, linear = wide.pop()
        setattr(parent, name, Linear8bit(linear, storage))
