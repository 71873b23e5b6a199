"""Writing adapters: as a file is, or in a format for a base."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dbtrain.adapters.formats import diffusers_file, kohya_file, peft_folder, reading
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.common import Content, States, by_module
from dbtrain.adapters.formats.header import network, serialized
from dbtrain.adapters.formats.names import Layers
from dbtrain.adapters.material.adapter_file import AdapterFile, Place
from dbtrain.adapters.material.delta import Delta
from dbtrain.adapters.state import AdapterState
from dbtrain.models.base import Base
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

FORMS = tuple(name for name, form in formats.FORMATS.items() if form.readable)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write(
    out: Path, changes: Mapping[Place, Delta], like: AdapterFile | Base, form: str | None = None,
    dtype: str = "fp32", about: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write the LoRA of these changes to `out`: as a file is, or in a format for a base.

    `about`: entries of a file's header. Raises ConfigError if the format cannot hold it.
    """
    form = form or (like.form if isinstance(like, AdapterFile) else None)
    states: dict[str, AdapterState] = {}
    for component in sorted({component for component, _ in changes}):
        mine = {module: delta for (where, module), delta in changes.items() if where == component}
        found = lora(mine, one_alpha=form == "kohya")
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in found.tensors.items()}
        if large := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ConfigError(f"{large[0]} is too large for {dtype}; use --dtype bf16 or fp32")
        states[component] = AdapterState(tensors, found.config)
    base = like.base if isinstance(like, AdapterFile) else like
    if form is None:
        assert base
        form = formats.natural(base.family, states)[0]
    if (form == "peft") == (out.suffix == ".safetensors"):
        kind = "a folder" if form == "peft" else "a .safetensors file"
        raise ConfigError(f"OUT is '{out}', but the format {form} is {kind}; give another OUT, or --format")
    if base:
        formats.check(form, base.family, states)
        kept = _kept(like.header) if isinstance(like, AdapterFile) else {}
        header = {**kept, **base.family.header(base), **(about or {})}
        content = Content(base.family, states, base.module_names, header, base.load)
        formats.FORMATS[form].write(out, content)
        return
    assert isinstance(like, AdapterFile)
    if form != like.form:
        raise ConfigError(f"{like.path} is of the format {like.form}; to write {form}, add --base")
    if form != "peft":
        files.write_atomically(out, _file_like(like, states, about or {}))
        return
    if len(states) > 1 and "." in like.prefixes.values():
        raise ConfigError("one of the PEFT folders does not say which component it is for; add --base")
    for component, state in states.items():
        for name, data in peft_folder.contents(state).items():
            files.write_atomically(out / like.prefixes[component] / name, data)


def _kept(header: Mapping[str, str]) -> dict[str, str]:
    """The entries of a file's header that a file made of it keeps: all but those about its network."""
    return {
        key: value
        for key, value in header.items()
        if key.startswith(("ss_", "modelspec.")) and not key.startswith("ss_network_")
    }


def _file_like(like: AdapterFile, states: States, about: Mapping[str, str]) -> bytes:
    """The file of LoRAs, as `lora` makes them for its format, under the names that another file has."""
    kohya, tensors = like.form == "kohya", dict[str, Tensor]()
    parts = kohya_file.PARTS if kohya else {}
    for component, state in states.items():
        for module, layer in by_module(state).items():
            start = f"{like.prefixes[component]}{module}"
            tensors |= {f"{start}.{parts.get(part, part)}": tensor for part, tensor in layer.items()}
            if kohya:
                tensors[f"{start}.alpha"] = torch.tensor(float(state.config["lora_alpha"]))
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


def lora(changes: Mapping[str, Delta], one_alpha: bool = False) -> AdapterState:
    """The LoRA of a component that makes these changes, each with its own rank, fp32.

    Its scale is 1; or with `one_alpha` all layers have the alpha of the most frequent rank, since Diffusers
    ignores in kohya's files the alphas that differ.
    """
    usual = Counter(delta.rank for delta in changes.values()).most_common(1)[0][0]
    layers: Layers = {}
    for module, delta in changes.items():
        tail, alpha = delta.tail, usual if one_alpha else delta.rank
        if tail is None:
            raise ConfigError(
                f"a LoHa or LoKr does not have the shape of {module}; add --base to make it a LoRA"
            )
        up = (delta.up * (delta.rank / alpha)).float()
        layers[module] = {
            "lora_A.weight": delta.down.float().reshape(-1, *tail).contiguous(),
            "lora_B.weight": up.reshape(*up.shape, *[1] * (len(tail) - 1)).contiguous(),
            "alpha": torch.tensor(float(alpha)),
        }
    return reading.state_of(layers, None)
