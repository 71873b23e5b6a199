"""Adapter files as material: each layer's change, by whatever name.

With the base's configs, names are the base's: files of any formats go together, and any can be written.
Without them, names stay as they are in the file, and so does its format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dbtrain.adapters import targets
from dbtrain.adapters.formats import diff_file, diffusers_file, limits, peft_folder, reading, word_file
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.common import States, by_module, strength
from dbtrain.adapters.formats.names import Layers, split
from dbtrain.adapters.formats.word_file import BUNDLE
from dbtrain.adapters.material.delta import Delta, delta_of
from dbtrain.adapters.state import AdapterState
from dbtrain.config import Model
from dbtrain.models.base import Base
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason

DENOISER = "denoiser"  # a component without the base, which has a name for it
# How the names of a component's layers begin in files, and what the component is.
PREFIXES = (
    (r"lora_te(?:1_|_)(?!\d)", "text_encoder"),
    (r"lora_te(\d)_", r"text_encoder_\1"),
    (r"(text_encoder(?:_\d)?)[._](?:text_model\.)?", r"\1"),
    (r"(?:lycoris_)?(?=transformer_blocks[._])", DENOISER),
    (r"(?:lora_|lycoris_)?(?:unet|transformer|diffusion_model)[._](?:base_model\.model\.)?", DENOISER),
    (r"base_model\.model\.|lycoris_|", DENOISER),
)
Place = tuple[str, str]  # component and module


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file or folder."""

    path: Path
    form: str  # its format, or what is nearest to it
    states: States  # by component
    prefixes: Mapping[str, str]  # without the base, by component: how names begin; in PEFT's, its folder
    header: Mapping[str, str]
    words: tuple[str, ...]  # that it has learned
    base: Base | None

    @classmethod
    def read(cls, adapter: str | Path, base: Base | None = None) -> AdapterFile:
        """The adapter in a file, or in a run's or PEFT's folder. `base`: whose layers it is for, if known.

        Raises ConfigError for anything but an adapter.
        """
        path = formats.find(adapter)
        with _about(path):
            if path.suffix.lower() in formats.PICKLES:
                raise ConfigError("it is a pickle, which may run code; use a .safetensors file")
            header, names = _opened(path) if path.is_file() else ({}, [])
            words = sorted({name.split(".")[1] for name in names if name.startswith(BUNDLE)})
            names = word_file.without(names)
            form = _form(names[0]) if names else "peft"
            if base is None:
                states, prefixes = _in_file(path, names, header) if names else _in_folders(path)
        if base:
            states, prefixes = dict(formats.read(path, base.family, base.skeleton)), {}
        return cls(path, form, states, prefixes, header, tuple(words), base)

    @cached_property
    def layers(self) -> dict[Place, Callable[[], Delta]]:
        """What computes the change of each layer. With the base, also a DoRA's, for which it is loaded.

        Raises ConfigError for trained biases, and for a DoRA without its base.
        """
        found: dict[Place, Callable[[], Delta]] = {}
        with _about(self.path):
            for component, state in self.states.items():
                found |= {(component, module): rule for module, rule in self._rules(component, state).items()}
        return found

    def _rules(self, component: str, state: AdapterState) -> dict[str, Callable[[], Delta]]:
        if biases := [name for name in state.tensors if name.endswith(".bias")]:
            raise ConfigError(f"it trains biases, e.g. {biases[0]}, which have no rank; use one without")
        if state.config.get("use_dora"):
            if not self.base:
                raise ConfigError("it is a DoRA, whose change depends on the base's weights; add --base")
            changes = diff_file.changes(self.base.load(component), state)
            return {module: partial(Delta.of, parts["diff"]) for module, parts in changes.items()}
        shapes = shapes_of(self.base, component) if self.base else {}
        return {
            module: partial(_shaped, layer, strength(state.config, module)[1], shapes.get(module))
            for module, layer in by_module(state).items()
        }


def shapes_of(base: Base, component: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of a component's layers."""
    every: Any = base.skeleton(component).named_modules()
    return {name: tuple(layer.weight.shape) for name, layer in every if isinstance(layer, targets.LAYERS)}


def _shaped(layer: Mapping[str, Tensor], scale: float, shape: tuple[int, ...] | None) -> Delta:
    found = delta_of(layer, scale)
    return replace(found, tail=shape[1:]) if shape else found


def find_base(name: str) -> Base:
    """The base of `--base`: a folder, a file, a Hub id, or tiny. Downloads a Hub id first."""
    return Base.find(Model(path=name))


def weighted(text: str) -> tuple[str, float]:
    """An adapter's path and its weight, from `PATH` or `PATH:WEIGHT`."""
    try:
        return files.weighted(text)
    except ValueError as error:
        raise ConfigError(f"adapter '{text}' is not PATH or PATH:WEIGHT; use e.g. dog:0.8") from error


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """In the block, problems are with this adapter."""
    try:
        yield
    except ConfigError as problem:
        raise ConfigError(f"adapter {path}: {problem}") from problem
    except formats.DAMAGED as error:
        raise ConfigError(f"adapter {path}: it is damaged: {reason(error)}") from error


def _in_folders(path: Path) -> tuple[dict[str, AdapterState], dict[str, str]]:
    """The adapters in PEFT's folders by component, and each one's folder within `path`."""
    states, folders = dict[str, AdapterState](), dict[str, str]()
    for config in (path / peft_folder.CONFIG, *sorted(path.glob(f"*/{peft_folder.CONFIG}"))):
        if config.is_file():
            folder = config.parent
            state = peft_folder.read(folder)
            if (kind := state.config["peft_type"]) not in formats.KINDS:
                raise ConfigError(f"it is of the kind {kind}; dbtrain reads {', '.join(formats.KINDS)}")
            component = folder.name if folder.name.startswith("text_encoder") else DENOISER
            states[component], folders[component] = limits.bounded(state), str(folder.relative_to(path))
    return states, folders


def _opened(path: Path) -> tuple[dict[str, str], list[str]]:
    """The header of a file, and the names of its tensors."""
    limits.check_file(path)
    with _reading(), safe_open(path, "pt") as file:
        header, names = file.metadata() or {}, list(file.keys())
    if not names:
        raise ConfigError("it has no tensors")
    return header, names


@contextmanager
def _reading() -> Iterator[None]:
    """In the block, whatever safetensors raises for a broken file is a ConfigError."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"not a safetensors file: {reason(error)}") from error


def _in_file(
    path: Path, names: Sequence[str], header: Mapping[str, str]
) -> tuple[dict[str, AdapterState], dict[str, str]]:
    """The adapters in a file by component, and how each one's layers' names begin."""
    layers: dict[str, Layers] = {}
    prefixes: dict[str, str] = {}
    with _reading(), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in names}
    for name, tensor in tensors.items():
        module, part = split(name)
        component, prefix = _component(module)
        if prefixes.setdefault(component, prefix) != prefix:
            raise ConfigError(
                f"names of its layers begin with '{prefixes[component]}' and '{prefix}'; add --base"
            )
        layers.setdefault(component, {}).setdefault(module.removeprefix(prefix), {})[part] = tensor
    stored = _stored(header, prefixes)
    states = {name: reading.state_of(found, stored.get(name)) for name, found in sorted(layers.items())}
    return {name: limits.bounded(state) for name, state in states.items()}, prefixes


def _component(module: str) -> tuple[str, str]:
    """The component that a layer in a file belongs to, and how its name begins there."""
    pattern, component = next(pair for pair in PREFIXES if re.match(pair[0], module))
    found = re.match(pattern, module)
    assert found
    return found.expand(component), found[0]


def _stored(header: Mapping[str, str], prefixes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The PEFT config of each component in Diffusers' header."""
    by_prefix = {prefix.partition(".")[0]: component for component, prefix in prefixes.items()}
    found: dict[str, dict[str, Any]] = {}
    metadata = files.json_object(header.get(diffusers_file.METADATA, "{}"), "its metadata")
    for key, value in metadata.items():
        start, _, name = key.partition(".")
        if start in by_prefix:
            found.setdefault(by_prefix[start], {})[name] = value
    return found


def _form(name: str) -> str:
    """The format of a file with a tensor of this name."""
    if name.startswith(("lora_", "lycoris_")):
        return "kohya"
    return "comfyui" if name.startswith("diffusion_model") else "diffusers"
