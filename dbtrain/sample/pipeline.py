"""A base model with adapters that can be added, switched, mixed, merged, swapped, and removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from dbtrain.adapters import inject, tokens
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats import word_file
from dbtrain.adapters.formats.common import States
from dbtrain.adapters.state import AdapterState
from dbtrain.adapters.tokens import Word, Words
from dbtrain.config import Model
from dbtrain.models import sampler
from dbtrain.models.base import Base
from dbtrain.models.pretrained import DTYPES
from dbtrain.runtime import dist
from dbtrain.runtime.errors import ConfigError, reason


class AdapterPipeline:
    """A base model that is loaded once, with adapters of any kind and format.

    >>> pipe = AdapterPipeline.load("tiny")
    >>> pipe.add("dog", "runs/dog")
    >>> pipe.use({"dog": 0.8})  # or use("dog")
    >>> images = pipe.generate("a photo of sks dog", seeds=[0, 1])
    """

    def __init__(self, base: Base, precision: str, device: torch.device | None = None) -> None:
        self.base = base
        self.family = base.family
        self.pipe = sampler.build(base, DTYPES[precision], device or dist.device())
        self.components: dict[str, nn.Module] = {
            name: getattr(self.pipe, name) for name in base.family.adaptable
        }
        self.layouts: dict[str, dict[str, Any]] = {}  # adapter -> component -> layout
        self.deltas: dict[
            str, dict[nn.Parameter, Tensor]
        ] = {}  # adapter -> what it adds to biases of the base
        self.base_biases: dict[nn.Parameter, Tensor] = {}  # their original values
        self.scales: dict[str, float] = {}  # of the adapters in use
        self.words: dict[str, Words] = {}  # adapter -> the words that it has learned
        self.spoken: list[Word] = []  # those of the adapters in use

    @classmethod
    def load(
        cls, model: Model | str | Path, precision: str = "fp32", device: torch.device | None = None
    ) -> AdapterPipeline:
        """Load a base model from disk or from the Hub: a config's `model` section, or its path alone."""
        return cls(
            Base.find(model if isinstance(model, Model) else Model(path=str(model))), precision, device
        )

    def add(self, name: str, adapter: str | Path) -> None:
        """Load an adapter (a run folder, a file, or a PEFT folder) under `name`; `use` activates it.

        Raises ConfigError if it does not fit the base.
        """
        if name in self.names() or not name.isidentifier():
            raise ConfigError(f"adapter name '{name}' is in use, or is not a valid identifier")
        states, words = self._read(adapter)
        scales = self.scales
        self.use({})  # restores the base's biases
        self.deltas[name], self.layouts[name], self.words[name] = {}, {}, words
        try:
            for component, state in states.items():
                self.deltas[name] |= inject.bias_changes(self.components[component], state)
                self.layouts[name] |= {component: state.layout}
                _inject(self.components[component], state, name)
        except Exception as error:  # PEFT raises many kinds for layers that it cannot wrap
            self.remove(name)
            self.use(scales)
            raise ConfigError(
                f"adapter '{adapter}' does not fit base model {self.base.name}: {reason(error)}"
            ) from error
        self.base_biases = {bias: bias.detach().clone() for bias in self.deltas[name]} | self.base_biases
        self.use(scales)

    def swap(self, name: str, adapter: str | Path) -> None:
        """Replace the weights of the adapter called `name` by those of another adapter.

        If both have the same layers, rank, and strength, the weights are copied in place, so that compiled
        code stays valid. Otherwise the old adapter is removed and the new one added.
        """
        self._check_names([name])
        (states, words), scales = self._read(adapter), self.scales
        if any(layer.merged for layer in self._layers()):
            self.use(scales)  # unmerges the old weights before they are overwritten
        layouts = {component: state.layout for component, state in states.items()}
        if layouts == self.layouts[name] and not self.deltas[name]:
            for component, state in states.items():
                inject.fill(inject.parameters(self.components[component], name), state)
            self.words[name] = words
            self._speak(scales)
        else:
            self.remove(name)
            self.add(name, adapter)
            self.use(scales)

    def remove(self, name: str) -> None:
        """Remove an adapter from the base and free its memory."""
        self._check_names([name])
        self.use({other: scale for other, scale in self.scales.items() if other != name})
        del self.deltas[name], self.words[name]
        for component in self.layouts.pop(name):
            for layer in _tuner_layers(self.components[component]):
                if name in layer._all_available_adapter_names():
                    layer.delete_adapter(name)
            getattr(self.components[component], "peft_config", {}).pop(name, None)

    def names(self) -> set[str]:
        """Names of the loaded adapters."""
        return set(self.layouts)

    def use(self, adapters: Mapping[str, float] | str) -> None:
        """Activate exactly these adapters, each at its scale, or just one; {} is the base alone."""
        scales = {adapters: 1.0} if isinstance(adapters, str) else adapters
        self._check_names(scales)
        self._speak(scales)
        for layer in self._layers():
            if layer.merged:
                layer.unmerge()
            layer.set_adapter([name for name in scales if name in layer._all_available_adapter_names()])
            for name, scale in scales.items():
                layer.set_scale(name, scale)
        with torch.no_grad():
            for bias, original in self.base_biases.items():
                used = (scale * self.deltas[n][bias] for n, scale in scales.items() if bias in self.deltas[n])
                bias.copy_(sum(used, original))
        self.scales = dict(scales)

    def _speak(self, adapters: Iterable[str]) -> None:
        """Make the text encoders know the words of these adapters, and no others, whatever the scales.

        Raises ConfigError if two of them have learned the same word, or if the base has it.
        """
        words = [word for name in adapters for word in self.words[name]]
        if words == self.spoken:
            return
        texts = [word.text for word in words]
        if twice := {text for text in texts if texts.count(text) > 1}:
            raise ConfigError(
                f"two of the adapters have learned the word '{min(twice)}'; use one of them at a time, or "
                "train one with another subject.token"
            )
        for name in self.family.adaptable_text:
            reader = self.family.text_encoders[name]
            setattr(self.pipe, reader, self.base.load(reader))
            tokens.speak(self.components[name], getattr(self.pipe, reader), name, words)
        self.spoken = words

    def merge(self) -> None:
        """Merge the active adapters into the base's weights for faster sampling; `use` unmerges them."""
        for layer in self._layers():
            if layer.active_adapters:
                layer.merge(safe_merge=True)

    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int],
        steps: int = 25,
        guidance: float = 7.5,
        side: int | None = None,
        images: Sequence[Image.Image] = (),
    ) -> list[Image.Image]:
        """Return one image for each of the seeds, `side` px square (None: the base's size).

        `prompts` is one prompt for all seeds or one per seed. `images` are the low-resolution inputs of an
        upscaler (IF stage II), one per seed.
        """
        seeds = [seeds] if isinstance(seeds, int) else seeds
        if isinstance(prompts, str):
            prompts = [prompts] * len(seeds)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sampler.generate(self.pipe, self.family, prompts, generators, steps, guidance, side, images)

    def _read(self, adapter: str | Path) -> tuple[States, Words]:
        path = formats.find(adapter)
        states = formats.read(path, self.family, self.base.skeleton)
        return states, word_file.read(path, self.family, self.base.skeleton)

    def _check_names(self, names: Sequence[str] | Mapping[str, float]) -> None:
        if unknown := set(names) - self.names():
            raise ConfigError(f"there is no adapter '{min(unknown)}'; choose from {sorted(self.names())}")

    def _layers(self) -> Iterator[Any]:
        for module in self.components.values():
            yield from _tuner_layers(module)


def _inject(module: nn.Module, state: AdapterState, name: str) -> None:
    """Add an adapter to `module` for inference, under `name`, in the module's precision.

    Raises what PEFT raises if it does not fit.
    """
    like = next(module.parameters())
    parameters = inject.put_on(module, state, name)
    inject.fill(parameters, state)
    for value in parameters.values():
        value.data = value.data.to(like.device, like.dtype)
        value.requires_grad_(False)


def _tuner_layers(module: nn.Module) -> Iterator[Any]:
    """All layers of a module that hold adapters; PEFT nests layers of different kinds."""
    return (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))
