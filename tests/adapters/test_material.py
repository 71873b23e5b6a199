"""Adapter files as material: every kind's change is PEFT's, and what is written is read back by clients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dbtrain.adapters import inject
from dbtrain.adapters.formats import diff_file
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.material import bake, compare, extract, info, merge
from dbtrain.adapters.material.adapter_file import DENOISER, AdapterFile, Place
from dbtrain.adapters.material.delta import Delta
from dbtrain.adapters.material.fit import Limit
from dbtrain.adapters.material.output import write
from dbtrain.adapters.state import AdapterState
from dbtrain.config import AdapterSettings, Model
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from tests import bases
from tests.conftest import dbtrain, slow, thinned
from tests.session import once

LAYERS = r"mid_block\..*(to_q|to_k|to_out\.0|proj_in|ff\.net\.2|conv1)"
FUSED = r".*transformer_blocks\.0\..*(to_[qkv]|to_qkv_mlp_proj|linear_in)"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {}, "ranks": {"ranks": {".*to_q": 2}}, "rslora": {"rslora": True},
    "loha": {"kind": "loha"}, "loha-cp": {"kind": "loha", "effective_conv2d": True},
    "lokr": {"kind": "lokr"}, "lokr-cp": {"kind": "lokr", "effective_conv2d": True, "rank": 2},
    "lokr-both": {"kind": "lokr", "decompose_both": True, "rank": 2}, "dora": {"dora": True},
    "lokr-whole": {"kind": "lokr", "rank": 64},
}  # fmt: skip
ENERGY = 0.8
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
MODULE = LAYER.replace(".", "_")
FORMS = {"sd": ("diffusers", "kohya", "peft"), "sdxl": ("kohya",), "flux2-klein": ("comfyui", "peft")}


@cache
def base(family: str = "sd") -> Base:
    folder = bases.ALL[family]()
    return Base.find(Model(path=str(once("sd-fp32", precise) if family == "sd" else folder)))


def precise(folder: Path) -> None:
    DiffusionPipeline.from_pretrained(bases.sd(), dtype=torch.float32).save_pretrained(folder)


def adapter(seed: int, family: str = "sd", text: bool = True, **settings: Any) -> dict[str, AdapterState]:
    """An adapter of random weights, on the text encoder too."""
    found, its = {}, base(family)
    names = its.family.adaptable[: 1 + (text and family == "sd")]
    for name in names:
        module, first = its.load(name), name == its.family.denoiser
        targets = (LAYERS if "unet" in names else FUSED) if first else ["q_proj", "fc1"]
        own = {"rank": 4, "alpha": 6, **settings, "targets": targets}
        own["ranks"] = own.get("ranks", {}) if first else {}
        part = "denoiser" if first else "text_encoder"
        inject.attach(module, AdapterSettings(**own), part, 0)
        random = torch.Generator().manual_seed(seed)
        for parameter in inject.trainable(module).values():
            nn.init.normal_(parameter, std=0.1, generator=random)
        found[name] = inject.collect(module)
    return found


def written(folder: Path, form: str, states: Mapping[str, AdapterState], family: str = "sd") -> Path:
    its = base(family)
    path = formats.write(form, folder, its.family, states, its.module_names, its.family.header(its))
    return folder if form == "peft" else path


def truth(states: Mapping[str, AdapterState], family: str = "sd") -> dict[Place, Tensor]:
    """What PEFT adds to each layer when it merges."""
    return {
        (name, module): parts["diff"]
        for name, state in states.items()
        for module, parts in diff_file.changes(base(family).load(name), state).items()
    }


def changes(path: Path, family: str = "sd") -> dict[Place, Tensor]:
    """What the adapter in a file adds to each layer, as PEFT says."""
    its = base(family)
    return truth(formats.read(path, its.family, its.skeleton), family)


def assert_same(
    found: Mapping[Place, Tensor], wanted: Mapping[Place, Tensor], tolerance: float = 1e-6
) -> None:
    assert found.keys() == wanted.keys()
    for place, tensor in wanted.items():
        assert (found[place] - tensor).norm() <= tolerance * tensor.norm(), place


def out(folder: Path, form: str) -> Path:
    return folder / ("out" if form == "peft" else "out.safetensors")


@pytest.mark.parametrize("kind", thinned(KINDS, 3))
def test_every_kind_is_the_change_that_peft_merges(tmp_path: Path, kind: str) -> None:
    states = adapter(1, **KINDS[kind])
    path = written(tmp_path, "peft", states)
    found = {place: rule() for place, rule in AdapterFile.read(path, base()).layers.items()}
    assert_same({place: delta.whole.float() for place, delta in found.items()}, truth(states), 1e-5)
    if kind == "dora":
        with pytest.raises(ConfigError, match=r"is a DoRA, whose change depends .* add --base"):
            assert AdapterFile.read(path).layers
        return
    for (component, module), rule in AdapterFile.read(path).layers.items():
        name = base().family.denoiser if component == DENOISER else component
        assert torch.equal(rule().up, found.pop((name, module)).up)
    assert not found


@pytest.mark.parametrize("known", [False, True], ids=["alone", "with the base"])
@pytest.mark.parametrize(
    ("family", "form"), thinned([(f, form) for f, forms in FORMS.items() for form in forms], 4)
)
def test_resizing_to_the_full_rank_changes_nothing(
    tmp_path: Path, family: str, form: str, known: bool
) -> None:
    states = adapter(1, family)
    path = written(tmp_path / "in", form, states, family)
    source = AdapterFile.read(path, base(family) if known else None)
    assert source.form == form
    result, fits = merge.merged([(source, 1.0)], Limit(energy=1.0))
    assert all(fit.relative < 1e-7 for fit in fits.values())
    write(out(tmp_path, form), result, source)
    assert_same(changes(out(tmp_path, form), family), truth(states, family))


@pytest.mark.parametrize("form", FORMS["sd"])
def test_each_layer_keeps_its_share_of_the_energy(tmp_path: Path, form: str) -> None:
    states = adapter(1, ranks={".*to_q": 2})
    source = AdapterFile.read(written(tmp_path / "in", form, states), base())
    result, fits = merge.merged([(source, 1.0)], Limit(energy=ENERGY))
    assert len({fit.rank for fit in fits.values()}) > 1
    write(out(tmp_path, form), result, source)
    found = changes(out(tmp_path, form))
    for place, change in truth(states).items():
        squares, rank = torch.linalg.svdvals(change.double().flatten(1)).square(), fits[place].rank
        assert squares[:rank].sum() >= ENERGY * squares.sum() > squares[: rank - 1].sum()
        error = (squares[rank:].sum() / squares.sum()).sqrt().item()
        assert fits[place].relative == pytest.approx(error, abs=1e-6)
        assert (found[place] - change).norm() / change.norm() == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_the_real_clients_load_what_has_a_rank_for_each_layer(tmp_path: Path, form: str) -> None:
    text = form != "kohya"  # of kohya's files, Diffusers does not load the text encoder's layers
    path = written(tmp_path / "in", form, adapter(1, text=text, ranks={".*to_q": 2}))
    size, place = Limit(energy=ENERGY), out(tmp_path, form)
    source = AdapterFile.read(path)
    write(place, merge.merged([(source, 1.0)], size)[0], source)
    pipe = DiffusionPipeline.from_pretrained(base().folder)
    if form == "peft":
        for name in ("unet", "text_encoder"):
            PeftModel.from_pretrained(getattr(pipe, name), place / name, adapter_name="it")
    else:
        pipe.load_lora_weights(place, adapter_name="it")
    wanted, fits = merge.merged([(AdapterFile.read(path, base()), 1.0)], size)
    assert len({fit.rank for fit in fits.values()}) > 1
    for (component, name), delta in wanted.items():
        change = getattr(pipe, component).get_submodule(name).get_delta_weight("it").detach()
        torch.testing.assert_close(change, delta.whole.float(), atol=1e-6, rtol=1e-4)


def test_a_sum_has_the_ranks_of_its_parts_and_is_exact(tmp_path: Path) -> None:
    one, two = adapter(1, text=False), adapter(2, rank=3)
    paths = written(tmp_path / "a", "kohya", one), written(tmp_path / "b", "diffusers", two)
    parts = [(AdapterFile.read(paths[0], base()), 0.5), (AdapterFile.read(paths[1], base()), -2.0)]
    result, fits = merge.merged(parts, Limit())
    assert {fit.rank for (name, _), fit in fits.items() if name == "unet"} == {7}
    write(tmp_path / "c.safetensors", result, parts[0][0], "diffusers")
    a, b = truth(one), truth(two)
    assert_same(
        changes(tmp_path / "c.safetensors"), {place: 0.5 * a.get(place, 0) - 2 * b[place] for place in b}
    )


@pytest.mark.parametrize("kind", ["loha", slow("loha-cp"), "lokr", slow("lokr-cp"), "dora"])
def test_kinds_are_added_to_a_lora(tmp_path: Path, kind: str) -> None:
    one, two = adapter(1), adapter(2, **KINDS[kind])
    paths = written(tmp_path / "a", "diffusers", one), written(tmp_path / "b", "peft", two)
    parts = [(AdapterFile.read(path, base()), 1.0) for path in paths]
    result, _ = merge.merged(parts, Limit())
    write(tmp_path / "c.safetensors", result, parts[0][0], "kohya")
    a, b = truth(one), truth(two)
    assert_same(changes(tmp_path / "c.safetensors"), {place: a[place] + b[place] for place in b}, 1e-5)


def test_files_with_other_names_need_the_base(tmp_path: Path) -> None:
    kohya = written(tmp_path / "a", "kohya", adapter(1, "sdxl"), "sdxl")
    diffusers = written(tmp_path / "b", "diffusers", adapter(1, "sdxl"), "sdxl")
    with pytest.raises(ConfigError, match="or not by this name; add --base"):
        merge.merged([(AdapterFile.read(kohya), 1.0), (AdapterFile.read(diffusers), 1.0)], Limit())
    parts, alone = compare.difference(*(AdapterFile.read(path, base("sdxl")) for path in (kohya, diffusers)))
    assert parts["unet"].relative < 1e-6 and not alone["first"] and not alone["second"]
    with pytest.raises(ConfigError, match="is of the format kohya; to write peft, add --base"):
        write(
            tmp_path / "out", {("denoiser", "x"): Delta.of(torch.ones(2, 2))}, AdapterFile.read(kohya), "peft"
        )


@pytest.mark.parametrize("form", FORMS["sd"])
def test_a_sum_has_the_parts_of_all(tmp_path: Path, form: str) -> None:
    one, two = adapter(1, text=False), adapter(2)
    sources = [
        AdapterFile.read(written(tmp_path / name, form, states)) for name, states in (("a", one), ("b", two))
    ]
    result, _ = merge.merged([(source, 1.0) for source in sources], Limit())
    write(out(tmp_path, form), result, merge.together(sources))
    a, b = truth(one), truth(two)
    assert_same(changes(out(tmp_path, form)), {place: a.get(place, 0) + b[place] for place in b}, 1e-5)


def test_a_part_with_other_names_is_not_added(tmp_path: Path) -> None:
    """The text encoder's layers are called alike, but those of the UNet have names of two programs."""
    text = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    sources = []
    for module in ("input_blocks_4_1_proj_in", "down_blocks_1_attentions_0_proj_in"):
        tensors = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
        names = (f"lora_unet_{module}", text)
        save_file({f"{n}.{k}": t.clone() for n in names for k, t in tensors.items()}, path := tmp_path / "it")
        sources.append(AdapterFile.read(path.rename(tmp_path / f"{module}.safetensors")))
    with pytest.raises(ConfigError, match=r"has the layer down_blocks_1_attentions_0_proj_in, .* --base"):
        merge.merged([(source, 1.0) for source in sources], Limit())


def test_components_without_a_folder_are_not_guessed(tmp_path: Path) -> None:
    one = AdapterFile.read(written(tmp_path / "a", "peft", adapter(1, text=False)) / "unet")
    two = AdapterFile.read(written(tmp_path / "b", "peft", adapter(2)))
    result, _ = merge.merged([(one, 1.0), (two, 1.0)], Limit())
    with pytest.raises(ConfigError, match="does not say which component it is for; add --base"):
        write(tmp_path / "out", result, merge.together([one, two]))


def test_a_difference_is_a_distance_and_an_angle(tmp_path: Path) -> None:
    one, two = adapter(1), adapter(2, text=False, rank=2)
    first = AdapterFile.read(written(tmp_path / "a", "kohya", one))
    second = AdapterFile.read(written(tmp_path / "b", "diffusers", two))
    parts, alone = compare.difference(first, second)
    a, b = truth(one), truth(two)
    flat = [torch.cat([x[p].double().flatten() for p in b if p[0] == "unet"]) for x in (a, b)]
    unet = parts["denoiser"]
    assert unet.relative == pytest.approx(((flat[0] - flat[1]).norm() / flat[0].norm()).item(), rel=1e-4)
    assert unet.cosine == pytest.approx(torch.cosine_similarity(flat[0], flat[1], dim=0).item(), rel=1e-3)
    assert parts["text_encoder"].relative == 1.0
    assert {name for name, _ in alone["first"]} == {"text_encoder"} and not alone["second"]
    same, _ = compare.difference(first, first)
    assert all(part.relative < 1e-7 and part.cosine == pytest.approx(1) for part in same.values())


def images(pipe: Any) -> Tensor:
    """What a pipeline generates, (1, H, W, 3)."""
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}
    made = pipe("a dog", generator=torch.Generator().manual_seed(0), **options).images
    return torch.from_numpy(made)


def test_a_baked_base_is_the_pipeline_with_its_adapters(tmp_path: Path) -> None:
    states = [adapter(1), adapter(2, rank=2)]
    paths = [written(tmp_path / name, "diffusers", one) for name, one in zip("ab", states, strict=True)]
    bake.bake(
        tmp_path / "baked",
        base(),
        [(AdapterFile.read(p, base()), w) for p, w in zip(paths, (0.8, 0.5), strict=True)],
    )
    pipe = DiffusionPipeline.from_pretrained(base().folder, safety_checker=None)
    bare = images(pipe)
    for name, path in zip("ab", paths, strict=True):
        pipe.load_lora_weights(path, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.8, 0.5])
    adapted = images(pipe)
    assert (adapted - bare).abs().max() > 1e-3
    baked = images(DiffusionPipeline.from_pretrained(tmp_path / "baked", safety_checker=None))
    torch.testing.assert_close(baked, adapted, atol=1e-5, rtol=0)


def test_baking_keeps_dtypes_and_every_other_byte(tmp_path: Path) -> None:
    half = tmp_path / "half"
    DiffusionPipeline.from_pretrained(base().folder, dtype=torch.bfloat16).save_pretrained(half)
    (half / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch(), (half / "unet" / "a.bin").touch()
    its = Base.find(Model(path=str(half)))
    states = adapter(1, text=False)
    source = AdapterFile.read(written(tmp_path / "a", "peft", states), its)
    bake.bake(tmp_path / "baked", its, [(source, 1.0)])
    was, now = (
        load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (half, tmp_path / "baked")
    )
    wanted = {f"{module}.weight": change for (_, module), change in truth(states).items()}
    assert was.keys() == now.keys()
    for name, tensor in was.items():
        expected = (tensor.double() + wanted[name].double()).bfloat16() if name in wanted else tensor
        torch.testing.assert_close(now[name], expected, atol=1e-8, rtol=2**-7)
    for path in half.rglob("*"):
        if path.is_file() and (path.parent.name != "unet" or path.suffix == ".json"):
            assert (tmp_path / "baked" / path.relative_to(half)).read_bytes() == path.read_bytes()


def test_baking_replaces_only_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(base().folder, tmp_path / "all" / "base")
    its = Base.find(Model(path=str(folder)))
    path = written(tmp_path / "a", "kohya", adapter(1, text=False))
    parts = [(AdapterFile.read(path, its), 1.0)]
    (photo := tmp_path / "mine" / "photo.jpg").parent.mkdir()
    photo.touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for place, said in {
        ".": "which holds", "/": "which holds", "all": "which holds", "all/base": "which holds",
        "a": "which holds", "all/base/unet/out": "a folder in the base", "mine": "which bake did not write",
        "mine/photo.jpg": "which bake did not write",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"OUT is '{place}', {said}"):
            bake.bake(Path(place), its, parts)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "baked").mkdir()
    for _ in range(2):
        bake.bake(Path("baked"), its, parts)
    assert Base.find(Model(path="baked")).index == its.index


def test_what_was_baked_in_is_extracted(tmp_path: Path) -> None:
    states = adapter(1)
    source = AdapterFile.read(written(tmp_path / "a", "kohya", states), base())
    bake.bake(tmp_path / "tuned", base(), [(source, 1.0)])
    tuned = Base.find(Model(path=str(tmp_path / "tuned")))
    result, fits, others = extract.extracted(tuned, base(), Limit(rank=4))
    assert not others and all(fit.relative < 1e-5 for fit in fits.values())
    write(tmp_path / "out.safetensors", result, base())
    assert_same(changes(tmp_path / "out.safetensors"), truth(states), 1e-5)


@pytest.mark.parametrize("older", ["tuned", "base"])
def test_clips_of_any_version_of_transformers_are_compared(tmp_path: Path, older: str) -> None:
    """Older files have another level in the names, and a tensor more."""
    states = adapter(1)
    source = AdapterFile.read(written(tmp_path / "a", "kohya", states), base())
    bake.bake(tmp_path / "tuned", base(), [(source, 1.0)])
    shutil.copytree(base().folder, tmp_path / "base")
    file = tmp_path / older / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(file).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    tuned, its = (Base.find(Model(path=str(tmp_path / name))) for name in ("tuned", "base"))
    result, _, others = extract.extracted(tuned, its, Limit(rank=4))
    assert not others and result.keys() == truth(states).keys()


def test_a_large_layer_is_extracted_by_a_randomized_svd() -> None:
    random = torch.Generator().manual_seed(0)
    change = torch.randn(1100, 8, generator=random) @ torch.randn(8, 1200, generator=random)
    delta, fit = extract.fitted(change, Limit(rank=8), "layer")
    assert delta.rank == 8 and fit.relative < 1e-5
    assert (delta.whole - change).norm() < 1e-5 * change.norm()


def test_what_no_lora_holds_is_named(tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(base().folder)
    with torch.no_grad():
        pipe.unet.conv_norm_out.weight.add_(1.0)
        pipe.unet.conv_in.weight.add_(torch.randn(pipe.unet.conv_in.weight.shape))
    pipe.save_pretrained(tmp_path / "tuned")
    tuned = Base.find(Model(path=str(tmp_path / "tuned")))
    result, _, others = extract.extracted(tuned, base(), Limit(energy=1.0))
    assert set(result) == {("unet", "conv_in")} and others == ["unet.conv_norm_out.weight"]
    with pytest.raises(ConfigError, match=r"no layer of .* differs"):
        extract.extracted(base(), base(), Limit(rank=1))


@pytest.mark.parametrize("form", FORMS["sd"])
def test_info_says_what_a_file_holds(tmp_path: Path, form: str) -> None:
    states = adapter(1, ranks={".*to_q": 2})
    found = info.info(AdapterFile.read(written(tmp_path, form, states)))
    unet = found["parts"]["denoiser"]
    total = sum(change.norm() ** 2 for (name, _), change in truth(states).items() if name == "unet") ** 0.5
    assert (unet["kind"], unet["rank"], unet["alpha"]) == ("LoRA", 4, 6)
    assert set(unet["ranks"].values()) == {2}
    assert unet["layers"] == len(states["unet"].tensors) // 2
    assert unet["parameters"] == sum(tensor.numel() for tensor in states["unet"].tensors.values())
    assert unet["norm"] == pytest.approx(total.item(), rel=1e-4)
    assert (found["format"], found["dtypes"]) == (form, ["F32"])
    if form == "kohya":
        assert found["base"] == "stable-diffusion-v1/lora"
    assert json.loads(info.as_json(found)) == found


@pytest.mark.parametrize("known", [False, True], ids=["alone", "with the base"])
@pytest.mark.parametrize("form", FORMS["sd"])
@pytest.mark.parametrize(("value", "said"), [(torch.nan, "NaN"), (torch.inf, "infinite values")])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, form: str, known: bool, value: float, said: str
) -> None:
    states = adapter(1, text=False)
    name = f"{LAYER}.lora_A.weight"
    states["unet"].tensors[name][0, 0] = value
    path = written(tmp_path, form, states)
    with pytest.raises(
        ConfigError, match=f"its tensor {name if known else '.*to_q.lora_A.weight'} has {said}"
    ):
        AdapterFile.read(path, base() if known else None)


def test_no_result_overflows(tmp_path: Path) -> None:
    states = adapter(1, text=False)
    for name, tensor in states["unet"].tensors.items():
        tensor.fill_(1e5 if "lora_B" in name else 1e-3)
    source = AdapterFile.read(written(tmp_path, "kohya", states), base())
    with pytest.raises(ConfigError, match=r"lora_B\.weight is too large for fp16; use --dtype bf16 or fp32"):
        write(
            tmp_path / "out.safetensors",
            {p: rule() for p, rule in source.layers.items()},
            source,
            None,
            "fp16",
        )
    assert not (tmp_path / "out.safetensors").exists()
    half = Base.find(Model(path=str(bases.sd())))
    with pytest.raises(ConfigError, match="would not be finite in F16; use smaller weights"):
        bake.bake(tmp_path / "baked", half, [(source, 1000.0)])
    assert not (tmp_path / "baked").exists()


def test_models_that_are_not_finite_are_not_compared(tmp_path: Path) -> None:
    shutil.copytree(base().folder, tmp_path / "tuned")
    file = tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"].fill_(torch.nan)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"unet\.conv_in\.weight of .*tuned or .* is not finite"):
        extract.extracted(Base.find(Model(path=str(tmp_path / "tuned"))), base(), Limit(rank=4))


def test_the_base_is_known_by_its_layers_too(tmp_path: Path) -> None:
    layers = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (2048, "SDXL, by its layers"),
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k": (
            768,
            "Stable Diffusion 1, by its layers",
        ),
        "diffusion_model.double_blocks.0.img_attn.qkv": (64, "FLUX or Chroma, by its layers"),
        "transformer.layers.0.attention.to_q": (64, None),
    }
    for module, (inputs, said) in layers.items():
        tensors = {"lora_down.weight": torch.ones(2, inputs), "lora_up.weight": torch.ones(8, 2)}
        save_file({f"{module}.{part}": t for part, t in tensors.items()}, tmp_path / "it.safetensors")
        assert info.info(AdapterFile.read(tmp_path / "it.safetensors"))["base"] == said


@pytest.mark.parametrize("start", ["", "lycoris_", "transformer.", "lora_transformer_", "diffusion_model."])
def test_names_of_transformers_are_read_alone(tmp_path: Path, start: str) -> None:
    """Some of their layers' names begin as a prefix does."""
    tensors = {}
    for module in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q", "proj_out"):
        named = start + (module.replace(".", "_") if start.endswith("_") else module)
        tensors |= {f"{named}.lora_A.weight": torch.ones(2, 4), f"{named}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, path := tmp_path / "in.safetensors")
    source = AdapterFile.read(path)
    assert source.prefixes == {DENOISER: start}
    assert info.info(source)["base"] == "FLUX or Chroma, by its layers"
    write(tmp_path / "out.safetensors", merge.merged([(source, 1.0)], Limit())[0], source)
    again = AdapterFile.read(tmp_path / "out.safetensors")
    assert again.layers.keys() == source.layers.keys() and again.prefixes == source.prefixes


def test_the_commands(tmp_path: Path) -> None:
    one, two = written(tmp_path / "a", "kohya", adapter(1)), written(tmp_path / "b", "diffusers", adapter(2))
    model = base().folder
    said = dbtrain("adapter", "info", one).stdout
    assert "LoRA of rank 4, alpha 6" in said and "modelspec.architecture: stable-diffusion-v1/lora" in said
    both = tmp_path / "both.safetensors"
    assert not dbtrain("adapter", "merge", both, f"{one}:0.5", two, "--dtype", "fp16").returncode
    with safe_open(both, "pt") as file:
        assert file.get_tensor(f"lora_unet_{MODULE}.lora_up.weight").dtype == torch.float16
    small = tmp_path / "small.safetensors"
    done = dbtrain("adapter", "resize", small, both, "--rank", 2, "--json")
    assert all(row["rank"] == 2 and 0 < row["error"] < 1 for row in json.loads(done.stdout)["layers"])
    assert "relative distance" in dbtrain("adapter", "diff", both, small).stdout
    assert not dbtrain("adapter", "bake", tmp_path / "baked", model, one).returncode
    back = tmp_path / "back.safetensors"
    done = dbtrain("adapter", "extract", back, tmp_path / "baked", model, "--rank", 4, "--format", "kohya")
    assert "relative error" in done.stdout
    same = json.loads(dbtrain("adapter", "diff", one, back, "--json").stdout)
    assert all(part["relative"] < 1e-4 for part in same["parts"].values())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("resize OUT FILE", "resize needs a size; add --rank"),
        ("resize OUT FILE --energy 2", "--energy is 2, not a share"),
        ("resize OUT FILE --rank 2 --format lora", "--format is 'lora'; use one of diffusers"),
        ("resize folder FILE --rank 2", "the format kohya is a .safetensors file"),
        ("merge OUT FILE:many", "is not PATH or PATH:WEIGHT"),
        ("info nothing", "is neither a file nor a run folder"),
        ("info TEXT", "matches no format for adapters"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, line: str, said: str) -> None:
    path = written(tmp_path / "in", "kohya", adapter(1, text=False))
    save_file({"what": torch.ones(1)}, tmp_path / "text.safetensors")
    places = {"OUT": tmp_path / "out.safetensors", "FILE": path, "TEXT": tmp_path / "text.safetensors"}
    for name, place in places.items():
        line = line.replace(name, str(place))
    done = dbtrain("adapter", *line.replace(" folder ", f" {tmp_path / 'folder'} ").split())
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
