"""A base model with adapters that can be added, switched, mixed, merged, swapped, and removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dbtrain.adapters import by_row, inject, tokens
from dbtrain.adapters.by_row import Scales, tuner_layers
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats import word_file
from dbtrain.adapters.formats.common import States
from dbtrain.adapters.tokens import Word, Words
from dbtrain.config import Model, Train
from dbtrain.data.sizes import Size
from dbtrain.models import denoiser, sampler
from dbtrain.models.base import Base
from dbtrain.models.denoiser import Work
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

    def __init__(
        self,
        base: Base,
        precision: str,
        device: torch.device | None = None,
        train: Train | None = None,
        memory_gib: float | None = None,
        batch: int = 1,  # images to find room for, if they are more than those of the first call
    ) -> None:
        """`train`: how the denoiser is stored and swapped; `memory_gib`: for text encoders, see `encode`."""
        self.base, self.family, self.dtype = base, base.family, DTYPES[precision]
        self.device, self.train, self.memory_gib = device or dist.device(), train or Train(), memory_gib
        module = denoiser.load(base, self.train.base_linears, self.dtype)
        self.apart = denoiser.apart(base, module, self.dtype, self.device)
        given = {**dict.fromkeys(self.apart), self.family.denoiser: module}
        self.pipe = sampler.build(base, self.dtype, torch.device("cpu"), given)
        self.components: dict[str, nn.Module] = {
            name: getattr(self.pipe, name) for name in base.family.adaptable
        }
        self.encoded: dict[tuple[str, bool], dict[str, Tensor]] = {}  # (prompt, guided), by encoders apart
        self.swapped: int | None = None  # blocks; None: the pipeline is not on its device yet
        self.batch = batch
        self.layouts: dict[str, dict[str, Any]] = {}  # adapter -> component -> layout
        self.deltas: dict[str, dict[nn.Parameter, Tensor]] = {}  # what adapters add to biases of the base
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
                inject.add(self.components[component], state, name)
        except Exception as error:  # PEFT raises many kinds for layers that it cannot wrap
            self.remove(name)
            self.use(scales)
            raise ConfigError(
                f"adapter '{adapter}' does not fit base model {self.base.name}: {reason(error)}"
            ) from error
        for bias in self.deltas[name]:
            bias.requires_grad_(True)  # what is not frozen stays on the device if its block is swapped
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
            for layer in tuner_layers(self.components[component]):
                if name in layer._all_available_adapter_names():
                    layer.delete_adapter(name)
            getattr(self.components[component], "peft_config", {}).pop(name, None)

    def names(self) -> set[str]:
        """Names of the loaded adapters."""
        return set(self.layouts)

    def use(self, adapters: Scales | str) -> None:
        """Activate exactly these adapters, each at its scale, or just one; {} is the base alone."""
        scales = _scales(adapters)
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
        words = tokens.joined([self.words[name] for name in adapters])
        if words == self.spoken:
            return
        for name in self.family.adaptable_text:
            reader = self.family.text_encoders[name]
            setattr(self.pipe, reader, self.base.load(reader))
            tokens.speak(self.components[name], getattr(self.pipe, reader), name, words)
        self.spoken = words

    def merge(self) -> None:
        """Merge the active adapters into the base's weights for faster sampling; `use` unmerges them.

        Raises ConfigError if weights are quantized or swapped.
        """
        if self.swapped or self.train.base_linears != "full":
            raise ConfigError(
                f"adapters cannot be merged into a denoiser with {self.swapped or 0} swapped blocks and "
                f"train.base_linears={self.train.base_linears}; generate without merging"
            )
        for layer in self._layers():
            if layer.active_adapters:
                layer.merge(safe_merge=True)

    def encode(self, prompts: Sequence[str], guidance: float) -> None:
        """Encode prompts ahead, with text encoders that are on the device for that alone.

        `generate` does it too, but by then the denoiser has taken most of the memory, so that they may be
        read layer by layer. Does nothing where all of the base fits onto the device.
        """
        new = sorted({prompt for prompt in prompts if (prompt, guidance > 1) not in self.encoded})
        if not self.apart or not new:
            return
        rows = sampler.encode_alone(self.base, new, guidance, self.dtype, self.memory_gib)
        for prompt, row in zip(new, rows, strict=True):
            self.encoded[prompt, guidance > 1] = {name: tensor.cpu() for name, tensor in row.items()}

    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int],
        steps: int = 25,
        guidance: float = 7.5,
        side: int | None = None,
        images: Sequence[Image.Image] = (),
        adapters: Sequence[Scales | str] = (),
    ) -> list[Image.Image]:
        """Return one image for each of the seeds, `side` px square (None: the base's size).

        `prompts` is one prompt for all seeds or one per seed. `images` are the low-resolution inputs of an
        upscaler (IF stage II), one per seed. `adapters` is what `use` takes, one per seed, in place of the
        adapters in use; all images are still one batch.

        Raises ConfigError if some of the adapters cannot share a batch: `together` says which ones can.
        """
        seeds = [seeds] if isinstance(seeds, int) else seeds
        if adapters and (len(adapters) != len(seeds) or len(self.together(adapters)) > 1):
            raise ConfigError(
                f"adapters={list(adapters)} does not fit one batch of {len(seeds)} images; give each image "
                "its own, and split those that cannot share a batch as `together` does"
            )
        prompts = [prompts] * len(seeds) if isinstance(prompts, str) else prompts
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = Size.square(side) if side else None
        self.encode(prompts, guidance)
        if self.swapped is None:
            self._move(max(len(seeds), self.batch), guidance, size)
        own = [_scales(one) for one in adapters] or [self.scales] * len(seeds)
        how = (generators, steps, guidance, size, images)
        with self._adapting(own, prompts, guidance) as rows:
            return sampler.generate_encoded(self.pipe, self.family, rows, *how)

    def together(self, adapters: Sequence[Scales | str]) -> list[list[int]]:
        """The places in `adapters` of those that can share a batch, batch by batch.

        All of them can, but for adapters with trained biases of the base, or on Z-Image's text embedder.
        """
        images = [_scales(one) for one in adapters]
        self._check_names({name for scales in images for name in scales})
        alone, layers = self.family.texts_as_one, self.family.denoiser
        able = {
            name for name, layouts in self.layouts.items()
            if not self.deltas[name] and not any(n.startswith(alone) for n in layouts.get(layers, ()))
        }  # fmt: skip
        return by_row.batches(images, able)

    def _move(self, images: int, guidance: float, size: Size | None) -> None:
        """Move the pipeline to its device; blocks of the denoiser for which there is no room are swapped."""
        module, beside = self.components[self.family.denoiser], set(self.family.models) - set(self.apart)
        work = Work.of(
            list(self.encoded.values()), images, guidance, size or sampler.default_size(self.pipe, module),
            tuple(beside - {self.family.denoiser}),
        )  # fmt: skip
        self.swapped = denoiser.swap(self.base, module, self.train, self.device, work)
        if self.swapped:
            self.use(self.scales)  # unmerges: swapped weights do not change
        self.pipe.to(self.device)

    @contextmanager
    def _adapting(
        self, images: Sequence[Scales], prompts: Sequence[str], guidance: float
    ) -> Iterator[list[dict[str, Tensor]]]:
        """In the block, each image of a batch has its own adapters. Gives the prompts, encoded with them."""
        before, groups = self.scales, by_row.groups(images)
        rows: dict[int, dict[str, Tensor]] = {}
        try:
            for scales, places in groups:
                if scales != self.scales:  # those in use may be merged
                    self.use(scales)
                different = sorted({prompts[place] for place in places})
                encoded = dict(zip(different, self._encoded(different, guidance), strict=True))
                rows |= {place: encoded[prompts[place]] for place in places}
            if len(groups) > 1:
                self.use({})
            with by_row.adapting(self.components[self.family.denoiser], images):
                yield [rows[place] for place in range(len(images))]
        finally:
            if before != self.scales:
                self.use(before)

    def _encoded(self, prompts: Sequence[str], guidance: float) -> list[dict[str, Tensor]]:
        """The prompts as the text encoders encode them, with the adapters in use."""
        if not self.apart:
            return sampler.encode(self.pipe, self.family, prompts, guidance)
        rows = [self.encoded[prompt, guidance > 1] for prompt in prompts]
        encoders = {name: self.components[name] for name in self.family.adaptable_text}
        if not self.spoken and not any(any(tuner_layers(encoder)) for encoder in encoders.values()):
            return rows
        tokenizers = {name: getattr(self.pipe, self.family.text_encoders[name]) for name in encoders}
        return [
            sampler.reencoded(self.family, encoders, tokenizers, prompt, row)
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    def _read(self, adapter: str | Path) -> tuple[States, Words]:
        path = formats.find(adapter)
        states = formats.read(path, self.family, self.base.skeleton)
        return states, word_file.read(path, self.family, self.base.skeleton)

    def _check_names(self, names: Iterable[str]) -> None:
        if unknown := set(names) - self.names():
            raise ConfigError(f"there is no adapter '{min(unknown)}'; choose from {sorted(self.names())}")

    def _layers(self) -> Iterator[Any]:
        for module in self.components.values():
            yield from tuner_layers(module)


def _scales(adapters: Scales | str) -> Scales:
    return {adapters: 1.0} if isinstance(adapters, str) else adapters
