"""Text encoders within a limit of memory: whole where they fit, otherwise layer by layer from disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dbtrain.models.base import Base
from dbtrain.models.blocks import blocks
from dbtrain.runtime import dist, memory
from dbtrain.runtime.errors import ConfigError

GIB = 2**30
SHARE = 0.8  # of the free memory; the rest is for activations
Result = TypeVar("Result")
Use = Callable[[Mapping[str, nn.Module]], Callable[[], Result]]


def encoded(base: Base, dtype: torch.dtype, gib: float | None, use: Use[Result]) -> Result:
    """What the function returns that `use` makes for the base's text encoders, in `dtype` on the device.

    `gib`: memory for their weights (None: most of what is free). If they need more, the function is called
    several times, and must call them alike each time. Raises ConfigError if a single layer needs more.
    """
    from dbtrain.models.layer_by_layer import LayerByLayer

    plans, room = plans_of(base, dtype), Room.here(gib)
    if sum(plan.whole for plan in plans) <= room.whole:
        return use(_OneAtATime(base, dtype))()
    return LayerByLayer(base, plans, room.layers).run(use)


@dataclass(frozen=True)
class Room:
    """Bytes for weights: of whole encoders, which pass through the host's memory, and of some layers."""

    whole: float
    layers: float

    @classmethod
    def here(cls, gib: float | None, card: float | None = None) -> Room:
        """`gib`, or most of what is free on this machine; `card`: bytes of a GPU elsewhere."""
        if gib:
            return cls(gib * GIB, gib * GIB)
        host = SHARE * memory.free()
        if card is None and dist.device().type == "cuda":
            card = torch.cuda.mem_get_info(dist.device())[0]
        return cls(host, host) if card is None else cls(min(host, SHARE * card), SHARE * card)


class _OneAtATime(Mapping[str, nn.Module]):
    """A base's text encoders, loaded when they are asked for, in place of the one before."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self.base, self.dtype, self.held = base, dtype, ("", nn.Module())

    def __getitem__(self, name: str) -> nn.Module:
        if self.held[0] != name:
            self.held = ("", nn.Module())  # frees the one before
            self.held = (name, self.base.load(name, self.dtype).to(dist.device()))
        return self.held[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base.family.text_encoders)

    def __len__(self) -> int:
        return len(self.base.family.text_encoders)


@dataclass(frozen=True)
class Weight:
    """A parameter, under all its names."""

    owners: Sequence[tuple[nn.Module, str]]
    names: Sequence[str]
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def put(self, tensor: torch.Tensor) -> nn.Parameter:
        """Make `tensor` the parameter's value."""
        parameter = nn.Parameter(tensor, requires_grad=False)
        for owner, name in self.owners:
            owner._parameters[name] = parameter
        return parameter


Part = list[Weight]


def size(*parts: Part) -> int:
    """Bytes of the weights."""
    return sum(weight.bytes for part in parts for weight in part)


@dataclass(frozen=True)
class Plan:
    """A text encoder without weights, and which of them have to be read. Made from config files alone."""

    name: str
    module: Any  # real buffers, and parameters on the meta device
    whole: int  # bytes of all weights
    weights: Part  # all, but for modules that prompts do not pass
    layers: list[nn.Module]
    kept: frozenset[int]  # layers whose output is read by more than the next layer
    rest: Part  # weights outside the layers
    parts: list[Part]  # the weights of each layer, to the last one that is needed

    @classmethod
    def of(cls, base: Base, name: str, dtype: torch.dtype) -> Plan:
        module: Any = base.skeleton(name, place=_parameters_on_meta(dtype))
        whole = size(_weights(module, dtype))
        base.drop_unread(name, module)
        layers = blocks(module)
        states = base.family.hidden.get(name, range(1, len(layers) + 1))
        kept = frozenset(state - 1 if state > 0 else len(layers) + state for state in states)
        numbers = {inner: number for number, layer in enumerate(layers) for inner in layer.modules()}
        by_layer: dict[int | None, Part] = defaultdict(list)
        weights = _weights(module, dtype)
        for weight in weights:
            by_layer[numbers.get(weight.owners[0][0])].append(weight)
        parts = [by_layer[number] for number in range(max(kept, default=-1) + 1)]
        return cls(name, module, whole, weights, layers, kept, by_layer[None], parts)


def plans_of(base: Base, dtype: torch.dtype) -> list[Plan]:
    return [Plan.of(base, name, dtype) for name in base.family.text_encoders]


@contextmanager
def _parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """In the block, new modules have real buffers, and parameters in `dtype` on the meta device."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        fresh = parameter is not None and not parameter.is_meta
        return nn.Parameter(parameter.to("meta"), requires_grad=False) if fresh else None

    default, hook = torch.get_default_dtype(), register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        hook.remove()


def _weights(module: Any, dtype: torch.dtype) -> Part:
    """Every parameter once, in the dtype that `from_pretrained` gives it."""
    strict = set(module._get_dtype_plan(dtype))  # parts of the names of those that stay in fp32
    found: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = defaultdict(list)
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                found[parameter].append((owner, name, f"{prefix}.{name}".lstrip(".")))
    return [
        Weight(
            [(owner, name) for owner, name, _ in places], [full for _, _, full in places], parameter.shape,
            torch.float32 if strict & set(places[0][2].split(".")) else dtype,
        )
        for parameter, places in found.items()
    ]  # fmt: skip


Group = list[tuple[Plan, int]]  # layers


def groups(plans: Sequence[Plan], limit: float) -> tuple[list[Group], bool]:
    """The layers to hold at once, one group after the other; and whether the next can be read meanwhile.

    The first layers of all encoders are together. Raises ConfigError if a single layer is beyond the limit.
    """
    first = [(plan, 0) for plan in plans if plan.parts]
    units = [first, *([(plan, number)] for plan in plans for number in range(1, len(plan.parts)))]
    sizes = [_size(unit) for unit in units]
    room = limit - size(*(plan.rest for plan in plans))
    if max(sizes) > room:
        least = -(-100 * int(limit - room + max(sizes)) // GIB) / 100  # rounded up
        raise ConfigError(
            f"the text encoders need {least} GiB even layer by layer, but may take {limit / GIB:.2f} GiB; "
            f"set prepare.memory_gib to {least} or more"
        )
    ahead = 2 * max(sizes) <= room < sum(sizes)
    found: list[Group] = [[]]
    for unit, its in zip(units, sizes, strict=True):
        if found[-1] and _size(found[-1]) + its > (room / 2 if ahead else room):
            found.append([])
        found[-1] += unit
    return found, ahead


def _size(group: Group) -> int:
    return size(*(plan.parts[number] for plan, number in group))


def peak(plans: Sequence[Plan], limit: float) -> int:
    """Bytes of weights held at once, layer by layer."""
    found, ahead = groups(plans, limit)
    sizes = [*map(_size, found), 0]
    return size(*(plan.rest for plan in plans)) + max(
        one + (two if ahead else 0) for one, two in pairwise(sizes)
    )


def to_read(plans: Sequence[Plan]) -> int:
    """Bytes of weights that are needed, each read once."""
    return sum(size(plan.rest, *plan.parts) for plan in plans)
