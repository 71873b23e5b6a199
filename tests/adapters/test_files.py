"""Adapter files by anyone: every naming is read, ranks and alphas are the layers' own, the rest is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dbtrain.adapters import inject
from dbtrain.adapters.formats import common
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.diffusers_file import FILE
from dbtrain.adapters.formats.names import nested, sgm_names
from dbtrain.adapters.formats.peft_folder import CONFIG, WEIGHTS
from dbtrain.adapters.material.adapter_file import AdapterFile
from dbtrain.adapters.state import AdapterState
from dbtrain.config import AdapterSettings, Model
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from dbtrain.sample.pipeline import AdapterPipeline
from tests import bases
from tests.conftest import slow, thinned

LAYERS = r"mid_block\..*(to_q|to_out\.0|proj_in|ff\.net\.2|conv1|time_emb_proj)"
KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"  # a layer, (64, 64)
CONV = "lora_unet_mid_block_resnets_0_conv1"  # (64, 64, 3, 3)


@cache
def base(family: str = "sd") -> Base:
    return Base.find(Model(path=str(bases.OF_FAMILY[family]())))


def state(component: str = "unet", family: str = "sd", **settings: Any) -> AdapterState:
    """An adapter of random weights."""
    module = base(family).load(component)
    part = "denoiser" if component == "unet" else "text_encoder"
    targets = LAYERS if component == "unet" else "attention"
    inject.attach(module, AdapterSettings(**{"rank": 4, "alpha": 4, "targets": targets, **settings}), part, 0)
    for parameter in inject.trainable(module).values():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return inject.collect(module)


def read(path: Path, family: str = "sd") -> dict[str, AdapterState]:
    return dict(formats.read(path, base(family).family, base(family).skeleton))


def saved(folder: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "it.safetensors", header
    )
    return folder / "it.safetensors"


def changes(found: AdapterState, family: str = "sd") -> dict[str, Tensor]:
    """What an adapter adds to the UNet's weights, as PEFT computes it."""
    unet = base(family).load("unet")
    with torch.no_grad():
        for name, parameter in inject.put_on(unet, found, "it").items():
            parameter.copy_(found.tensors[name])
    layers = ((name, layer) for name, layer in unet.named_modules() if hasattr(layer, "get_delta_weight"))
    return {name: layer.get_delta_weight("it").detach() for name, layer in layers}


def as_kohya(module: str) -> str:
    return f"lora_unet_{module}".replace(".", "_")


def in_sgm(module: str) -> str:
    return sgm_names(base("sdxl").module_names("unet"))[module]


NAMINGS: dict[str, Callable[[str, str], str]] = {
    "bare": lambda module, part: f"{module}.{part}",
    "peft": lambda module, part: f"base_model.model.{module}.{part}",
    "default": lambda module, part: f"base_model.model.{module}.{part.replace('.', '.default.')}",
    "unet": lambda module, part: f"unet.{module}.{part}",
    "unet, peft": lambda module, part: f"unet.base_model.model.{module}.{part}",
    "kohya": lambda module, part: f"{as_kohya(module)}.{KOHYA[part]}",
    "kohya, sgm": lambda module, part: f"{as_kohya(in_sgm(module))}.{KOHYA[part]}",
    "lycoris": lambda module, part: f"lycoris_{module.replace('.', '_')}.{KOHYA[part]}",
    "diffusion_model": lambda module, part: f"diffusion_model.{module}.{part}",
    "diffusion_model, sgm": lambda module, part: f"diffusion_model.{in_sgm(module)}.{KOHYA[part]}",
    "diffusers": lambda module, part: f"unet.{module}.lora.{'down' if 'A' in part else 'up'}.weight",
}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("naming", thinned(NAMINGS, 4))
def test_every_naming_is_read(tmp_path: Path, family: str, naming: str) -> None:
    truth = state(family=family)
    tensors = {}
    for module, layer in common.by_module(truth).items():
        tensors |= {NAMINGS[naming](module, part): tensor for part, tensor in layer.items()}
    found = read(saved(tmp_path, tensors), family)
    assert found.keys() == {"unet"}
    assert found["unet"].tensors.keys() == truth.tensors.keys()
    assert all(torch.equal(found["unet"].tensors[name], tensor) for name, tensor in truth.tensors.items())
    assert common.strength(found["unet"].config, "any") == (4, 1.0)


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_the_text_encoder_of_sd_1_has_two_names(tmp_path: Path, prefix: str) -> None:
    truth = state("text_encoder")
    tensors = {}
    for module, layer in common.by_module(truth).items():
        nested = module if module.startswith("text_model.") else f"text_model.{module}"
        for part, tensor in layer.items():
            tensors[f"{prefix}_{nested}".replace(".", "_") + f".{KOHYA[part]}"] = tensor
    found = read(saved(tmp_path, tensors))
    assert found["text_encoder"].tensors.keys() == truth.tensors.keys()


@pytest.mark.parametrize("naming", ["{}_proj.lora_linear_layer.{}.weight", "to_{}_lora.{}.weight"])
def test_text_encoders_of_older_diffusers_are_read(tmp_path: Path, naming: str) -> None:
    truth = state("text_encoder")
    tensors = {}
    for module, layer in common.by_module(truth).items():
        where, _, name = nested(module).rpartition(".")
        for part, tensor in layer.items():
            label = naming.format(name.removesuffix("_proj"), "down" if "A" in part else "up")
            tensors[f"text_encoder.{where}.{label}"] = tensor
    assert read(saved(tmp_path, tensors))["text_encoder"].tensors.keys() == truth.tensors.keys()


def test_attention_processors_are_read(tmp_path: Path) -> None:
    truth = state(targets=r"mid_block\..*(to_q|to_out\.0)")
    tensors = {}
    for module, layer in common.by_module(truth).items():
        where, _, name = module.removesuffix(".0").rpartition(".")
        for part, tensor in layer.items():
            tensors[f"{where}.processor.{name}_lora.{'down' if 'A' in part else 'up'}.weight"] = tensor
    assert read(saved(tmp_path, tensors))["unet"].tensors.keys() == truth.tensors.keys()


def locon(**alphas: float) -> dict[str, Tensor]:
    """A LoCon whose layers differ: rank 4 on the attention, rank 2 on the convolution."""
    torch.manual_seed(0)
    return {
        f"{Q}.lora_down.weight": torch.randn(4, 64), f"{Q}.lora_up.weight": torch.randn(64, 4),
        f"{CONV}.lora_down.weight": torch.randn(2, 64, 3, 3),
        f"{CONV}.lora_up.weight": torch.randn(64, 2, 1, 1),
        f"{Q}.alpha": torch.tensor(alphas["attention"]), f"{CONV}.alpha": torch.tensor(alphas["conv"]),
    }  # fmt: skip


def test_ranks_and_alphas_of_layers_go_all_the_way_through(tmp_path: Path) -> None:
    tensors = locon(attention=6.0, conv=1.0)
    found = read(saved(tmp_path, tensors))
    down, up = (
        {layer: tensors[f"{layer}.lora_{side}.weight"] for layer in (Q, CONV)} for side in ("down", "up")
    )
    want = {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": up[Q] @ down[Q] * 6 / 4,
        "mid_block.resnets.0.conv1": torch.einsum("or, rikl -> oikl", up[CONV].flatten(1), down[CONV]) / 2,
    }
    for form in ("", "diffusers", "peft", "kohya"):
        if form:
            found = read(formats.write(form, tmp_path / form, base().family, found))
        got = changes(found["unet"])
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5)
    with safe_open(tmp_path / "kohya" / "kohya.safetensors", "pt") as file:
        assert file.get_tensor(f"{CONV}.alpha").item() == 1.0
    pipe = AdapterPipeline(base(), "fp32")
    pipe.add("it", tmp_path / "diffusers")
    ranks = {layer.r["it"]: layer.scaling["it"] for layer in pipe._layers()}
    assert ranks == {4: 1.5, 2: 0.5}


def test_a_cp_decomposed_locon_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, mid, up = torch.randn(4, 64, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(64, 4, 1, 1)
    parts = {
        "lora_down.weight": down,
        "lora_mid.weight": mid,
        "lora_up.weight": up,
        "alpha": torch.tensor(2.0),
    }
    found = read(saved(tmp_path, {f"{CONV}.{part}": tensor for part, tensor in parts.items()}))
    want = torch.einsum("or, rskl, si -> oikl", up.flatten(1), mid, down.flatten(1)) / 2
    torch.testing.assert_close(
        changes(found["unet"])["mid_block.resnets.0.conv1"], want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("left", "right"),
    [((8, 8), (8, 8)), ((4, 4), (16, 16)), ((2, 2), (32, 32)), ((4, 4), ((16, 2), (2, 16))),
     (((8, 2), (2, 8)), (8, 8)), (((8, 2), (2, 8)), ((8, 2), (2, 8)))],
    ids=str,
)  # fmt: skip
def test_a_lokr_of_any_factor_is_read(tmp_path: Path, left: Any, right: Any) -> None:
    """Whole factors have no scale, as in LyCORIS, whatever their alpha is."""
    torch.manual_seed(0)
    tensors, factors, rank = {"alpha": torch.tensor(3.0)}, [], None
    for name, shape in (("w1", left), ("w2", right)):
        if isinstance(shape[0], int):
            tensors[f"lokr_{name}"] = torch.randn(shape)
            factors.append(tensors[f"lokr_{name}"])
        else:
            tensors |= {f"lokr_{name}_a": torch.randn(shape[0]), f"lokr_{name}_b": torch.randn(shape[1])}
            factors.append(tensors[f"lokr_{name}_a"] @ tensors[f"lokr_{name}_b"])
            rank = shape[0][1]
    found = read(saved(tmp_path, {f"{Q}.{part}": tensor for part, tensor in tensors.items()}))
    (got,) = changes(found["unet"]).values()
    torch.testing.assert_close(got, torch.kron(*factors) * (3 / rank if rank else 1), rtol=1e-5, atol=1e-5)


def test_a_file_resized_by_another_tool_keeps_its_strength(tmp_path: Path) -> None:
    """From rank 4 to 2, with a new alpha and the old header."""
    path = formats.write("kohya", tmp_path, base().family, {"unet": state(alpha=8)})
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    for name in tensors:
        if "lora_down" in name or "lora_up" in name:
            tensors[name] = tensors[name][:2] if "down" in name else tensors[name][:, :2]
        else:
            tensors[name] = torch.tensor(4.0)
    small = read(saved(tmp_path, tensors, header))["unet"]
    assert {common.strength(small.config, name) for name in common.by_module(small)} == {(2, 2.0)}
    again = read(formats.write("kohya", tmp_path / "again", base().family, {"unet": small}))
    assert changes(again["unet"]).keys() == changes(small).keys()
    for name, tensor in changes(small).items():
        assert torch.equal(changes(again["unet"])[name], tensor)


def parts(layer: str = Q, **tensors: Tensor) -> dict[str, Tensor]:
    return {f"{layer}.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}


LORA = {"lora_down__weight": torch.ones(4, 64), "lora_up__weight": torch.ones(64, 4)}
HADA = {f"hada_w{half}_{side}": torch.ones(64, 4).T if side == "b" else torch.ones(64, 4)
        for half in "12" for side in "ab"}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"bundle_emb.dog.clip_l": torch.ones(1)}, "an embedding"),
        ({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 8)}, "an embedding"),
        ({"control_model.input_hint_block.0.weight": torch.ones(4)}, "a ControlNet"),
        (parts(diff=torch.ones(64, 64)), "changes of whole weights"),
        (parts("lora_unet_conv_norm_out", w_norm=torch.ones(32)), "a trained normalization layer"),
        (parts(oft_blocks=torch.ones(2, 4, 4)), "an OFT adapter"),
        (parts(a1__weight=torch.ones(4, 64)), "a GLoRA adapter"),
        (parts(weight=torch.ones(64), on_input=torch.ones(1)), "no format for adapters|an IA3 adapter"),
        ({"transformer.x.lora_A.weight": torch.ones(4, 4)}, r"a transformer model's adapter \(SD 3, FLUX\)"),
        (parts("lora_unet_double_blocks_0_img_attn_proj", **LORA), "a transformer model's adapter"),
        ({"model.diffusion_model.out.2.weight": torch.ones(4)}, "a whole model"),
        (parts(**HADA, dora_scale=torch.ones(64, 1)), "DoRA on a LOHA layer, which PEFT does not have"),
        (parts(**LORA, dora_scale=torch.ones(1, 64)), "over the layer's input; PEFT's DoRA is"),
        (parts(**LORA) | parts(CONV, **HADA), "must be of one kind, but are LOHA, LORA"),
        (parts(lora_down__weight=torch.ones(4, 32), lora_up__weight=torch.ones(64, 4)), "the base has "),
        (parts(lora_down__weight=torch.ones(4, 64)), "is missing"),
        (parts(lora_up__weight=torch.ones(64, 4)), "has only lora_B.weight"),
        (parts(lokr_w1=torch.ones(8, 8), lokr_w2=torch.ones(4, 8)), "split by no one factor|the base has"),
        (parts(alpha=torch.ones(())), "of one kind, but are of none"),
        ({}, "it has no tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path: Path, tensors: dict[str, Tensor], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read(saved(tmp_path, tensors))


@pytest.mark.parametrize(
    "config",
    [{"r": 10**12}, {"r": 0}, {"r": -1}, {"r": "x"}, {"lora_alpha": None}, {"lora_alpha": 1e400},
     {"peft_type": []}, {"rank_pattern": {"(": 3}}, {"rank_pattern": {".*": 10**15}}, {"alpha_pattern": []},
     {"alpha_pattern": {r"(\w+\w+)+!": 2}}, {"rank_pattern": {f"layer{n}": 4 for n in range(1001)}},
     {"peft_type": "LOKR"}, {"rank_pattern": 7}],
    ids=lambda config: str(config)[:40],
)  # fmt: skip
@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_settings_that_do_not_fit_the_tensors_are_refused(tmp_path: Path, form: str, config: dict) -> None:
    path = formats.write(form, tmp_path, base().family, {"unet": state()})
    if form == "peft":
        file = path / "unet" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    else:
        with safe_open(path, "pt") as opened:
            header = json.loads(opened.metadata()["lora_adapter_metadata"])
        header |= {f"unet.{key}": value for key, value in config.items()}
        path = saved(tmp_path, load_file(path), {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(ConfigError, match=r"^adapter "):
        read(path)


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_writing_touches_no_other_folder(tmp_path: Path, form: str) -> None:
    for name in (".out.tmp", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").touch()
    (out := tmp_path / "out").mkdir()
    stamp, there = tmp_path.stat().st_mtime_ns, set(tmp_path.rglob("*"))
    formats.write(form, out, base().family, {"unet": state()})
    assert tmp_path.stat().st_mtime_ns == stamp, "nothing was made beside the folder, even for a moment"
    new = {path.name for path in set(tmp_path.rglob("*")) - there if path.is_file()}
    wanted = {"diffusers": {FILE}, "peft": {WEIGHTS, CONFIG}, "kohya": {"kohya.safetensors"}}
    assert new == wanted[form]


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_a_rank_that_no_layer_has_is_not_limited(tmp_path: Path, form: str) -> None:
    truth = state(rank=16, ranks={".*": 2})
    found = read(formats.write(form, tmp_path, base().family, {"unet": truth}))["unet"]
    assert found.tensors.keys() == truth.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in truth.tensors.items())
    assert AdapterFile.read(tmp_path).layers


@pytest.mark.parametrize("first", ["loha", "lokr"])
@pytest.mark.parametrize("second", ["lora", "loha", *map(slow, ("dora", "lokr"))])
def test_kinds_mix_in_any_order_on_convolutions(tmp_path: Path, first: str, second: str) -> None:
    pipe, paths = AdapterPipeline(base(), "fp32"), {}
    for name, kind in (("one", first), ("two", second)):
        settings = {"dora": True} if kind == "dora" else {"kind": kind}
        paths[name] = formats.write("peft", tmp_path / name, base().family, {"unet": state(**settings)})
        pipe.add(name, paths[name])
    assert pipe.names() == {"one", "two"}
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([400]), torch.randn(1, 32, 64)
    alone = AdapterPipeline(base(), "fp32")
    for name, path in paths.items():
        alone.add(name, path)
        alone.use({name: 0.1})
        pipe.use({name: 0.1})
        with torch.no_grad():
            torch.testing.assert_close(pipe.pipe.unet(x, t, c).sample, alone.pipe.unet(x, t, c).sample)
        alone.remove(name)


def test_an_adapter_that_cannot_be_added_leaves_its_name_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = formats.write("peft", tmp_path, base().family, {"unet": state()})
    pipe = AdapterPipeline(base(), "fp32")
    with monkeypatch.context() as patched:
        patched.setattr(inject, "parameters", lambda *_: {"strange": nn.Parameter(torch.ones(1))})
        patched.setattr(inject, "check_fit", lambda *_: None)
        with pytest.raises(ConfigError, match="does not fit base model"):
            pipe.add("dog", path)
    assert not pipe.names()
    pipe.add("dog", path)


@pytest.mark.parametrize("name", ["conv1", "to_q", "default", "weight"])
def test_an_adapter_may_be_called_like_a_module(tmp_path: Path, name: str) -> None:
    found = state(dora=True)
    pipe = AdapterPipeline(base(), "fp32")
    pipe.add(name, formats.write("peft", tmp_path, base().family, {"unet": found}))
    filled = inject.parameters(pipe.components["unet"], name)
    assert filled.keys() == found.tensors.keys()
    assert all(torch.equal(filled[key], tensor) for key, tensor in found.tensors.items())


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_peft_folder_by_other_versions_is_read(tmp_path: Path, component: str) -> None:
    """With the adapter's name in it, and with CLIP's layers below `text_model.` or not."""
    found = state(component)
    renamed = {}
    for name, tensor in found.tensors.items():
        name = name.removeprefix("text_model.") if name.startswith("text_model.") else nested(name)
        renamed[name.replace(".weight", ".default.weight")] = tensor
    path = formats.write("peft", tmp_path, base().family, {component: AdapterState(renamed, found.config)})
    again = read(path / component)[component]
    assert again.tensors.keys() == found.tensors.keys()


def test_a_swap_to_other_alphas_is_no_copy_in_place(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two")]
    for path, alpha in zip(paths, (1.0, 2.0), strict=True):
        path.mkdir()
        saved(path, locon(attention=4.0, conv=alpha))
    pipe = AdapterPipeline(base(), "fp32")
    pipe.add("it", paths[0] / "it.safetensors")
    pipe.swap("it", paths[1] / "it.safetensors")
    assert {layer.r["it"]: layer.scaling["it"] for layer in pipe._layers()} == {4: 1.0, 2: 1.0}
