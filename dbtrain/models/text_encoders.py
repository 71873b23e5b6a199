"""Text encoders within a limit of memory: whole where they fit, otherwise layer by layer from disk.

Layer by layer, the models' own code runs once per group of layers, over all prompts. Layers before the group
return what they returned in an earlier run. Layers after it return what the group's last layer returned,
which nothing reads. So each weight is read once, whatever the number of prompts, and every bit is the whole
model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from dbtrain.models.base import Base
from dbtrain.models.encoder_plan import EncoderPlan, Room, Weight, groups, plans_of, sizes, to_read
from dbtrain.runtime import console, dist, preemption
from dbtrain.runtime.memory import GIB

Result = TypeVar("Result")
Use = Callable[[Mapping[str, nn.Module]], Callable[[], Result]]


def encoded(base: Base, dtype: torch.dtype, gib: float | None, use: Use[Result]) -> Result:
    """What the function returns that `use` makes for the base's text encoders, in `dtype` on the device.

    `gib`: memory for their weights (None: most of what is free). If they need more, the function is called
    several times, and must call them alike each time. Raises ConfigError if a single layer needs more.
    """
    room = Room.here(gib)
    if sum(sizes(base, dtype).values()) <= room.whole:
        return use(_OneAtATime(base, dtype))()
    return LayerByLayer(base, plans_of(base, dtype), room.layers).run(use)


class _OneAtATime(Mapping[str, nn.Module]):
    """A base's text encoders, loaded when they are asked for, in place of the one before."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self.base, self.dtype, self.held = base, dtype, ("", nn.Module())

    def __getitem__(self, name: str) -> nn.Module:
        if self.held[0] != name:
            self.held = ("", nn.Module())  # frees the one before
            console.say(f"loading {name} of {self.base.name}")
            self.held = (name, self.base.load(name, self.dtype).to(dist.device()))
        return self.held[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base.family.text_encoders)

    def __len__(self) -> int:
        return len(self.base.family.text_encoders)


class LayerByLayer:
    """Text encoders whose layers are read in groups."""

    def __init__(self, base: Base, plans: Sequence[EncoderPlan], limit: float) -> None:
        """Reads the names of the weights. `limit`: bytes of weights to hold at once.

        Raises ConfigError if the limit is too small for a layer, or if weights are missing.
        """
        self.groups, self.ahead = groups(plans, limit)
        self.base, self.plans, self.device = base, plans, dist.device()
        self.files = {plan.name: base.weights(plan.name) for plan in plans}
        for plan in plans:
            self._check(plan)
            # Parameters without elements, so that the modules have a device and a dtype.
            self._drop([plan.weights])
            plan.module.eval().to(self.device)
        self.runs = {plan.name: _Run(plan, self.device) for plan in plans}
        console.say(
            f"reading the text encoders of {base.name} ({to_read(plans) / GIB:.1f} GiB) in "
            f"{len(self.groups)} groups of layers, within {limit / GIB:.1f} GiB"
        )

    def _check(self, plan: EncoderPlan) -> None:
        """Raise ConfigError if a weight that is needed is missing, or has another shape."""
        self.base.check(plan.name)
        shape = self.files[plan.name].shape
        needed = [weight for part in (plan.rest, *plan.parts) for weight in part]
        with self.base.reading(plan.name):
            unfit = [one.name for one in needed if not one.source or shape(one.source) != one.shape]
        self.base.check_complete(plan.name, unfit)

    def run(self, use: Use[Result]) -> Result:
        """What the function returns in its last call, in which each layer returns what the model's does."""
        function = use({plan.name: plan.module for plan in self.plans})
        try:
            _fill(self._read([(plan, plan.rest) for plan in self.plans]))
            return self._in_groups(function)
        finally:
            self._drop([plan.weights for plan in self.plans])
            for run in self.runs.values():
                run.end()

    def _in_groups(self, function: Callable[[], Result]) -> Result:
        parts = [[(plan, plan.parts[number]) for plan, number in group] for group in self.groups]
        with ThreadPoolExecutor(1) as reader, console.bar(len(parts), "text encoders", "group") as bar:
            coming = reader.submit(self._read, parts[0])
            for number, following in enumerate([*parts[1:], []]):
                preemption.check()
                _fill(coming.result())
                if self.ahead:
                    coming = reader.submit(self._read, following)
                for plan in self.plans:
                    here = {layer for owner, layer in self.groups[number] if owner is plan}
                    self.runs[plan.name].begin(here)
                result = function()
                self._drop([part for _, part in parts[number]])
                if not self.ahead:
                    coming = reader.submit(self._read, following)
                bar.update()
        return result

    def _read(self, parts: Sequence[tuple[EncoderPlan, list[Weight]]]) -> list[tuple[Weight, Tensor]]:
        """The weights of these parts, on the device."""
        return [(weight, self._tensor(plan.name, weight)) for plan, part in parts for weight in part]

    def _tensor(self, encoder: str, weight: Weight) -> Tensor:
        with self.base.reading(encoder):
            tensor = self.files[encoder].read(weight.source)
        # A copy: without one, the file would only be read when the layer runs.
        return tensor.to(self.device, weight.dtype, copy=True)

    def _drop(self, parts: Sequence[list[Weight]]) -> None:
        for part in parts:
            for weight in part:
                weight.put(torch.empty(0, dtype=weight.dtype, device=self.device))


def _fill(read: list[tuple[Weight, Tensor]]) -> None:
    """Make the tensors the modules' weights. Empties the list, which would keep them alive."""
    while read:
        weight, tensor = read.pop()
        weight.put(tensor)


class _Run:
    """The layers of one encoder, which return for each call what they have computed in this or earlier runs.

    What they return is held on the CPU.
    """

    def __init__(self, plan: EncoderPlan, device: torch.device) -> None:
        self.device = device
        self.layers = [_Layer(self, layer, n in plan.kept) for n, layer in enumerate(plan.layers)]
        self.latest: dict[int, Any] = {}  # call -> what the last layer so far returned
        self.shown: tuple[Any, Any] = (None, None)  # what was returned last: on the CPU, on the device

    def begin(self, here: set[int]) -> None:
        """Begin a run in which the layers `here` have their weights."""
        for number, layer in enumerate(self.layers):
            layer.calls, layer.here, layer.last = 0, number in here, number == max(here, default=-1)

    def end(self) -> None:
        """Give the layers their own `forward` back, so that nothing holds what they returned."""
        for layer in self.layers:
            del layer.module.forward

    def hold(self, call: int, output: Any) -> Any:
        """A layer's output, on the CPU. Tensors that are equal to the last call's are held once.

        So is T5's position bias, eight times as large as its hidden states.
        """
        leaves, tree = tree_flatten(tree_map_only(Tensor, Tensor.cpu, output))
        before = tree_leaves(self.latest.get(call - 1))
        if len(before) == len(leaves):
            leaves = [old if _equal(old, new) else new for old, new in zip(before, leaves, strict=True)]
        held = tree_unflatten(leaves, tree)
        self.latest[call], self.shown = held, (held, output)
        return held

    def show(self, held: Any) -> Any:
        """A held output on the device."""
        if self.shown[0] is not held:
            self.shown = (held, tree_map_only(Tensor, lambda one: one.to(self.device), held))
        return self.shown[1]


class _Layer:
    """Takes the place of a layer's `forward`."""

    def __init__(self, run: _Run, module: nn.Module, kept: bool) -> None:
        self.run, self.module, self.forward, self.kept = run, module, module.forward, kept
        self.calls, self.here, self.last = 0, False, False
        self.outputs: dict[int, Any] = {}  # by call, if they are kept
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.calls
        self.calls += 1
        if not self.here:
            return self.run.show(self.outputs.get(call, self.run.latest.get(call)))
        output = self.forward(*args, **kwargs)
        if self.kept or self.last:
            held = self.run.hold(call, output)
            if self.kept:
                self.outputs[call] = held
        return output


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
