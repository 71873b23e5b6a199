"""Frozen linear layers with 8- and 4-bit weights: less memory than bf16, at some cost in accuracy and speed.

Diffusers' layerwise casting stores fp8 without scales, so its error is larger for small weights (11% at a
standard deviation of 0.005, 2.6% here), and autograd keeps its decoded bf16 weights until the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.runtime.errors import ConfigError

WIDTH = 64  # narrower layers are not worth quantizing
BLOCK = 64  # weights of a row that share a scale in 4 bits
# Quantiles of a normal distribution, Dettmers et al. 2023, "QLoRA", arXiv:2305.14314; bitsandbytes' digits.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
PAIRS = torch.cartesian_prod(*2 * [torch.tensor(NF4, device="cpu")])  # of values, by the byte of their codes
NO_TABLE = torch.empty(0, device="cpu")
TINY = torch.finfo(torch.float32).tiny  # the scale of zeros


@dataclass(frozen=True)
class Storage:
    """A way to store the rows of a weight, (rows, in)."""

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    """(rows in fp32) -> (codes, scale), bytes, (rows, k) and (rows, m)."""
    decode: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    """(codes, scale, table, dtype) -> the rows, maybe with padding behind."""
    table: Tensor = NO_TABLE  # that `decode` reads, fp32
    indices: int = 0  # bytes a weight that `decode` takes besides the decoded weight
    dynamic: bool = False  # multiplies the codes with activations and gradients in 8 bits


def _encode_8bit(dtype: torch.dtype, largest: float, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes up to `largest`, and one scale a row."""
    scale = (rows.abs().amax(1, keepdim=True) / largest).clamp(min=TINY)
    coded = rows / scale
    coded = coded.round_() if dtype == torch.int8 else coded.clamp_(-largest, largest)
    return coded.to(dtype).view(torch.uint8), scale.view(torch.uint8)


def _decode_8bit(coded: torch.dtype, codes: Tensor, scale: Tensor, _: Tensor, dtype: torch.dtype) -> Tensor:
    """8-bit codes, which every `dtype` represents exactly, times the scales."""
    return codes.view(coded).to(dtype).mul_(scale.view(torch.float32))


def _encode_nf4(double: bool, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes a byte, the first one in its upper half, and a scale for each block of a row.

    `scale` is the blocks' in fp32; if `double`, the row's fp32 step and how many of them each block has.
    """
    blocks = nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(2)  # (rows, blocks)
    scale = largest.view(torch.uint8)
    if double:
        step = (largest.amax(1, keepdim=True) / 255).clamp(min=TINY)
        scale = torch.cat([step.view(torch.uint8), (largest / step).round().to(torch.uint8)], 1)
    values = torch.tensor(NF4, device=rows.device)  # increasing
    between = (values[1:] + values[:-1]) / 2
    shares = blocks / _block_scales(double, scale).clamp(min=TINY)[:, :, None]
    codes = torch.bucketize(shares, between, out_int32=True).flatten(1).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


def _decode_nf4(double: bool, codes: Tensor, scale: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of each byte's two codes, times the scales. Indices take as much memory as bf16 weights."""
    rows = nn.functional.embedding(codes.int(), pairs.to(dtype))  # (rows, k, 2)
    rows.view(len(rows), -1, BLOCK).mul_(_block_scales(double, scale)[:, :, None])
    return rows.flatten(1)


def _block_scales(double: bool, scale: Tensor) -> Tensor:
    """The scales of the blocks, (rows, blocks) fp32."""
    if not double:
        return scale.view(torch.float32)
    return scale[:, 4:] * scale[:, :4].contiguous().view(torch.float32)


NF4_FP32 = "nf4-fp32"  # with fp32 scales, as 4-bit weights in files have them
# The steps of int8 are 1/127 of a row's largest weight, those of fp8 (e4m3) 1/16 to 1/8 of each weight. For
# normally distributed weights int8 has a third of fp8's error, and NF4 15 times int8's.
_INT8 = Storage(partial(_encode_8bit, torch.int8, 127.0), partial(_decode_8bit, torch.int8))
_FP8 = torch.float8_e4m3fn
STORAGE = {
    "int8": _INT8,
    "fp8": Storage(partial(_encode_8bit, _FP8, 448.0), partial(_decode_8bit, _FP8)),
    "nf4": Storage(partial(_encode_nf4, True), partial(_decode_nf4, True), PAIRS, 2),
    NF4_FP32: Storage(partial(_encode_nf4, False), partial(_decode_nf4, False), PAIRS, 2),
    "int8-dynamic": Storage(_INT8.encode, _INT8.decode, dynamic=True),
}


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that keeps `encode`'s bytes in place of its weight.

    A subclass of `nn.Linear`, because PEFT checks for it. Each read of `weight`, (out, in), decodes it. The
    forward and the backward pass decode their own copies and drop them after one matrix product. A layer on
    the meta device becomes one on the meta device.
    """

    table: Tensor  # bytes, too

    def __init__(self, linear: nn.Linear, storage: str) -> None:
        nn.Module.__init__(self)  # skips nn.Linear's, which creates a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.storage = storage
        codes, scale = encode(linear.weight.detach(), storage)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_buffer("table", STORAGE[storage].table.view(torch.uint8), persistent=False)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight in the base's dtype; of a layer that is sharded by rows, those that are here."""
        codes, scale = (
            part.to_local() if hasattr(part, "to_local") else part for part in (self.codes, self.scale)
        )
        return decode(codes, scale, self.table, self.storage, self.dtype, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        dtype, kind = self.dtype, input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input = input.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(input, self.codes, self.scale, self.table, bias, self.storage, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage={self.storage}"


def encode(rows: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """(codes, scale) of some rows of a weight, (rows, in): bytes, (rows, k) and (rows, m).

    Each row is encoded by itself. Both are bytes, because `module.to(dtype)` would convert floating dtypes.
    """
    return STORAGE[storage].encode(rows.float())


def decode(
    codes: Tensor, scale: Tensor, table: Tensor, storage: str, dtype: torch.dtype, width: int
) -> Tensor:
    """Rows of a weight, (rows, width), from what `encode` returned. `table`: the storage's, as bytes."""
    return STORAGE[storage].decode(codes, scale, table.view(torch.float32), dtype)[:, :width]


class _Product(torch.autograd.Function):
    """input @ weight.T + bias. Saves the codes for the backward pass, not the weight."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, codes: Tensor, scale: Tensor, table: Tensor, bias: Tensor | None,
        storage: str, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(codes, scale, table)
        ctx.storage, ctx.width = storage, input.shape[-1]
        if STORAGE[storage].dynamic:
            output = _rounded_product(input, codes.view(torch.int8).t()).mul_(scale.view(torch.float32).t())
            return (output if bias is None else output.add_(bias)).to(dtype)
        return nn.functional.linear(input, decode(codes, scale, table, storage, dtype, ctx.width), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (codes, scale, table) = grads, ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0] and STORAGE[ctx.storage].dynamic:
            # The scales are of the terms of this sum: the gradient takes them in before it is rounded.
            scaled = grad * scale.view(torch.float32).t()
            grad_input = _rounded_product(scaled, codes.view(torch.int8)).to(grad.dtype)
        elif ctx.needs_input_grad[0]:
            grad_input = grad @ decode(codes, scale, table, ctx.storage, grad.dtype, ctx.width)
        if ctx.needs_input_grad[4]:  # adapter.bias trains it
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_input, None, None, None, grad_bias, None, None


def _rounded_product(rows: Tensor, codes: Tensor) -> Tensor:
    """rows @ codes, (..., n) fp32, each row rounded to 255 steps. `codes`: (k, n) int8.

    Rows do not depend on each other, and the sums are exact. A row that is not finite stays so.
    """
    step = torch.linalg.vector_norm(rows, torch.inf, -1, keepdim=True, dtype=torch.float32) / 127
    step = step.clamp(min=TINY)
    rounded = (rows / step).round_().to(torch.int8)
    sums = int8_matmul(rounded.reshape(-1, rows.shape[-1]), codes, rows.is_cuda)
    return sums.view(*rows.shape[:-1], -1) * step


def int8_matmul(left: Tensor, right: Tensor, cuda: bool) -> Tensor:
    """left @ right, (m, n) int32, of int8 matrices; exact. `cuda`: within the limits of cuBLAS.

    It needs 17 rows or more, multiples of 8 in the other sizes, `left` in rows and `right` in columns.
    """
    if cuda and (left.shape[1] % 8 or right.shape[1] % 8):
        return (left.double() @ right.double()).int()
    rows = len(left)
    if cuda:
        left = nn.functional.pad(left, (0, 0, 0, max(0, 32 - rows))).contiguous()
        right = right.t().contiguous().t()
    return torch._int_mm(left, right)[:rows]


def parameters(module: nn.Module) -> int:
    """How many parameters a module has. Of quantized layers, the weights that the bytes stand for count."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(part.numel() for layer in layers for part in (layer.codes, layer.scale))
    return sum(parameter.numel() for parameter in module.parameters()) - stored + weights


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
