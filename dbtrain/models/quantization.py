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


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that keeps `encode`'s bytes in place of its weight.

    A subclass of `nn.Linear`, because PEFT checks for it. Each read of `weight`, (out, in), decodes it. The
    forward and the backward pass decode their own copies and drop them after one matrix product. A layer on
    the meta device becomes one on the meta device.
    """

    def __init__(self, linear: nn.Linear, storage: str) -> None:
        nn.Module.__init__(self)  # skips nn.Linear's, which creates a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.storage = storage
        codes, scale = encode(linear.weight.detach(), storage)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
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


def encode(rows: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """(codes, scale) of some rows of a weight, (rows, in): bytes, (rows, k) and (rows, m).

    Each row is encoded by itself. Both are bytes, because `module.to(dtype)` would convert floating dtypes.
    """
    dtype, largest = STORAGE[storage]
    rows = rows.float()
    scale = (rows.abs().amax(1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    coded = rows / scale
    coded = coded.round_() if dtype == torch.int8 else coded.clamp_(-largest, largest)
    return coded.to(dtype).view(torch.uint8), scale.view(torch.uint8)


def decode(codes: Tensor, scale: Tensor, storage: str, dtype: torch.dtype) -> Tensor:
    """The rows, (rows, in): 8-bit codes, which every `dtype` represents exactly, times fp32 scales."""
    return codes.view(STORAGE[storage][0]).to(dtype).mul_(scale.view(torch.float32))


class _Product(torch.autograd.Function):
    """input @ weight.T + bias. Saves the codes for the backward pass, not the weight."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
        storage: str, dtype: torch.dtype,
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
        setattr(parent, name, QuantizedLinear(linear, storage))
