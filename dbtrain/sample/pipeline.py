"""A base model and any number of adapters on it: added, switched, mixed, merged, swapped, removed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.common import States
from dbtrain.adapters.inject import KINDS
from dbtrain.adapters.state import AdapterState
from dbtrain.config import Model
from dbtrain.models import sampler
from dbtrain.models.base import Base
from dbtrain.models.pretrained import DTYPES
from dbtrain.runtime import dist
from dbtrain.runtime.errors import ConfigError, reason


class AdapterPipeline:
    """A base model, loaded once, and adapters of any kind and format on it.

    >>> pipe = AdapterPipeline.load(Model(path="tiny"))
    >>> pipe.add("dog", "runs/dog")
    >>> pipe.use({"dog": 0.8})
    >>> pictures = pipe.generate("a photo of sks dog", seeds=[0, 1])
    """

    def __init__(self, base: Base, precision: str, device: torch.device | None = None) -> None:
        self.base = base
        self.family = base.family
        self.pipe = sampler.build(base, DTYPES[precision], device or dist.device())
        self.components: dict[str, nn.Module] = {
            name: getattr(self.pipe, name) for name in base.family.adaptable
        }
        self.modules = {name: [n for n, _ in m.named_modules()] for name, m in self.components.items()}
        self.added: dict[str, dict[str, Any]] = {}  # layout of each adapter, by component
        self.biases: dict[str, dict[nn.Parameter, Tensor]] = {}  # changes to the base's, by adapter
        self.plain: dict[nn.Parameter, Tensor] = {}  # those biases as the base has them
        self.scales: dict[str, float] = {}  # adapters in use

    @classmethod
    def load(
        cls, model: Model, precision: str = "fp32", device: torch.device | None = None
    ) -> AdapterPipeline:
        """The base that a config's `model` section names, downloaded first if it is a Hub id."""
        return cls(Base.find(model), precision, device)

    def add(self, name: str, adapter: str | Path) -> None:
        """Load an adapter (a run folder, a file or a PEFT folder) under `name`; `use` puts it to work.

        Raises ConfigError if it does not fit the base.
        """
        if name in self.names() or not name.isidentifier():
            raise ConfigError(f"adapter name '{name}' is taken already, or no plain word")
        states = self._read(adapter)
        scales = self.scales
        self.use({})  # the base's own biases
        self.biases[name], self.added[name] = {}, {}
        try:
            for component, state in states.items():
                self.biases[name] |= _biases(self.components[component], state)
                self.added[name] |= {component: state.layout}
                _load(self.components[component], state, name)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            self.remove(name)
            self.use(scales)
            raise ConfigError(
                f"adapter '{adapter}' does not fit base model {self.base.name}: {reason(error)}"
            ) from error
        self.plain = {bias: bias.detach().clone() for bias in self.biases[name]} | self.plain
        self.use(scales)

    def swap(self, name: str, adapter: str | Path) -> None:
        """Give the adapter called `name` the weights of another one.

        In place where both have the same layers, rank and strength, so that nothing is compiled anew;
        else the old one is removed and the new one added.
        """
        self._known([name])
        states, scales = self._read(adapter), self.scales
        if any(layer.merged for layer in self._layers()):
            self.use(scales)  # takes the old weights out of the base's, while they are known
        layouts = {component: state.layout for component, state in states.items()}
        if layouts == self.added[name] and not self.biases[name]:
            for component, state in states.items():
                _fill(self.components[component], state, name)
        else:
            self.remove(name)
            self.add(name, adapter)
            self.use(scales)

    def remove(self, name: str) -> None:
        """Take an adapter off the base, and free its memory."""
        self._known([name])
        self.use({other: scale for other, scale in self.scales.items() if other != name})
        del self.biases[name]
        for component in self.added.pop(name):
            _remove(self.components[component], name)

    def names(self) -> set[str]:
        """Names of the adapters that were added."""
        return set(self.added)

    def use(self, scales: Mapping[str, float]) -> None:
        """Draw with exactly these adapters, each at its scale; with none, the bare base."""
        self._known(scales)
        for layer in self._layers():
            if layer.merged:
                layer.unmerge()
            layer.set_adapter([name for name in scales if name in layer._all_available_adapter_names()])
            for name, scale in scales.items():
                layer.set_scale(name, scale)
        with torch.no_grad():
            for bias, plain in self.plain.items():
                changes = [
                    scale * self.biases[n][bias] for n, scale in scales.items() if bias in self.biases[n]
                ]
                bias.copy_(sum(changes, plain))
        self.scales = dict(scales)

    def merge(self) -> None:
        """Add the adapters in use into the base's weights: faster pictures; `use` takes them out again."""
        for layer in self._layers():
            if layer.active_adapters:
                layer.merge(safe_merge=True)

    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int],
        steps: int = 25,
        guidance: float = 7.5,
        side: int | None = None,
        images: Sequence[Image.Image] = (),
    ) -> list[Image.Image]:
        """One picture a seed, of one prompt or of each its own; `side` px (None: the base's size).

        `images`: what an upscaler (IF stage II) enlarges, one a picture.
        """
        if isinstance(prompts, str):
            prompts = [prompts] * len(seeds)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sampler.generate(self.pipe, prompts, generators, steps, guidance, side, images)

    def _read(self, adapter: str | Path) -> States:
        return formats.read(formats.find(adapter), self.family, self.modules.__getitem__)

    def _known(self, names: Sequence[str] | Mapping[str, float]) -> None:
        if unknown := set(names) - self.names():
            raise ConfigError(f"there is no adapter '{min(unknown)}', only {sorted(self.names())}")

    def _layers(self) -> Iterator[Any]:
        for module in self.components.values():
            yield from _tuner_layers(module)


def _load(module: nn.Module, state: AdapterState, name: str) -> None:
    """Put an adapter for drawing pictures on `module`, under `name`, in the module's precision.

    Raises whatever PEFT raises if it does not fit.
    """
    kind = KINDS[state.config["peft_type"].lower()]
    known = {field.name for field in fields(kind.config)}
    options = {key: value for key, value in state.config.items() if key in known}
    parameter = next(module.parameters())
    inject_adapter_in_model(kind.config(**options | {"exclude_modules": None}), module, adapter_name=name)
    _fill(module, state, name)
    for label, value in module.named_parameters():
        if f".{name}." in label or label.endswith(f".{name}"):
            value.data = value.data.to(parameter.device, parameter.dtype)
            value.requires_grad_(False)


def _fill(module: nn.Module, state: AdapterState, name: str) -> None:
    """Copy weights, but for biases of the base, into the adapter `name` of `module`.

    Raises ValueError if one has no place.
    """
    places = {}
    for label, parameter in module.named_parameters():
        if f".{name}." in label or label.endswith(f".{name}"):
            places[_unwrapped(label.replace(f".{name}.", ".").removesuffix(f".{name}"))] = parameter
    with torch.no_grad():
        for label, tensor in state.tensors.items():
            if label not in places and label.endswith("bias"):
                continue
            if label not in places or places[label].shape != tensor.shape:
                there = tuple(places[label].shape) if label in places else "nothing of that name"
                raise ValueError(f"{label} is {tuple(tensor.shape)}, the base has {there}")
            places[label].copy_(tensor)


def _biases(module: nn.Module, state: AdapterState) -> dict[nn.Parameter, Tensor]:
    """The base's biases that an adapter changes, and by how much."""
    places = {_unwrapped(label): parameter for label, parameter in module.named_parameters()}
    trained = {places[_unwrapped(n)]: tensor for n, tensor in state.tensors.items() if n.endswith("bias")}
    return {bias: tensor.to(bias) - bias.detach() for bias, tensor in trained.items()}


def _unwrapped(label: str) -> str:
    """A parameter's name without the layers that PEFT wrapped around its module."""
    return re.sub(r"(\.base_layer)+\.", ".", label)


def _tuner_layers(module: nn.Module) -> Iterator[Any]:
    """Every layer of a module that carries adapters; PEFT may nest those of different kinds."""
    return (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))


def _remove(module: nn.Module, name: str) -> None:
    """Delete the adapter `name` of a module."""
    for layer in _tuner_layers(module):
        if name in layer._all_available_adapter_names():
            layer.delete_adapter(name)
    getattr(module, "peft_config", {}).pop(name, None)
