"""Adapter files for Qwen-Image and Krea 2: the names of all trainers, as Diffusers' own loaders read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dbtrain.adapters import inject
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.names import original_names
from dbtrain.adapters.state import AdapterState
from dbtrain.config import AdapterSettings, Model
from dbtrain.models.base import Base
from tests import bases

RANK, ALPHA = 4, 3.0
DOWN, UP = "lora_A", "lora_B"
KOHYA = {DOWN: "lora_down", UP: "lora_up"}


def dotted(prefix: str) -> Callable[[str, str], str]:
    return lambda name, part: f"{prefix}.{name}.{part}.weight"


def underscored(name: str, part: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}.{KOHYA[part]}.weight"


# How a file calls a layer's tensor, whether by the original code's name of it, whether it has alphas, and
# whether Diffusers reads it.
NAMINGS = {
    ("qwen-image", "Diffusers"): (dotted("transformer"), False, False, True),
    ("qwen-image", "ComfyUI"): (dotted("diffusion_model"), True, False, True),
    ("qwen-image", "ComfyUI with alphas"): (dotted("diffusion_model"), True, True, True),
    ("qwen-image", "kohya"): (underscored, True, True, True),
    ("krea2", "Diffusers"): (dotted("transformer"), False, False, True),
    ("krea2", "ComfyUI"): (dotted("diffusion_model"), True, False, True),
    ("krea2", "ai-toolkit"): (dotted("base_model.model"), True, False, True),
    ("krea2", "kohya"): (underscored, True, True, False),
}


@cache
def base(family: str) -> Base:
    return Base.find(Model(path=str(bases.OF_FAMILY[family]())))


@cache
def linears(family: str) -> dict[str, nn.Linear]:
    layers = base(family).load("transformer").named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, nn.Linear)}


def changes_by(family: str, state: AdapterState) -> dict[str, Tensor]:
    """The change of each layer's weight."""
    module = base(family).load("transformer")
    inject.fill(inject.put_on(module, state, "it"), state)
    layers = ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight"))
    return {name: layer.get_delta_weight("it").detach() for name, layer in layers}


@pytest.mark.parametrize(("family", "naming"), NAMINGS)
def test_every_linear_layer_is_read_as_diffusers_reads_it(family: str, naming: str, tmp_path: Path) -> None:
    called, originally, alphas, by_diffusers = NAMINGS[family, naming]
    names = linears(family)
    places = {found: place for place, (found,) in original_names(base(family).family, names).items()}
    assert not places or places.keys() == names.keys(), "of every layer or of none, for one layer each"
    random = torch.Generator().manual_seed(0)
    tensors, wanted = {}, {}
    for name, layer in names.items():
        place = places.get(name, name) if originally else name
        down = torch.randn(RANK, layer.in_features, generator=random)
        up = torch.randn(layer.out_features, RANK, generator=random)
        tensors |= {called(place, DOWN): down, called(place, UP): up}
        if alphas:
            tensors[called(place, DOWN).rsplit(".", 2)[0] + ".alpha"] = torch.tensor(ALPHA)
        wanted[name] = (ALPHA / RANK if alphas else 1.0) * up @ down
    path = tmp_path / "it.safetensors"
    save_file(tensors, path)

    state = formats.read(path, base(family).family, base(family).skeleton)["transformer"]
    torch.testing.assert_close(changes_by(family, state), wanted, rtol=1e-5, atol=1e-5)
    if by_diffusers:
        kind: Any = getattr(diffusers, base(family).family.pipeline)
        theirs = kind.lora_state_dict(str(tmp_path), weight_name=path.name)
        found = {
            name: theirs[f"transformer.{name}.{UP}.weight"] @ theirs[f"transformer.{name}.{DOWN}.weight"]
            for name in names
        }
        assert len(theirs) == 2 * len(names)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", dict.fromkeys(family for family, _ in NAMINGS))
@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_comfyui_s_file_of_every_kind_comes_back(family: str, kind: str, tmp_path: Path) -> None:
    module = base(family).load("transformer")
    settings = AdapterSettings(kind=kind, rank=RANK, alpha=ALPHA, targets="all")
    inject.attach(module, settings, "denoiser", 0, (), base(family).family.presets)
    for parameter in inject.trainable(module).values():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    states = {"transformer": inject.collect(module)}
    formats.check("comfyui", base(family).family, states)
    path = formats.write("comfyui", tmp_path, base(family).family, states, base(family).module_names)
    read = formats.read(path, base(family).family, base(family).skeleton)
    changes, wanted = (changes_by(family, every["transformer"]) for every in (read, states))
    torch.testing.assert_close(changes, wanted, rtol=1e-5, atol=1e-5)
