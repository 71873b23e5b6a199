"""Adapter files as material: each layer's change, by whatever name, and files like them of other changes.

With the base's configs, names are the base's: files of any formats go together, and any can be written.
Without them, names stay as they are in the file, and so does its format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dbtrain.adapters import targets
from dbtrain.adapters.formats import diff_file, diffusers_file, kohya_file, limits, peft_folder, reading
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.common import Content, States, by_module, strength
from dbtrain.adapters.formats.header import network, serialized
from dbtrain.adapters.formats.names import Layers, split
from dbtrain.adapters.formats.word_file import BUNDLE
from dbtrain.adapters.state import AdapterState
from dbtrain.config import Model
from dbtrain.material.delta import Delta, delta_of
from dbtrain.models.base import Base
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason

DENOISER = "denoiser"  # a component without the base, which has a name for it
# How the names of a component's layers begin in files, and what the component is.
PREFIXES = (
    (r"lora_te(?:1_|_)(?!\d)", "text_encoder"),
    (r"lora_te(\d)_", r"text_encoder_\1"),
    (r"(text_encoder(?:_\d)?)[._](?:text_model\.)?", r"\1"),
    (r"(?:lora_|lycoris_)?(?:unet|transformer|diffusion_model)[._](?:base_model\.model\.)?", DENOISER),
    (r"base_model\.model\.|lycoris_|", DENOISER),
)
FORMS = tuple(name for name, form in formats.FORMATS.items() if form.readable)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Place = tuple[str, str]  # component and module


@dataclass(frozen=True)
class Source:
    """An adapter file or folder."""

    path: Path
    form: str  # its format, or what is nearest to it
    states: States  # by component
    prefixes: Mapping[str, str]  # by component: how its layers' names begin in the file
    header: Mapping[str, str]
    words: tuple[str, ...]  # that it has learned
    base: Base | None

    @classmethod
    def read(cls, adapter: str | Path, base: Base | None = None) -> Source:
        """The adapter in a file, or in a run's or PEFT's folder. `base`: whose layers it is for, if known.

        Raises ConfigError for anything but an adapter.
        """
        path = formats.find(adapter)
        with _about(path):
            if path.suffix.lower() in formats.PICKLES:
                raise ConfigError("it is a pickle, which may run code; use a .safetensors file")
            if path.is_dir():
                states, form = _folder(path), "peft"
                prefixes, header, names = (
                    dict.fromkeys(states, peft_folder.PREFIX),
                    dict[str, str](),
                    list[str](),
                )
            else:
                states, prefixes, header, names = _file(path)
                form = _form(prefixes)
        if base:
            states = dict(formats.read(path, base.family, base.skeleton))
        words = sorted({name.split(".")[1] for name in names if name.startswith(BUNDLE)})
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


def write(
    out: Path, changes: Mapping[Place, Delta], like: Source | Base, form: str | None = None,
    dtype: str = "fp32", about: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write the LoRA of these changes to `out`: as a file is, or in a format for a base.

    `about`: entries of a file's header. Raises ConfigError if the format cannot hold it.
    """
    states: dict[str, AdapterState] = {}
    for component in sorted({component for component, _ in changes}):
        found = lora({module: delta for (where, module), delta in changes.items() if where == component})
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in found.tensors.items()}
        states[component] = AdapterState(tensors, found.config)
    base = like.base if isinstance(like, Source) else like
    form = form or (like.form if isinstance(like, Source) else formats.natural(like.family, states)[0])
    if (form == "peft") == (out.suffix == ".safetensors"):
        kind = "a folder" if form == "peft" else "a .safetensors file"
        raise ConfigError(f"OUT is '{out}', but the format {form} is {kind}; give another OUT, or --format")
    if base:
        formats.check(form, base.family, states)
        kept = _kept(like.header) if isinstance(like, Source) else {}
        header = {**kept, **base.family.header(base), **(about or {})}
        content = Content(base.family, states, base.module_names, header, base.load)
        formats.FORMATS[form].write(out, content)
        return
    assert isinstance(like, Source)
    if form != like.form:
        raise ConfigError(f"{like.path} is of the format {like.form}; to write {form}, add --base")
    if form != "peft":
        files.write_atomically(out, _file_like(like, states, about or {}))
        return
    single = (like.path / peft_folder.CONFIG).is_file()
    for component, state in states.items():
        for name, data in peft_folder.contents(state).items():
            files.write_atomically((out if single else out / component) / name, data)


def _kept(header: Mapping[str, str]) -> dict[str, str]:
    """The entries of a file's header that a file made of it keeps: all but those about its network."""
    return {
        key: value
        for key, value in header.items()
        if key.startswith(("ss_", "modelspec.")) and not key.startswith("ss_network_")
    }


def _file_like(like: Source, states: States, about: Mapping[str, str]) -> bytes:
    """The file of LoRAs under the names that another file has, whose scales are 1."""
    kohya, tensors = like.form == "kohya", dict[str, Tensor]()
    parts = kohya_file.PARTS if kohya else {}
    for component, state in states.items():
        for module, layer in by_module(state).items():
            start = f"{like.prefixes[component]}{module}"
            tensors |= {f"{start}.{parts.get(part, part)}": tensor for part, tensor in layer.items()}
            if kohya:
                tensors[f"{start}.alpha"] = torch.tensor(float(len(layer["lora_A.weight"])))
    header = _kept(like.header) | dict(about)
    if like.form == "diffusers":
        configs = {
            f"{like.prefixes[component].partition('.')[0]}.{key}": value
            for component, state in states.items()
            for key, value in state.config.items()
        }
        header[diffusers_file.METADATA] = json.dumps(configs, sort_keys=True)
    else:
        header |= network(next(iter(states.values())).config)
    return serialized(tensors, header)


def lora(changes: Mapping[str, Delta]) -> AdapterState:
    """The LoRA of a component that makes these changes, each with its own rank and the scale 1, fp32."""
    layers: Layers = {}
    for module, delta in changes.items():
        tail = delta.tail
        if tail is None:
            raise ConfigError(
                f"the shape of {module} is not in a LoHa or LoKr; give the base with --base to make it a LoRA"
            )
        up = delta.up.float().reshape(*delta.up.shape, *[1] * (len(tail) - 1))
        layers[module] = {
            "lora_A.weight": delta.down.float().reshape(-1, *tail).contiguous(),
            "lora_B.weight": up.contiguous(),
        }
    return reading.state_of(layers, None)


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


def _folder(path: Path) -> dict[str, AdapterState]:
    """The adapters in PEFT's folders, by component."""
    if (path / peft_folder.CONFIG).is_file():
        return {
            path.name if path.name.startswith("text_encoder") else DENOISER: _bounded(peft_folder.read(path))
        }
    found = [entry.parent for entry in sorted(path.glob(f"*/{peft_folder.CONFIG}"))]
    return {folder.name: _bounded(peft_folder.read(folder)) for folder in found}


def _bounded(state: AdapterState) -> AdapterState:
    if (kind := state.config["peft_type"]) not in formats.KINDS:
        raise ConfigError(f"it is of the kind {kind}; dbtrain reads {', '.join(formats.KINDS)}")
    return limits.bounded(state)


def _file(path: Path) -> tuple[dict[str, AdapterState], dict[str, str], dict[str, str], list[str]]:
    """The adapters in a file, how their layers' names begin, the header, and the names of all tensors."""
    limits.check_file(path)
    try:
        with safe_open(path, "pt") as file:
            header, names = file.metadata() or {}, list(file.keys())
            tensors = {name: file.get_tensor(name).float() for name in names if not name.startswith(BUNDLE)}
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"not a safetensors file: {reason(error)}") from error
    if not tensors:
        raise ConfigError("it has no tensors of an adapter")
    layers: dict[str, Layers] = {}
    prefixes: dict[str, str] = {}
    for name, tensor in tensors.items():
        module, part = split(name)
        component, prefix = _component(module)
        if prefixes.setdefault(component, prefix) != prefix:
            raise ConfigError(f"its layers' names begin with both '{prefixes[component]}' and '{prefix}'")
        layers.setdefault(component, {}).setdefault(module.removeprefix(prefix), {})[part] = tensor
    stored = _stored(header, prefixes)
    states = {
        name: limits.bounded(reading.state_of(found, stored.get(name)))
        for name, found in sorted(layers.items())
    }
    return states, prefixes, header, names


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


def _form(prefixes: Mapping[str, str]) -> str:
    """The format of files whose names begin like this."""
    first = next(iter(prefixes.values()))
    if first.startswith(("lora_", "lycoris_")):
        return "kohya"
    return "comfyui" if first.startswith("diffusion_model") else "diffusers"
