"""Adapters: what presets select, what every option does, and files that are refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dbtrain.adapters import inject as adapters
from dbtrain.adapters import targets
from dbtrain.adapters.formats import peft_folder
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.common import check_patterns, strength
from dbtrain.adapters.formats.diffusers_file import FILE
from dbtrain.config import Adapter, AdapterSettings, Config, Model, Optim
from dbtrain.config.adapter import PRESETS
from dbtrain.models.base import Base
from dbtrain.models.families import registry as families
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from dbtrain.sample.pipeline import AdapterPipeline
from dbtrain.train import optim
from tests import bases
from tests.conftest import Make, train

GOLDEN = Path(__file__).with_name("golden_targets.json")


def matched() -> dict[str, dict[str, list[str]]]:
    """family component preset -> names of the modules that get an adapter."""
    found: dict[str, dict[str, list[str]]] = {}
    for family_name, make in {**bases.OF_FAMILY, "sd": partial(bases.sd, size="whole")}.items():
        base, family = Base.find(Model(path=str(make()))), families.get(family_name)
        for component in family.adaptable:
            part = "denoiser" if component == family.denoiser else "text_encoder"
            presets = family.presets if part == "denoiser" else PRESETS[part]
            for preset in presets:
                module = base.load(component)
                without = family.idle(component, module)
                adapters.attach(module, AdapterSettings(targets=preset), part, 0, without, presets)
                names = [n for n, m in module.named_modules() if isinstance(m, adapters.LoraLayer)]
                found.setdefault(f"{family_name} {component}", {})[preset] = sorted(names)
    return found


@pytest.mark.slow
def test_presets_select_the_modules_of_the_golden_file() -> None:
    """`python -m tests.adapters.test_inject` writes it anew: then read the difference."""
    assert matched() == json.loads(GOLDEN.read_text())


def test_a_list_a_name_and_a_regular_expression_select_too() -> None:
    unet = Base.find(Model(path=str(bases.sd()))).load("unet")
    modules = targets.Modules.of(unet)
    assert targets.select(modules, ("to_q", "conv1"), "denoiser") == ["to_q", "conv1"]
    assert targets.select(modules, "to_out.0", "denoiser") == ["to_out.0"]
    middle = targets.select(modules, r"mid_block\..*attn1\.to_[qk]", "denoiser")
    assert [name.rsplit(".", 1)[1] for name in middle] == ["to_k", "to_q"]
    assert all(name.startswith("mid_block.") for name in middle)


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_every_kind_starts_as_nothing_and_learns_from_the_first_step(kind: str) -> None:
    base = Base.find(Model(path=str(bases.sd())))
    unet = base.load("unet")
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), torch.randn(2, 32, 64)
    before = unet(x, t, c).sample
    settings = AdapterSettings(kind=kind, rank=4, targets="all", effective_conv2d=kind != "lora")
    adapters.attach(unet, settings, "denoiser", 0)
    assert torch.allclose(unet(x, t, c).sample, before, atol=1e-6)
    parameters = adapters.trainable(unet)
    optimizer = optim.build({f"unet.{n}": p for n, p in parameters.items()}, Optim(lr=1e-3))
    changes = []
    for _ in range(2):
        optimizer.zero_grad()
        unet(x, t, c).sample.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
        optimizer.step()
        changes.append((unet(x, t, c).sample - before).abs().mean().item())
    assert changes[0] > 1e-4 * before.abs().mean().item(), "the first step changes next to nothing"
    assert changes[1] > changes[0]


@pytest.mark.parametrize("settings", [*({"kind": kind} for kind in adapters.KINDS), {"init": "orthogonal"}])
def test_the_same_seed_gives_the_same_start_in_every_precision(settings: dict[str, Any]) -> None:
    base = Base.find(Model(path=str(bases.sd())))
    starts = []
    for dtype in (torch.float32, torch.bfloat16):
        unet = base.load("unet", dtype)
        adapters.attach(unet, AdapterSettings(rank=4, **settings), "denoiser", 3)
        assert {parameter.dtype for parameter in adapters.trainable(unet).values()} == {torch.float32}
        starts.append(adapters.collect(unet).tensors)
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", adapters.KINDS)
def test_the_same_seed_gives_the_same_start_to_a_base_on_a_gpu(kind: str) -> None:
    """A GPU's generator would draw other numbers, and is not seeded."""
    starts = []
    for device in ("cpu", "cuda"):
        unet = Base.find(Model(path=str(bases.sd()))).load("unet").to(device)
        adapters.attach(unet, AdapterSettings(kind=kind, rank=4), "denoiser", 3)
        starts.append(adapters.collect(unet).tensors)
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 2.0), ({"rslora": True}, 4.0), ({"alpha": 3}, 0.75), ({"dora": True}, 2.0),
     ({"init": "kaiming"}, 2.0), ({"init": "orthogonal"}, 2.0)],
    ids=str,
)  # fmt: skip
def test_lora_options(settings: dict[str, Any], scale: float) -> None:
    unet = Base.find(Model(path=str(bases.sd()))).load("unet")
    adapters.attach(unet, Adapter(**{"rank": 4, "alpha": 8, **settings}), "denoiser", 0)
    layers = [layer for layer in unet.modules() if isinstance(layer, adapters.LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {scale}
    magnitudes = [name for name in adapters.trainable(unet) if "magnitude" in name]
    assert bool(magnitudes) == settings.get("dora", False)


RANKS = {"mid_block.*to_[qk]": 6, "attn1.to_q": 1, "to_v": 3}  # the first that fits counts


@pytest.mark.parametrize("kind", adapters.KINDS)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_ranks_by_module_and_alpha_follows(kind: Any, alpha: float | None) -> None:
    unet = Base.find(Model(path=str(bases.sd()))).load("unet")
    adapters.attach(unet, Adapter(kind=kind, rank=2, alpha=alpha, ranks=RANKS), "denoiser", 0)
    config = adapters.collect(unet).config
    found = {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in unet.named_modules()
        if isinstance(layer, adapters.KINDS[kind].layer)
    }
    for name, (rank, scale) in found.items():
        wanted = next(
            (rank for pattern, rank in RANKS.items() if re.fullmatch(f"(.*\\.)?{pattern}", name)), 2
        )
        assert (rank, scale) == (wanted, (alpha or wanted) / wanted) == strength(config, name)
    assert {rank for rank, _ in found.values()} == {1, 2, 3, 6}
    check_patterns(config)  # so that other programs' users, and we, may read it


def test_a_module_that_is_none_is_named() -> None:
    unet = Base.find(Model(path=str(bases.sd()))).load("unet")
    for ranks, told in (
        ({"to_w": 2}, r"^adapter\.ranks: 'to_w' fits no module with an adapter; did you mean '.*to_.*'\?$"),
        ({"mid_block": 2}, "'mid_block' fits no module"),  # but mid_block.* does
        ({"ff.net.2": 2}, "'ff.net.2' fits no module"),  # it has no adapter
        ({"(": 2}, "not a valid regular expression"),
    ):
        with pytest.raises(ConfigError, match=told):
            adapters.attach(unet, Adapter(ranks=ranks), "denoiser", 0)
    with pytest.raises(ConfigError, match=r"optim\.lrs: 'unet\.b' fits no module .* mean 'unet\.a'"):
        optim.build(
            {"unet.a.lora_A.default.weight": nn.Parameter(torch.zeros(1))}, Optim(lrs={"unet.b": 2.0})
        )


def test_tables_come_from_the_command_line(make: Make) -> None:
    cfg = make(adapter__ranks={"to_q": 8})
    changed = cfg.override('adapter.ranks={"mid_block\\\\..*": 2}', "optim.lrs={unet.up_.*: 0.5, to_q: 2}")
    assert changed.adapter.ranks == {r"mid_block\..*": 2}, "it replaces the table of the config"
    assert changed.optim.lrs == {"unet.up_.*": 0.5, "to_q": 2.0}
    assert changed.override("adapter.ranks=null").adapter.ranks == {}
    with pytest.raises(ConfigError, match=r"adapter\.ranks is 0: .*greater than or equal to 1"):
        cfg.override("adapter.ranks={to_q: 0}")


def test_learning_rates_of_text_encoders_of_lora_plus_and_of_modules() -> None:
    parameters = {
        name: nn.Parameter(torch.zeros(1))
        for name in ("unet.a.lora_A.default.weight", "unet.a.lora_B.default.weight",
                     "text_encoder_2.a.lora_A.default.weight", "text_encoder.a.lora_B.default.weight",
                     "unet.b.a.lora_A.default.weight", "unet.b.c.lora_magnitude_vector.default.weight")
    }  # fmt: skip
    lrs = {"unet\\.b.*": 3.0, "b.c": 9.0, "text_encoder.*": 0.5}
    optimizer = optim.build(parameters, Optim(lr=1e-3, text_encoder_lr=1e-4, lora_plus_ratio=16, lrs=lrs))
    optim.set_lr(optimizer, 5e-4)  # half of the peak
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = [found[id(p)] for p in parameters.values()]
    assert rates == pytest.approx([5e-4, 8e-3, 2.5e-5, 4e-4, 1.5e-3, 1.5e-3])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "loha", "dora": True}, "dora: not available for kind 'loha'"),
        ({"kind": "lora", "rank_dropout": 0.1}, "rank_dropout: not available for kind 'lora'"),
        ({"kind": "loha", "decompose_both": True}, "decompose_both: not available for kind 'loha'"),
        ({"init": "pissa"}, "init"),
        ({"targets": []}, "targets is empty"),
    ],
    ids=str,
)
def test_options_of_another_kind_are_refused(make: Make, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make(**{f"adapter__{key}": value for key, value in settings.items()})


@pytest.fixture
def run(make: Make) -> tuple[Config, Path]:
    cfg = make(train__steps=1)
    prepare(cfg)
    return cfg, train(cfg)


def test_trained_biases_are_kept_by_peft_s_format_and_taken_off_again(make: Make, tmp_path: Path) -> None:
    cfg = make(adapter__bias="all", train__steps=2, optim__lr=0.01)
    prepare(cfg)
    run = train(cfg)
    tensors = load_file(run / "export" / "unet" / peft_folder.WEIGHTS)
    base = Base.find(cfg.model).load("unet").state_dict()
    changed = [name for name, tensor in tensors.items() if name.endswith("conv_in.bias")
               and not torch.equal(tensor, base["conv_in.bias"])]  # fmt: skip
    assert changed
    with pytest.raises(ConfigError, match="diffusers cannot store trained biases; use peft"):
        (run / "DONE").unlink()
        train(make(adapter__bias="all", train__steps=2, optim__lr=0.01, export__formats=["diffusers"]))
    pipe = AdapterPipeline.load(cfg.model)
    plain = pipe.pipe.unet.conv_in.bias.detach().clone()
    pipe.add("dog", run)
    pipe.use({"dog": 1.0})
    want = next(tensor for name, tensor in tensors.items() if name.endswith("conv_in.bias"))
    torch.testing.assert_close(pipe.pipe.unet.conv_in.bias, want)
    pipe.use({})
    assert torch.equal(pipe.pipe.unet.conv_in.bias, plain)


def test_a_pipeline_takes_a_path_a_name_and_a_seed(run: tuple[Config, Path]) -> None:
    cfg, folder = run
    pipe = AdapterPipeline.load(Path(cfg.model.path))
    pipe.add("dog", folder)
    pipe.use("dog")
    assert pipe.scales == {"dog": 1.0}
    (one,) = pipe.generate("a photo of sks dog", seeds=3, steps=1, side=64)
    (same,) = pipe.generate("a photo of sks dog", seeds=[3], steps=1, side=64)
    assert one.tobytes() == same.tobytes()
    with pytest.raises(ConfigError, match="there is no adapter 'dogs'; choose from \\['dog'\\]"):
        pipe.use("dogs")


def test_adapters_of_different_kinds_and_formats_mix_merge_swap_and_leave(make: Make, tmp_path: Path) -> None:
    runs = {}
    for kind, form in (("lora", "diffusers"), ("loha", "peft"), ("lokr", "kohya")):
        cfg = make(run_dir=str(tmp_path / kind), adapter__kind=kind, train__steps=2, optim__lr=0.02,
                   export__formats=[form])  # fmt: skip
        prepare(cfg)
        runs[kind] = train(cfg)
    pipe = AdapterPipeline.load(cfg.model)
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([400]), torch.randn(1, 32, 64)

    def seen(**scales: float) -> torch.Tensor:
        pipe.use(scales)
        with torch.no_grad():
            return pipe.pipe.unet(x, t, c).sample

    bare = seen()
    for kind, path in runs.items():
        pipe.add(kind, path)
    alone = {kind: seen(**{kind: 1.0}) for kind in runs}
    assert all((value - bare).abs().max() > 1e-4 for value in alone.values())
    assert torch.equal(seen(), bare)
    half = seen(lora=0.5)
    assert 0 < (half - bare).abs().max() < (alone["lora"] - bare).abs().max()
    together = seen(lora=0.7, loha=0.5, lokr=1.0)
    pipe.merge()
    with torch.no_grad():
        torch.testing.assert_close(pipe.pipe.unet(x, t, c).sample, together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen(), bare, atol=1e-5, rtol=1e-4)
    size = sum(p.numel() for p in pipe.pipe.unet.parameters())
    pipe.remove("loha")
    assert sum(p.numel() for p in pipe.pipe.unet.parameters()) < size
    torch.testing.assert_close(seen(lora=1.0), alone["lora"], atol=1e-5, rtol=1e-4)
    other = make(run_dir=str(tmp_path / "other"), train__steps=2, optim__lr=0.02, seed=1)
    prepare(other)
    places = [p.data_ptr() for n, p in pipe.pipe.unet.named_parameters() if ".lora." in n]
    pipe.swap("lora", train(other))
    assert places == [p.data_ptr() for n, p in pipe.pipe.unet.named_parameters() if ".lora." in n]
    assert (seen(lora=1.0) - alone["lora"]).abs().max() > 1e-4
    pipe.use({"lora": 1.0})
    pipe.merge()
    pipe.swap("lora", runs["lora"])  # while the old one is merged
    torch.testing.assert_close(seen(lora=1.0), alone["lora"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen(), bare, atol=1e-5, rtol=1e-4)
    pipe.swap("lora", runs["lokr"])  # another kind: taken off, and the new one put on
    torch.testing.assert_close(seen(lora=1.0), alone["lokr"], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_swap_compiles_nothing_anew(make: Make, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    runs = []
    for seed in (0, 1):
        cfg = make(run_dir=str(tmp_path / f"run{seed}"), seed=seed, train__steps=1, optim__lr=0.02,
                   adapter__targets=r"mid_block.*to_q")  # fmt: skip
        prepare(cfg)
        runs.append(train(cfg))
    pipe = AdapterPipeline.load(cfg.model)
    pipe.add("dog", runs[0])
    pipe.use({"dog": 1.0})
    pipe.pipe.unet.compile(backend="eager")
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([400]), torch.randn(1, 32, 64)
    with torch.no_grad():
        first = pipe.pipe.unet(x, t, c).sample
        graphs = counters["stats"]["unique_graphs"]
        assert graphs
        pipe.swap("dog", runs[1])
        second = pipe.pipe.unet(x, t, c).sample
    assert counters["stats"]["unique_graphs"] == graphs
    assert (first - second).abs().max() > 1e-6


class Harm:
    """Pickles that would write a file if they were loaded."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


@pytest.mark.slow
def test_files_that_are_no_adapter_of_this_base(run: tuple[Config, Path], tmp_path: Path) -> None:
    cfg, folder = run
    tensors = load_file(folder / "export" / FILE)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "truncated.safetensors").write_bytes((folder / "export" / FILE).read_bytes()[:-100])
    (broken / "a.bin").write_bytes(pickle.dumps(Harm()))
    (broken / "b.safetensors").write_bytes(pickle.dumps(Harm()))
    save_file({"transformer.layer.weight": torch.zeros(2)}, broken / "layout.safetensors")
    strange = dict(tensors)
    strange["unet.nowhere.to_q.lora.down.weight"] = torch.zeros(4, 8)
    save_file(strange, broken / "strange.safetensors")
    mixed = dict(tensors)
    name = next(name for name in mixed if name.endswith("lora.down.weight"))
    mixed[name] = mixed[name][:2].contiguous()
    save_file(mixed, broken / "mixed.safetensors")
    (broken / "empty").mkdir()
    strange_kind = shutil.copytree(sorted((folder / "checkpoints").iterdir())[-1] / "unet", broken / "kind")
    text = (strange_kind / peft_folder.CONFIG).read_text()
    (strange_kind / peft_folder.CONFIG).write_text(text.replace('"LORA"', '"IA3"'))
    no_rank = shutil.copytree(strange_kind, broken / "no-rank")
    (no_rank / peft_folder.CONFIG).write_text(text.replace('"r": 4', '"r": null'))
    small = {key: t[:, :8].contiguous() if key.endswith("down.weight") else t for key, t in tensors.items()}
    save_file(small, broken / "narrow.safetensors")
    pipe = AdapterPipeline.load(cfg.model)
    pipe.add("good", folder)
    pipe.use({"good": 0.5})
    for name, told in {
        "kind": "of the kind IA3", "no-rank": "settings are damaged", "narrow.safetensors": "does not fit",
        "truncated.safetensors": "not a safetensors file", "a.bin": "pickle", "b.safetensors": "not a safe",
        "layout.safetensors": "matches no format", "strange.safetensors": "no module 'nowhere.to_q'",
        "mixed.safetensors": "does not fit the base", "empty": "neither a file nor a run folder",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            pipe.add("it", broken / name)
    assert not Path("canary").exists()
    assert pipe.names() == {"good"} and pipe.scales == {"good": 0.5}, "what was in use stays in use"


def test_an_adapter_for_another_family_is_refused(
    run: tuple[Config, Path], make: Make, tmp_path: Path
) -> None:
    cfg, folder = run
    states = formats.read(folder / "export" / FILE, families.get("sd"), Base.find(cfg.model).skeleton)
    formats.write("kohya", tmp_path / "k", families.get("sd"), states)
    pipe = AdapterPipeline.load(Model(path=str(bases.if_1())))
    for path in (folder, tmp_path / "k" / "kohya.safetensors"):
        with pytest.raises(ConfigError, match="adapter"):
            pipe.add("dog", path)
    with pytest.raises(ConfigError, match="kohya cannot store an adapter of the unet of a deepfloyd model"):
        formats.check("kohya", families.get("deepfloyd"), states)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(matched(), indent=1) + "\n")
