"""Formats of adapter files, written from and read into PEFT's names.

| format | for | layout |
|---|---|---|
| diffusers | `load_lora_weights` | one file, `<component>.<module>.lora...`; metadata holds alpha |
| peft | `PeftModel.from_pretrained` | one folder per component, weights and `adapter_config.json` |
| kohya | A1111, ComfyUI, Forge | `<run>.safetensors`, `lora_unet_<module>...`, one alpha per layer |
| comfyui | ComfyUI | `<run>.safetensors`, `diffusion_model.<original module>...` (see Family) |
| diff | the same | `<run>-diff.safetensors`, the changes of whole weights; is not read |
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from dbtrain.adapters import inject, targets
from dbtrain.adapters.formats import (
    comfyui_file,
    diff_file,
    diffusers_file,
    fused,
    kohya_file,
    limits,
    names,
    peft_folder,
    reading,
    word_file,
)  # fmt: skip
from dbtrain.adapters.formats.common import CONFIGS, Content, Names, States, by_module, strength
from dbtrain.adapters.state import AdapterState
from dbtrain.adapters.tokens import Words
from dbtrain.models.families.family import Family
from dbtrain.runtime import files, hashing
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.run_folder import RunFolder, name_of

OLD_NAME = "kohya"  # of every adapter in earlier versions
KINDS = ("LORA", "LOHA", "LOKR")
# What Python and torch raise for settings of a wrong type, size or form.
DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, re.error)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Format:
    """A format of adapter files, and what it can store."""

    file: str  # its name, with `{name}` for the adapter's; "" for a folder per component
    write: Callable[[Path, Content], None]
    kinds: tuple[str, ...]
    programs: str  # that load it
    biases: bool = False
    readable: bool = True  # by dbtrain
    components: Callable[[Family], Collection[str]] = lambda family: family.adaptable
    refuses: Callable[[Family, States], str | None] = lambda family, states: None

    def path(self, folder: Path, name: str) -> Path:
        """Where the adapter called `name` is in an export: the file, or the folder of its folders."""
        return folder / self.file.format(name=name)

    def lacks(self, family: Family, states: States) -> str | None:
        """The part of an adapter that the format cannot store; None if it can store everything."""
        for state in states.values():
            kind = state.config["peft_type"].lower()
            if kind not in self.kinds:
                return f"a {kind} adapter"
            if not self.biases and any(name.endswith(".bias") for name in state.tensors):
                return "trained biases"
        if unknown := set(states) - set(self.components(family)):
            return f"an adapter of the {min(unknown)} of a {family.name} model"
        return self.refuses(family, states)


def natural(family: Family, states: States) -> tuple[str, ...]:
    """The default formats of an adapter: the first one that can store it."""
    return (next(name for name, form in FORMATS.items() if not form.lacks(family, states)),)


def check(name: str, family: Family, states: States) -> None:
    """Raise ConfigError if a format cannot store an adapter."""
    if lacking := FORMATS[name].lacks(family, states):
        able = [other for other, form in FORMATS.items() if not form.lacks(family, states)]
        raise ConfigError(
            f"export.formats: the format {name} cannot store {lacking}; use {', '.join(able)}", shared=True
        )


def caveat(name: str, states: States, forms: Collection[str]) -> str | None:
    """What programs that load a format get wrong about an adapter; None if they get it right.

    `forms`: all formats that are written.
    """
    if name == "comfyui" and any(state.config.get("use_dora") for state in states.values()):
        return "ComfyUI computes DoRA in another way than it was trained; for it, set adapter.dora=false"
    cure = "add the format diff to export.formats, or set adapter.dora=false"
    if "diff" in forms:
        cure = "use the file of the format diff"
    if name == "kohya" and any(state.config.get("use_dora") for state in states.values()):
        return (
            "of the programs that load kohya's file, only LyCORIS applies DoRA as it was trained; "
            f"ComfyUI, A1111, Forge and InvokeAI give other images; for them, {cure}"
        )
    return None


def write(
    form: str,
    folder: Path,
    family: Family,
    states: States,
    modules: Names | None = None,
    about: Mapping[str, str] | None = None,
    name: str = OLD_NAME,
    load: Callable[[str], nn.Module] | None = None,
    words: Words = (),
) -> Path:
    """Write an adapter that passes `check` into `folder`; return the path for its loader.

    `name` is the adapter's; for the others see Content. Raises ConfigError if the disk is full.
    """
    path = FORMATS[form].path(folder, name)
    try:
        FORMATS[form].write(path, Content(family, states, modules, about or {}, load, words))
    except SafetensorError as error:  # how safetensors reports a full disk
        raise ConfigError(f"cannot write into {folder}: {error}") from error
    return path


def find(adapter: str | Path) -> Path:
    """The adapter file or folder in a run or export folder, or the path itself if it is an adapter file.

    Raises ConfigError if there is none, or more than one adapter.
    """
    path = files.expand(adapter)
    if path.name == peft_folder.WEIGHTS and (path.parent / peft_folder.CONFIG).is_file():
        return path.parent
    if path.is_file():
        return path
    for folder in (RunFolder(path).export, path):
        if found := _find_in(folder):
            return found
    raise ConfigError(
        f"adapter '{adapter}' is neither a file nor a run folder with an export "
        f"({diffusers_file.FILE}); run: dbtrain export"
    )


def _find_in(folder: Path) -> Path | None:
    """The adapter file in a folder, or the folder itself if it is PEFT's; None if there is no adapter."""
    for form in (form for form in FORMATS.values() if form.readable):
        for name in (name_of(folder), OLD_NAME):
            if (file := form.path(folder, name)).is_file():
                return file
    if (folder / peft_folder.CONFIG).is_file() or any(folder.glob(f"*/{peft_folder.CONFIG}")):
        return folder
    # A renamed run, or a converted adapter: its file is the only one.
    unread = diff_file.FILE.format(name="")
    found = [file for file in sorted(folder.glob("*.safetensors"))
             if not file.name.startswith(".") and not file.name.endswith(unread)]  # fmt: skip
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise ConfigError(f"{folder} has {len(found)} adapter files; give one of them, e.g. {names}")
    return found[0] if found else None


def content_of(path: Path) -> str:
    """A hash of an adapter's content."""
    found = [*([path] if path.is_file() else sorted(path.glob("**/adapter_*"))), *word_file.beside(path)]
    return hashing.content_key([[file.name, hashing.sha256_of(file)] for file in found if file.is_file()])


def read(path: Path, family: Family, skeleton: Callable[[str], nn.Module]) -> States:
    """The adapters in a file or folder of any format, by component, under PEFT's names.

    `skeleton`: component -> a new copy of it on the meta device. Raises ConfigError for anything but an
    adapter that fits the base, tensor by tensor, and for pickles.
    """
    if path.suffix.lower() in PICKLES:
        raise ConfigError(f"{path} is a pickle, which may run code; use a .safetensors file")
    try:
        skeletons = {name: skeleton(name) for name in family.adaptable}
        layers = {name: _sizes(module) for name, module in skeletons.items()}
        states = _read_folder(path, family, layers) if path.is_dir() else _read_file(path, family, layers)
        states = {component: limits.bounded(state) for component, state in states.items()}
        for component, state in states.items():
            _check(state)
            inject.check_fit(skeletons[component], state)
    except ConfigError as problem:
        raise ConfigError(f"adapter {path}: {problem}") from problem
    except DAMAGED as error:
        raise ConfigError(f"adapter {path}: its settings are damaged: {reason(error)}") from error
    return states


def _sizes(module: nn.Module) -> dict[str, int]:
    """The layers that an adapter can be on, and how many outputs each has."""
    every: Any = module.named_modules()
    return {name: len(layer.weight) for name, layer in every if isinstance(layer, targets.LAYERS)}


def _read_folder(path: Path, family: Family, modules: names.Modules) -> States:
    if (path / peft_folder.CONFIG).is_file():
        component = path.name if path.name in family.adaptable else family.denoiser
        return _renamed(peft_folder.read(path), component, family, modules)
    components = [entry.parent for entry in sorted(path.glob(f"*/{peft_folder.CONFIG}"))]
    if not components:
        raise ConfigError(
            f"no {diffusers_file.FILE}, {kohya_file.FILE} or folder with {peft_folder.CONFIG} in it"
        )
    states: dict[str, AdapterState] = {}
    for folder in components:
        states |= _renamed(peft_folder.read(folder), folder.name, family, modules)
    return states


def _renamed(state: AdapterState, component: str, family: Family, modules: names.Modules) -> States:
    """An adapter of `component` under the names of the installed libraries; biases of the base stay."""
    if component not in modules:
        raise ConfigError(f"it is for the component '{component}', which the base does not have")
    mine = {component: modules[component]}
    adapter = {name: tensor for name, tensor in state.tensors.items() if names.is_adapter(name)}
    if not adapter:
        raise ConfigError("it has no tensors of an adapter")
    layers = fused.separated(names.layers_in(adapter, family, mine)[component], modules[component])
    tensors = {name: tensor for name, tensor in state.tensors.items() if name not in adapter}
    tensors |= {f"{module}.{part}": t for module, layer in layers.items() for part, t in layer.items()}
    return {component: AdapterState(tensors, state.config)}


def _read_file(path: Path, family: Family, modules: names.Modules) -> States:
    """The adapters in a file by anyone: the names of its tensors say what belongs where."""
    limits.check_file(path)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in word_file.without(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"not a safetensors file: {reason(error)}") from error
    if not tensors:
        raise ConfigError("it has no tensors")
    found, stored = names.layers_in(tensors, family, modules), _stored(header, family)
    return {
        name: reading.state_of(fused.separated(layers, modules[name]), stored.get(name))
        for name, layers in sorted(found.items())
    }


def _stored(header: Mapping[str, str], family: Family) -> dict[str, dict[str, Any]]:
    """The PEFT config of each component in the header of Diffusers' or of our kohya file."""
    found = files.json_object(header.get(CONFIGS, "{}"), "its header's settings")
    metadata = files.json_object(header.get(diffusers_file.METADATA, "{}"), "its metadata")
    for key, value in metadata.items():
        component, _, name = key.partition(".")
        if component in family.adaptable:
            found.setdefault(component, {})[name] = value
    return found


def _check(state: AdapterState) -> None:
    """Raise ConfigError unless an adapter's settings are sound and fit its tensors."""
    if (kind := state.config["peft_type"]) not in KINDS:
        raise ConfigError(f"it is of the kind {kind}; dbtrain reads {', '.join(KINDS)}")
    for module, layer in by_module(state).items():
        rank, scale = strength(state.config, module)
        if not 0 < scale < math.inf:
            raise ConfigError(f"the scale of {module} is {scale}, which is not positive and finite")
        if (its := reading.rank_of(layer)) not in (None, rank):
            raise ConfigError(f"its settings say rank {rank} for {module}, its tensors have rank {its}")


EVERY, WEBUIS = ("lora", "loha", "lokr"), "ComfyUI, A1111, Forge, InvokeAI"
FORMATS = {
    "diffusers": Format(
        diffusers_file.FILE,
        diffusers_file.write,
        ("lora",),
        "Diffusers",
        components=lambda family: family.lora_loads or family.adaptable,
    ),
    "peft": Format("", peft_folder.write, EVERY, "PEFT", biases=True),
    "kohya": Format(kohya_file.FILE, kohya_file.write, EVERY, WEBUIS, components=lambda family: family.kohya),
    "comfyui": Format(
        kohya_file.FILE,
        comfyui_file.write,
        EVERY,
        "ComfyUI",
        components=comfyui_file.components,
        refuses=comfyui_file.refuses,
    ),
    "diff": Format(
        diff_file.FILE,
        diff_file.write,
        EVERY,
        WEBUIS,
        biases=True,
        readable=False,
        components=lambda family: family.kohya,
    ),
}
