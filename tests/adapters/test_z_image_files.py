"""Adapter files for Z-Image: the names of all its trainers, as Diffusers' own converters read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbtrain.adapters import inject
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.names import original_names
from dbtrain.config import AdapterSettings, Model
from dbtrain.models.base import Base
from tests import bases

RANK, ALPHA = 4, 3.0
KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}


@cache
def base() -> Base:
    return Base.find(Model(path=str(bases.z_image())))


def linears() -> dict[str, Tensor]:
    layers = base().load("transformer").named_modules()
    return {name: layer.weight for name, layer in layers if isinstance(layer, torch.nn.Linear)}


def fused(name: str) -> str:
    return name.replace(".to_q", ".qkv").replace(".to_out.0", ".out")


# How a file calls a layer's tensor, whether it joins queries, keys and values, and whether it has alphas.
NAMINGS: dict[str, tuple[Callable[[str, str], str], bool, bool]] = {
    "Diffusers": (lambda name, part: f"transformer.{name}.{part}.weight", False, False),
    "PEFT": (lambda name, part: f"diffusion_model.{name}.{part}.default.weight", False, False),
    "ai-toolkit": (lambda name, part: f"diffusion_model.{name}.{part}.weight", False, True),
    "kohya, Diffusers' names": (
        lambda name, part: f"lora_unet_{name.replace('.', '_')}.{KOHYA[part]}.weight", False, True
    ),
    "kohya": (
        lambda name, part: f"lora_unet_{fused(name).replace('.', '_')}.{KOHYA[part]}.weight", True, True
    ),
    "ComfyUI, original names": (
        lambda name, part: f"diffusion_model.{fused(name)}.{part}.weight", True, False
    ),
}  # fmt: skip


def written(naming: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors, with random weights on every block, and the change that they are of each layer."""
    named, joins, alphas = NAMINGS[naming]
    random = torch.Generator().manual_seed(0)
    tensors, changes = {}, {}
    weights = {name: weight for name, weight in linears().items() if "layers" in name or "refiner" in name}
    for name, weight in weights.items():
        parts = [name]
        if joins and name.endswith(("to_k", "to_v")):
            continue
        if joins and name.endswith("to_q"):
            parts = [name[:-1] + part for part in "qkv"]
        down = torch.randn(RANK, weight.shape[1], generator=random)
        up = torch.randn(len(parts) * weight.shape[0], RANK, generator=random)
        tensors |= {named(name, "lora_A"): down, named(name, "lora_B"): up}
        if alphas:
            key = named(name, "lora_A").removesuffix(".weight").rpartition(".")[0]
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        scale = ALPHA / RANK if alphas else 1.0
        changes |= zip(parts, (scale * up @ down).chunk(len(parts)), strict=True)
    return tensors, changes


def changed_by(state: Any) -> dict[str, Tensor]:
    module = base().load("transformer")
    inject.fill(inject.put_on(module, state, "it"), state)
    layers = ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight"))
    return {name: layer.get_delta_weight("it").detach() for name, layer in layers}


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("naming", NAMINGS)
def test_files_of_every_trainer_are_read_as_diffusers_reads_them(naming: str, tmp_path: Path) -> None:
    tensors, wanted = written(naming)
    path = tmp_path / "it.safetensors"
    save_file(tensors, path)
    states = formats.read(path, base().family, base().skeleton)
    assert_same(changed_by(states["transformer"]), wanted)
    if naming != "ComfyUI, original names":  # which Diffusers does not split
        theirs: Any = ZImagePipeline.lora_state_dict(str(tmp_path), weight_name=path.name)
        layers = {name.split(".lora_")[0] for name in theirs}
        default = ".default" if any(".default." in name for name in theirs) else ""
        parts = {layer: [theirs[f"{layer}.lora_{part}{default}.weight"] for part in "BA"] for layer in layers}
        products = {name.removeprefix("transformer."): up @ down for name, (up, down) in parts.items()}
        assert_same(dict(sorted(products.items())), dict(sorted(wanted.items())))


def test_original_names_are_those_that_diffusers_converts() -> None:
    weights = linears()
    places = original_names(base().family, weights)
    known = {module for modules in places.values() for module in modules}
    places |= {name: [name] for name in weights if name not in known}  # the same there
    checkpoint = {
        f"{place}.weight": torch.cat([weights[m] for m in found]) for place, found in places.items()
    }
    found = convert_z_image_transformer_checkpoint_to_diffusers(checkpoint)
    assert found.keys() == {f"{name}.weight" for name in weights}
    assert all(torch.equal(found[f"{name}.weight"], weight) for name, weight in weights.items())


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_comfyui_s_file_has_names_that_both_programs_know(kind: str, tmp_path: Path) -> None:
    """ComfyUI's table for Z-Image has every layer of a block as `diffusion_model.<Diffusers' name>`."""
    module = base().load("transformer")
    settings = AdapterSettings(kind=kind, rank=RANK, alpha=ALPHA, targets="all")
    inject.attach(module, settings, "denoiser", 0, (), base().family.presets)
    for parameter in inject.trainable(module).values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    states = {"transformer": inject.collect(module)}
    formats.check("comfyui", base().family, states)
    path = formats.write("comfyui", tmp_path, base().family, states, base().module_names, name="dog")
    layers = {name.split(f".{part}")[0] for name in load_file(path) for part in ("lora_", "hada_", "lokr_")
              if f".{part}" in name}  # fmt: skip
    assert layers == {
        f"diffusion_model.{name}" for name in linears() if "layers" in name or "refiner" in name
    }
    read = formats.read(path, base().family, base().skeleton)
    assert_same(changed_by(read["transformer"]), changed_by(states["transformer"]))


@pytest.mark.parametrize("form", ["diffusers", "peft", "comfyui"])
def test_layers_with_hyphens_in_their_names_have_ranks_of_their_own(tmp_path: Path, form: str) -> None:
    module, last = base().skeleton("transformer").to_empty(device="cpu"), "all_final_layer.2-1.linear"
    settings = {"targets": (last, "to_q"), "ranks": {last: 2}}
    inject.attach(module, AdapterSettings(rank=RANK, alpha=ALPHA, **settings), "denoiser", 0)
    state = inject.collect(module)
    path = formats.write(form, tmp_path, base().family, {"transformer": state}, base().module_names)
    found = formats.read(path, base().family, base().skeleton)["transformer"]
    assert found.tensors[f"{last}.lora_A.weight"].shape[0] == 2
    assert {name: t.shape for name, t in found.tensors.items()} == {
        n: t.shape for n, t in state.tensors.items()
    }
