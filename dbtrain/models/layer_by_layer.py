"""Running text encoders layer by layer from disk.

The models' own code runs once per group of layers, over all prompts. Layers before the group return what they
returned in an earlier run. Layers after it return what the group's last layer returned, which nothing reads.
So each weight is read once, whatever the number of prompts, and every bit is the whole model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dbtrain.models.base import Base
from dbtrain.models.text_encoders import GIB, Part, Plan, Result, Use, Weight, groups
from dbtrain.models.weight_files import WeightFiles
from dbtrain.runtime import console, dist, preemption
from dbtrain.runtime.errors import ConfigError, reason

CPU = torch.device("cpu")


class LayerByLayer:
    """Text encoders whose layers are read in groups."""

    def __init__(self, base: Base, plans: Sequence[Plan], limit: float) -> None:
        """Reads the names of the weights. `limit`: bytes of weights to hold at once.

        Raises ConfigError if the limit is too small for a layer, or if weights are missing.
        """
        self.groups, self.ahead = groups(plans, limit)
        self.base, self.plans, self.device = base, plans, dist.device()
        self.files = {plan.name: base.weights(plan.name) for plan in plans}
        self.sources = {plan.name: _sources(base, plan, self.files[plan.name]) for plan in plans}
        for plan in plans:
            # Parameters without elements, so that the modules have a device and a dtype.
            self._drop([plan.weights])
            plan.module.eval().to(self.device)
        self.runs = {plan.name: _Run(plan, self.device) for plan in plans}
        whole = sum(plan.whole for plan in plans)
        console.say(
            f"the text encoders of {base.name} have {whole / GIB:.1f} GiB: reading them in "
            f"{len(self.groups)} groups of layers, within {limit / GIB:.1f} GiB"
        )

    def run(self, use: Use[Result]) -> Result:
        """What the function returns in its last call, in which each layer returns what the model's does."""
        function = use({plan.name: plan.module for plan in self.plans})
        parts = [[(plan, plan.parts[number]) for plan, number in group] for group in self.groups]
        _fill(self._read([(plan, plan.rest) for plan in self.plans]))
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

    def _read(self, parts: Sequence[tuple[Plan, Part]]) -> list[tuple[Weight, Tensor]]:
        """The weights of these parts, on the device."""
        return [(weight, self._tensor(plan.name, weight)) for plan, part in parts for weight in part]

    def _tensor(self, encoder: str, weight: Weight) -> Tensor:
        sources = self.sources[encoder]
        source = next(sources[name] for name in weight.names if name in sources)
        try:
            # A copy: without one, the file would only be read when the layer runs.
            return self.files[encoder].read(source).to(self.device, weight.dtype, copy=True)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"cannot load '{encoder}' of base model {self.base.name}: {reason(error)}"
            ) from error

    def _drop(self, parts: Sequence[Part]) -> None:
        for part in parts:
            for weight in part:
                weight.put(torch.empty(0, dtype=weight.dtype, device=self.device))


def _fill(read: list[tuple[Weight, Tensor]]) -> None:
    """Make the tensors the modules' weights. Empties the list, which would keep them alive."""
    while read:
        weight, tensor = read.pop()
        weight.put(tensor)


def _sources(base: Base, plan: Plan, files: WeightFiles) -> dict[str, str]:
    """The name in the files of each parameter, by transformers' own rules.

    Raises ConfigError if a weight that is needed is missing, or has another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    base.check(plan.name)
    rules, known = get_model_conversion_mapping(plan.module), plan.module.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found = {}
    for name in files.places:
        around = (plan.module.base_model_prefix, known)
        target, converted = rename_source_key(name, renamings, converters, *around)
        if target not in known and name in known:
            target, converted = rename_source_key(name, [], [], *around)
        if not converted:
            found[target] = name
    missing = [
        weight.names[0]
        for part in (plan.rest, *plan.parts)
        for weight in part
        if not any(name in found and files.shape(found[name]) == weight.shape for name in weight.names)
    ]
    if missing:
        raise ConfigError(
            f"'{plan.name}' of base model {base.name} is incomplete: {len(missing)} weights are missing "
            f"or have another shape, e.g. {missing[0]}"
        )
    return found


class _Run:
    """The layers of one encoder, which return for each call what they have computed in this or earlier runs.

    What they return is held on the CPU.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.device = device
        self.layers = [_Layer(self, layer, n in plan.kept) for n, layer in enumerate(plan.layers)]
        self.latest: dict[int, Any] = {}  # call -> what the last layer so far returned
        self.shown: tuple[Any, Any] = (None, None)  # what was returned last: on the CPU, on the device

    def begin(self, here: set[int]) -> None:
        """Begin a run in which the layers `here` have their weights."""
        for number, layer in enumerate(self.layers):
            layer.calls, layer.here, layer.last = 0, number in here, number == max(here, default=-1)

    def hold(self, call: int, output: Any) -> Any:
        """A layer's output, on the CPU. Tensors that are equal to the last call's are held once.

        So is T5's position bias, eight times as large as its hidden states.
        """
        leaves, tree = tree_flatten(tree_map(lambda value: _moved(value, CPU), output))
        before = tree_leaves(self.latest.get(call - 1))
        if len(before) == len(leaves):
            leaves = [old if _equal(old, new) else new for old, new in zip(before, leaves, strict=True)]
        held = tree_unflatten(leaves, tree)
        self.latest[call], self.shown = held, (held, output)
        return held

    def show(self, held: Any) -> Any:
        """A held output on the device."""
        if self.shown[0] is not held:
            self.shown = (held, tree_map(lambda value: _moved(value, self.device), held))
        return self.shown[1]


class _Layer:
    """Takes the place of a layer's `forward`."""

    def __init__(self, run: _Run, module: nn.Module, kept: bool) -> None:
        self.run, self.forward, self.kept = run, module.forward, kept
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


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
