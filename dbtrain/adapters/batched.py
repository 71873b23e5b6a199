"""Many LoRAs on one frozen model: each row of a batch passes the adapter of its own subject.

The factors of all *slots* are stacked, so that a layer's adapters cost two batched products whatever their
number, beside one product of the frozen layer for all rows. A slot's rows never meet those of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import conv2d

from dbtrain.adapters.inject import NAME, trainable
from dbtrain.config.adapter import Adapter
from dbtrain.runtime.errors import ConfigError


class BatchedLora(nn.Module):
    """A frozen linear or 2-d convolution layer with a LoRA for each slot.

    `A`, (slots, rank, in, ...), and `B`, (slots, rank, out), are PEFT's, B transposed. A smaller rank is the
    beginning of each; the rest is zero, and so are its gradients.
    """

    def __init__(self, base_layer: nn.Module, stack: Stack) -> None:
        super().__init__()
        self.base_layer, self.stack = base_layer, stack
        self.scale = torch.ones(stack.slots)  # no buffer: those of a swapped block are elsewhere
        self.register_parameter("A", None)  # see `Stack.in_place`
        self.register_parameter("B", None)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of a slot's A and B, without the rank."""
        layer: Any = self.base_layer
        if isinstance(layer, nn.Conv2d):
            return (layer.in_channels, *layer.kernel_size), (layer.out_channels,)
        return (layer.in_features,), (layer.out_features,)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def forward(self, x: Tensor) -> Tensor:
        slot, of_all = self.stack.slot, cast("tuple[Tensor, ...]", (self.A, self.B, self.scale))
        a, b, scale = of_all if slot is None else (each[slot, None] for each in of_all)
        update = self._convolve if isinstance(self.base_layer, nn.Conv2d) else self._multiply
        y, times = self.base_layer(x), self.stack.times
        if times == 1:
            return update(y, x, a, b, scale)
        y, x = (_swapped(each, times, len(a)) for each in (y, x))
        return _swapped(update(y, x, a, b, scale), len(a), times)

    def _multiply(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        inner = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.mT) * scale[:, None, None].to(a.dtype)
        return y + torch.bmm(inner, b).view(y.shape)

    def _convolve(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """Slot after slot: one convolution in groups would keep a copy of `x` for the backward pass."""
        layer: Any = self.base_layer
        slots = zip(x.unflatten(0, (len(a), -1)), a, strict=True)
        settings = layer.stride, layer.padding, layer.dilation
        inner = torch.stack([conv2d(rows, factor, None, *settings) for rows, factor in slots])
        inner = inner.flatten(3) * scale[:, None, None, None].to(a.dtype)  # (slots, rows, rank, H * W)
        return y + torch.matmul(b.mT[:, None], inner).view(y.shape)


def _swapped(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Rows of `inner` parts in each of `outer` ones, as `outer` parts in each of `inner` ones."""
    return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Place:
    """Where the rows of a stack hold a factor."""

    start: int
    shape: tuple[int, ...]  # (rank, ...) of the widest slot

    @property
    def end(self) -> int:
        return self.start + prod(self.shape)

    def of(self, row: Tensor, rank: int) -> Tensor:
        """The factor of a slot with this rank, in the slot's row, (N,)."""
        shape = (rank, *self.shape[1:])
        return row[self.start : self.start + prod(shape)].view(shape)

    def of_all(self, rows: Tensor) -> Tensor:
        """The factors of all slots, (slots, rank, ...), in their rows, (slots, N)."""
        return rows[:, self.start : self.end].unflatten(1, self.shape)


class _Spread(torch.autograd.Function):
    """Copy all factors out of the rows of a stack, in another dtype, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dtype: torch.dtype, places: Sequence[Place]) -> tuple[Tensor, ...]:
        ctx.places, ctx.like = places, rows
        parts = [place.of_all(rows) for place in places]
        copies = tuple(torch.empty(part.shape, dtype=dtype, device=part.device) for part in parts)
        torch._foreach_copy_(copies, parts)
        return copies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows = torch.zeros_like(ctx.like)
        torch._foreach_copy_([place.of_all(rows) for place in ctx.places], grads)
        return rows, None, None


class Stack:
    """The LoRAs of all slots on the components of a model: a row of `weights`, (slots, N) fp32, for each.

    Optimizers see a few long tensors rather than hundreds of short ones. The layers compute with copies of
    the weights, which one kernel each makes once a step.
    """

    def __init__(self, slots: int, dtype: torch.dtype) -> None:
        """`dtype`: that of the base."""
        self.slots, self.dtype = slots, dtype
        self.slot: int | None = None  # of all rows; None: those of slot 0 first, then as many of slot 1, ...
        self.times = 1  # how often the rows of all slots follow one another in a batch
        self.layers: dict[str, BatchedLora] = {}  # by <component>.<module>
        self.places: dict[tuple[str, str], Place] = {}  # by layer and factor
        self.weights = nn.Parameter(torch.empty(slots, 0))
        self.grads = torch.empty(slots, 0)

    def add(self, component: str, module: nn.Module, ranks: Mapping[str, int]) -> None:
        """Put an adapter for each slot on these layers of a component; `ranks` are the widest.

        Raises ConfigError for a convolution in groups.
        """
        for name, rank in ranks.items():
            base: Any = module.get_submodule(name)
            if isinstance(base, nn.Conv2d) and base.groups > 1:
                raise ConfigError(f"{component}.{name} is a convolution in groups, which slots cannot adapt")
            layer = self.layers[f"{component}.{name}"] = BatchedLora(base, self)
            module.set_submodule(name, layer)
            for factor, shape in zip("AB", layer.shapes, strict=True):
                start = max((place.end for place in self.places.values()), default=0)
                self.places[f"{component}.{name}", factor] = Place(start, (rank, *shape))

    def allocate(self, device: torch.device) -> None:
        """Make the weights, zero, once all layers are there."""
        length = max(place.end for place in self.places.values())
        self.weights = nn.Parameter(torch.zeros(self.slots, length, device=device))
        self.weights.grad = self.grads = torch.zeros_like(self.weights)
        for layer in self.layers.values():
            layer.scale = layer.scale.to(device)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, forward and backward passes use copies of the weights in the base's precision.

        Gradients accumulate in `grads`.
        """
        copies = _Spread.apply(self.weights, self.dtype, tuple(self.places.values()))
        for (name, factor), copy in zip(self.places, copies, strict=True):
            self.layers[name]._parameters[factor] = copy  # as torch.func.functional_call does
        try:
            yield
        finally:
            for name, factor in self.places:
                self.layers[name]._parameters[factor] = None

    def bind(self, slot: int, component: str, module: nn.Module) -> None:
        """Make the parameters of the LoRA that PEFT put on `module` views of a slot.

        `module` is a `skeleton` of the component. Raises ConfigError if it needs more room than there is.
        """
        layer: Any
        linears: Any
        for name, layer in module.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            for factor, linears in (("A", layer.lora_A), ("B", layer.lora_B)):
                place, rank = self.places[f"{component}.{name}", factor], layer.r[NAME]
                if rank > place.shape[0]:
                    raise ConfigError(
                        f"the rank of {component}.{name} is {rank}, but the slots have room for "
                        f"{place.shape[0]}; start the fleet again"
                    )
                weights, grads = (place.of(row, rank) for row in self.row(slot))
                if factor == "B":  # (out, rank, ...)
                    shape = linears[NAME].weight.shape
                    weights, grads = (view.t().view(shape) for view in (weights, grads))
                linears[NAME].weight = nn.Parameter(weights)
                linears[NAME].weight.grad = grads
            self.layers[f"{component}.{name}"].scale[slot] = layer.scaling[NAME]

    def row(self, slot: int) -> tuple[Tensor, Tensor]:
        """A slot's weights and gradients, (N,) each."""
        return self.weights.data[slot], self.grads[slot]

    def clear(self, slot: int) -> None:
        """Make a slot's adapter zero, whose update is zero."""
        self.weights.data[slot] = 0.0

    @contextmanager
    def only(self, slot: int) -> Iterator[None]:
        """In the block, all rows of a batch belong to one slot."""
        self.slot = slot
        try:
            yield
        finally:
            self.slot = None

    @contextmanager
    def sampling(self, denoiser: nn.Module, rows: int) -> Iterator[None]:
        """In the block, `denoiser` gets `rows` rows of each slot, once or, with guidance, several times."""

        def see(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self.times = len(args[0] if args else kwargs["hidden_states"]) // (rows * self.slots)

        hook = denoiser.register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self.times = 1


@contextmanager
def on_the_cpu(modules: Iterable[nn.Module]) -> Iterator[None]:
    """In the block, parameters of adapters are on the CPU and contiguous, as where training starts anew.

    Their values afterwards become those of the slot.
    """
    parameters = [parameter for module in modules for parameter in trainable(module).values()]
    views = [parameter.data for parameter in parameters]
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = torch.empty(view.shape)
    yield
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view.copy_(parameter.data)


def ranks(module: nn.Module) -> dict[str, int]:
    """The rank of each layer with a LoRA of PEFT's, by name."""
    return {name: layer.r[NAME] for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


# Settings of an adapter that slots do not have, and the value that they need.
NEEDED = {"kind": "lora", "dropout": 0.0, "dora": False, "bias": "none"}


def check(cfg: Adapter) -> None:
    """Raise ConfigError for an adapter that cannot be trained in slots."""
    for section, one in (("adapter", cfg), ("adapter.text_encoder", cfg.text_encoder)):
        for key, needed in NEEDED.items():
            if one and (value := getattr(one, key)) != needed:
                raise ConfigError(f"{section}.{key} is {value!r}, which slots cannot train; use {needed!r}")
    if cfg.token:
        raise ConfigError("adapter.token: slots learn no words; remove it")
