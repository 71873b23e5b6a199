"""kohya's file in other programs: their names and formulas, derived anew from what they document.

The bases have the depth, the blocks and the names of SD 1.5, SD 2 and SDXL, but few channels.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dbtrain.adapters import inject
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.names import nested
from dbtrain.config import AdapterSettings, Model
from dbtrain.models.families import registry as families
from dbtrain.models.pretrained import Pretrained
from tests import bases
from tests.conftest import thinned

SMALL = {"norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 8, "sample_size": 8}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32, "block_out_channels": (4, 8, 8),
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (4, 8, 8, 8)},
    "sd2": {"block_out_channels": (4, 8, 8, 8), "use_linear_projection": True},
    "sdxl": XL,
}
ENCODERS = {"sd1": (12,), "sd2": (23,), "sdxl": (12, 32)}  # layers
FAMILY = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl"}


@cache
def base(name: str) -> dict[str, nn.Module]:
    """The components that can have an adapter."""
    torch.manual_seed(0)
    found: dict[str, Any] = {"unet": UNet2DConditionModel(**SMALL | UNETS[name])}
    for number, layers in enumerate(ENCODERS[name]):
        kind = CLIPTextModelWithProjection if number else CLIPTextModel
        config = CLIPTextConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=layers, projection_dim=8,
            num_attention_heads=2,
        )  # fmt: skip
        found["text_encoder_2" if number else "text_encoder"] = kind(config)
    return found


def adapted(name: str, components: tuple[str, ...] | None = None, **settings: Any) -> dict[str, nn.Module]:
    """The components with an adapter of random weights."""
    found = {}
    for component, module in base(name).items():
        if components and component not in components:
            continue
        part = "denoiser" if component == "unet" else "text_encoder"
        found[component] = deepcopy(module)
        inject.attach(found[component], AdapterSettings(**{"rank": 2, **settings}), part, 0)
        for parameter in inject.trainable(found[component]).values():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return found


def exported(name: str, folder: Path, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """The layers in kohya's file."""
    states = {component: inject.collect(module) for component, module in modules.items()}
    path = formats.write("kohya", folder, families.get(FAMILY[name]), states, lambda component: [
        module for module, _ in base(name)[component].named_modules()
    ])  # fmt: skip
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        layer, _, part = key.partition(".")
        layers.setdefault(layer, {})[part] = tensor
    return layers


@cache
def original(unet: nn.Module) -> dict[str, str]:
    """Diffusers' name of each block -> its name in the original UNet, built up as the original is."""
    names = dict(unet.named_modules())
    found = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for number in (1, 2):
        found[f"time_embedding.linear_{number}"] = f"time_embed.{2 * number - 2}"
        found[f"add_embedding.linear_{number}"] = f"label_emb.0.{2 * number - 2}"
    place = 1
    for block in range(len(unet.down_blocks)):  # type: ignore[arg-type]
        for layer in range(2):
            for slot, kind in enumerate(("resnets", "attentions")):
                found[f"down_blocks.{block}.{kind}.{layer}"] = f"input_blocks.{place}.{slot}"
            place += 1
        if f"down_blocks.{block}.downsamplers.0" in names:
            found[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    found |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
    place = 0
    for block in range(len(unet.up_blocks)):  # type: ignore[arg-type]
        for layer in range(3):
            modules = [f"up_blocks.{block}.{kind}.{layer}" for kind in ("resnets", "attentions")]
            if layer == 2:
                modules.append(f"up_blocks.{block}.upsamplers.0")
            for slot, module in enumerate(module for module in modules if module in names):
                found[module] = f"output_blocks.{place}.{slot}"
            place += 1
    return found


RESIDUAL = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"))  # fmt: skip


def in_original(name: str, blocks: Mapping[str, str]) -> str:
    """A layer's name in the original UNet."""
    start = max((block for block in blocks if f"{name}.".startswith(f"{block}.")), key=len)
    rest = name[len(start) :]
    if ".resnets." in name:
        for ours, theirs in RESIDUAL:
            rest = rest.replace(ours, theirs)
    return blocks[start] + rest


def layers_of(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def text_names(name: str, prefix: str, second: str = "lora_te2") -> dict[str, tuple[str, str]]:
    found = {}
    for component in list(base(name))[1:]:
        start = second if component == "text_encoder_2" else prefix
        for layer in layers_of(base(name)[component]):
            found[f"{start}_{nested(layer)}".replace(".", "_")] = (component, layer)
    return found


@cache
def comfyui(name: str) -> dict[str, tuple[str, str]]:
    """The original's names and Diffusers'; `lora_te` and `lora_te1` for the first CLIP."""
    unet = base(name)["unet"]
    blocks, found = original(unet), text_names(name, "lora_te") | text_names(name, "lora_te1")
    for layer in layers_of(unet):
        for spelling in (layer, in_original(layer, blocks)):
            found[f"lora_unet_{spelling}".replace(".", "_")] = ("unet", layer)
    return found


@cache
def a1111(name: str) -> dict[str, tuple[str, str]]:
    """The original's names; Diffusers' are turned into them with three layers a block, as SD 1 and 2 have."""
    unet = base(name)["unet"]
    blocks = original(unet)
    layers = {in_original(layer, blocks).replace(".", "_"): layer for layer in layers_of(unet)}
    found = text_names(name, "lora_te1" if name == "sdxl" else "lora_te")
    for layer in layers_of(unet):
        spelled = in_original(layer, blocks)
        if ups := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", layer):
            block = int(ups[1])
            spelled = f"output_blocks.{block * 3 + 2}.{2 if block else 1}.conv"
        if (there := layers.get(spelled.replace(".", "_"))) and not layer.startswith("add_embedding"):
            found[f"lora_unet_{layer}".replace(".", "_")] = ("unet", there)
    return found | {f"lora_unet_{spelled}": ("unet", layer) for spelled, layer in layers.items()}


@cache
def sd_scripts(name: str) -> dict[str, tuple[str, str]]:
    """The names of the UNet that it trains: Diffusers' for SD 1 and 2, the original's for SDXL."""
    unet = base(name)["unet"]
    blocks = original(unet)
    found = text_names(name, "lora_te1" if name == "sdxl" else "lora_te")
    for layer in layers_of(unet):
        spelled = in_original(layer, blocks) if name == "sdxl" else layer
        found[f"lora_unet_{spelled}".replace(".", "_")] = ("unet", layer)
    return found


CLIENTS: dict[str, Callable[[str], dict[str, tuple[str, str]]]] = {
    "ComfyUI, Forge, InvokeAI": comfyui, "A1111": a1111, "sd-scripts, LyCORIS": sd_scripts,
}  # fmt: skip


EVERY = r".*(?<!text_projection)"


@pytest.mark.parametrize(
    ("name", "targets"),
    thinned(
        [*((name, EVERY) for name in UNETS), ("sdxl", r"up_blocks\.0\.upsamplers\.0\.conv"),
         ("sdxl", r"down_blocks\.1\.attentions\.0\..*to_q")], 4
    ),
)  # fmt: skip
def test_every_client_finds_every_layer(name: str, targets: str, tmp_path: Path) -> None:
    modules = adapted(name, None if targets == EVERY else ("unet",), targets=targets)
    written = exported(name, tmp_path, modules)
    truth = {
        (component, layer) for component in modules for layer in layers_of(base(name)[component])
        if re.fullmatch(targets, layer)
    }  # fmt: skip
    for client, names in CLIENTS.items():
        known = names(name)
        assert {known.get(layer) for layer in written} == truth, client
        assert len(written) == len(truth)
        for layer, tensors in written.items():  # the very layer, by the change's size where that tells
            component, module = known[layer]
            up = tensors["lora_up.weight"].shape[0]
            assert up == base(name)[component].get_submodule(module).weight.shape[0], (client, layer)


@pytest.mark.slow
def test_diffusers_loads_every_layer_of_sdxl(tmp_path: Path) -> None:
    modules = adapted("sdxl", targets="all", alpha=3)
    exported("sdxl", tmp_path, modules)
    path = tmp_path / "kohya.safetensors"
    unet: Any = deepcopy(base("sdxl")["unet"])
    found, alphas = StableDiffusionXLPipeline.lora_state_dict(path, unet_config=unet.config)
    StableDiffusionXLPipeline.load_lora_into_unet(found, alphas, unet, adapter_name="default")
    theirs = {name: layer for name, layer in unet.named_modules() if isinstance(layer, inject.LoraLayer)}
    mine = {n: layer for n, layer in modules["unet"].named_modules() if isinstance(layer, inject.LoraLayer)}
    assert theirs.keys() == mine.keys()
    for name, layer in mine.items():
        assert torch.equal(layer.get_delta_weight("default"), theirs[name].get_delta_weight("default")), name


def change(layer: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """What a layer of kohya's file adds to a weight, as LyCORIS documents it and the other programs do it."""
    dim = next((layer[part].shape[0] for part in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
                if part in layer), None)  # fmt: skip
    scale = layer["alpha"].item() / dim if dim else 1.0
    if "lora_down.weight" in layer:
        return (layer["lora_up.weight"].flatten(1) @ layer["lora_down.weight"].flatten(1)).view(shape) * scale
    if "hada_w1_a" in layer:
        halves = []
        for half in ("1", "2"):
            a, b = layer[f"hada_w{half}_a"], layer[f"hada_w{half}_b"]
            if (core := layer.get(f"hada_t{half}")) is not None:
                halves.append(torch.einsum("ijkl,ip,jq->pqkl", core, a, b))
            else:
                halves.append(a @ b)
        return (halves[0] * halves[1]).view(shape) * scale
    left = layer["lokr_w1"] if "lokr_w1" in layer else layer["lokr_w1_a"] @ layer["lokr_w1_b"]
    right = layer["lokr_w2"] if "lokr_w2" in layer else layer["lokr_w2_a"] @ layer["lokr_w2_b"]
    left = left.view(*left.shape, *[1] * (right.dim() - 2))
    return torch.kron(left, right.contiguous()).reshape(shape) * scale


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 3}, "ranks": {"ranks": {r".*conv\d": 1, ".*proj.*": 5}}, "rslora": {"rslora": True},
    "loha": {"kind": "loha", "alpha": 3},
    "loha-cp": {"kind": "loha", "effective_conv2d": True}, "lokr": {"kind": "lokr", "rank": 1, "alpha": 3},
    "lokr-cp": {"kind": "lokr", "rank": 1, "alpha": 3, "effective_conv2d": True},
    "lokr-both": {"kind": "lokr", "rank": 1, "decompose_both": True, "effective_conv2d": True},
    "lokr-factor": {"kind": "lokr", "rank": 1, "alpha": 0.5, "decompose_factor": 2},
    "lokr-whole": {"kind": "lokr", "rank": 64, "alpha": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", thinned(KINDS, 4))
def test_every_layer_changes_as_in_peft(kind: str, tmp_path: Path) -> None:
    unet = adapted("sd1", ("unet",), targets="all", **KINDS[kind])["unet"]
    written = exported("sd1", tmp_path, {"unet": unet})
    assert not any("lokr_t2" in layer for layer in written.values()), "ComfyUI and Forge cannot read it"
    known = comfyui("sd1")
    for label, tensors in written.items():
        layer: Any = unet.get_submodule(known[label][1])
        want = layer.get_delta_weight("default")
        assert (change(tensors, want.shape) - want).abs().max() <= 1e-6 * max(1.0, want.abs().max()), label


EVERY_KIND = KINDS | {"dora": {"dora": True}, "biases": {"bias": "all"}, "own-biases": {"bias": "lora_only"}}
# A layer of every type.
SOME = (
    r"(down_blocks\.1\.|mid_block\.|up_blocks\.1\.).*(to_[kq]|to_out\.0|proj_in|ff\.net\.2|conv\d?|emb_proj)"
)
DIFFS = [("sd1", kind, ("unet",)) for kind in EVERY_KIND] + [
    ("sdxl", "dora", ("unet",)), ("sdxl", "dora", ("text_encoder_2",)), ("sdxl", "biases", ("text_encoder",)),
    ("sd2", "loha", ("text_encoder",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "components"), thinned(DIFFS, 4))
def test_a_diff_is_what_merging_adds_to_every_layer(
    name: str, kind: str, components: tuple[str, ...], tmp_path: Path
) -> None:
    """Also where the layer is DoRA's, which the programs that read the file compute in other ways."""
    targets = SOME if components == ("unet",) else "all"
    modules = adapted(name, components, targets=targets, **EVERY_KIND[kind])
    states = {component: inject.collect(module) for component, module in modules.items()}
    path = formats.write(
        "diff", tmp_path, families.get(FAMILY[name]), states,
        lambda component: [module for module, _ in base(name)[component].named_modules()],
        name="dog", load=lambda component: deepcopy(base(name)[component]),
    )  # fmt: skip
    assert path == tmp_path / "dog-diff.safetensors"
    found = load_file(path)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    (component,) = components
    trained = modules[component]
    for layer in trained.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    wanted: dict[str, Tensor] = {}
    for label, after in trained.named_parameters():
        layer, _, part = inject.unwrapped(label).rpartition(".")
        if not re.search(r"\.(lora|hada|lokr)_", label):
            before = base(name)[component].get_parameter(f"{layer}.{part}")
            end = {"weight": "diff", "bias": "diff_b"}.get(part, part)
            wanted[f"{as_kohya(name, component, layer)}.{end}"] = (after - before).detach()
    changed = {key.partition(".")[0] for key, change in wanted.items() if change.any()}
    wanted = {key: change for key, change in wanted.items()
              if key.partition(".")[0] in changed and (change.any() or key.endswith(".diff"))}  # fmt: skip
    assert found.keys() == wanted.keys()
    for key, change in wanted.items():
        assert found[key].shape == change.shape
        assert (found[key] - change).abs().max() <= 1e-6 * max(1.0, change.abs().max()), key


def as_kohya(name: str, component: str, layer: str) -> str:
    """A layer's name in the files of kohya's scripts."""
    if component == "unet":
        unet = base(name)["unet"]
        spelled = in_original(layer, original(unet)) if name == "sdxl" else layer
        return f"lora_unet_{spelled}".replace(".", "_")
    start = {"text_encoder": "lora_te1" if name == "sdxl" else "lora_te", "text_encoder_2": "lora_te2"}
    level = "" if layer.startswith(("text_model.", "text_projection")) else "text_model."
    return f"{start[component]}_{level}{layer}".replace(".", "_")


def version(header: Mapping[str, str]) -> str:
    """As A1111 sorts files."""
    if header.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if header.get("ss_v2") == "True" else "SD1"


@pytest.mark.parametrize(
    ("family", "width", "prediction", "wanted"),
    [
        ("sd", 768, "epsilon", ("SD1", "sd_v1", "stable-diffusion-v1/lora")),
        ("sd", 1024, "epsilon", ("SD2", "sd_v2", "stable-diffusion-v2-512/lora")),
        ("sd", 1024, "v_prediction", ("SD2", "sd_v2_v", "stable-diffusion-v2-768-v/lora")),
        ("sdxl", 2048, "epsilon", ("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")),
    ],
)
def test_the_header_says_which_models_a_file_is_for(
    tmp_path: Path, family: str, width: int, prediction: str, wanted: tuple[str, ...]
) -> None:
    folder = shutil.copytree(bases.OF_FAMILY[family](), tmp_path / "base")
    for part, name, change in (
        ("unet", "config.json", {"cross_attention_dim": width}),
        ("scheduler", "scheduler_config.json", {"prediction_type": prediction}),
    ):
        path = folder / part / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    header = families.get(family).header(Pretrained.find(Model(path=str(folder))))
    found = (version(header), header["ss_base_model_version"], header["modelspec.architecture"])
    assert found == wanted
    assert header["modelspec.prediction_type"] == ("v" if prediction == "v_prediction" else "epsilon")
