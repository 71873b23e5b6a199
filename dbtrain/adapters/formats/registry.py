"""Formats of adapter files, written from and read into PEFT's names.

| format | for | layout |
|---|---|---|
| diffusers | `load_lora_weights` | one file, `<component>.<module>.lora...`; metadata holds alpha |
| peft | `PeftModel.from_pretrained` | one folder per component, weights and `adapter_config.json` |
| kohya | A1111, ComfyUI, Forge | one file, `lora_unet_<module>...`, one alpha per layer; LyCORIS's names |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dbtrain.adapters.formats import diffusers_file, kohya_file, limits, peft_folder
from dbtrain.adapters.formats.common import Modules, States, by_module, one_rank, scale_of
from dbtrain.models.families.family import Family
from dbtrain.runtime import files, hashing
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.run_folder import RunFolder

KINDS = ("LORA", "LOHA", "LOKR")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Format:
    """A format of adapter files, and what it can store."""

    main: str  # file name, or "" for a folder per component
    write: Callable[[Path, Family, States], None]
    kinds: tuple[str, ...]
    biases: bool = False
    components: Callable[[Family], Collection[str]] = lambda family: family.adaptable

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
        return None


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


def write(name: str, folder: Path, family: Family, states: States) -> Path:
    """Write an adapter that passes `check` into `folder`; return the path for its loader.

    Raises ConfigError if the disk is full.
    """
    try:
        FORMATS[name].write(folder, family, states)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise ConfigError(f"cannot write into {folder}: {error}") from error
    return folder / FORMATS[name].main


def find(adapter: str | Path) -> Path:
    """The adapter file or folder in a run or export folder, or the path itself if it is an adapter file.

    Raises ConfigError if there is none.
    """
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
    """A hash of an adapter's content."""
    found = [path] if path.is_file() else sorted(path.glob("**/adapter_*"))
    return hashing.content_key([[file.name, hashing.sha256_of(file)] for file in found if file.is_file()])


def read(path: Path, family: Family, modules: Callable[[str], list[str]]) -> States:
    """The adapters in a file or folder of any format, by component, under PEFT's names.

    `modules`: component -> the names of the base's modules. Raises ConfigError for anything but an adapter
    that fits the base, and for pickles.
    """
    if path.suffix.lower() in PICKLES:
        raise ConfigError(f"{path} is a pickle, which may run code; use a .safetensors file")
    found = {name: modules(name) for name in family.adaptable}
    try:
        states = _read_folder(path, family) if path.is_dir() else _read_file(path, family, found)
        states = {component: limits.bounded(state) for component, state in states.items()}
        _check(states, found)
    except ConfigError as problem:
        raise ConfigError(f"adapter {path}: {problem}") from problem
    # Malformed settings: of other types, too large for a float, nested too deeply.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
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
    limits.check_file(path)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        metadata = files.json_object(header.get(diffusers_file.METADATA, "{}"), "its metadata")
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"not a safetensors file: {reason(error)}") from error
    first = min(tensors, default="nothing")
    if any(first.startswith(f"{prefix}_") for prefix in family.kohya.values()):
        return kohya_file.read(tensors, header, family, modules)
    if any(first.startswith(f"{component}.") for component in modules):
        if unknown := [key for key in tensors if key.split(".")[0] not in modules]:
            raise ConfigError(f"its tensor {unknown[0]} belongs to no component of the base")
        return diffusers_file.read(tensors, metadata, modules)
    raise ConfigError(
        f"its first tensor is called '{first}', which matches no format for {family.name} models"
    )


def _check(states: States, modules: Modules) -> None:
    """Raise ConfigError unless the adapters fit the base's modules."""
    for component, state in states.items():
        if component not in modules:
            raise ConfigError(f"it is for the component '{component}', which the base does not have")
        names = set(modules[component])
        if unknown := [layer for layer in by_module(state) if layer not in names]:
            raise ConfigError(f"the base's {component} has no module '{unknown[0]}'")
        if (kind := state.config["peft_type"]) not in KINDS:
            raise ConfigError(f"it is of the kind {kind}; dbtrain reads {', '.join(KINDS)}")
        if not 0 < scale_of(state.config) < math.inf:
            raise ConfigError(f"its scale is {scale_of(state.config)}, which is not positive and finite")
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
