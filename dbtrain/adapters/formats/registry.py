"""Adapter files that others read: Diffusers', PEFT's and kohya's, from PEFT's names and back.

| format | for | layout |
|---|---|---|
| diffusers | `load_lora_weights` | one file, `<component>.<module>.lora...`; metadata holds alpha |
| peft | `PeftModel.from_pretrained` | one folder a component, `adapter_config.json` beside the weights |
| kohya | A1111, ComfyUI, Forge | one file, `lora_unet_<module>...`, one alpha a layer; LyCORIS's names |
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dbtrain.adapters.formats import diffusers_file, kohya_file, peft_folder
from dbtrain.adapters.formats.common import Modules, States, by_module, one_rank, scale_of
from dbtrain.models.families.family import Family
from dbtrain.runtime import files, hashing
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import RunFolder

KINDS = ("LORA", "LOHA", "LOKR")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Format:
    """One form of adapter file, and what it can hold."""

    main: str  # file, or "" for a folder a component
    write: Callable[[Path, Family, States], None]
    kinds: tuple[str, ...]
    biases: bool = False
    components: Callable[[Family], Collection[str]] = lambda family: family.adaptable

    def lacks(self, family: Family, states: States) -> str | None:
        """What of this adapter the format cannot hold; None if it holds all."""
        for state in states.values():
            kind = state.config["peft_type"].lower()
            if kind not in self.kinds:
                return f"a {kind} adapter"
            if not self.biases and any(name.endswith(".bias") for name in state.tensors):
                return "trained biases"
        if strange := set(states) - set(self.components(family)):
            return f"an adapter of the {min(strange)} of a {family.name} model"
        return None


def natural(family: Family, states: States) -> tuple[str, ...]:
    """The format to use when none is asked for: the first that holds all of the adapter."""
    return (next(name for name, form in FORMATS.items() if not form.lacks(family, states)),)


def check(name: str, family: Family, states: States) -> None:
    """Raise ConfigError if a format cannot hold an adapter."""
    if lacking := FORMATS[name].lacks(family, states):
        able = [other for other, form in FORMATS.items() if not form.lacks(family, states)]
        raise ConfigError(
            f"export.formats: the format {name} cannot hold {lacking}; use {', '.join(able)}", shared=True
        )


def write(name: str, folder: Path, family: Family, states: States) -> Path:
    """Write an adapter into `folder` in one format; the path that its loader takes.

    For what the format can hold: see `check`. Raises ConfigError if the disk is full.
    """
    try:
        FORMATS[name].write(folder, family, states)
    except SafetensorError as error:  # its writer reports a full disk this way
        raise ConfigError(f"cannot write into {folder}: {error}") from error
    return folder / FORMATS[name].main


def find(adapter: str | Path) -> Path:
    """The adapter of a run folder or an export folder, or the file itself. Raises ConfigError if none."""
    path = files.expand(adapter)
    if path.name == peft_folder.WEIGHTS and (path.parent / peft_folder.CONFIG).is_file():
        return path.parent
    if path.is_file():
        return path
    for folder in (RunFolder(path).export, path):
        for main in (form.main for form in FORMATS.values() if form.main):
            if (folder / main).is_file():
                return folder / main
        if (folder / peft_folder.CONFIG).is_file() or any(folder.glob(f"*/{peft_folder.CONFIG}")):
            return folder
    raise ConfigError(
        f"adapter '{adapter}' is neither a file nor a run folder with an export "
        f"({diffusers_file.FILE}); run: dbtrain export"
    )


def content_of(path: Path) -> str:
    """A name for an adapter's content."""
    found = [path] if path.is_file() else sorted(path.glob("**/adapter_*"))
    return content_key([[file.name, hashing.sha256_of(file)] for file in found])


def read(path: Path, family: Family, modules: Callable[[str], list[str]]) -> States:
    """The adapter in a file or folder of any format, by component, under PEFT's names.

    `modules`: component -> names of the base's modules. Raises ConfigError if it is none, if it is a
    pickle, or if it does not fit.
    """
    if path.suffix.lower() in PICKLES:
        raise ConfigError(f"{path} is a pickle, which may run code; give a .safetensors file")
    found = {name: modules(name) for name in family.adaptable}
    try:
        states = _read_folder(path, family) if path.is_dir() else _read_file(path, family, found)
        _check(states, found)
    except ConfigError as problem:
        raise ConfigError(f"adapter {path}: {problem}") from problem
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # settings that are none
        raise ConfigError(f"adapter {path}: its settings are damaged: {reason(error)}") from error
    return states


def _read_folder(path: Path, family: Family) -> States:
    if (path / peft_folder.CONFIG).is_file():
        component = path.name if path.name in family.adaptable else family.denoiser
        return {component: peft_folder.read(path)}
    components = [entry.parent for entry in sorted(path.glob(f"*/{peft_folder.CONFIG}"))]
    if not components:
        raise ConfigError(
            f"no {diffusers_file.FILE}, {kohya_file.FILE} or folder with {peft_folder.CONFIG} in it"
        )
    return {folder.name: peft_folder.read(folder) for folder in components}


def _read_file(path: Path, family: Family, modules: Modules) -> States:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(header.get(diffusers_file.METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"no safetensors file: {reason(error)}") from error
    first = min(tensors, default="nothing")
    if any(first.startswith(f"{prefix}_") for prefix in family.kohya.values()):
        return kohya_file.read(tensors, header, family, modules)
    if any(first.startswith(f"{component}.") for component in modules):
        strange = [key for key in tensors if key.split(".")[0] not in modules]
        if strange:
            raise ConfigError(f"a tensor is called {strange[0]}")
        return diffusers_file.read(tensors, metadata, modules)
    raise ConfigError(
        f"its first tensor is called '{first}', which is the layout of no format for {family.name} models"
    )


def _check(states: States, modules: Modules) -> None:
    """Raise ConfigError unless every layer is one of the base's."""
    for component, state in states.items():
        if component not in modules:
            raise ConfigError(f"it is for the component '{component}', which the base has not")
        names = set(modules[component])
        strange = [layer for layer in by_module(state) if layer not in names]
        if strange:
            raise ConfigError(f"the base's {component} has no module '{strange[0]}'")
        if (kind := state.config["peft_type"]) not in KINDS:
            raise ConfigError(f"it is of the kind {kind}; dbtrain reads {', '.join(KINDS)}")
        if not 0 < scale_of(state.config) < math.inf:
            raise ConfigError(f"its strength is {scale_of(state.config)}")
        if kind == "LORA":
            one_rank(state.tensors, ("lora_A.weight",))


FORMATS = {
    "diffusers": Format(
        diffusers_file.FILE,
        diffusers_file.write,
        ("lora",),
        components=lambda family: family.lora_loads or family.adaptable,
    ),
    "peft": Format("", peft_folder.write, ("lora", "loha", "lokr"), biases=True),
    "kohya": Format(
        kohya_file.FILE, kohya_file.write, ("lora", "loha", "lokr"), components=lambda family: family.kohya
    ),
}
