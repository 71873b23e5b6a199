"""Which weights of text encoders have to be read, and which to hold at once within a limit of memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from dbtrain.models.base import Base
from dbtrain.models.blocks import blocks
from dbtrain.runtime import dist, memory
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.memory import GIB

SHARE = 0.8  # of the free memory; the rest is for activations


def sizes(base: Base, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each text encoder in `dtype`, from the headers of its files."""
    found = {}
    for name in base.family.text_encoders:
        with base.reading(name):
            files = base.weights(name)
            found[name] = dtype.itemsize * sum(math.prod(files.shape(tensor)) for tensor in files.names)
    return found


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
        host = SHARE * memory.free() / dist.local_world()  # each rank may load them
        if card is None and dist.device().type == "cuda":
            torch.cuda.empty_cache()  # what earlier work left counts as taken
            card = torch.cuda.mem_get_info(dist.device())[0]
        return cls(host, host) if card is None else cls(min(host, SHARE * card), SHARE * card)


@dataclass(frozen=True)
class Weight:
    """A parameter, which several modules may share."""

    owners: Sequence[tuple[nn.Module, str]]
    name: str
    source: str  # its name in the files; "" if they lack it
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def put(self, tensor: torch.Tensor) -> None:
        """Make `tensor` the parameter's value."""
        parameter = nn.Parameter(tensor, requires_grad=False)
        for owner, name in self.owners:
            owner._parameters[name] = parameter


def size(*parts: Sequence[Weight]) -> int:
    """Bytes of the weights."""
    return sum(weight.bytes for part in parts for weight in part)


@dataclass(frozen=True)
class EncoderPlan:
    """A text encoder without weights, and which of them have to be read. Made without reading any."""

    name: str
    module: Any  # real buffers, and parameters on the meta device
    weights: list[Weight]  # all, but for modules that prompts do not pass
    layers: list[nn.Module]
    kept: frozenset[int]  # layers whose output is read by more than the next layer
    rest: list[Weight]  # weights outside the layers
    parts: list[list[Weight]]  # the weights of each layer, to the last one that is needed

    @classmethod
    def of(cls, base: Base, name: str, dtype: torch.dtype) -> EncoderPlan:
        module: Any = base.skeleton(name, dtype)
        base.drop_unread(name, module)
        layers = blocks(module)
        states = base.family.hidden.get(name, range(1, len(layers) + 1))
        kept = frozenset(state - 1 if state > 0 else len(layers) + state for state in states)
        numbers = {inner: number for number, layer in enumerate(layers) for inner in layer.modules()}
        by_layer: dict[int | None, list[Weight]] = defaultdict(list)
        with base.reading(name):
            sources = _sources(module, base.weights(name).names)
        weights = _weights(module, dtype, sources)
        for weight in weights:
            by_layer[numbers.get(weight.owners[0][0])].append(weight)
        parts = [by_layer[number] for number in range(max(kept, default=-1) + 1)]
        return cls(name, module, weights, layers, kept, by_layer[None], parts)


def plans_of(base: Base, dtype: torch.dtype) -> list[EncoderPlan]:
    return [EncoderPlan.of(base, name, dtype) for name in base.family.text_encoders]


def _weights(module: Any, dtype: torch.dtype, sources: Mapping[str, str]) -> list[Weight]:
    """Every parameter, in the dtype that `from_pretrained` gives it.

    Like there, a parameter that modules share is one for each of its names that the files have.
    """
    strict = set(module._get_dtype_plan(dtype))  # parts of the names of those that stay in fp32
    shared: dict[nn.Parameter, dict[str, tuple[nn.Module, str]]] = defaultdict(dict)
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                shared[parameter][f"{prefix}.{name}".lstrip(".")] = (owner, name)
    found = []
    for parameter, owners in shared.items():
        apart = [{name: owners[name]} for name in owners if name in sources]
        for each in apart if len(apart) > 1 else [owners]:
            name = next((name for name in each if name in sources), next(iter(each)))
            kind = torch.float32 if strict & set(name.split(".")) else dtype
            found.append(Weight([*each.values()], name, sources.get(name, ""), parameter.shape, kind))
    return found


def _sources(module: Any, names: Collection[str]) -> dict[str, str]:
    """Name of a parameter -> its name in the files, by transformers' own rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules, known = get_model_conversion_mapping(module), module.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found = {}
    for name in names:
        target, converted = rename_source_key(name, renamings, converters, module.base_model_prefix, known)
        if target not in known and name in known:
            target, converted = rename_source_key(name, [], [], module.base_model_prefix, known)
        if not converted:
            found[target] = name
    return found


Group = list[tuple[EncoderPlan, int]]  # layers


def groups(plans: Sequence[EncoderPlan], limit: float) -> tuple[list[Group], bool]:
    """The layers to hold at once, one group after the other; and whether the next can be read meanwhile.

    The first layers of all encoders are together. Raises ConfigError if a single layer is beyond the limit.
    """
    first = [(plan, 0) for plan in plans if plan.parts]
    units = [first, *([(plan, number)] for plan in plans for number in range(1, len(plan.parts)))]
    each = [_size(unit) for unit in units]
    room = limit - size(*(plan.rest for plan in plans))
    if max(each) > room:
        least = -(-100 * int(limit - room + max(each)) // GIB) / 100  # rounded up
        raise ConfigError(
            f"the text encoders need {least} GiB even layer by layer, but may take {limit / GIB:.2f} GiB; "
            f"set prepare.memory_gib to {least} or more"
        )
    ahead = 2 * max(each) <= room < sum(each)
    found: list[Group] = [[]]
    for unit, its in zip(units, each, strict=True):
        if found[-1] and _size(found[-1]) + its > (room / 2 if ahead else room):
            found.append([])
        found[-1] += unit
    return found, ahead


def _size(group: Group) -> int:
    return size(*(plan.parts[number] for plan, number in group))


def peak(plans: Sequence[EncoderPlan], limit: float) -> int:
    """Bytes of weights held at once, layer by layer."""
    found, ahead = groups(plans, limit)
    pairs = pairwise([*map(_size, found), 0])
    return size(*(plan.rest for plan in plans)) + max(one + two * ahead for one, two in pairs)


def to_read(plans: Sequence[EncoderPlan]) -> int:
    """Bytes of weights that are needed, each read once."""
    return sum(size(plan.rest, *plan.parts) for plan in plans)
