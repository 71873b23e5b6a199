"""Count the memory of live tensors and the FLOPs while operators run; on a CPU, as if it were a GPU."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from dbtrain.runtime.memory import GIB

aten = torch.ops.aten
# Estimates of what a GPU needs besides tensors: its context and the libraries' workspaces, GiB, and the share
# of memory lost to fragmentation.
CONTEXT_GIB, FRAGMENTED = 0.6, 0.04


def needed(peak: float) -> int:
    """The peak of all tensors, plus an estimate of what a GPU needs besides, bytes."""
    return int(peak * (1 + FRAGMENTED) + CONTEXT_GIB * GIB)


def tensors(missing: float) -> float:
    """Bytes of tensors by which the peak must sink, so that `missing` bytes less are needed."""
    return missing / (1 + FRAGMENTED)


class MemoryCounter(TorchDispatchMode):
    """Counts the live bytes of all storages that operators create under this mode, and their peak.

    Each storage is rounded up to a multiple of `block` bytes, like an allocator does. What a kernel
    allocates and frees internally is not counted, unless `workspace` says so: (operator, its arguments) ->
    bytes. Counts the FLOPs of products, convolutions and attention too.
    """

    def __init__(self, block: int = 1, workspace: Callable[[Any, Sequence[Any]], int] = lambda *_: 0) -> None:
        super().__init__()
        self.block, self.workspace = block, workspace
        self.live = self.peak = self.flops = 0
        self.known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        operator = func.overloadpacket
        if operator in flop_registry:
            self.flops += flop_registry[operator](*args, **(kwargs or {}), out_val=output)
        self.peak = max(self.peak, self.live + self.workspace(operator, args))
        return output

    def of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes that these tensors take, each storage counted once."""
        sizes = {(s := tensor.untyped_storage())._cdata: s.nbytes() for tensor in tensors}
        return sum(map(self._rounded, sizes.values()))

    def _rounded(self, size: int) -> int:
        return math.ceil(size / self.block) * self.block

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.known:
            size = self._rounded(storage.nbytes())
            self.live += size
            self.peak = max(self.peak, self.live)
            self.known[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size


def materialized(module: Any) -> Any:
    """Replace every tensor of a module by a new one, which the active modes make fake and count."""
    new: dict[Tensor, Tensor] = {}  # T5 has one weight under two names
    for part in module.modules():
        for tensors in (part._parameters, part._buffers, vars(part)):  # some are attributes only
            for name, tensor in tensors.items():
                if not isinstance(tensor, Tensor):
                    continue
                if tensor not in new:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    parameter = isinstance(tensor, nn.Parameter)
                    new[tensor] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                tensors[name] = new[tensor]
    return module


def of_a_cpu(operator: Any, args: Sequence[Any]) -> int:
    """Bytes that some operators take on a CPU while they run, where those of GPUs need no copies.

    A product of two dtypes, as decoding has, copies both sides to the wider one. Of convolutions in half
    precision, oneDNN's backward pass sums the input's gradient in fp32; if it lacks the dtype, torch unrolls
    the input, so that the convolution is a matrix product.
    """
    if operator is aten.mul_ and isinstance(args[1], Tensor) and args[0].dtype != args[1].dtype:
        return 2 * args[0].numel() * args[1].itemsize
    if operator not in (aten.convolution, aten.convolution_backward):
        return 0
    backward = operator is aten.convolution_backward
    input, weight, strides = args[backward], args[1 + backward], args[3 + backward]
    if input.dtype not in (torch.bfloat16, torch.float16):
        return 0
    half = "bf16" if input.dtype == torch.bfloat16 else "fp16"
    if torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported")():
        return 4 * input.numel() * backward
    unrolled = math.prod(weight.shape[2:]) * input.nbytes // math.prod(strides)
    return unrolled if unrolled > input.nbytes else 0


@contextmanager
def like_cuda() -> Iterator[None]:
    """In the block, treat CPU tensors like a GPU's: fused attention, and autocast with norms in fp32.

    A torch built without CUDA cannot run autograd on fake CUDA tensors, so that all machines use CPU tensors.
    https://docs.pytorch.org/docs/stable/amp.html lists what CUDA's autocast keeps in fp32; the CPU's list has
    no norms. This patches functions, as a TorchFunctionMode is off during the backward pass, where
    checkpoints recompute.
    """
    ours = {name: _in_fp32(getattr(functional, name)) for name in ("group_norm", "layer_norm")}
    ours["scaled_dot_product_attention"] = _attention
    plain = {name: getattr(functional, name) for name in ours}
    try:
        for name, function in ours.items():
            setattr(functional, name, function)
        yield
    finally:
        for name, function in plain.items():
            setattr(functional, name, function)


def _in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def cast(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return function(*args, **kwargs)

    return cast


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention with the kernel that CUDA chooses: flash in half precision, else memory-efficient.

    The latter has no grouped queries: they are computed step by step.
    """
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(half), key.to(half), value.to(half)
    if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] % 8 == 0:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        steps = aten._scaled_dot_product_attention_math
        mask = attn_mask
        return steps(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=True)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    keep = any(tensor.requires_grad for tensor in (query, key, value))
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale)[0]
